//! What a solve asks of its weight and its groups.

use crate::device::GridRule;
use crate::quantize::settings::SolverSettings;
use crate::tensor::Matrix;
use anyhow::{Result, bail, ensure};

/// How a layer's ranges become grids.
pub(crate) fn rule_of(settings: &SolverSettings) -> GridRule {
    GridRule {
        bits: settings.bits,
        symmetric: settings.symmetric,
        grid: settings.grid,
        scale_type: settings.scale_type,
        smallest_zero: settings.smallest_zero,
    }
}

/// Columns of a group, which must divide the layer's.
pub(super) fn checked_group(settings: &SolverSettings, features: usize) -> Result<usize> {
    let group = settings.group_columns(features);
    ensure!(features > 0, "a layer without inputs cannot be quantized");
    if !features.is_multiple_of(group) {
        let works: Vec<String> =
            [32, 64, 128, 256].iter().filter(|&&size| features.is_multiple_of(size)).map(ToString::to_string).collect();
        let works = if works.is_empty() { "none".into() } else { format!("{} and none", works.join(", ")) };
        bail!("{features} input features are not divisible by the group size {group}; sizes that work: {works}");
    }
    Ok(group)
}

pub(super) fn check_shape((rows, cols): (usize, usize), features: usize) -> Result<()> {
    ensure!(cols == features, "the weight has {cols} columns, the statistics {features} inputs");
    ensure!(rows > 0, "the weight has no rows");
    Ok(())
}

pub(super) fn check_finite(weight: &Matrix) -> Result<()> {
    if let Some((row, column)) = weight.first_non_finite() {
        bail!("weight [{row}, {column}] is {}, not a finite number", weight.row(row)[column]);
    }
    Ok(())
}
