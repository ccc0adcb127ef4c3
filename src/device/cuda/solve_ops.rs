//! Statistics, factorization and blockwise error propagation on the GPU, all in float32.

use super::Cuda;
use super::bindings::{
    vlmq_cross_factor_args, vlmq_factor_args, vlmq_gather_rows_args, vlmq_grid, vlmq_grid_rule, vlmq_group_grid_args,
    vlmq_permute_args, vlmq_permute_columns_args, vlmq_product_args, vlmq_quantize_block_args, vlmq_squared_norm_args,
    vlmq_weighted_hessian_args,
};
use super::codes::{CudaCodes, Outputs};
use super::memory::Memory;
use super::tensor::{CudaTensor, dtype_of};
use crate::device::checks::{self, GroupOperands, square};
use crate::device::{
    BLOCK, BlockCodes, BlockShape, ColumnBlock, CrossFactor, Factor, Factored, Grid, GridRule, Group, GroupGrid,
    LayerInputs, PermuteSymmetric, ProductRange, SolveOps, SolveState,
};
use crate::tensor::Float;
use anyhow::{Context, Result, ensure};
use std::ops::Range;
use std::ptr;

impl SolveOps for Cuda {
    type Codes = CudaCodes;

    fn room_for_codes(&self, rows: usize, blocks: &[BlockShape]) -> Result<CudaCodes> {
        Ok(CudaCodes { outputs: Outputs::new(self, rows, blocks)?, done: 0 })
    }

    fn take_codes(&self, codes: CudaCodes, rule: &GridRule) -> Result<Vec<BlockCodes>> {
        let CudaCodes { outputs, done } = codes;
        ensure!(done == outputs.blocks.len(), "{done} of {} blocks have codes", outputs.blocks.len());
        outputs.take(rule)
    }

    fn permute_columns(&self, weight: &CudaTensor, order: &[u32], dead: &[usize]) -> Result<CudaTensor> {
        let (rows, cols) = (weight.rows, weight.cols);
        checks::columns(weight, order, dead)?;
        let mut from: Vec<i32> = (0..cols).map(i32::try_from).collect::<Result<_, _>>().context("too many columns")?;
        dead.iter().for_each(|&i| from[i] = -1);
        let from: Option<Vec<i32>> = order.iter().map(|&column| from.get(column as usize).copied()).collect();
        let from = Memory::of(&self.runtime, &from.context("an order with a column that is not there")?)?;
        let mut out = self.tensor(rows, cols, Float::F32)?;
        self.launch(&vlmq_permute_columns_args {
            x: self.read(weight)?,
            order: from.at(0),
            out: self.floats_mut(&mut out)?,
            rows: rows as i64,
            cols: cols as i64,
            dtype: dtype_of(weight.precision),
        })?;
        Ok(out)
    }

    fn accumulate_statistics(
        &self,
        hessian: &mut CudaTensor,
        cross: Option<&mut CudaTensor>,
        inputs: &LayerInputs<'_, CudaTensor>,
    ) -> Result<()> {
        let &LayerInputs { u, f, g } = inputs;
        let features = u.cols;
        checks::statistics(&*hessian, cross.as_deref(), inputs)?;
        let g = g.map(|g| Memory::of(&self.runtime, g)).transpose()?;
        self.launch_with_workspace(vlmq_weighted_hessian_args {
            u: self.read(u)?,
            f: f.map_or(Ok(ptr::null()), |f| self.read(f))?,
            g: g.as_ref().map_or(ptr::null(), |g| g.at(0)),
            hessian: self.floats_mut(hessian)?,
            cross: cross.map_or(Ok(ptr::null_mut()), |cross| self.floats_mut(cross))?,
            ..statistics_arguments(u.rows, features, u.precision)
        })
    }

