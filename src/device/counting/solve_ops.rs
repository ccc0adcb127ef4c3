//! Statistics, factorization and blockwise error propagation, counted.

use super::device::Counting;
use super::tensor::CountedTensor;
use crate::device::checks::{self, square};
use crate::device::work::ByKind;
use crate::device::{
    BLOCK, BlockCodes, BlockShape, ColumnBlock, CrossFactor, Factor, Factored, Grid, GridRule, Group, GroupGrid,
    LOSS_SHRINKS, LOSS_STRETCHES, LayerInputs, PermuteSymmetric, ProductRange, SolveOps, SolveState, Work,
};
use crate::tensor::Float;
use anyhow::{Context, Result, ensure};
use std::ops::Range;

/// Codes begin at multiples of so many bytes on a device.
const ALIGNMENT: usize = 256;

/// The codes of a layer, of which there is nothing but their room.
#[derive(Debug)]
pub struct CountedCodes {
    /// What they take on the device.
    room: CountedTensor,
    rows: usize,
    blocks: Vec<BlockShape>,
    /// Blocks that have theirs.
    done: usize,
}

impl SolveOps for Counting {
    type Codes = CountedCodes;

    fn room_for_codes(&self, rows: usize, blocks: &[BlockShape]) -> Result<CountedCodes> {
        let part = |bytes: usize| bytes.next_multiple_of(ALIGNMENT) as u64;
        let block = |shape: &BlockShape| {
            part(rows * shape.columns)
                + part(rows * shape.groups * size_of::<f32>())
                + part(rows * shape.groups)
                + part(rows * size_of::<f64>())
        };
        let bytes = part(size_of::<i32>()) + blocks.iter().map(block).sum::<u64>();
        let columns = blocks.iter().map(|shape| shape.columns).sum();
        let room = CountedTensor::holding(&self.ledger, (rows, columns), Float::F32, bytes);
        Ok(CountedCodes { room, rows, blocks: blocks.to_vec(), done: 0 })
    }

    fn take_codes(&self, codes: CountedCodes, rule: &GridRule) -> Result<Vec<BlockCodes>> {
        let CountedCodes { room, rows, blocks, done } = codes;
        self.check([&room])?;
        ensure!(done == blocks.len(), "{done} of {} blocks have codes", blocks.len());
        let bytes = (rows * room.cols) as u64;
        if self.host {
            // Here they are put together from their blocks.
            self.ledger.keep_codes(bytes);
        } else {
            // As they come, and as they are put together.
            self.ledger.pass_on_host(2 * bytes);
        }
        self.ledger.wait("codes");
        if !self.running {
            return Ok(Vec::new());
        }
        let block = |shape: &BlockShape| BlockCodes {
            codes: vec![0; rows * shape.columns],
            grid: grid(rows * shape.groups, rule),
            error: 0.0,
        };
        Ok(blocks.iter().map(block).collect())
    }

    fn permute_columns(&self, weight: &CountedTensor, order: &[u32], dead: &[usize]) -> Result<CountedTensor> {
        self.check([weight])?;
        let (rows, cols) = (weight.rows, weight.cols);
        checks::columns(weight, order, dead)?;
        let made = self.tensor(rows, cols, Float::F32)?;
        self.takes(None, size_of_val(order));
        self.values(made.count());
        Ok(made)
    }

    fn accumulate_statistics(
        &self,
        hessian: &mut CountedTensor,
        cross: Option<&mut CountedTensor>,
        inputs: &LayerInputs<'_, CountedTensor>,
    ) -> Result<()> {
        let &LayerInputs { u, f, g } = inputs;
        let (tokens, features) = (u.rows, u.cols);
        self.check([&*hessian, u].into_iter().chain(cross.as_deref()).chain(f))?;
        checks::statistics(&*hessian, cross.as_deref(), inputs)?;
        let work = Work::Statistics { tokens, features, cross: cross.is_some() };
        self.takes(Some(work), g.map_or(0, size_of_val));
        // H is symmetric, C is not.
        let share = if cross.is_some() { 1.5 } else { 0.5 };
        let statistics = 2.0 * share * tokens as f64 * (features as f64).powi(2);
        self.ledger.work(ByKind { statistics, ..ByKind::default() });
        Ok(())
    }

    fn diagonal(&self, x: &CountedTensor) -> Result<Vec<f32>> {
        self.check([x])?;
        square(x, x.cols)?;
        self.takes(None, 2 * x.cols * size_of::<f32>());
        self.ledger.wait("a diagonal");
        Ok(vec![1.0; x.cols])
    }

    fn permute_symmetric(&self, x: &CountedTensor, how: PermuteSymmetric<'_>) -> Result<CountedTensor> {
        checks::diagonal(x, &how)?;
        self.permuted(x, how.order, size_of_val(how.diagonal))
    }

    fn permute(&self, x: &CountedTensor, order: &[u32]) -> Result<CountedTensor> {
        self.permuted(x, order, 0)
    }

    fn factor(&self, h: CountedTensor, blocks: &[Range<usize>]) -> Result<Factored<CountedTensor>> {
        self.check([&h])?;
        let n = h.cols;
        square(&h, n)?;
        checks::consecutive(blocks, 0..n)?;
        let (inverses, diagonal) = (self.tensor(n, BLOCK, Float::F32)?, self.tensor(1, n, Float::F32)?);
        self.factors(n, size_of::<i32>());
        self.ledger.wait("whether a matrix was factored");
        Ok(Factored::Done(Factor { root: h, inverses, diagonal }))
    }

