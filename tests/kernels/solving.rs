//! One layer's problem for the solver's kernels, how they are called, and how their results are compared with the CPU's.

use crate::buffers::{Bits, Buffer, F32, F64, I32, U8};
use crate::calls::accepted;
use crate::support::kernels::{SHARED_KIB, kernels, set_shared_kib, workspace_bytes};
use crate::support::uniform;
use std::ops::Range;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{
    BlockCodes, ColumnBlock, CrossFactor, Factor, Factored, Grid, GridRule, Group, GroupGrid, LayerInputs, SolveOps,
    SolveState,
};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// Numbers of [-1, 1).
pub(crate) fn matrix(rows: usize, cols: usize, seed: u64) -> Matrix {
    Matrix::new(rows, cols, uniform(seed).take(rows * cols).collect()).unwrap()
}

pub(crate) const RULE: GridRule =
    GridRule { bits: 3, symmetric: false, grid: Grid::Minmax, scale_type: Float::F16, smallest_zero: 0 };

pub(crate) fn c_rule(rule: &GridRule) -> vlmq_grid_rule {
    vlmq_grid_rule {
        bits: rule.bits as i32,
        symmetric: rule.symmetric.into(),
        grid: match rule.grid {
            Grid::Minmax => vlmq_grid::VLMQ_MINMAX,
            Grid::Mse => vlmq_grid::VLMQ_MSE,
            Grid::Loss => vlmq_grid::VLMQ_LOSS,
        },
        scale_type: match rule.scale_type {
            Float::F32 => vlmq_dtype::VLMQ_F32,
            Float::Bf16 => vlmq_dtype::VLMQ_BF16,
            Float::F16 => vlmq_dtype::VLMQ_F16,
        },
        smallest_zero: rule.smallest_zero.into(),
    }
}

/// A layer's factor, and the GPTAQ term.
pub(crate) struct Prepared {
    pub(crate) factor: Factor<Matrix>,
    pub(crate) cross: CrossFactor<Matrix>,
}

impl Prepared {
    /// From correlated inputs, twice as many tokens as features.
    pub(crate) fn new(features: usize, blocks: &[Range<usize>]) -> Self {
        let mut u = matrix(2 * features, features, 11);
        for token in 0..u.rows() {
            let row = u.row_mut(token);
            for i in 1..row.len() {
                row[i] = (row[i] + 0.4 * row[i - 1]) * (1.0 + (i % 5) as f32 * 0.1);
            }
        }
        let mut f = matrix(2 * features, features, 12);
        f.data_mut().iter_mut().zip(u.data()).for_each(|(f, u)| *f = u + 0.1 * *f);
        let (mut h, mut c) = (Matrix::zeros(features, features), Matrix::zeros(features, features));
        Cpu.accumulate_statistics(&mut h, Some(&mut c), &LayerInputs { u: &u, f: Some(&f), g: None }).unwrap();
        let mean = (0..features).map(|i| h.row(i)[i]).sum::<f32>() / features as f32;
        (0..features).for_each(|i| h.row_mut(i)[i] += 0.01 * mean);
        let Factored::Done(factor) = Cpu.factor(h, blocks).unwrap() else { panic!("not positive definite") };
        let cross = Cpu.cross_factor(c, &factor, blocks, 0.25).unwrap();
        Self { factor, cross }
    }

    /// Of one block.
    pub(crate) fn whole(features: usize) -> Self {
        Self::new(features, std::slice::from_ref(&(0..features)))
    }

    /// No error is carried on by these products: a start of the span without corrections stays exact.
    pub(crate) fn state(&self, w: &Matrix, mode: Mode, span: usize) -> SolveState<Matrix> {
        let zeros = |cols| Matrix::zeros(w.rows(), cols);
        SolveState {
            residual: w.clone(),
            carried: (mode != Mode::Gptq).then(|| zeros(w.cols())),
            shift: (mode == Mode::Shift).then(|| zeros(w.cols())),
            error: zeros(span),
            cross: (mode != Mode::Gptq).then(|| zeros(span)),
        }
    }
}

/// What GPTAQ hands on, if it is GPTAQ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    Gptq,
    Carried,
    Shift,
}