    fn diagonal(&self, x: &CudaTensor) -> Result<Vec<f32>> {
        let n = x.cols;
        square(x, n)?;
        // The matrix as a table of rows of one value.
        let places: Option<Vec<u32>> = (0..n).map(|i| u32::try_from(i * (n + 1)).ok()).collect();
        let places = Memory::of(&self.runtime, &places.context("a diagonal of more than 65535 values")?)?;
        let mut diagonal = self.tensor(1, n, Float::F32)?;
        self.launch(&vlmq_gather_rows_args {
            table: self.floats(x)?.cast(),
            indices: places.at(0),
            out: self.write(&mut diagonal)?,
            rows: n as i64,
            row_bytes: size_of::<f32>() as i64,
            scatter: 0,
        })?;
        diagonal.memory.read(0, n)
    }

    fn permute_symmetric(&self, x: &CudaTensor, how: PermuteSymmetric<'_>) -> Result<CudaTensor> {
        checks::diagonal(x, &how)?;
        self.permuted(x, how.order, Some(how.diagonal))
    }

    fn permute(&self, x: &CudaTensor, order: &[u32]) -> Result<CudaTensor> {
        self.permuted(x, order, None)
    }

    fn factor(&self, mut h: CudaTensor, blocks: &[Range<usize>]) -> Result<Factored<CudaTensor>> {
        let n = h.cols;
        square(&h, n)?;
        checks::consecutive(blocks, 0..n)?;
        let ends = ends(blocks)?;
        let mut inverses = self.tensor(n, BLOCK, Float::F32)?;
        let mut diagonal = self.tensor(1, n, Float::F32)?;
        let mut status = Memory::of(&self.runtime, &[-1i32])?;
        self.launch_with_workspace(vlmq_factor_args {
            h: self.floats_mut(&mut h)?,
            inverses: self.floats_mut(&mut inverses)?,
            diagonal: self.floats_mut(&mut diagonal)?,
            blocks: ends.as_ptr(),
            block_count: ends.len() as i64,
            n: n as i64,
            status: status.at_mut(0),
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        })?;
        Ok(match usize::try_from(status.read::<i32>(0, 1)?[0]) {
            Ok(pivot) => Factored::NotPositive { pivot },
            Err(_) => Factored::Done(Factor { root: h, inverses, diagonal }),
        })
    }

    fn cross_factor(
        &self,
        mut c: CudaTensor,
        factor: &Factor<CudaTensor>,
        blocks: &[Range<usize>],
        alpha: f32,
    ) -> Result<CrossFactor<CudaTensor>> {
        let n = c.cols;
        square(&c, n)?;
        checks::factor(factor, n)?;
        checks::consecutive(blocks, 0..n)?;
        let ends = ends(blocks)?;
        let mut products = self.tensor(n, BLOCK, Float::F32)?;
        self.launch_with_workspace(vlmq_cross_factor_args {
            c: self.floats_mut(&mut c)?,
            root: self.floats(&factor.root)?,
            inverses: self.floats(&factor.inverses)?,
            diagonal: self.floats(&factor.diagonal)?,
            products: self.floats_mut(&mut products)?,
            blocks: ends.as_ptr(),
            block_count: ends.len() as i64,
            n: n as i64,
            alpha,
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        })?;
        Ok(CrossFactor { scaled: c, blocks: products })
    }

    fn add_product(&self, c: &mut CudaTensor, a: &CudaTensor, b: &CudaTensor, range: &ProductRange) -> Result<()> {
        let ProductRange { inner, columns, target } = range;
        let width = columns.len();
        checks::product([&*c, a, b], range)?;
        self.launch(&vlmq_product_args {
            a: self.floats(a)?.wrapping_add(inner.start),
            b: self.floats(b)?.wrapping_add(inner.start * b.cols + columns.start),
            c: self.floats_mut(c)?.wrapping_add(*target),
            rows: c.rows as i64,
            cols: width as i64,
            inner: inner.len() as i64,
            a_stride: a.cols as i64,
            b_stride: b.cols as i64,
            c_stride: c.cols as i64,
            alpha: 1.0,
            beta: 1.0,
            transposed: 0,
        })
    }

    fn squared_norm(&self, x: &CudaTensor) -> Result<f64> {
        self.norm_in(x, None)
    }

