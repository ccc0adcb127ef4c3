//! Quantized layers: what the format allows, and how far they are from the float weights.

use super::{Check, LayerCheck, Written};
use crate::checkpoint::formats::LinearSpec;
use crate::checkpoint::{Checkpoint, weight_error};
use crate::codes::QuantizedLinear;
use crate::parallel::map;
use crate::progress::{Observer, Stage, StageClock};
use anyhow::Result;
use std::collections::BTreeMap;

/// Weights of the layers that are worked on together: about 5 bytes each, codes and packed words twice, 320 MiB in all.
/// A larger layer goes alone.
const TOGETHER: usize = 1 << 26;

impl Check<'_> {
    pub(super) fn layers(
        &mut self,
        written: &Written<'_>,
        recorded: &BTreeMap<&str, f64>,
        observer: &mut dyn Observer,
    ) {
        let linears = written.linears;
        let clock = StageClock::start(Stage::Verify, linears.len() as u64, observer);
        let model = &self.model;
        let mut done = Vec::with_capacity(linears.len());
        while done.len() < linears.len() {
            let rest = &linears[done.len()..];
            let mut weights = 0;
            let fits = |linear: &&LinearSpec| {
                weights += linear.out_features * linear.in_features;
                weights <= TOGETHER
            };
            let count = rest.iter().take_while(fits).count().max(1);
            done.extend(map(count, |i| layer(model, written, &rest[i])));
            observer.stage_advanced(Stage::Verify, done.len() as u64, &rest[count - 1].module);
        }
        for (linear, (error, mut wrong)) in linears.iter().zip(done) {
            let name = linear.module.clone();
            let recorded = recorded.get(name.as_str()).copied();
            match (error, recorded) {
                (_, None) => wrong.push("is not in report.json".to_owned()),
                // To the bit: the same sums in the same order.
                (Some(error), Some(recorded)) if error != recorded => {
                    wrong.push(format!("has a relative error of weights of {error:e}, recorded is {recorded:e}"));
                }
                _ => {}
            }
            if !wrong.is_empty() {
                self.differ(format!("the layer {name} {}", wrong.join("; it ")));
            }
            self.found.layers.push(LayerCheck { name, weight_error: error, recorded });
        }
        clock.finish(observer);
    }
}

/// A layer's error, and what is wrong with it.
fn layer(model: &Checkpoint, written: &Written<'_>, linear: &LinearSpec) -> (Option<f64>, Vec<String>) {
    let mut wrong = Vec::new();
    let error = try_layer(model, written, linear, &mut wrong);
    let error = error.map_err(|error| wrong.push(format!("cannot be read: {error:#}"))).ok();
    (error, wrong)
}

fn try_layer(model: &Checkpoint, written: &Written<'_>, linear: &LinearSpec, wrong: &mut Vec<String>) -> Result<f64> {
    let &Written { ref copy, format, solver, .. } = written;
    let name = format!("{}.weight", linear.module);
    let weight = model.tensor(&name)?;
    if format.codes().is_none() {
        copy.check_finite(&name)?;
        return weight_error::of_tensor(weight, copy.tensor(&name)?);
    }
    let mut layer = copy.packed(&linear.module, linear.out_features, linear.in_features)?;
    if solver.has_group_index() && layer.group_index.is_none() {
        // An order that happens to be that of the columns.
        layer.group_index = Some((0..layer.in_features).map(|column| layer.group_of(column) as u32).collect());
    }
    if let Some(scale) = layer.scales.iter().find(|scale| **scale <= 0.0) {
        wrong.push(format!("has a scale of {scale}, which is not positive"));
    }
    if let Some(group) = uneven_group(&layer) {
        wrong.push(format!("has a group {group} that is not of {} columns", layer.group_columns));
    }
    // What the codes leave of the words is zeros, and nothing is stored that they do not say: packed again they are the file.
    let layout = solver.layout();
    let stored = format.specs(linear, &layout);
    for (spec, bytes) in stored.iter().zip(format.encode(linear, &layout, &layer)?) {
        if copy.tensor(&spec.name)?.bytes != bytes {
            wrong.push(format!("has bits in {} that mean nothing", spec.name));
        }
    }
    weight_error::of_layer(format, weight, &layer)
}

/// The first group that has more or fewer columns than a group has.
fn uneven_group(layer: &QuantizedLinear) -> Option<usize> {
    let mut columns = vec![0; layer.groups()];
    layer.group_index.iter().flatten().for_each(|&group| columns[group as usize] += 1);
    let indexed = layer.group_index.is_some();
    columns.into_iter().position(|count| indexed && count != layer.group_columns)
}
