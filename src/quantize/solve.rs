//! The solve of one layer (method section 3): written once, over the operations of a device.

use super::order::{Span, processing_order, spans};
use super::settings::{CrossTerm, Solver, SolverSettings};
use super::statistics::Statistics;
use super::{Finding, FindingKind, QuantizedLinear, SolveReport};
use crate::device::cpu::Cpu;
use crate::device::{
    BLOCK, Block, BlockCodes, BlockShape, CrossFactor, Factor, Factored, GridRule, GroupGrid, PermuteSymmetric,
    ProductRange, SolveOps, SolveState,
};
use crate::tensor::Matrix;
use anyhow::{Result, bail, ensure};
use rayon::prelude::*;
use std::time::Instant;

/// All of a solve that depends on the statistics alone: layers that read the same inputs with the same importance
/// (gate and up; q, k and v without importance) share it.
pub struct Prepared<T> {
    order: Vec<u32>,
    dead: Vec<usize>,
    spans: Vec<Span>,
    factor: Factor<T>,
    cross: Option<CrossFactor<T>>,
    damp: f64,
    findings: Vec<Finding>,
    absolute_damp: f64,
    tokens: usize,
    seconds: f64,
    settings: SolverSettings,
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

    /// Damping λ that the factorization succeeded with.
    pub fn damp(&self) -> f64 {
        self.damp
    }

    /// Wall-clock seconds that the preparation took.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }
}

/// Dead inputs, order, damping, factorization and, for GPTAQ, the cross term.
///
/// The damping starts at `settings.damp` and is doubled, up to 1, until the factorization succeeds; every raise is
/// logged as a warning. Errors when even 1 fails, when the statistics hold a NaN or an infinity or nothing but zeros,
/// when GPTAQ finds no cross statistics, or when the group size does not divide the inputs.
pub fn prepare<D: SolveOps>(
    device: &D,
    statistics: &Statistics<D::Tensor>,
    settings: &SolverSettings,
) -> Result<Prepared<D::Tensor>> {
    let start = Instant::now();
    settings.validate()?;
    ensure!(settings.solver != Solver::Rtn, "round-to-nearest takes no statistics: call round_to_nearest");
    let mut diagonal = device.diagonal(&statistics.hessian)?;
    let group = checked_group(settings, diagonal.len())?;
    let broken = device.first_non_finite_row(&statistics.hessian)?;
    ensure!(broken.is_none(), "the statistics H hold a NaN or an infinity: check the layer's inputs");
    ensure!(diagonal.iter().any(|&h| h > 0.0), "the statistics H are all zero: no calibration token reaches the layer");
    let dead: Vec<usize> = (0..diagonal.len()).filter(|&i| diagonal[i] == 0.0).collect();
    dead.iter().for_each(|&i| diagonal[i] = 1.0);

    let order = processing_order(&diagonal, group, settings.order);
    let spans = spans(order.len(), group, BLOCK);
    let blocks: Vec<_> = spans.iter().flat_map(|span| span.blocks.iter().cloned()).collect();
    let mean = diagonal.iter().map(|&h| f64::from(h)).sum::<f64>() / diagonal.len() as f64;
    let mut damp = settings.damp;
    let factor = loop {
        let damped: Vec<f32> = diagonal.iter().map(|&h| (f64::from(h) + damp * mean) as f32).collect();
        let how = PermuteSymmetric { order: &order, diagonal: &damped };
        match device.factor(device.permute_symmetric(&statistics.hessian, how)?, &blocks)? {
            Factored::Done(factor) => break factor,
            Factored::NotPositive { pivot } if damp < 1.0 => {
                let raised = (2.0 * damp).min(1.0);
                log::warn!("H is not positive definite with damping {damp} (input {}): trying {raised}", order[pivot]);
                damp = raised;
            }
            Factored::NotPositive { pivot } => bail!(
                "H is not positive definite even with damping 1 (input {}): the statistics are broken",
                order[pivot]
            ),
        }
    };
    let mut findings = Vec::new();
    if damp > settings.damp {
        findings.push(Finding {
            kind: FindingKind::DampingRaised,
            found: format!("H is not positive definite with damping {}", settings.damp),
            done: format!("damping raised to {damp}"),
        });
    }
    let cross = match (settings.solver, &statistics.cross) {
        (Solver::Gptaq, Some(cross)) => {
            let broken = device.first_non_finite_row(cross)?;
            ensure!(
                broken.is_none(),
                "the cross statistics C hold a NaN or an infinity: check the layer's float-path inputs"
            );
            let permuted = device.permute(cross, &order)?;
            Some(device.cross_factor(permuted, &factor, &blocks, settings.alpha as f32)?)
        }
        (Solver::Gptaq, None) => bail!("GPTAQ needs cross statistics: accumulate the inputs of both paths"),
        _ => None,
    };
    Ok(Prepared {
        order,
        dead,
        spans,
        factor,
        cross,
        damp,
        findings,
        absolute_damp: damp * mean,
        tokens: statistics.tokens,
        seconds: start.elapsed().as_secs_f64(),
        settings: settings.clone(),
    })
}

