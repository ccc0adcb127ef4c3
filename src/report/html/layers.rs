//! Error and damping of each layer: a small chart for each projection, blocks along x, and the figures as a table.

use super::super::{LayerReport, RunReport};
use super::charts::{Axis, Bars, Chart, block_labels};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub(super) struct LayersView<'a> {
    errors: Charts,
    /// How far the paths come apart; `None` where only one ran.
    distance: Option<Charts>,
    /// `None` where nothing was factored.
    damps: Option<Charts>,
    /// How many layers have which damping.
    used: BTreeMap<String, usize>,
    layers: &'a [LayerReport],
}

/// Charts of one scale.
#[derive(Serialize)]
struct Charts {
    scale: &'static str,
    charts: Vec<Chart>,
}

/// `None` without layers.
pub(super) fn view(report: &RunReport) -> Result<Option<LayersView<'_>>> {
    let layers = report.layers.as_slice();
    if layers.is_empty() {
        return Ok(None);
    }
    let is_damped = layers.iter().any(|layer| layer.solve.damp.is_some());
    let mut used = BTreeMap::new();
    for damp in layers.iter().filter_map(|layer| layer.solve.damp) {
        *used.entry(damp.to_string()).or_default() += 1;
    }
    Ok(Some(LayersView {
        errors: by_projection(layers, "error", "relative error", |layer| Some(layer.solve.relative_error))?,
        distance: distance(report)?,
        damps: is_damped.then(|| by_projection(layers, "damp", "damping", |layer| layer.solve.damp)).transpose()?,
        used,
        layers,
    }))
}

/// The last part of a layer's name: its projection.
fn projection(layer: &LayerReport) -> &str {
    layer.name.rsplit('.').next().unwrap_or(&layer.name)
}

/// A chart of `what` for each projection that has it.
fn by_projection(
    layers: &[LayerReport],
    id: &str,
    what: &str,
    value: impl Fn(&LayerReport) -> Option<f64> + Copy,
) -> Result<Charts> {
    let axis = Axis::of(layers.iter().filter_map(value));
    let mut projections: Vec<(&str, Vec<f64>)> = Vec::new();
    for layer in layers {
        let name = projection(layer);
        match projections.iter_mut().find(|(other, _)| *other == name) {
            Some((_, values)) => values.extend(value(layer)),
            None => projections.push((name, value(layer).into_iter().collect())),
        }
    }
    projections.retain(|(_, values)| !values.is_empty());
    let chart = |(name, values): (&str, Vec<f64>)| {
        let (low, high) = values.iter().fold((f64::INFINITY, 0.0), |(l, h): (f64, f64), &v| (l.min(v), h.max(v)));
        let (blocks, scale) = (values.len(), axis.describe());
        Bars {
            id: format!("{id}-{name}"),
            title: format!("{name}: {what}"),
            description: format!("{what} of {name} in {blocks} blocks, {scale}: from {low:.3e} to {high:.3e}"),
            labels: block_labels(blocks),
            series: &[values],
            axis,
            height: 260,
        }
        .chart()
    };
    Ok(Charts { scale: axis.describe(), charts: projections.into_iter().map(chart).collect::<Result<_>>()? })
}

/// How far the paths come apart, where both were run.
fn distance(report: &RunReport) -> Result<Option<Charts>> {
    let values: Vec<f64> = report.blocks.iter().filter_map(|block| block.path_error).collect();
    if values.is_empty() {
        return Ok(None);
    }
    let axis = Axis::of(values.iter().copied());
    let scale = axis.describe();
    let chart = Bars {
        id: "path-error".into(),
        title: "distance of the paths behind each block".into(),
        description: format!("{} blocks, {scale}", values.len()),
        labels: block_labels(values.len()),
        series: &[values],
        axis,
        height: 260,
    };
    Ok(Some(Charts { scale, charts: vec![chart.chart()?] }))
}
