//! Everything that the run was told and what it read.

use super::super::{CalibrationCounts, RunReport};
use crate::checkpoint::formats::Loader;
use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

#[derive(Serialize)]
pub(super) struct SettingsView<'a> {
    settings: Vec<Pair>,
    vlmq_version: &'a str,
    commit: &'a str,
    model: &'a str,
    calibration: &'a CalibrationCounts,
    inputs: Vec<Pair>,
    loaders: &'a [Loader],
}

/// A name and its value, if it has one.
type Pair = (String, Option<String>);

pub(super) fn view(report: &RunReport) -> Result<SettingsView<'_>> {
    let provenance = &report.provenance;
    let (mut settings, mut inputs) = (Vec::new(), Vec::new());
    flatten(&serde_json::to_value(&provenance.settings)?, "", &mut settings);
    flatten(&serde_json::to_value(&provenance.inputs)?, "", &mut inputs);
    Ok(SettingsView {
        settings,
        vlmq_version: &provenance.vlmq_version,
        commit: &provenance.commit,
        model: &provenance.model,
        calibration: &report.calibration,
        inputs,
        loaders: &report.loaders,
    })
}

/// Pairs for everything inside a JSON value, keys joined by points.
fn flatten(value: &Value, name: &str, pairs: &mut Vec<Pair>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                // Names of files have points of their own: below the first level they stand alone.
                flatten(value, &if name.is_empty() { key.clone() } else { format!("{name} · {key}") }, pairs);
            }
        }
        Value::Null => pairs.push((name.into(), None)),
        Value::String(text) => pairs.push((name.into(), Some(text.clone()))),
        other => pairs.push((name.into(), Some(other.to_string()))),
    }
}