/// Quantizes `weight` `[out, in]` with GPTQ or GPTAQ and reports on it. `hessian`: H of the statistics that `prepared`
/// was made from, undamped.
///
/// The report's seconds are those of this call; add [`Prepared::seconds`] where the layer is the one that the
/// preparation was made for. Errors as [`solve`] does.
pub fn solve_layer<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    hessian: &D::Tensor,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<(QuantizedLinear, SolveReport)> {
    let start = Instant::now();
    let (linear, error) = solve(device, prepared, weight, settings)?;
    let as_it_is: Vec<u32> = (0..prepared.order.len() as u32).collect();
    let norm = device.weighted_squared_norm(&device.permute_columns(weight, &as_it_is, &[])?, hessian)?;
    let report = SolveReport {
        relative_error: if error == 0.0 { 0.0 } else { error / norm },
        damp: Some(prepared.damp),
        dead_inputs: prepared.dead.len(),
        tokens: prepared.tokens,
        seconds: start.elapsed().as_secs_f64(),
        findings: prepared.findings.clone(),
    };
    Ok((linear, report))
}

/// Quantizes `weight` `[out, in]` with GPTQ or GPTAQ: the layer and its error `‖Ŵ−W‖²_H`, H undamped.
///
/// Errors when the weight has another width than the statistics or holds a NaN or an infinity, when `settings` disagree
/// with those of the preparation in anything that it depends on, or when a scale does not fit its storage type.
pub fn solve<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<(QuantizedLinear, f64)> {
    enqueue(device, prepared, weight, settings)?.finish(device, prepared, settings)
}

/// A solve that is under way on the device.
pub struct Enqueued<D: SolveOps> {
    codes: D::Codes,
    /// `[rows, in]`, W − Ŵ in processing order.
    residual: D::Tensor,
    blocks: Vec<std::ops::Range<usize>>,
}

