//! `vlmq-run eval`.

use crate::args::EvalArgs;
use crate::progress::Screen;
use crate::{print_lines, text};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use vlmq::device::ModelOps;
use vlmq::evaluate::{self, Evaluation};
use vlmq::progress::Stop;

pub(crate) fn run<D: ModelOps>(device: &D, args: &EvalArgs, screen: &Screen) -> Result<()> {
    let evaluation = evaluate::run(device, &args.settings(), &mut screen.observer(Stop::default()))?;
    if let Some(path) = &args.json {
        write_json(path, &evaluation)?;
    }
    print_lines(&scores(&evaluation))
}

/// A score between 0 and 1 as people quote it.
pub(crate) fn percent(score: f64) -> String {
    format!("{:.2}%", 100.0 * score)
}

fn scores(evaluation: &Evaluation) -> Vec<String> {
    let row = |name: &str, n: usize, score, nll, kl| {
        vec![name.to_owned(), n.to_string(), percent(score), text::optional(nll), text::optional(kl)]
    };
    let mut rows = vec![["", "n", "score", "nll", "kl"].map(str::to_owned).to_vec()];
    rows.extend(evaluation.groups.iter().map(|(name, group)| row(name, group.n, group.score, group.nll, group.kl)));
    rows.push(row("total", evaluation.n, evaluation.score, evaluation.nll, evaluation.kl));
    let mut lines = text::table(&rows);
    let conditions = &evaluation.conditions;
    if let (Some(preset), Some(points)) = (conditions.preset, evaluation.points) {
        lines.push(format!("{}: {points} points of {}", preset.name, evaluation.n));
    }
    if let (Some(min), Some(max)) = (conditions.min_pixels, conditions.max_pixels) {
        lines.push(format!("images of {min} to {max} pixels"));
    }
    lines
}

/// Refuses a file that could not be written, before the work rather than after it.
pub(crate) fn check_target(path: &Path) -> Result<()> {
    ensure!(!path.is_dir(), "--json {}: is a folder; give the name of a file", path.display());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(parent.is_dir(), "--json {}: the folder {} does not exist", path.display(), parent.display());
    Ok(())
}

/// Writes beside the target and renames, so that a full disk leaves no half file under the target's name. Pipes and devices
/// are written as they are: a rename would put a plain file in their place.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let cannot_write = || format!("--json {}: cannot write", path.display());
    let text = serde_json::to_string_pretty(value)? + "\n";
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        let mut file = std::fs::OpenOptions::new().write(true).open(path).with_context(cannot_write)?;
        return file.write_all(text.as_bytes()).with_context(cannot_write);
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written.with_context(cannot_write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::evaluate::SampleResult;

    fn evaluation() -> Evaluation {
        let sample = |group: &str, score, kl| SampleResult {
            id: "s".into(),
            group: Some(group.into()),
            answer: "5".into(),
            score,
            answer_tokens: 1,
            nll: 0.25,
            kl,
            ..SampleResult::default()
        };
        Evaluation::new(vec![sample("count", 1.0, None), sample("read", 0.0, None)])
    }

    #[test]
    fn scores_by_group_and_in_total() {
        let expected = "       n    score     nll  kl
count  1  100.00%  0.2500   -
read   1    0.00%  0.2500   -
total  2   50.00%  0.2500   -";
        assert_eq!(scores(&evaluation()).join("\n"), expected);
    }

    #[test]
    fn json_files_replace_older_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.json");
        std::fs::write(&path, "old").unwrap();
        write_json(&path, &evaluation()).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((&value["n"], &value["kl"]), (&2.into(), &serde_json::Value::Null));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    /// Through a link, so that a mistake replaces the link and not the device.
    #[cfg(target_os = "linux")]
    #[test]
    fn devices_stay_devices() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("full");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        let error = write_json(&link, &evaluation()).unwrap_err();
        assert!(format!("{error:#}").contains("cannot write"), "{error:#}");
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn impossible_targets_are_refused_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_target(folder.path()).is_err());
        assert!(check_target(&folder.path().join("none/scores.json")).is_err());
        assert!(check_target(&folder.path().join("scores.json")).is_ok());
        assert!(check_target(Path::new("scores.json")).is_ok());
    }
}
