//! What runs found, one JSON object a line in a file that is only ever added to: a table that was interrupted goes on where it
//! stopped.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use vlmq::evaluate::Evaluation;

/// One run's line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// All that decides the figures: program, bed, device, settings, seed.
    pub(crate) key: Map<String, Value>,
    /// The row's name.
    pub(crate) row: String,
    /// By group of questions.
    pub(crate) groups: BTreeMap<String, Figures>,
    /// How far the paths are apart behind the last block, where there are two.
    pub(crate) path_error: Option<f64>,
    /// Layers that had something to say.
    pub(crate) findings: usize,
    /// Of quantizing and of evaluating.
    pub(crate) seconds: [f64; 2],
}

/// What is found of a group of questions, as in the evaluation's JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) n: usize,
    pub(crate) tokens: usize,
    pub(crate) nll: Option<f64>,
    pub(crate) kl: Option<f64>,
    pub(crate) agreement: Option<f64>,
}

/// The figures of every group.
pub(crate) fn figures(evaluation: &Evaluation) -> BTreeMap<String, Figures> {
    let group = |(name, found): (&String, &vlmq::evaluate::GroupResult)| {
        let vlmq::evaluate::GroupResult { n, tokens, nll, kl, agreement, .. } = *found;
        (name.clone(), Figures { n, tokens, nll, kl, agreement })
    };
    evaluation.groups.iter().map(group).collect()
}

/// Runs found so far.
pub(crate) struct Record {
    file: Option<(PathBuf, File)>,
    runs: Vec<Run>,
}

impl Record {
    /// What `path` has already; without one, runs are kept in memory.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, runs: Vec::new() }) };
        let cannot = || format!("cannot use {}", path.display());
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).with_context(cannot)?;
        file.rewind().with_context(cannot)?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(cannot)?;
        // An interrupted write leaves half a line, which must not spoil the next one.
        if !text.is_empty() && !text.ends_with('\n') {
            file.write_all(b"\n").with_context(cannot)?;
        }
        let mut runs = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match serde_json::from_str(line) {
                Ok(run) => runs.push(run),
                Err(error) => eprintln!("{}:{}: left out, not a run: {error}", path.display(), number + 1),
            }
        }
        Ok(Self { file: Some((path.to_owned(), file)), runs })
    }

    /// The run of this key.
    pub(crate) fn find(&self, key: &Map<String, Value>) -> Option<&Run> {
        self.runs.iter().find(|run| run.key == *key)
    }

    /// Keeps a run, on disk before anything else is done.
    pub(crate) fn add(&mut self, run: Run) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let line = serde_json::to_string(&run)? + "\n";
            let written = file.write_all(line.as_bytes()).and_then(|()| file.sync_data());
            written.with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.runs.push(run);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seed: u64) -> Run {
        let figures = Figures { n: 2, tokens: 9, nll: Some(0.1 + 0.2), kl: Some(1e-7), agreement: None };
        Run {
            key: [("seed".to_owned(), seed.into())].into_iter().collect(),
            row: "GPTQ".into(),
            groups: [("image".to_owned(), figures)].into(),
            path_error: None,
            findings: 1,
            seconds: [1.5, 0.25],
        }
    }

    #[test]
    fn a_file_goes_on_behind_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let mut record = Record::open(Some(&path)).unwrap();
        record.add(run(0)).unwrap();
        record.add(run(1)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();

        let mut record = Record::open(Some(&path)).unwrap();
        assert_eq!((record.find(&run(0).key), record.find(&run(1).key)), (Some(&run(0)), None));
        record.add(run(1)).unwrap();
        let record = Record::open(Some(&path)).unwrap();
        assert_eq!((record.runs.len(), record.find(&run(1).key)), (2, Some(&run(1))));
        assert!(Record::open(Some(folder.path())).is_err());
    }
}