/// The part of [`solve`] that the device does: with groups of at most [`BLOCK`] columns no step waits for the host. Errors
/// as [`solve`] does.
pub fn enqueue<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<Enqueued<D>> {
    settings.validate()?;
    let made = &prepared.settings;
    ensure!(
        (made.solver, made.group_size, made.order, made.damp, made.alpha)
            == (settings.solver, settings.group_size, settings.order, settings.damp, settings.alpha),
        "the statistics were prepared for other settings: solver, group size, order, damping and alpha must agree"
    );
    let features = prepared.order.len();
    check_shape(device.shape(weight), features)?;
    if device.first_non_finite_row(weight)?.is_some() {
        check_finite(&device.download(weight)?)?;
    }
    let (rows, _) = device.shape(weight);
    let group = settings.group_columns(features);
    let rule = rule_of(settings);
    let factor = &prepared.factor;

    let permuted = device.permute_columns(weight, &prepared.order, &prepared.dead)?;
    let first_width = prepared.spans[0].end;
    let quantized_cross = prepared.cross.is_some() && settings.cross_term == CrossTerm::Quantized;
    let mut state = SolveState {
        residual: permuted,
        carried: prepared.cross.as_ref().map(|_| device.zeros(rows, features)).transpose()?,
        shift: quantized_cross.then(|| device.zeros(rows, features)).transpose()?,
        error: device.zeros(rows, first_width)?,
        cross: prepared.cross.as_ref().map(|_| device.zeros(rows, first_width)).transpose()?,
    };
    let blocks: Vec<_> = prepared.spans.iter().flat_map(|span| span.blocks.iter().cloned()).collect();
    let shapes: Vec<BlockShape> = blocks
        .iter()
        .map(|block| BlockShape { columns: block.len(), groups: if group > BLOCK { 1 } else { block.len() / group } })
        .collect();
    let mut codes = device.room_for_codes(rows, &shapes)?;
    let whole_row = (group > BLOCK && group == features)
        .then(|| device.group_grid(&state, 0..features, rule, None, &[]))
        .transpose()?;
    for span in &prepared.spans {
        let width = span.end - span.start;
        if device.shape(&state.error).1 == width {
            device.clear(&mut state.error)?;
            state.cross.as_mut().map(|cross| device.clear(cross)).transpose()?;
        } else {
            state.error = device.zeros(rows, width)?;
            state.cross = prepared.cross.as_ref().map(|_| device.zeros(rows, width)).transpose()?;
        }
        carry(device, prepared, &mut state, 0..span.start, span.start..span.end, 0)?;
        let own_grid = (group > BLOCK && group < features)
            .then(|| device.group_grid(&state, span.start..span.end, rule, Some(factor), &span.blocks))
            .transpose()?;
        for block in &span.blocks {
            carry(device, prepared, &mut state, span.start..block.start, block.clone(), block.start - span.start)?;
            let job = Block {
                columns: block.clone(),
                span: span.start,
                group,
                grid: whole_row.as_ref().or(own_grid.as_ref()),
                rule,
                factor: Some(factor),
                cross: prepared.cross.as_ref(),
            };
            device.quantize_block(&job, &mut state, &mut codes)?;
        }
    }
    Ok(Enqueued { codes, residual: state.residual, blocks })
}

impl<D: SolveOps> Enqueued<D> {
    /// Waits and brings the codes to the host, columns in their original order. The arguments are those of the call that
    /// enqueued it.
    fn finish(
        self,
        device: &D,
        prepared: &Prepared<D::Tensor>,
        settings: &SolverSettings,
    ) -> Result<(QuantizedLinear, f64)> {
        let (rows, features) = device.shape(&self.residual);
        let mut out = Assembly::new(rows, settings.group_columns(features), &prepared.order, settings);
        let mut error = 0.0;
        for (block, codes) in self.blocks.iter().zip(device.take_codes(self.codes, &rule_of(settings))?) {
            error += codes.error;
            out.place(block, &codes);
        }
        // The factor is that of the damped matrix.
        let damping = prepared.absolute_damp * device.squared_norm(&self.residual)?;
        Ok((out.linear, (error - damping).max(0.0)))
    }
}

/// Brings `columns` of the current span up to date with the columns `done`; `target` is their place in the span.
fn carry<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    state: &mut SolveState<D::Tensor>,
    done: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    target: usize,
) -> Result<()> {
    if done.is_empty() {
        return Ok(());
    }
    let range = ProductRange { inner: done, columns, target };
    device.add_product(&mut state.error, &state.residual, &prepared.factor.root, &range)?;
    if let (Some(cross), Some(carried), Some(term)) = (&mut state.cross, &state.carried, &prepared.cross) {
        device.add_product(cross, carried, &term.scaled, &range)?;
        if let Some(shift) = &state.shift {
            device.add_product(cross, shift, &prepared.factor.root, &range)?;
        }
    }
    Ok(())
}