    fn weighted_squared_norm(&self, x: &CudaTensor, h: &CudaTensor) -> Result<f64> {
        square(h, x.cols)?;
        self.norm_in(x, Some(h))
    }

    fn group_grid(&self, state: &SolveState<CudaTensor>, group: &Group<'_, CudaTensor>) -> Result<GroupGrid> {
        let GroupOperands { factor, cross: products, corrections } = checks::group(state, group)?;
        let (residual, columns, rule) = (&state.residual, group.columns.clone(), group.rule);
        let (rows, features) = (residual.rows, residual.cols);
        let ends = if factor.is_some() { ends(group.blocks)? } else { Vec::new() };
        let mut outputs = Outputs::new(self, rows, &[BlockShape { columns: 0, groups: 1 }])?;
        let place = outputs.blocks[0];
        let optional = |part: Option<&CudaTensor>| part.map_or(Ok(ptr::null()), |part| self.floats(part));
        let arguments = vlmq_group_grid_args {
            residual: self.floats(residual)?,
            error: optional(corrections[0])?,
            cross: optional(corrections[1])?,
            root: optional(factor.map(|factor| &factor.root))?,
            inverses: optional(factor.map(|factor| &factor.inverses))?,
            diagonal: optional(factor.map(|factor| &factor.diagonal))?,
            products: optional(products.map(|products| &products.blocks))?,
            blocks: if factor.is_some() { ends.as_ptr() } else { ptr::null() },
            block_count: ends.len() as i64,
            scales: outputs.memory.at_mut(place.scales),
            zeros: outputs.memory.at_mut(place.zeros),
            status: outputs.memory.at_mut(outputs.status),
            rows: rows as i64,
            features: features as i64,
            first: columns.start as i64,
            columns: columns.len() as i64,
            rule: rule_arguments(&rule),
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        };
        self.launch_with_workspace(arguments)?;
        let grid = outputs.take(&rule)?.pop().context("a group without a grid")?.grid;
        Ok(grid)
    }

    fn quantize_block(
        &self,
        block: &ColumnBlock<'_, CudaTensor>,
        state: &mut SolveState<CudaTensor>,
        codes: &mut CudaCodes,
    ) -> Result<()> {
        let (rows, features) = (state.residual.rows, state.residual.cols);
        let (columns, width, span) = (block.columns.clone(), block.columns.len(), state.error.cols);
        let groups = checks::block(block, state)?;
        let CudaCodes { outputs, done } = codes;
        let place = outputs.blocks.get(*done).copied().filter(|place| {
            outputs.rows == rows
                && place.shape == BlockShape { columns: width, groups }
                && outputs.memory.is_of(&self.runtime)
        });
        let place =
            place.with_context(|| format!("there is no room for codes of block {columns:?} with {groups} groups"))?;
        *done += 1;
        if let Some(grid) = block.grid {
            outputs.memory.write(place.scales, bytemuck::cast_slice(&grid.scales))?;
            outputs.memory.write(place.zeros, &grid.zeros)?;
        }
        let (factor, cross) = (block.factor, block.cross);
        let solved = factor.is_some();
        // Without a factor nothing is carried on.
        let optional = |part: Option<&mut CudaTensor>| match part {
            Some(part) if solved => self.floats_mut(part),
            _ => Ok(ptr::null_mut()),
        };
        self.launch(&vlmq_quantize_block_args {
            residual: self.floats_mut(&mut state.residual)?,
            carried: optional(state.carried.as_mut())?,
            shift: optional(state.shift.as_mut())?,
            error: optional(Some(&mut state.error))?,
            cross: optional(state.cross.as_mut())?,
            root: factor.map_or(Ok(ptr::null()), |factor| self.floats(&factor.root))?,
            inverses: factor.map_or(Ok(ptr::null()), |factor| self.floats(&factor.inverses))?,
            diagonal: factor.map_or(Ok(ptr::null()), |factor| self.floats(&factor.diagonal))?,
            products: cross.filter(|_| solved).map_or(Ok(ptr::null()), |cross| self.floats(&cross.blocks))?,
            codes: outputs.memory.at_mut(place.codes),
            scales: outputs.memory.at_mut(place.scales),
            zeros: outputs.memory.at_mut(place.zeros),
            row_errors: outputs.memory.at_mut(place.row_errors),
            status: outputs.memory.at_mut(outputs.status),
            rows: rows as i64,
            features: features as i64,
            first: columns.start as i64,
            columns: width as i64,
            span_first: block.span as i64,
            span: span as i64,
            group: if block.grid.is_some() { width } else { block.group } as i64,
            given_grid: block.grid.is_some().into(),
            rule: rule_arguments(&block.rule),
        })
    }
}

