//! Whether shapes go together, before their addresses are taken.

use super::tensor::CudaTensor;
use crate::device::{BLOCK, ColumnBlock, Factor, SolveState};
use anyhow::{Context, Result, ensure};
use std::ops::Range;

pub(super) fn check_block(block: &ColumnBlock<'_, CudaTensor>, state: &SolveState<CudaTensor>) -> Result<()> {
    let (rows, features) = (state.residual.rows, state.residual.cols);
    let (columns, width) = (&block.columns, block.columns.len());
    ensure!(width > 0 && columns.end <= features, "block {columns:?} of {}", state.residual.describe());
    match block.grid {
        Some(grid) => ensure!(
            grid.scales.len() == rows && grid.zeros.len() == rows,
            "a grid of {} scales and {} zeros for {rows} rows",
            grid.scales.len(),
            grid.zeros.len()
        ),
        None => ensure!(
            block.group > 0 && width.is_multiple_of(block.group),
            "groups of {} columns in a block of {width}",
            block.group
        ),
    }
    let Some(factor) = block.factor else { return Ok(()) };
    check_factor(factor, features)?;
    let span = state.error.cols;
    ensure!(
        width <= BLOCK && block.span <= columns.start && columns.end <= block.span + span,
        "block {columns:?} in a span of {span} columns from {} on",
        block.span
    );
    for part in [Some(&state.error), state.cross.as_ref()].into_iter().flatten() {
        shaped(part, rows, span)?;
    }
    for part in [&state.carried, &state.shift].into_iter().flatten() {
        shaped(part, rows, features)?;
    }
    if let Some(cross) = block.cross {
        shaped(&cross.blocks, features, BLOCK)?;
    }
    ensure!(state.shift.is_none() || block.cross.is_some(), "a shift without a cross term");
    Ok(())
}

pub(super) fn check_factor(factor: &Factor<CudaTensor>, n: usize) -> Result<()> {
    square(&factor.root, n)?;
    shaped(&factor.inverses, n, BLOCK)?;
    shaped(&factor.diagonal, 1, n)
}

pub(super) fn square(x: &CudaTensor, n: usize) -> Result<()> {
    shaped(x, n, n)
}

pub(super) fn shaped(x: &CudaTensor, rows: usize, cols: usize) -> Result<()> {
    ensure!((x.rows, x.cols) == (rows, cols), "{} where {rows}x{cols} is needed", x.describe());
    Ok(())
}

/// Ends of blocks, which must follow each other over all of `columns` and be at most [`BLOCK`] wide.
pub(super) fn ends(blocks: &[Range<usize>], columns: Range<usize>) -> Result<Vec<i32>> {
    let mut at = columns.start;
    for block in blocks {
        ensure!(block.start == at && block.end > at && block.len() <= BLOCK, "block {block:?} behind column {at}");
        at = block.end;
    }
    ensure!(at == columns.end, "blocks up to column {at} of {columns:?}");
    blocks.iter().map(|block| i32::try_from(block.end).context("too many columns")).collect()
}
