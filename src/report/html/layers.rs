//! Error and damping of each layer, and what a user should know of its numbers.

use super::super::{LayerReport, RunReport};
use super::charts::{Axis, Bars, block_labels};
use super::markup::{Cell, details, error, or_dash, table};
use crate::progress::human_seconds;
use anyhow::Result;
use std::collections::BTreeMap;

/// What was found, layer by layer.
pub(super) fn findings(report: &RunReport) -> Option<String> {
    let model = report.check.iter().flat_map(|check| &check.findings);
    let model = model.map(|finding| (Cell::Text("the whole model".into()), finding));
    let layers = report
        .layers
        .iter()
        .flat_map(|layer| layer.solve.findings.iter().map(move |finding| (Cell::Code(layer.name.clone()), finding)));
    let rows: Vec<Vec<Cell>> = model
        .chain(layers)
        .map(|(what, finding)| {
            vec![
                what,
                Cell::Text(finding.kind.to_string()),
                Cell::Text(finding.found.clone()),
                Cell::Text(finding.done.clone()),
                Cell::Text(finding.kind.remedy().to_owned()),
            ]
        })
        .collect();
    Some(match rows.is_empty() {
        true => "<p>None: the numbers of all layers are sound.</p>\n".into(),
        false => table("Findings", &["of", "kind", "found", "done about it", "against it"], &rows),
    })
}

/// The last part of a layer's name: its projection.
fn projection(layer: &LayerReport) -> &str {
    layer.name.rsplit('.').next().unwrap_or(&layer.name)
}

/// A small chart for each projection, blocks along x, and the figures as a table.
pub(super) fn charts(report: &RunReport) -> Result<Option<String>> {
    let layers = &report.layers;
    if layers.is_empty() {
        return Ok(None);
    }
    let mut names: Vec<&str> = Vec::new();
    layers.iter().map(projection).for_each(|name| {
        if !names.contains(&name) {
            names.push(name);
        }
    });
    let errors = Axis::of(layers.iter().map(|layer| layer.solve.relative_error));
    let mut out = format!(
        "<p>Relative error of a layer's output on the calibration data, ‖(Ŵ−W)‖²<sub>H</sub> / ‖W‖²<sub>H</sub>, by block; \
         {}, the same in all charts.</p>\n<div class=\"charts\">\n",
        errors.describe()
    );
    let by_block = |name: &str, value: &dyn Fn(&LayerReport) -> Option<f64>| -> Vec<f64> {
        layers.iter().filter(|layer| projection(layer) == name).filter_map(value).collect()
    };
    let draw = |out: &mut String, id: &str, what: &str, axis: Axis, value: &dyn Fn(&LayerReport) -> Option<f64>| {
        for name in &names {
            let values = by_block(name, value);
            if values.is_empty() {
                continue;
            }
            let (low, high) = values.iter().fold((f64::INFINITY, 0.0), |(l, h): (f64, f64), &v| (l.min(v), h.max(v)));
            let chart = Bars {
                id: format!("{id}-{name}"),
                title: format!("{name}: {what}"),
                description: format!(
                    "{what} of {name} in {} blocks, {}: from {} to {}",
                    values.len(),
                    axis.describe(),
                    error(low),
                    error(high)
                ),
                labels: block_labels(values.len()),
                series: &[values],
                axis,
                height: 260,
            };
            *out += &chart.figure()?;
        }
        anyhow::Ok(())
    };
    draw(&mut out, "error", "relative error", errors, &|layer| Some(layer.solve.relative_error))?;
    out += "</div>\n";
    out += &path_errors(report)?;
    let damps = Axis::of(layers.iter().filter_map(|layer| layer.solve.damp));
    if layers.iter().any(|layer| layer.solve.damp.is_some()) {
        out += &format!(
            "<p>Damping that the factorization succeeded with, relative to the mean of the Hessian's diagonal; {}. In use: {}</p>\n\
             <div class=\"charts\">\n",
            damps.describe(),
            used_damps(layers)
        );
        draw(&mut out, "damp", "damping", damps, &|layer| layer.solve.damp)?;
        out += "</div>\n";
    } else {
        out += "<p>No damping: nothing was factored.</p>\n";
    }
    out += &details(&format!("All {} layers", layers.len()), &all(layers));
    Ok(Some(out))
}

/// How far the paths come apart, where both were run.
fn path_errors(report: &RunReport) -> Result<String> {
    let values: Vec<f64> = report.blocks.iter().filter_map(|block| block.path_error).collect();
    if values.is_empty() {
        return Ok(String::new());
    }
    let axis = Axis::of(values.iter().copied());
    let chart = Bars {
        id: "path-error".into(),
        title: "distance of the paths behind each block".into(),
        description: format!("{} blocks, {}", values.len(), axis.describe()),
        labels: block_labels(values.len()),
        series: &[values],
        axis,
        height: 260,
    };
    Ok(format!(
        "<p>Distance of the quantized path's activations from the float path's behind each block, relative, mean over \
         tokens; {}.</p>\n<div class=\"charts\">\n{}</div>\n",
        axis.describe(),
        chart.figure()?
    ))
}

/// How many layers have which damping.
fn used_damps(layers: &[LayerReport]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for damp in layers.iter().filter_map(|layer| layer.solve.damp) {
        *counts.entry(format!("{damp}")).or_default() += 1;
    }
    let named: Vec<String> = counts.iter().map(|(damp, count)| format!("{damp} in {count} layers")).collect();
    format!("{}.", named.join(", "))
}

fn all(layers: &[LayerReport]) -> String {
    let rows: Vec<Vec<Cell>> = layers
        .iter()
        .map(|layer| {
            let solve = &layer.solve;
            let spread = |value: &dyn Fn(&super::super::ImportanceSpread) -> f64| {
                Cell::Number(or_dash(layer.importance.as_ref(), |spread| format!("{:.3}", value(spread))))
            };
            vec![
                Cell::Code(layer.name.clone()),
                Cell::Number(format!("{} × {}", layer.rows, layer.cols)),
                Cell::Number(layer.bits.to_string()),
                Cell::Number(layer.group_columns.to_string()),
                Cell::Number(error(solve.relative_error)),
                Cell::Number(error(layer.weight_error)),
                Cell::Number(or_dash(solve.damp, |damp| damp.to_string())),
                Cell::Number(solve.dead_inputs.to_string()),
                Cell::Number(solve.tokens.to_string()),
                Cell::Number(or_dash(solve.effective_tokens, |tokens| format!("{tokens:.1}"))),
                spread(&|spread| spread.text_mean),
                spread(&|spread| spread.vision_mean),
                spread(&|spread| spread.largest),
                spread(&|spread| spread.power),
                Cell::Number(human_seconds(solve.seconds)),
            ]
        })
        .collect();
    let columns = [
        "layer",
        "out × in",
        "bits",
        "group",
        "error",
        "of weights",
        "damping",
        "dead inputs",
        "tokens",
        "effective",
        "g text",
        "g vision",
        "g largest",
        "g power",
        "time",
    ];
    table("Layers in the order in which they were quantized", &columns, &rows)
}
