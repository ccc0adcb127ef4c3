//! The part of a solve that depends on the statistics alone: dead inputs, order, damping, factorization, cross term.

use super::checks::checked_group;
use crate::device::{BLOCK, CrossFactor, Factor, Factored, PermuteSymmetric, SolveOps};
use crate::quantize::finding::DEAD_SHARE;
use crate::quantize::order::{ColumnSpan, processing_order, spans};
use crate::quantize::settings::{Solver, SolverSettings};
use crate::quantize::statistics::Statistics;
use crate::quantize::{Finding, FindingKind};
use anyhow::{Context, Result, bail, ensure};
use std::time::Instant;

/// The part of a solve that depends on the statistics alone: layers that read the same inputs with the same importance
/// (gate and up; q, k and v without importance) share it.
pub struct Prepared<T> {
    pub(super) order: Vec<u32>,
    pub(super) dead: Vec<usize>,
    pub(super) tokens: usize,
    pub(super) effective_tokens: Option<f64>,
    pub(super) settings: SolverSettings,
    pub(super) findings: Vec<Finding>,
    system: Option<System<T>>,
    seconds: f64,
}

/// The factored statistics.
pub(super) struct System<T> {
    pub(super) spans: Vec<ColumnSpan>,
    pub(super) factor: Factor<T>,
    pub(super) cross: Option<CrossFactor<T>>,
    pub(super) damp: f64,
    pub(super) absolute_damp: f64,
}

impl<T> Prepared<T> {
    /// Place → original input column, in processing order.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Inputs that no calibration token excites, in original order.
    pub fn dead_inputs(&self) -> &[usize] {
        &self.dead
    }

    /// Damping λ that the factorization succeeded with; `None` where the statistics are good for nothing.
    pub fn damp(&self) -> Option<f64> {
        self.system.as_ref().map(|system| system.damp)
    }

    /// What was found of the statistics.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Wall-clock seconds that the preparation took.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    pub(super) fn system(&self) -> Result<&System<T>> {
        self.system.as_ref().with_context(|| {
            let found: Vec<&str> = self.findings.iter().map(|finding| finding.found.as_str()).collect();
            format!("these statistics cannot be solved with: {}", found.join("; "))
        })
    }
}

