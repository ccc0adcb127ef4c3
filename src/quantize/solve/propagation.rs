//! The columns of a layer, block by block, each block's errors propagated to the later ones (method section 3).

use super::assembly::Assembly;
use super::checks::{check_finite, check_shape, rule_of};
use super::prepare::{Prepared, System};
use crate::codes::QuantizedLinear;
use crate::device::{BLOCK, BlockShape, ColumnBlock, CrossFactor, Factor, Group, ProductRange, SolveOps, SolveState};
use crate::quantize::settings::{CrossTerm, SolverSettings};
use anyhow::{Result, ensure};

/// Quantizes `weight` `[out, in]` with GPTQ or GPTAQ: the layer and its error `‖Ŵ−W‖²_H`, H undamped.
///
/// Errors when the weight has another width than the statistics or holds a NaN or an infinity, when the preparation found
/// the statistics good for nothing, when `settings` disagree with those of the preparation in anything that it depends
/// on, or when a scale does not fit its storage type ([`ScaleMisfit`](crate::device::ScaleMisfit)).
pub fn solve<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    weight: &D::Tensor,
    settings: &SolverSettings,
) -> Result<(QuantizedLinear, f64)> {
    solve_with(device, prepared, weight, settings, prepared.system()?.cross.as_ref())
}

/// [`solve`] with this cross term instead of the preparation's own.
pub(super) fn solve_with<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    weight: &D::Tensor,
    settings: &SolverSettings,
    cross: Option<&CrossFactor<D::Tensor>>,
) -> Result<(QuantizedLinear, f64)> {
    enqueue_with(device, prepared, weight, settings, cross)?.finish(device, prepared, settings)
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
    enqueue_with(device, prepared, weight, settings, prepared.system()?.cross.as_ref())
}

/// [`enqueue`] with this cross term instead of the preparation's own.
fn enqueue_with<D: SolveOps>(
    device: &D,
    prepared: &Prepared<D::Tensor>,
    weight: &D::Tensor,
    settings: &SolverSettings,
    cross: Option<&CrossFactor<D::Tensor>>,
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
    let System { spans, factor, .. } = prepared.system()?;

    let permuted = device.permute_columns(weight, &prepared.order, &prepared.dead)?;
    let first_width = spans[0].end;
    let quantized_cross = cross.is_some() && settings.cross_term == CrossTerm::Quantized;
    let mut state = SolveState {
        residual: permuted,
        carried: cross.map(|_| device.zeros(rows, features)).transpose()?,
        shift: quantized_cross.then(|| device.zeros(rows, features)).transpose()?,
        error: device.zeros(rows, first_width)?,
        cross: cross.map(|_| device.zeros(rows, first_width)).transpose()?,
    };
    let blocks: Vec<_> = spans.iter().flat_map(|span| span.blocks.iter().cloned()).collect();
    let shapes: Vec<BlockShape> = blocks
        .iter()
        .map(|block| BlockShape { columns: block.len(), groups: if group > BLOCK { 1 } else { block.len() / group } })
        .collect();
    let mut codes = device.room_for_codes(rows, &shapes)?;
    let wide = |columns: &std::ops::Range<usize>, blocks, is_span| Group {
        columns: columns.clone(),
        blocks,
        rule,
        factor: Some(factor),
        cross,
        is_span,
    };
    let whole_row = (group > BLOCK && group == features)
        .then(|| device.group_grid(&state, &wide(&(0..features), &blocks, false)))
        .transpose()?;
    let terms = (factor, cross);
    for span in spans {
        let width = span.end - span.start;
        if device.shape(&state.error).1 == width {
            device.clear(&mut state.error)?;
            state.cross.as_mut().map(|cross| device.clear(cross)).transpose()?;
        } else {
            state.error = device.zeros(rows, width)?;
            state.cross = cross.map(|_| device.zeros(rows, width)).transpose()?;
        }
        carry(
            device,
            terms,
            &mut state,
            ProductRange { inner: 0..span.start, columns: span.start..span.end, target: 0 },
        )?;
        let own_grid = (group > BLOCK && group < features)
            .then(|| device.group_grid(&state, &wide(&(span.start..span.end), &span.blocks, true)))
            .transpose()?;
        for block in &span.blocks {
            let inner = span.start..block.start;
            let range = ProductRange { inner, columns: block.clone(), target: block.start - span.start };
            carry(device, terms, &mut state, range)?;
            let job = ColumnBlock {
                columns: block.clone(),
                span: span.start,
                group,
                grid: whole_row.as_ref().or(own_grid.as_ref()),
                rule,
                factor: Some(factor),
                cross,
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
        let codes = device.take_codes(self.codes, &rule_of(settings))?;
        let mut error = codes.iter().map(|block| block.error).sum::<f64>();
        out.place(&self.blocks.into_iter().zip(codes).collect::<Vec<_>>());
        // The factor is that of the damped matrix.
        error -= prepared.system()?.absolute_damp * device.squared_norm(&self.residual)?;
        // Not f64::max, which would make 0 of a NaN.
        Ok((out.linear, if error < 0.0 { 0.0 } else { error }))
    }
}

/// Brings columns of the current span up to date with the inner ones of `range`, which have their codes.
fn carry<D: SolveOps>(
    device: &D,
    (factor, term): (&Factor<D::Tensor>, Option<&CrossFactor<D::Tensor>>),
    state: &mut SolveState<D::Tensor>,
    range: ProductRange,
) -> Result<()> {
    if range.inner.is_empty() {
        return Ok(());
    }
    device.add_product(&mut state.error, &state.residual, &factor.root, &range)?;
    if let (Some(cross), Some(carried), Some(term)) = (&mut state.cross, &state.carried, term) {
        device.add_product(cross, carried, &term.scaled, &range)?;
        if let Some(shift) = &state.shift {
            device.add_product(cross, shift, &factor.root, &range)?;
        }
    }
    Ok(())
}
