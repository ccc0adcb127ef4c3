//! `vlmq-run verify`.

use crate::args::VerifyArgs;
use crate::progress::Screen;
use crate::{json_file, print_lines, text};
use anyhow::{Result, bail};
use vlmq::progress::Stop;
use vlmq::run::verify::{self, Verification};

/// Differences that are printed; all are in `--json`.
const SHOWN: usize = 20;
/// Layers of the largest errors that are printed.
const WORST: usize = 5;

pub(crate) fn run(args: &VerifyArgs, screen: &Screen) -> Result<()> {
    let found = verify::run(&args.out, &args.against, &mut screen.observer(Stop::default()))?;
    if let Some(path) = &args.json {
        json_file::write_json(path, &found)?;
    }
    print_lines(&describe(&found))?;
    match found.differences.len() {
        0 => Ok(()),
        count => {
            let s = if count == 1 { "" } else { "s" };
            bail!("{} does not verify against {}: {count} difference{s}", args.out.display(), args.against.display())
        }
    }
}

fn describe(found: &Verification) -> Vec<String> {
    let mut lines: Vec<String> = found.differences.iter().take(SHOWN).cloned().collect();
    if found.differences.len() > SHOWN {
        lines.push(format!("and {} more differences", found.differences.len() - SHOWN));
    }
    let layers = found.layers.len();
    let sound = if found.differences.is_empty() { ", all as they were written" } else { "" };
    lines.push(format!("compared {} files, {} tensors, {layers} quantized layers{sound}", found.files, found.tensors));
    let mut worst: Vec<_> = found.layers.iter().filter_map(|layer| Some((layer.weight_error?, &layer.name))).collect();
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut rows = vec![["largest errors of weights", "relative"].map(str::to_owned).to_vec()];
    rows.extend(worst.iter().take(WORST).map(|(error, name)| vec![(*name).clone(), format!("{error:.3e}")]));
    if rows.len() > 1 {
        lines.extend(text::table(&rows));
        lines.push("(in the Frobenius norm; errors of outputs cannot be computed without the calibration data)".into());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::run::verify::LayerCheck;

    #[test]
    fn differences_come_first_and_are_counted() {
        let layer = |number: u8| LayerCheck {
            name: format!("layers.{number}"),
            weight_error: (number > 0).then(|| f64::from(number) / 100.0),
            recorded: None,
        };
        let mut found = Verification {
            files: 3,
            tensors: 40,
            layers: (0..8).map(layer).collect(),
            differences: (0..22).map(|number| format!("difference {number}")).collect(),
        };
        let lines = describe(&found);
        assert_eq!(
            lines[19..22],
            ["difference 19", "and 2 more differences", "compared 3 files, 40 tensors, 8 quantized layers"]
        );
        assert_eq!(lines[23], "layers.7                   7.000e-2");
        assert_eq!(lines.len(), 23 + WORST + 1);
        found.differences.clear();
        assert_eq!(describe(&found)[0], "compared 3 files, 40 tensors, 8 quantized layers, all as they were written");
    }
}