/// Rounds `weight` `[out, in]` to the nearest codes, group by group: the floor that everything is compared with. Only
/// the grid settings and the group size count. The report's error is in the Frobenius norm.
///
/// Errors as [`solve`] does.
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
    let mut error = 0.0;
    let mut codes = Vec::new();
    for columns in (0..features).step_by(group).map(|first| first..first + group) {
        let job = Block { columns, span: 0, group, grid: None, rule, factor: None, cross: None };
        Cpu.quantize_block(&job, &mut state, &mut codes)?;
        for codes in codes.drain(..) {
            error += codes.error;
            out.place(&job.columns, &codes);
        }
    }
    let report = SolveReport {
        relative_error: if error == 0.0 { 0.0 } else { error / weight_norm },
        damp: None,
        dead_inputs: 0,
        tokens: 0,
        seconds: start.elapsed().as_secs_f64(),
        findings: Vec::new(),
    };
    Ok((out.linear, report))
}

fn rule_of(settings: &SolverSettings) -> GridRule {
    GridRule {
        bits: settings.bits,
        symmetric: settings.symmetric,
        grid: settings.grid,
        scale_type: settings.scale_type,
        smallest_zero: settings.smallest_zero,
    }
}

/// Columns of a group, which must divide the layer's.
fn checked_group(settings: &SolverSettings, features: usize) -> Result<usize> {
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

fn check_shape((rows, cols): (usize, usize), features: usize) -> Result<()> {
    ensure!(cols == features, "the weight has {cols} columns, the statistics {features} inputs");
    ensure!(rows > 0, "the weight has no rows");
    Ok(())
}

fn check_finite(weight: &Matrix) -> Result<()> {
    if let Some((row, column)) = weight.first_non_finite() {
        bail!("weight [{row}, {column}] is {}, not a finite number", weight.row(row)[column]);
    }
    Ok(())
}

/// Puts blocks of codes back to where their columns came from.
struct Assembly<'a> {
    linear: QuantizedLinear,
    order: &'a [u32],
    group: usize,
    /// Place of each processed group in the result.
    group_places: Vec<usize>,
}

impl<'a> Assembly<'a> {
    fn new(rows: usize, group: usize, order: &'a [u32], settings: &SolverSettings) -> Self {
        let features = order.len();
        let groups = features / group;
        let (mut group_index, mut group_places) = (None, (0..groups).collect());
        if settings.has_group_index() {
            // Columns leave their groups: groups are numbered as they form and the layer carries an index.
            let mut index = vec![0; features];
            order.iter().enumerate().for_each(|(place, &column)| index[column as usize] = (place / group) as u32);
            group_index = Some(index);
        } else {
            group_places = order.chunks(group).map(|columns| columns[0] as usize / group).collect::<Vec<_>>();
        }
        let linear = QuantizedLinear {
            out_features: rows,
            in_features: features,
            bits: settings.bits,
            group_columns: group,
            symmetric: settings.symmetric,
            codes: vec![0; rows * features],
            scales: vec![0.0; rows * groups],
            zeros: vec![0; rows * groups],
            group_index,
        };
        Self { linear, order, group, group_places }
    }

    fn place(&mut self, columns: &std::ops::Range<usize>, block: &BlockCodes) {
        let (features, groups) = (self.linear.in_features, self.group_places.len());
        let width = columns.len();
        let GroupGrid { scales, zeros } = &block.grid;
        let brought = scales.len() / self.linear.out_features;
        let places = &self.group_places[columns.start / self.group..][..brought];
        let order = &self.order[columns.clone()];
        let linear = &mut self.linear;
        linear
            .codes
            .par_chunks_mut(features)
            .zip(linear.scales.par_chunks_mut(groups))
            .zip(linear.zeros.par_chunks_mut(groups))
            .enumerate()
            .for_each(|(row, ((codes, row_scales), row_zeros))| {
                for (&code, &column) in block.codes[row * width..].iter().zip(order) {
                    codes[column as usize] = code;
                }
                for (i, &place) in places.iter().enumerate() {
                    row_scales[place] = scales[row * brought + i];
                    row_zeros[place] = zeros[row * brought + i];
                }
            });
    }
}