pub(crate) const MODES: [Mode; 3] = [Mode::Gptq, Mode::Carried, Mode::Shift];

/// What a block's kernel leaves behind.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) codes: BlockCodes,
    pub(crate) row_errors: Vec<f64>,
    pub(crate) state: SolveState<Matrix>,
    pub(crate) status: i32,
}

impl Outcome {
    /// Everything, to compare to the last bit.
    pub(crate) fn bits(&self) -> Vec<Vec<u64>> {
        let state = &self.state;
        let optional = |x: &Option<Matrix>| x.as_ref().map_or_else(Vec::new, |x| x.data().bits());
        vec![
            self.codes.codes.bits(),
            self.codes.grid.scales.bits(),
            self.codes.grid.zeros.bits(),
            self.row_errors.bits(),
            state.residual.data().bits(),
            optional(&state.carried),
            optional(&state.shift),
            state.error.data().bits(),
            vec![self.status as u64],
        ]
    }
}

impl Bits for GroupGrid {
    fn append_bits(&self, to: &mut Vec<u64>) {
        self.scales.append_bits(to);
        self.zeros.append_bits(to);
    }
}

fn groups_of(block: &ColumnBlock<'_, Matrix>) -> usize {
    if block.grid.is_some() { 1 } else { block.columns.len() / block.group }
}

/// Runs `vlmq_quantize_block` on a GPU with ample shared memory and on one with little, which must give the same bits.
pub(crate) fn quantize_block(block: &ColumnBlock<'_, Matrix>, state: &SolveState<Matrix>) -> Outcome {
    let [ample, small] = [SHARED_KIB[0], SHARED_KIB[1]].map(|kib| {
        set_shared_kib(kernels(), kib);
        quantize_block_as_is(block, state)
    });
    set_shared_kib(kernels(), SHARED_KIB[0]);
    assert!(ample.bits() == small.bits(), "the outputs differ with {} KiB", SHARED_KIB[1]);
    ample
}

/// Runs `vlmq_quantize_block`; what it may not touch is checked.
pub(crate) fn quantize_block_as_is(block: &ColumnBlock<'_, Matrix>, state: &SolveState<Matrix>) -> Outcome {
    let (rows, features) = (state.residual.rows(), state.residual.cols());
    let (width, groups) = (block.columns.len(), groups_of(block));
    let in_out = |x: &Matrix| Buffer::in_out(F32, x.data(), 0);
    let mut residual = in_out(&state.residual);
    let mut carried = state.carried.as_ref().map(in_out);
    let mut shift = state.shift.as_ref().map(in_out);
    let mut error = in_out(&state.error);
    let mut codes = Buffer::output(U8, rows * width, 0);
    let (mut scales, mut zeros) = match block.grid {
        Some(grid) => (Buffer::in_out(F32, &grid.scales, 0), Buffer::in_out(U8, &grid.zeros, 0)),
        None => (Buffer::output(F32, rows * groups, 0), Buffer::output(U8, rows * groups, 0)),
    };
    let mut row_errors = Buffer::output(F64, rows, 0);
    let mut status = Buffer::in_out(I32, &[i32::MAX], 0);
    let pointer = |x: Option<&Matrix>| x.map_or(std::ptr::null(), |x| x.data().as_ptr());
    let args = vlmq_quantize_block_args {
        residual: residual.ptr_mut(),
        carried: carried.as_mut().map_or(std::ptr::null_mut(), Buffer::ptr_mut),
        shift: shift.as_mut().map_or(std::ptr::null_mut(), Buffer::ptr_mut),
        error: if block.factor.is_some() { error.ptr_mut() } else { std::ptr::null_mut() },
        cross: pointer(state.cross.as_ref()),
        root: pointer(block.factor.map(|factor| &factor.root)),
        inverses: pointer(block.factor.map(|factor| &factor.inverses)),
        diagonal: block.factor.map_or(std::ptr::null(), |factor| factor.diagonal.data().as_ptr()),
        products: pointer(block.cross.map(|cross| &cross.blocks)),
        codes: codes.ptr_mut(),
        scales: scales.ptr_mut(),
        zeros: zeros.ptr_mut(),
        row_errors: row_errors.ptr_mut(),
        status: status.ptr_mut(),
        rows: rows as i64,
        features: features as i64,
        first: block.columns.start as i64,
        columns: width as i64,
        span_first: block.span as i64,
        span: state.error.cols() as i64,
        group: block.group as i64,
        given_grid: block.grid.is_some().into(),
        rule: c_rule(&block.rule),
    };
    accepted("vlmq_quantize_block", &args);
    let back = |x: &Buffer, like: &Matrix, columns: Range<usize>| {
        let after = Matrix::new(like.rows(), like.cols(), x.values()).unwrap();
        for row in 0..rows {
            let outside = |x: &Matrix| [&x.row(row)[..columns.start], &x.row(row)[columns.end..]].concat().bits();
            assert_eq!(outside(&after), outside(like), "row {row} outside the block");
        }
        after
    };
    let columns = block.columns.clone();
    let local = columns.start - block.span..columns.end - block.span;
    Outcome {
        codes: BlockCodes {
            codes: codes.values(),
            grid: GroupGrid { scales: scales.values(), zeros: zeros.values() },
            error: row_errors.values().iter().sum(),
        },
        row_errors: row_errors.values(),
        state: SolveState {
            residual: back(&residual, &state.residual, columns.clone()),
            carried: carried.map(|x| back(&x, state.carried.as_ref().unwrap(), columns.clone())),
            shift: shift.map(|x| back(&x, state.shift.as_ref().unwrap(), columns)),
            error: if block.factor.is_some() { back(&error, &state.error, local) } else { state.error.clone() },
            cross: state.cross.clone(),
        },
        status: status.values()[0],
    }
}

