//! The solver as a library call on plain matrices, with no model around it.

use super::SolveReport;
use super::settings::{Solver, SolverSettings};
use super::solve::{prepare, round_to_nearest, solve_layer};
use super::statistics::Statistics;
use crate::codes::QuantizedLinear;
use crate::device::{LayerInputs, SolveOps};
use crate::tensor::Matrix;
use anyhow::{Result, bail, ensure};

/// What [`quantize_layer`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLayer {
    /// Codes, scales and zeros, columns in the original order.
    pub linear: QuantizedLinear,
    /// Place → input column: the order in which columns were quantized, or would have been where a finding says that the
    /// layer was rounded to nearest instead.
    pub order: Vec<u32>,
    /// Error, damping, dead inputs, tokens, seconds, findings (which are logged as warnings as well).
    pub report: SolveReport,
}

/// Quantizes one linear layer.
///
/// `weight` `[out, in]`. Of the inputs GPTAQ needs those of the float path, which the others ignore; round-to-nearest reads none at
/// all.
///
/// Errors when shapes disagree, a number is not finite, an importance factor is negative, there is no token, `f` is
/// missing for GPTAQ, or `in` is not divisible by the group size.
///
/// ```
/// use vlmq::device::{LayerInputs, cpu::Cpu};
/// use vlmq::quantize::{plain::quantize_layer, settings::SolverSettings};
/// use vlmq::tensor::Matrix;
///
/// # fn main() -> anyhow::Result<()> {
/// let wave = |rows: usize, cols: usize, step: f32| {
///     Matrix::new(rows, cols, (0..rows * cols).map(|i| (step * (i * i % 997) as f32).sin()).collect())
/// };
/// let weight = wave(8, 64, 0.37)?;
/// let inputs = wave(200, 64, 0.11)?; // as the quantized model produces them
/// let float_inputs = wave(200, 64, 0.1101)?; // as the float model does
/// let importance: Vec<f32> = (0..200).map(|token| 1.0 + (token % 3) as f32).collect();
///
/// let settings = SolverSettings { group_size: Some(32), ..SolverSettings::default() };
/// let inputs = LayerInputs { u: &inputs, f: Some(&float_inputs), g: Some(&importance) };
/// let layer = quantize_layer(&Cpu, &weight, &inputs, &settings)?;
/// assert_eq!(layer.linear.codes.len(), 8 * 64);
/// assert_eq!(layer.linear.scales.len(), 8 * 2);
/// assert!(layer.linear.codes.iter().all(|&code| code < 8));
/// assert!(layer.report.relative_error < 0.2);
/// # Ok(())
/// # }
/// ```
pub fn quantize_layer<D: SolveOps>(
    device: &D,
    weight: &Matrix,
    inputs: &LayerInputs<'_, Matrix>,
    settings: &SolverSettings,
) -> Result<QuantizedLayer> {
    let &LayerInputs { u, f, g } = inputs;
    if settings.solver == Solver::Rtn {
        let (linear, report) = round_to_nearest(weight, settings)?;
        let order = (0..weight.cols() as u32).collect();
        return Ok(QuantizedLayer { linear, order, report });
    }
    ensure!(
        u.cols() == weight.cols(),
        "the inputs have {} columns, the weight {}: both are the layer's input features",
        u.cols(),
        weight.cols()
    );
    ensure!(u.rows() > 0, "there is no calibration token: the inputs have no row");
    check_finite("inputs of the quantized path", u)?;
    let f = match settings.solver {
        Solver::Gptaq => f,
        Solver::Gptq | Solver::Rtn => None,
    };
    if let Some(f) = f {
        check_finite("inputs of the float path", f)?;
    } else if settings.solver == Solver::Gptaq {
        bail!("GPTAQ needs the inputs of the float path; pass them or choose GPTQ");
    }
    let mut statistics = Statistics::new(device, weight.cols(), f.is_some())?;
    let upload = |matrix: &Matrix| device.upload(matrix.clone());
    statistics.accumulate(device, &upload(u)?, f.map(upload).transpose()?.as_ref(), g)?;
    let prepared = prepare(device, &statistics, settings)?;
    let (linear, mut report) = solve_layer(device, &prepared, &statistics.hessian, &upload(weight)?, settings)?;
    report.seconds += prepared.seconds();
    report.findings.iter().for_each(|finding| log::warn!("{finding}"));
    Ok(QuantizedLayer { linear, order: prepared.order().to_vec(), report })
}

fn check_finite(what: &str, x: &Matrix) -> Result<()> {
    if let Some((row, column)) = x.first_non_finite() {
        bail!("{what}: value [{row}, {column}] is {}, not a finite number", x.row(row)[column]);
    }
    Ok(())
}