/// Dead inputs, order, damping, factorization and, for GPTAQ, the cross term.
///
/// The damping starts at `settings.damp` and is doubled, up to 1, until the factorization succeeds. Statistics that hold
/// a NaN or an infinity, or nothing but zeros, or that even damping 1 makes no positive definite matrix of, leave
/// [`solve_layer`](super::solve_layer) nothing but rounding to nearest; broken cross statistics are left out. All of this,
/// and tokens that weigh as much as fewer than there are inputs, is among the [`findings`](Prepared::findings).
///
/// Errors when GPTAQ finds no cross statistics, or when the group size does not divide the inputs.
pub fn prepare<D: SolveOps>(
    device: &D,
    statistics: &Statistics<D::Tensor>,
    settings: &SolverSettings,
) -> Result<Prepared<D::Tensor>> {
    let start = Instant::now();
    settings.validate()?;
    ensure!(settings.solver != Solver::Rtn, "round-to-nearest takes no statistics: call round_to_nearest");
    if settings.solver == Solver::Gptaq && statistics.cross.is_none() {
        bail!("GPTAQ needs cross statistics: accumulate the inputs of both paths");
    }
    let mut diagonal = device.diagonal(&statistics.hessian)?;
    let inputs = diagonal.len();
    let group = checked_group(settings, inputs)?;
    let mut findings = Vec::new();
    let finite = device.first_non_finite_row(&statistics.hessian)?.is_none();
    let dead: Vec<usize> = (0..inputs).filter(|&i| diagonal[i] == 0.0).collect();
    let effective_tokens = statistics.effective_tokens();
    let mut order = (0..inputs as u32).collect();
    let mut system = None;
    if !finite {
        let found = "the statistics H hold a NaN or an infinity";
        findings.push(Finding::new(FindingKind::StatisticsUnusable, found, ROUNDED));
    } else if dead.len() == inputs {
        let found = format!("no calibration token excites any of the {inputs} inputs");
        findings.push(Finding::new(FindingKind::DeadInputs, found, ROUNDED));
    } else {
        if dead.len() as f64 > DEAD_SHARE * inputs as f64 {
            let found = format!("no calibration token excites {} of the {inputs} inputs", dead.len());
            findings.push(Finding::new(FindingKind::DeadInputs, found, "their weights set to 0"));
        }
        if effective_tokens.unwrap_or(statistics.tokens as f64) < inputs as f64 {
            let tokens = statistics.tokens;
            let weigh = effective_tokens.map_or_else(String::new, |n| format!(" that weigh as much as {n:.1} alike"));
            let found = format!("{tokens} calibration tokens{weigh}, fewer than the {inputs} inputs");
            findings.push(Finding::new(FindingKind::FewTokens, found, "solved, resting on the damping"));
        }
        dead.iter().for_each(|&i| diagonal[i] = 1.0);
        order = processing_order(&diagonal, group, settings.order);
        let how = PermuteSymmetric { order: &order, diagonal: &diagonal };
        system = factored(device, statistics, settings, how, &mut findings)?;
    }
    Ok(Prepared {
        order,
        dead,
        tokens: statistics.tokens,
        effective_tokens,
        settings: settings.clone(),
        findings,
        system,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// What is done with a layer that cannot be solved.
pub(super) const ROUNDED: &str = "rounded to nearest instead";

/// What is done with a layer that GPTAQ's cross term spoils.
pub(super) const WITHOUT_CROSS: &str = "solved without the cross term, as GPTQ does";

/// Damps and factors H in the order and with the diagonal of `how`; `None` where even damping 1 does not help.
fn factored<D: SolveOps>(
    device: &D,
    statistics: &Statistics<D::Tensor>,
    settings: &SolverSettings,
    how: PermuteSymmetric<'_>,
    findings: &mut Vec<Finding>,
) -> Result<Option<System<D::Tensor>>> {
    let PermuteSymmetric { order, diagonal } = how;
    let spans = spans(order.len(), settings.group_columns(order.len()), BLOCK);
    let blocks: Vec<_> = spans.iter().flat_map(|span| span.blocks.iter().cloned()).collect();
    let mean = diagonal.iter().map(|&h| f64::from(h)).sum::<f64>() / diagonal.len() as f64;
    let mut damp = settings.damp;
    let mut first_failure = None;
    let factor = loop {
        let damped: Vec<f32> = diagonal.iter().map(|&h| (f64::from(h) + damp * mean) as f32).collect();
        let how = PermuteSymmetric { order, diagonal: &damped };
        match device.factor(device.permute_symmetric(&statistics.hessian, how)?, &blocks)? {
            Factored::Done(factor) => break factor,
            Factored::NotPositive { pivot } if damp < 1.0 => {
                first_failure.get_or_insert(order[pivot]);
                damp = (2.0 * damp).min(1.0);
            }
            Factored::NotPositive { pivot } => {
                let found = format!("H is not positive definite even with damping 1 (input {})", order[pivot]);
                findings.push(Finding::new(FindingKind::StatisticsUnusable, found, ROUNDED));
                return Ok(None);
            }
        }
    };
    if let Some(input) = first_failure {
        let found = format!("H is not positive definite with damping {} (input {input})", settings.damp);
        findings.push(Finding::new(FindingKind::DampingRaised, found, format!("damping raised to {damp}")));
    }
    let cross = match statistics.cross.as_ref().filter(|_| settings.solver == Solver::Gptaq) {
        Some(cross) if device.first_non_finite_row(cross)?.is_some() => {
            let found = "the cross statistics C hold a NaN or an infinity";
            findings.push(Finding::new(FindingKind::StatisticsUnusable, found, WITHOUT_CROSS));
            None
        }
        Some(cross) => {
            let permuted = device.permute(cross, order)?;
            Some(device.cross_factor(permuted, &factor, &blocks, settings.alpha as f32)?)
        }
        None => None,
    };
    Ok(Some(System { spans, factor, cross, damp, absolute_damp: damp * mean }))
}