/// How many codes and scales were compared and how many differed.
#[derive(Default, Debug)]
pub(crate) struct Tally {
    pub(crate) codes: usize,
    pub(crate) wrong_codes: usize,
    pub(crate) scales: usize,
    pub(crate) wrong_scales: usize,
}

/// `|a − b| ≤ tolerance · (norm of b's row)`, row by row.
pub(crate) fn assert_close(a: &[f32], b: &[f32], tolerance: f64, what: &str) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut b.iter().map(|b| f64::from(*b)));
    assert!(off <= tolerance * size, "{what}: off by {off}, size {size}");
}

impl Tally {
    /// Compares with the CPU device; `exact` where both must agree in every code, scale and residual.
    pub(crate) fn compare(&mut self, ours: &Outcome, cpu: &Outcome, exact: bool, what: &str) {
        let rows = ours.row_errors.len();
        let (a, b) = (&ours.codes, &cpu.codes);
        let width = a.codes.len() / rows.max(1);
        let wrong_codes = a.codes.iter().zip(&b.codes).filter(|(a, b)| a != b).count();
        let wrong_scales = a.grid.scales.bits().into_iter().zip(b.grid.scales.bits()).filter(|(a, b)| a != b).count();
        self.codes += a.codes.len();
        self.scales += a.grid.scales.len();
        self.wrong_codes += wrong_codes;
        self.wrong_scales += wrong_scales;
        assert_eq!((a.codes.len(), a.grid.scales.len()), (b.codes.len(), b.grid.scales.len()));
        if exact {
            assert_eq!((wrong_codes, wrong_scales), (0, 0), "{what}");
            assert_eq!(a.grid.zeros, b.grid.zeros, "{what}");
            assert!(ours.state.residual == cpu.state.residual, "{what}: residual");
        }
        assert_eq!(ours.status, i32::MAX, "{what}");
        let mut all_agree = true;
        for row in 0..rows {
            let codes = row * width..(row + 1) * width;
            if a.codes[codes.clone()] != b.codes[codes] {
                all_agree = false;
                continue;
            }
            let close = |a: &Matrix, b: &Matrix, name: &str| {
                assert_close(a.row(row), b.row(row), 1e-5, &format!("{what}, {name}, row {row}"));
            };
            let (ours, cpu) = (&ours.state, &cpu.state);
            close(&ours.residual, &cpu.residual, "residual");
            close(&ours.error, &cpu.error, "error");
            if let (Some(a), Some(b)) = (&ours.carried, &cpu.carried) {
                close(a, b, "carried");
            }
            if let (Some(a), Some(b)) = (&ours.shift, &cpu.shift) {
                close(a, b, "shift");
            }
        }
        if all_agree {
            assert!((a.error / b.error - 1.0).abs() <= 1e-5 || a.error == b.error, "{what}: {} {}", a.error, b.error);
        }
    }

