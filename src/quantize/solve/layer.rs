//! One layer from its weights to a report that can be trusted: a solve, held against rounding to nearest where its error is
//! suspicious.

use super::prepare::{Prepared, ROUNDED, WITHOUT_CROSS};
use super::propagation::solve_with;
use super::round::{round_to_nearest, small_scales};
use crate::codes::QuantizedLinear;
use crate::device::{ScaleMisfit, SolveOps};
use crate::quantize::settings::SolverSettings;
use crate::quantize::{Finding, FindingKind, SolveReport};
use anyhow::Result;
use std::time::Instant;

/// Quantizes `weight` `[out, in]` with GPTQ or GPTAQ and reports on it. `hessian`: H of the statistics that `prepared`
/// was made from, undamped.
///
/// A solve must not lose to rounding to nearest by much. Where its relative error is more than rounding costs Gaussian
/// weights, that of rounding these weights is measured in the same norm. Past twice that, or where a corrected weight
/// outgrows the storage type of scales, GPTAQ's cross term is left out, and if that does not help, or for GPTQ, the layer is
/// rounded to nearest; so it is where the preparation found no statistics to solve with. Each is among the report's
/// findings, and so is an error above a half that is no worse than rounding's. GPTAQ moves weights on purpose, towards outputs that differ from their own: by α, which is granted to it.
///
/// The report's seconds are those of this call; add [`Prepared::seconds`] where the layer is the one that the
/// preparation was made for. Errors as [`solve`](super::solve) does, but for what is said above.
pub fn solve_layer<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    hessian: &D::Tensor,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<(QuantizedLinear, SolveReport)> {
    let start = Instant::now();
    let mut findings = prepared.findings.clone();
    let (linear, relative_error) = match prepared.damp() {
        Some(_) => {
            let (linear, error, finding) = solve_or_round(device, prepared, hessian, weight, settings)?;
            findings.extend(finding);
            (linear, error)
        }
        None => {
            let (linear, report) = round_to_nearest(&device.download(weight)?, settings)?;
            (linear, report.relative_error)
        }
    };
    findings.extend(small_scales(&linear, settings));
    let report = SolveReport {
        relative_error,
        damp: prepared.damp(),
        dead_inputs: prepared.dead.len(),
        tokens: prepared.tokens,
        effective_tokens: prepared.effective_tokens,
        seconds: start.elapsed().as_secs_f64(),
        findings,
    };
    Ok((linear, report))
}

/// Past so many times the error of rounding to nearest a solve has failed. On the trained checkpoint of the tests no layer
/// of GPTQ or GPTAQ comes to 0.4 of it, at 2, 3, 4 or 8 bits, with 2 samples or 256, α up to 1.
const WORST: f64 = 2.0;

/// A relative error of so much is a finding even where rounding to nearest does no better: half of the layer's output is
/// lost.
const LARGE: f64 = 0.5;

/// Relative error of rounding groups of 128 Gaussian weights to nearest: their range is 5.2 standard deviations wide, and
/// steps of it, `2^bits − 1`, leave a twelfth of their square each.
fn usual_rounding_error(settings: &SolverSettings) -> f64 {
    let step = 5.2 / f64::from(settings.largest_code());
    step * step / 12.0
}

/// The layer, its relative error, and a finding where it is not the solve that was asked for.
fn solve_or_round<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    hessian: &D::Tensor,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<(QuantizedLinear, f64, Option<Finding>)> {
    let cross = prepared.system()?.cross.as_ref();
    let first = attempt(solve_with(device, prepared, weight, settings, cross))?;
    let as_it_is: Vec<u32> = (0..prepared.order.len() as u32).collect();
    let norm = device.weighted_squared_norm(&device.permute_columns(weight, &as_it_is, &[])?, hessian)?;
    // The cross term asks for α of the paths' difference, which may be as large as the outputs themselves.
    let granted = if cross.is_some() { settings.alpha * settings.alpha } else { 0.0 };
    let first = match first.map(|(linear, error)| (linear, relative(error, norm))) {
        Ok((linear, error)) if error <= (usual_rounding_error(settings) + granted).min(LARGE) => {
            return Ok((linear, error, None));
        }
        other => other,
    };

    let host = device.download(weight)?;
    let (rounded, report) = round_to_nearest(&host, settings)?;
    let mut difference = rounded.dequantize()?;
    difference.data_mut().iter_mut().zip(host.data()).for_each(|(q, w)| *q -= w);
    let floor = relative(device.weighted_squared_norm(&device.upload(difference)?, hessian)?, norm);
    // A floor that is not finite says nothing about a solve that is.
    let failed = |error: f64, granted: f64| !error.is_finite() || error > WORST * (floor + granted);
    let found = match first {
        Ok((linear, error)) if !failed(error, granted) => {
            let finding = (error > LARGE).then(|| {
                let found = format!("relative error {error:.3e}, rounding to nearest having {floor:.3e}");
                Finding::new(FindingKind::ErrorExploded, found, "kept as solved")
            });
            return Ok((linear, error, finding));
        }
        Ok((_, error)) => format!("relative error {error:.3e} where rounding to nearest has {floor:.3e}"),
        Err(misfit) => format!("corrected by other columns' errors, {misfit}"),
    };
    let finding = |done: &str| Some(Finding::new(FindingKind::ErrorExploded, found, done));
    if cross.is_some() {
        let second = attempt(solve_with(device, prepared, weight, settings, None))?;
        if let Ok((linear, error)) = second.map(|(linear, error)| (linear, relative(error, norm)))
            && !failed(error, 0.0)
        {
            return Ok((linear, error, finding(WITHOUT_CROSS)));
        }
    }
    let error = if floor.is_finite() { floor } else { report.relative_error };
    Ok((rounded, error, finding(ROUNDED)))
}

/// The layer with its error, or the scale that had no room; other errors stay errors.
fn attempt(solved: Result<(QuantizedLinear, f64)>) -> Result<std::result::Result<(QuantizedLinear, f64), ScaleMisfit>> {
    match solved {
        Ok(solved) => Ok(Ok(solved)),
        Err(error) => Ok(Err(error.downcast()?)),
    }
}

/// `error / norm`, NaN or infinite where numbers overflow. A layer of zeros has no error.
fn relative(error: f64, norm: f64) -> f64 {
    match error {
        0.0 => 0.0,
        _ if norm.is_finite() => error / norm,
        _ => f64::NAN,
    }
}