impl Cuda {
    /// Bytes of work space of the statistics.
    pub(super) fn statistics_workspace(&self, tokens: usize, features: usize, with_cross: bool) -> usize {
        // The query looks at sizes, and at which pointers are there.
        let there = ptr::dangling_mut::<f32>();
        let cross = if with_cross { there } else { ptr::null_mut() };
        self.workspace_bytes(&vlmq_weighted_hessian_args {
            u: there.cast(),
            f: cross.cast(),
            hessian: there,
            cross,
            ..statistics_arguments(tokens, features, self.precision)
        })
    }

    fn permuted(&self, x: &CudaTensor, order: &[u32], diagonal: Option<&[f32]>) -> Result<CudaTensor> {
        let n = x.cols;
        checks::order(x, order)?;
        let mut out = self.tensor(n, n, Float::F32)?;
        let order = Memory::of(&self.runtime, order)?;
        let values = diagonal.map(|diagonal| Memory::of(&self.runtime, diagonal)).transpose()?;
        self.launch(&vlmq_permute_args {
            x: self.floats(x)?,
            order: order.at(0),
            diagonal: values.as_ref().map_or(ptr::null(), |values| values.at(0)),
            out: self.floats_mut(&mut out)?,
            n: n as i64,
            symmetric: diagonal.is_some().into(),
        })?;
        Ok(out)
    }

    fn norm_in(&self, x: &CudaTensor, h: Option<&CudaTensor>) -> Result<f64> {
        let mut norm = Memory::of(&self.runtime, &[0.0f64])?;
        self.launch_with_workspace(vlmq_squared_norm_args {
            x: self.floats(x)?,
            h: h.map_or(Ok(ptr::null()), |h| self.floats(h))?,
            norm: norm.at_mut(0),
            rows: x.rows as i64,
            cols: x.cols as i64,
            workspace: ptr::null_mut(),
            workspace_bytes: 0,
        })?;
        Ok(norm.read::<f64>(0, 1)?[0])
    }
}

/// Sizes of a weighted Hessian's call, without its pointers.
fn statistics_arguments(tokens: usize, features: usize, precision: Float) -> vlmq_weighted_hessian_args {
    vlmq_weighted_hessian_args {
        u: ptr::null(),
        f: ptr::null(),
        g: ptr::null(),
        hessian: ptr::null_mut(),
        cross: ptr::null_mut(),
        tokens: tokens as i64,
        features: features as i64,
        u_stride: features as i64,
        f_stride: features as i64,
        dtype: dtype_of(precision),
        fast: 0,
        workspace: ptr::null_mut(),
        workspace_bytes: 0,
    }
}

/// Ends of blocks, as kernels take them.
fn ends(blocks: &[Range<usize>]) -> Result<Vec<i32>> {
    blocks.iter().map(|block| i32::try_from(block.end).context("too many columns")).collect()
}

fn rule_arguments(rule: &GridRule) -> vlmq_grid_rule {
    vlmq_grid_rule {
        bits: rule.bits as i32,
        symmetric: rule.symmetric.into(),
        grid: match rule.grid {
            Grid::Minmax => vlmq_grid::VLMQ_MINMAX,
            Grid::Mse => vlmq_grid::VLMQ_MSE,
            Grid::Loss => vlmq_grid::VLMQ_LOSS,
        },
        scale_type: dtype_of(rule.scale_type),
        smallest_zero: rule.smallest_zero.into(),
    }
}