    /// The bound of the whole: float32 order may turn a rounding tie, no more.
    pub(crate) fn finish(&self, what: &str) {
        println!("{what}: {self:?}");
        assert!(self.codes > 0 && self.wrong_codes * 1000 <= self.codes, "{what}: {self:?}");
        assert!(self.wrong_scales * 1000 <= self.scales, "{what}: {self:?}");
    }
}

pub(crate) fn on_cpu(block: &ColumnBlock<'_, Matrix>, state: &SolveState<Matrix>) -> Outcome {
    let mut state = state.clone();
    let mut all = Vec::new();
    Cpu.quantize_block(block, &mut state, &mut all).unwrap();
    let codes = all.remove(0);
    Outcome { codes, row_errors: Vec::new(), state, status: i32::MAX }
}

/// Errors of rows from the outcome's residual, in float64: `‖(W − Ŵ)_span·R‖²` on the block's columns.
pub(crate) fn check_row_errors(
    outcome: &Outcome,
    block: &ColumnBlock<'_, Matrix>,
    factor: &Factor<Matrix>,
    what: &str,
) {
    for (row, &error) in outcome.row_errors.iter().enumerate() {
        let residual = outcome.state.residual.row(row);
        let exact: f64 = (block.columns.clone())
            .map(|j| {
                let sum: f64 =
                    (block.span..=j).map(|k| f64::from(residual[k]) * f64::from(factor.root.row(k)[j])).sum();
                (sum * f64::from(factor.diagonal.data()[j])).powi(2)
            })
            .sum();
        assert!((error - exact).abs() <= 1e-5 * exact, "{what}, row {row}: {error}, exactly {exact}");
    }
}

/// Runs `vlmq_group_grid` and hands back the status too.
pub(crate) fn group_grid(state: &SolveState<Matrix>, group: &Group<'_, Matrix>) -> (GroupGrid, i32) {
    let rows = state.residual.rows();
    let (mut scales, mut zeros) = (Buffer::output(F32, rows, 0), Buffer::output(U8, rows, 0));
    let mut status = Buffer::in_out(I32, &[i32::MAX], 0);
    let pointer = |x: Option<&Matrix>| x.map_or(std::ptr::null(), |x| x.data().as_ptr());
    let (factor, corrected) = (group.factor, group.factor.is_some() && group.is_span);
    let ends: Vec<i32> = group.blocks.iter().map(|block| block.end as i32).collect();
    let mut args = vlmq_group_grid_args {
        residual: state.residual.data().as_ptr(),
        error: pointer(Some(&state.error).filter(|_| corrected)),
        cross: pointer(state.cross.as_ref().filter(|_| corrected)),
        root: pointer(factor.map(|f| &f.root)),
        inverses: pointer(factor.map(|f| &f.inverses)),
        diagonal: pointer(factor.map(|f| &f.diagonal)),
        products: pointer(group.cross.filter(|_| factor.is_some()).map(|cross| &cross.blocks)),
        blocks: ends.as_ptr(),
        block_count: ends.len() as i64,
        scales: scales.ptr_mut(),
        zeros: zeros.ptr_mut(),
        status: status.ptr_mut(),
        rows: rows as i64,
        features: state.residual.cols() as i64,
        first: group.columns.start as i64,
        columns: group.columns.len() as i64,
        rule: c_rule(&group.rule),
        workspace: std::ptr::null_mut(),
        workspace_bytes: 0,
    };
    let bytes = workspace_bytes("vlmq_group_grid", &args);
    assert_eq!(bytes == 0, factor.is_none() || !corrected && group.rule.grid != Grid::Loss);
    let mut workspace = Buffer::workspace(bytes);
    (args.workspace, args.workspace_bytes) = (workspace.ptr_mut(), bytes);
    accepted("vlmq_group_grid", &args);
    workspace.bytes();
    (GroupGrid { scales: scales.values(), zeros: zeros.values() }, status.values()[0])
}
