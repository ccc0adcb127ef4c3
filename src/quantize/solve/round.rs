//! Round to nearest: without statistics, and what the other solvers are held against.

use super::assembly::Assembly;
use super::checks::{check_finite, check_shape, checked_group, rule_of};
use crate::codes::QuantizedLinear;
use crate::device::cpu::Cpu;
use crate::device::{ColumnBlock, ScaleMisfit, SolveOps, SolveState};
use crate::quantize::settings::SolverSettings;
use crate::quantize::{Finding, FindingKind, SolveReport};
use crate::tensor::Matrix;
use anyhow::{Result, anyhow};
use std::ops::Range;
use std::time::Instant;

/// Rounds `weight` `[out, in]` to the nearest codes, group by group: the floor that everything is compared with. Only
/// the grid settings and the group size count. The report's error is in the Frobenius norm.
///
/// Errors as [`solve`](super::solve) does.
pub fn round_to_nearest(weight: &Matrix, settings: &SolverSettings) -> Result<(QuantizedLinear, SolveReport)> {
    let start = Instant::now();
    settings.validate()?;
    let features = weight.cols();
    check_shape((weight.rows(), features), features)?;
    check_finite(weight)?;
    let group = checked_group(settings, features)?;
    let order: Vec<u32> = (0..features as u32).collect();
    let rule = rule_of(settings);
    // No product is made, so there is nothing for another device to be faster at.
    let weight_norm = Cpu.squared_norm(weight)?;
    let mut state =
        SolveState { residual: weight.clone(), carried: None, shift: None, error: Matrix::default(), cross: None };
    let mut out = Assembly::new(weight.rows(), group, &order, settings);
    let mut codes = Vec::new();
    let groups: Vec<Range<usize>> = (0..features).step_by(group).map(|first| first..first + group).collect();
    for columns in &groups {
        let columns = columns.clone();
        let job = ColumnBlock { columns, span: 0, group, grid: None, rule, factor: None, cross: None };
        Cpu.quantize_block(&job, &mut state, &mut codes).map_err(|error| with_largest(error, weight))?;
    }
    let error = codes.iter().map(|block| block.error).sum::<f64>();
    out.place(&groups.into_iter().zip(codes).collect::<Vec<_>>());
    let report = SolveReport {
        relative_error: if error == 0.0 { 0.0 } else { error / weight_norm },
        damp: None,
        dead_inputs: 0,
        tokens: 0,
        effective_tokens: None,
        seconds: start.elapsed().as_secs_f64(),
        findings: small_scales(&out.linear, settings).into_iter().collect(),
    };
    Ok((out.linear, report))
}

/// Bytes of host memory that [rounding](round_to_nearest) a layer takes: its weights brought over and their residuals, the codes by groups
/// and as they are put together.
pub fn rounding_bytes(rows: usize, cols: usize) -> u64 {
    rows as u64 * cols as u64 * (2 * size_of::<f32>() as u64 + 2)
}

/// The finding of scales that stand at the smallest value of their type, which a scale becomes that is smaller still: the codes of such
/// a group are too coarse, whatever they are.
pub(super) fn small_scales(linear: &QuantizedLinear, settings: &SolverSettings) -> Option<Finding> {
    let smallest = settings.scale_type.smallest();
    let stuck = linear.scales.iter().filter(|&&scale| scale == smallest).count();
    (stuck > 0).then(|| {
        let (all, kind) = (linear.scales.len(), settings.scale_type);
        let found = format!("{stuck} of {all} scales stand at {smallest:e}, the smallest of {kind:?}");
        Finding::new(FindingKind::ScalesTooSmall, found, "kept as they are")
    })
}

/// Says how large the weights are whose scale does not fit.
fn with_largest(error: anyhow::Error, weight: &Matrix) -> anyhow::Error {
    let Some(misfit) = error.downcast_ref::<ScaleMisfit>() else { return error };
    let largest = weight.row(misfit.row).iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
    anyhow!("{misfit}: the row's largest weight is {largest:e}; use more bits, or a format with wider scales")
}