    fn cross_factor(
        &self,
        c: CountedTensor,
        factor: &Factor<CountedTensor>,
        blocks: &[Range<usize>],
        _alpha: f32,
    ) -> Result<CrossFactor<CountedTensor>> {
        self.check([&c])?;
        let n = c.cols;
        square(&c, n)?;
        self.check_factor(factor, n)?;
        checks::consecutive(blocks, 0..n)?;
        let blocks = self.tensor(n, BLOCK, Float::F32)?;
        self.factors(n, 0);
        Ok(CrossFactor { scaled: c, blocks })
    }

    fn add_product(
        &self,
        c: &mut CountedTensor,
        a: &CountedTensor,
        b: &CountedTensor,
        range: &ProductRange,
    ) -> Result<()> {
        let ProductRange { inner, columns, .. } = range;
        self.check([&*c, a, b])?;
        let width = columns.len();
        checks::product([&*c, a, b], range)?;
        self.takes(Some(Work::Carry { features: inner.len() + width, columns: width }), 0);
        let products = 2.0 * (c.rows * inner.len()) as f64 * width as f64;
        self.ledger.work(ByKind { products, ..ByKind::default() });
        Ok(())
    }

    fn squared_norm(&self, x: &CountedTensor) -> Result<f64> {
        self.check([x])?;
        self.values(x.count());
        self.ledger.wait("norms");
        Ok(1.0)
    }

    fn weighted_squared_norm(&self, x: &CountedTensor, h: &CountedTensor) -> Result<f64> {
        self.check([x, h])?;
        square(h, x.cols)?;
        self.takes(Some(Work::WeightedNorm { rows: x.rows, features: x.cols }), 0);
        // H is known by a triangle.
        self.ledger.work(ByKind { products: x.count() * x.cols as f64, ..ByKind::default() });
        self.ledger.wait("norms");
        Ok(1.0)
    }

    fn group_grid(&self, state: &SolveState<CountedTensor>, group: &Group<'_, CountedTensor>) -> Result<GroupGrid> {
        let SolveState { residual, error, cross, .. } = state;
        self.check([residual, error].into_iter().chain(cross))?;
        let (columns, rule, rows) = (&group.columns, group.rule, residual.rows);
        let operands = checks::group(state, group)?;
        operands.factor.map_or(Ok(()), |factor| self.check_factor(factor, residual.cols))?;
        // The group's weights brought up to date, and for a search by loss a range, a grid and its candidates' losses.
        let losses = 4 + LOSS_SHRINKS + 2 * LOSS_STRETCHES.len();
        let corrected = operands.corrections[0].map_or(0, |_| columns.len());
        let search = if rule.grid == Grid::Loss { losses } else { 0 };
        self.takes(None, rows * (corrected + search) * size_of::<f32>() + rows * 5);
        self.values((rows * columns.len()) as f64);
        self.ledger.wait("the grid of a wide group");
        Ok(grid(rows, &rule))
    }

    fn quantize_block(
        &self,
        block: &ColumnBlock<'_, CountedTensor>,
        state: &mut SolveState<CountedTensor>,
        codes: &mut CountedCodes,
    ) -> Result<()> {
        let SolveState { residual, carried, shift, error, cross } = &*state;
        self.check([residual, error].into_iter().chain(carried).chain(shift).chain(cross))?;
        let (rows, columns, width) = (residual.rows, &block.columns, block.columns.len());
        let groups = checks::block(block, state)?;
        block.factor.map_or(Ok(()), |factor| self.check_factor(factor, residual.cols))?;
        let wanted = BlockShape { columns: width, groups };
        let place = codes.blocks.get(codes.done).filter(|shape| codes.rows == rows && **shape == wanted);
        place.with_context(|| format!("there is no room for codes of block {columns:?} with {groups} groups"))?;
        codes.done += 1;
        self.ledger.work(ByKind { codes: (rows * width) as f64, ..ByKind::default() });
        Ok(())
    }
}

impl Counting {
    fn permuted(&self, x: &CountedTensor, order: &[u32], more: usize) -> Result<CountedTensor> {
        self.check([x])?;
        let n = x.cols;
        checks::order(x, order)?;
        let made = self.tensor(n, n, Float::F32)?;
        self.takes(None, size_of_val(order) + more);
        self.values(made.count());
        Ok(made)
    }

    /// A factorization, or what a cross term takes of it: a block to finish with, and so many bytes that say how it went.
    fn factors(&self, n: usize, status: usize) {
        self.takes(Some(Work::Factor { features: n }), BLOCK * BLOCK * size_of::<f32>() + status);
        self.ledger.work(ByKind { factors: (n as f64).powi(3) / 3.0, ..ByKind::default() });
    }

    fn check_factor(&self, factor: &Factor<CountedTensor>, n: usize) -> Result<()> {
        let Factor { root, inverses, diagonal } = factor;
        self.check([root, inverses, diagonal])?;
        checks::factor(factor, n)
    }
}

/// A grid that every storage type has.
fn grid(groups: usize, rule: &GridRule) -> GroupGrid {
    let zero = if rule.symmetric { 1 << (rule.bits - 1) } else { rule.smallest_zero };
    GroupGrid { scales: vec![1.0; groups], zeros: vec![zero; groups] }
}
