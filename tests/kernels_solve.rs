//! The solver's kernels of `kernels/solve`, against the CPU device and against float64.

mod support;

use support::guarded::{Guarded, bits, noise};
use support::kernels::{Variant, call, kernels, pass_under_sanitizers, set_seed, workspace_bytes};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{
    BLOCK, Block, BlockCodes, CrossFactor, Factor, Factored, Grid, GridRule, GroupGrid, ProductRange, ScaleType,
    SolveOps, SolveState,
};
use vlmq::tensor::Matrix;

fn matrix(rows: usize, cols: usize, seed: u64) -> Matrix {
    Matrix::new(rows, cols, noise(rows * cols, seed)).unwrap()
}

const RULE: GridRule =
    GridRule { bits: 3, symmetric: false, grid: Grid::Minmax, scale_type: ScaleType::F16, smallest_zero: 0 };

fn c_rule(rule: &GridRule) -> vlmq_grid_rule {
    vlmq_grid_rule {
        bits: rule.bits as i32,
        symmetric: rule.symmetric.into(),
        grid: match rule.grid {
            Grid::Minmax => vlmq_grid::VLMQ_MINMAX,
            Grid::Mse => vlmq_grid::VLMQ_MSE,
        },
        scale_type: match rule.scale_type {
            ScaleType::F32 => vlmq_dtype::VLMQ_F32,
            ScaleType::Bf16 => vlmq_dtype::VLMQ_BF16,
            ScaleType::F16 => vlmq_dtype::VLMQ_F16,
        },
        smallest_zero: rule.smallest_zero.into(),
    }
}

/// A layer's factor, and the GPTAQ term.
struct Prepared {
    factor: Factor<Matrix>,
    cross: CrossFactor<Matrix>,
}

impl Prepared {
    /// From correlated inputs, twice as many tokens as features.
    fn new(features: usize, blocks: &[std::ops::Range<usize>]) -> Self {
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
        Cpu.accumulate_statistics(&mut h, Some(&mut c), &u, Some(&f), None).unwrap();
        let mean = (0..features).map(|i| h.row(i)[i]).sum::<f32>() / features as f32;
        (0..features).for_each(|i| h.row_mut(i)[i] += 0.01 * mean);
        let Factored::Done(factor) = Cpu.factor(h, blocks).unwrap() else { panic!("not positive definite") };
        let cross = Cpu.cross_factor(c, &factor, blocks, 0.25).unwrap();
        Self { factor, cross }
    }

    /// No error is carried on by these products: a start of the span without corrections stays exact.
    fn state(&self, w: &Matrix, mode: Mode, span: usize) -> SolveState<Matrix> {
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
enum Mode {
    Gptq,
    Carried,
    Shift,
}

const MODES: [Mode; 3] = [Mode::Gptq, Mode::Carried, Mode::Shift];

/// What a block's kernel leaves behind.
#[derive(Clone, Debug)]
struct Outcome {
    codes: BlockCodes,
    row_errors: Vec<f64>,
    state: SolveState<Matrix>,
    status: i32,
}

impl Outcome {
    /// Everything, to compare to the last bit.
    fn bits(&self) -> Vec<Vec<u64>> {
        let state = &self.state;
        let optional = |x: &Option<Matrix>| x.as_ref().map_or_else(Vec::new, |x| bits(x.data()));
        vec![
            bits(&self.codes.codes),
            bits(&self.codes.grid.scales),
            bits(&self.codes.grid.zeros),
            bits(&self.row_errors),
            bits(state.residual.data()),
            optional(&state.carried),
            optional(&state.shift),
            bits(state.error.data()),
            vec![self.status as u64],
        ]
    }
}

fn groups_of(block: &Block<'_, Matrix>) -> usize {
    if block.grid.is_some() { 1 } else { block.columns.len() / block.group }
}

/// Runs `vlmq_quantize_block`; what it may not touch is checked.
fn quantize_block(block: &Block<'_, Matrix>, state: &SolveState<Matrix>) -> Outcome {
    let (rows, features) = (state.residual.rows(), state.residual.cols());
    let (width, groups) = (block.columns.len(), groups_of(block));
    let mut residual = Guarded::holding(state.residual.data());
    let mut carried = state.carried.as_ref().map(|x| Guarded::holding(x.data()));
    let mut shift = state.shift.as_ref().map(|x| Guarded::holding(x.data()));
    let mut error = Guarded::holding(state.error.data());
    let mut codes = Guarded::<u8>::output(rows * width);
    let (mut scales, mut zeros) = match block.grid {
        Some(grid) => (Guarded::holding(&grid.scales), Guarded::holding(&grid.zeros)),
        None => (Guarded::output(rows * groups), Guarded::output(rows * groups)),
    };
    let mut row_errors = Guarded::<f64>::output(rows);
    let mut status = Guarded::holding(&[i32::MAX]);
    let pointer = |x: Option<&Matrix>| x.map_or(std::ptr::null(), |x| x.data().as_ptr());
    let args = vlmq_quantize_block_args {
        residual: residual.ptr(),
        carried: carried.as_mut().map_or(std::ptr::null_mut(), Guarded::ptr),
        shift: shift.as_mut().map_or(std::ptr::null_mut(), Guarded::ptr),
        error: if block.factor.is_some() { error.ptr() } else { std::ptr::null_mut() },
        cross: pointer(state.cross.as_ref()),
        root: pointer(block.factor.map(|factor| &factor.root)),
        inverses: pointer(block.factor.map(|factor| &factor.inverses)),
        diagonal: block.factor.map_or(std::ptr::null(), |factor| factor.diagonal.as_ptr()),
        products: pointer(block.cross.map(|cross| &cross.blocks)),
        codes: codes.ptr(),
        scales: scales.ptr(),
        zeros: zeros.ptr(),
        row_errors: row_errors.ptr(),
        status: status.ptr(),
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
    assert_eq!(call("vlmq_quantize_block", &args), vlmq_status::VLMQ_OK);
    let back = |x: &Guarded<f32>, like: &Matrix, columns: std::ops::Range<usize>| {
        let after = Matrix::new(like.rows(), like.cols(), x.values().to_vec()).unwrap();
        for row in 0..rows {
            let outside = |x: &Matrix| bits(&[&x.row(row)[..columns.start], &x.row(row)[columns.end..]].concat());
            assert_eq!(outside(&after), outside(like), "row {row} outside the block");
        }
        after
    };
    let columns = block.columns.clone();
    let local = columns.start - block.span..columns.end - block.span;
    Outcome {
        codes: BlockCodes {
            codes: codes.values().to_vec(),
            grid: GroupGrid { scales: scales.values().to_vec(), zeros: zeros.values().to_vec() },
            error: row_errors.values().iter().sum(),
        },
        row_errors: row_errors.values().to_vec(),
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
struct Tally {
    codes: usize,
    wrong_codes: usize,
    scales: usize,
    wrong_scales: usize,
}

/// `|a − b| ≤ tolerance · (norm of b's row)`, row by row.
fn assert_close(a: &[f32], b: &[f32], tolerance: f64, what: &str) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut b.iter().map(|b| f64::from(*b)));
    assert!(off <= tolerance * size, "{what}: off by {off}, size {size}");
}

impl Tally {
    /// Compares with the CPU device; `exact` where both must agree in every code, scale and residual.
    fn compare(&mut self, ours: &Outcome, cpu: &Outcome, width: usize, exact: bool, what: &str) {
        let rows = ours.row_errors.len();
        let (a, b) = (&ours.codes, &cpu.codes);
        let wrong_codes = a.codes.iter().zip(&b.codes).filter(|(a, b)| a != b).count();
        let wrong_scales = bits(&a.grid.scales).iter().zip(bits(&b.grid.scales)).filter(|(a, b)| **a != *b).count();
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
    fn finish(&self, what: &str) {
        println!("{what}: {self:?}");
        assert!(self.codes > 0 && self.wrong_codes * 1000 <= self.codes, "{what}: {self:?}");
        assert!(self.wrong_scales * 1000 <= self.scales, "{what}: {self:?}");
    }
}

fn on_cpu(block: &Block<'_, Matrix>, state: &SolveState<Matrix>) -> Outcome {
    let mut state = state.clone();
    let codes = Cpu.quantize_block(block, &mut state).unwrap();
    Outcome { codes, row_errors: Vec::new(), state, status: i32::MAX }
}

/// Errors of rows from the outcome's residual, in float64: `‖(W − Ŵ)_span·R‖²` on the block's columns.
fn check_row_errors(outcome: &Outcome, block: &Block<'_, Matrix>, factor: &Factor<Matrix>, what: &str) {
    for (row, &error) in outcome.row_errors.iter().enumerate() {
        let residual = outcome.state.residual.row(row);
        let exact: f64 = (block.columns.clone())
            .map(|j| {
                let sum: f64 =
                    (block.span..=j).map(|k| f64::from(residual[k]) * f64::from(factor.root.row(k)[j])).sum();
                (sum * f64::from(factor.diagonal[j])).powi(2)
            })
            .sum();
        assert!((error - exact).abs() <= 1e-5 * exact, "{what}, row {row}: {error}, exactly {exact}");
    }
}

/// Quantizes a whole layer on the CPU, and each of its blocks on the kernel from the same state.
fn follow(prepared: &Prepared, blocks: &[std::ops::Range<usize>], w: &Matrix, job: Job, tally: &mut Tally) {
    let features = w.cols();
    let mut state = prepared.state(w, job.mode, features);
    for columns in blocks {
        if columns.start > 0 {
            let range = ProductRange { inner: 0..columns.start, columns: columns.clone(), target: columns.start };
            Cpu.add_product(&mut state.error, &state.residual, &prepared.factor.root, &range).unwrap();
            if let (Some(cross), Some(carried)) = (&mut state.cross, &state.carried) {
                Cpu.add_product(cross, carried, &prepared.cross.scaled, &range).unwrap();
                if let Some(shift) = &state.shift {
                    Cpu.add_product(cross, shift, &prepared.factor.root, &range).unwrap();
                }
            }
        }
        let given = GroupGrid {
            scales: (0..w.rows()).map(|r| 0.25 + (r % 3) as f32 / 16.0).collect(),
            zeros: vec![1 << (job.rule.bits - 1); w.rows()],
        };
        let block = Block {
            columns: columns.clone(),
            span: 0,
            group: job.group.map_or(BLOCK, |group| if columns.len() % group == 0 { group } else { columns.len() }),
            grid: job.group.is_none().then_some(&given),
            rule: job.rule,
            factor: Some(&prepared.factor),
            cross: (job.mode != Mode::Gptq).then_some(&prepared.cross),
        };
        let what = format!("{job:?}, {} rows, columns {columns:?} of {features}", w.rows());
        let ours = quantize_block(&block, &state);
        let cpu = on_cpu(&block, &state);
        tally.compare(&ours, &cpu, columns.len(), false, &what);
        check_row_errors(&ours, &block, &prepared.factor, &what);
        state = cpu.state;
    }
}

#[derive(Clone, Copy, Debug)]
struct Job {
    mode: Mode,
    rule: GridRule,
    /// Columns of a group, or a given grid.
    group: Option<usize>,
}

/// Blocks of each width that matters: narrow, uneven, whole; starts that are and are not multiples of 16 bytes.
const BLOCKS: [std::ops::Range<usize>; 6] = [0..32, 32..120, 120..248, 248..265, 265..393, 393..397];

#[test]
fn blocks_follow_the_cpu() {
    let prepared = Prepared::new(397, &BLOCKS);
    let mut tally = Tally::default();
    let rows: &[usize] = if Variant::current() == Variant::Plain { &[1, 5, 17, 33, 129] } else { &[33] };
    for (number, &rows) in rows.iter().enumerate() {
        let w = matrix(rows, 397, 20 + number as u64);
        for mode in MODES {
            for (index, (bits, scale_type)) in
                [(2, ScaleType::F16), (3, ScaleType::Bf16), (4, ScaleType::F32), (8, ScaleType::F16)]
                    .into_iter()
                    .enumerate()
            {
                if Variant::current() != Variant::Plain && index != mode as usize {
                    continue;
                }
                let rule = GridRule { bits, scale_type, symmetric: index % 2 == 1, ..RULE };
                let group = [Some(16), Some(8), Some(128), None][(index + number) % 4];
                follow(&prepared, &BLOCKS, &w, Job { mode, rule, group }, &mut tally);
            }
        }
    }
    tally.finish("blocks");
}

/// Without corrections nothing but the grid, its search and the column loop is at work, and they round as the CPU's do.
#[test]
fn a_first_block_is_exact() {
    let mut tally = Tally::default();
    let plain = Variant::current() == Variant::Plain;
    let shapes: &[(usize, &[usize])] =
        if plain { &[(128, &[16, 32, 64, 128]), (96, &[8, 96]), (60, &[5, 30])] } else { &[(60, &[30])] };
    for &(columns, groups) in shapes {
        let blocks = [0..columns, columns..columns + 3];
        let prepared = Prepared::new(columns + 3, &blocks);
        let mut w = matrix(17, columns + 3, 31);
        w.row_mut(2)[..columns].fill(0.0); // a group of zeros
        w.row_mut(3)[..columns].iter_mut().for_each(|w| *w = w.abs());
        w.row_mut(4)[..columns].iter_mut().for_each(|w| *w *= 1e-9);
        w.row_mut(5)[..columns].iter_mut().for_each(|w| *w *= 1e-38);
        for (index, &group) in groups.iter().enumerate() {
            for (turn, bits) in [2, 3, 4, 8].into_iter().enumerate() {
                for symmetric in [false, true] {
                    for grid in [Grid::Minmax, Grid::Mse] {
                        for scale_type in [ScaleType::F16, ScaleType::Bf16, ScaleType::F32] {
                            if !plain && (turn + scale_type as usize) % 3 != 0 {
                                continue;
                            }
                            let smallest_zero = ((turn + index) % 2) as u8;
                            let rule = GridRule { bits, symmetric, grid, scale_type, smallest_zero };
                            let mode = MODES[(turn + index) % 3];
                            let block = Block {
                                columns: 0..columns,
                                span: 0,
                                group,
                                grid: None,
                                rule,
                                factor: Some(&prepared.factor),
                                cross: (mode != Mode::Gptq).then_some(&prepared.cross),
                            };
                            let what = format!("{mode:?} {rule:?} {columns} by {group}");
                            let state = prepared.state(&w, mode, columns);
                            tally.compare(
                                &quantize_block(&block, &state),
                                &on_cpu(&block, &state),
                                columns,
                                true,
                                &what,
                            );
                        }
                    }
                }
            }
        }
    }
    assert_eq!((tally.wrong_codes, tally.wrong_scales), (0, 0));
    tally.finish("first blocks");
}

/// Round to nearest, by narrow and wide groups or to a given grid: every bit is the CPU's.
#[test]
fn round_to_nearest_is_exact() {
    let mut tally = Tally::default();
    let plain = Variant::current() == Variant::Plain;
    let shapes: &[(usize, usize, usize)] = match plain {
        true => &[(1, 1, 1), (5, 32, 32), (17, 96, 8), (33, 384, 128), (129, 127, 127), (9, 1030, 515)],
        false => &[(1, 1, 1), (9, 66, 33)],
    };
    for &(rows, columns, group) in shapes {
        let w = matrix(rows, columns + 5, 41);
        for (turn, bits) in [2, 3, 4, 8].into_iter().enumerate() {
            for grid in [Grid::Minmax, Grid::Mse] {
                let scale_type = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32][turn % 3];
                let rule = GridRule { bits, symmetric: turn % 2 == 0, grid, scale_type, smallest_zero: turn as u8 % 2 };
                let given = GroupGrid { scales: vec![0.125; rows], zeros: vec![1; rows] };
                for given in [None, Some(&given)] {
                    let block =
                        Block { columns: 3..columns + 3, span: 0, group, grid: given, rule, factor: None, cross: None };
                    let state = SolveState {
                        residual: w.clone(),
                        carried: None,
                        shift: None,
                        error: Matrix::default(),
                        cross: None,
                    };
                    let (ours, cpu) = (quantize_block(&block, &state), on_cpu(&block, &state));
                    let what = format!("{rows}x{columns} by {group}, {rule:?}, given {}", given.is_some());
                    tally.compare(&ours, &cpu, columns, true, &what);
                    for (row, &error) in ours.row_errors.iter().enumerate() {
                        let residual = &ours.state.residual.row(row)[3..columns + 3];
                        let exact: f64 = residual.iter().map(|x| f64::from(*x).powi(2)).sum();
                        assert!((error - exact).abs() <= 1e-12 * exact, "{what}");
                    }
                }
            }
        }
    }
    assert_eq!((tally.wrong_codes, tally.wrong_scales), (0, 0));
    tally.finish("round to nearest");
}

/// Numbers of few bits, so that nothing rounds but the weights: all results are those of a plain loop in float64.
#[test]
fn numbers_of_few_bits_are_exact() {
    let (features, first, width) = (140, 7, 128);
    let rows = if Variant::current() == Variant::Plain { 67 } else { 9 };
    let few = |x: f32, steps: f32| (x * steps).round();
    let mut w = matrix(rows, features, 51);
    w.data_mut().iter_mut().for_each(|w| *w = few(*w, 1000.0) / 256.0);
    // Sparse, so that sums stay small: rows early in the block reach columns late in it.
    let sparse = |seed, diagonal: f32| {
        let mut x = Matrix::zeros(features, features);
        let values = noise(features * features, seed);
        for i in 0..features {
            for j in i + 1..features {
                let value = values[i * features + j];
                x.row_mut(i)[j] = if i % 5 == 0 && j % 5 != 0 { few(value, 1.4) } else { 0.0 };
            }
            x.row_mut(i)[i] = diagonal;
        }
        x
    };
    let block_rows = |x: &Matrix| {
        let mut out = Matrix::zeros(features, BLOCK);
        for i in first..first + width {
            out.row_mut(i)[..width].copy_from_slice(&x.row(i)[first..first + width]);
        }
        out
    };
    let (root, inverse, products) = (sparse(52, 1.0), sparse(53, 1.0), sparse(54, 0.0));
    let prepared = Prepared {
        factor: Factor { root, inverses: block_rows(&inverse), diagonal: vec![2.0; features] },
        cross: CrossFactor { scaled: Matrix::default(), blocks: block_rows(&products) },
    };
    let given = GroupGrid { scales: (0..rows).map(|r| [0.125, 0.25][r % 2]).collect(), zeros: vec![128; rows] };
    for mode in MODES {
        let block = Block {
            columns: first..first + width,
            span: first - 2,
            group: width,
            grid: Some(&given),
            rule: GridRule { bits: 8, ..RULE },
            factor: Some(&prepared.factor),
            cross: (mode != Mode::Gptq).then_some(&prepared.cross),
        };
        let mut state = prepared.state(&w, mode, width + 3);
        let fill = |x: &mut Matrix, seed| {
            let values = noise(x.data().len(), seed);
            x.data_mut().iter_mut().zip(values).for_each(|(x, v)| *x = few(v, 100.0) / 256.0);
        };
        fill(&mut state.error, 55);
        state.cross.iter_mut().for_each(|x| fill(x, 56));
        let ours = quantize_block(&block, &state);
        for row in 0..rows {
            let acc: Vec<f64> = (2..width + 2)
                .map(|c| {
                    let cross = state.cross.as_ref().map_or(0.0, |x| x.row(row)[c]);
                    f64::from(state.error.row(row)[c]) + f64::from(cross)
                })
                .collect();
            let entry = |x: &Matrix, k: usize, c: usize| f64::from(x.row(first + k)[first + c]);
            let mut now: Vec<f64> = (0..width)
                .map(|c| {
                    let correction: f64 = (0..width).map(|k| acc[k] * entry(&inverse, k, c)).sum();
                    f64::from(w.row(row)[first + c]) + correction
                })
                .collect();
            let scale = f64::from(given.scales[row]);
            let mut error_row = 0.0;
            let (mut residual, mut kept) = (vec![0.0; width], vec![0.0; width]);
            for i in 0..width {
                let level = (now[i] / scale).round_ties_even().clamp(-128.0, 127.0);
                assert_eq!(f64::from(ours.codes.codes[row * width + i]), level + 128.0, "{mode:?} [{row}, {i}]");
                kept[i] = now[i];
                let error = now[i] - level * scale;
                residual[i] = f64::from(w.row(row)[first + i]) - level * scale;
                for c in i + 1..width {
                    now[c] -= error * entry(&inverse, i, c);
                    if mode != Mode::Gptq {
                        now[c] += kept[i] * entry(&products, i, c);
                    }
                }
            }
            let product = |x: &[f64], by: &Matrix, c: usize| (0..width).map(|k| x[k] * entry(by, k, c)).sum::<f64>();
            let rounded: Vec<f64> = (0..width).map(|c| f64::from(w.row(row)[first + c]) - residual[c]).collect();
            let errors: Vec<f64> = (0..width).map(|c| kept[c] - rounded[c]).collect();
            for c in 0..width {
                let what = format!("{mode:?} [{row}, {c}]");
                assert_eq!(f64::from(ours.state.residual.row(row)[first + c]), residual[c], "{what} residual");
                let error = f64::from(state.error.row(row)[2 + c]) + product(&residual, &prepared.factor.root, c);
                assert_eq!(f64::from(ours.state.error.row(row)[2 + c]), error, "{what} error");
                error_row += (2.0 * error).powi(2);
                if let Some(carried) = &ours.state.carried {
                    let expected = if mode == Mode::Shift { rounded[c] } else { kept[c] };
                    assert_eq!(f64::from(carried.row(row)[first + c]), expected, "{what} carried");
                }
                if let Some(shift) = &ours.state.shift {
                    assert_eq!(f64::from(shift.row(row)[first + c]), product(&errors, &products, c), "{what} shift");
                }
            }
            assert_eq!(ours.row_errors[row], error_row, "{mode:?} row {row}");
        }
    }
}

/// One seed's run, and what it must be with each.
fn same_with_every_seed(run: impl Fn() -> Outcome) -> Outcome {
    let first = run();
    for seed in [1, 2, 3] {
        set_seed(kernels(), seed);
        assert_eq!(run().bits(), first.bits(), "seed {seed}");
    }
    set_seed(kernels(), 0);
    first
}

#[test]
fn schedules_do_not_matter() {
    let blocks = [0..45, 45..110];
    let prepared = Prepared::new(110, &blocks);
    let w = matrix(41, 110, 61);
    for mode in MODES {
        let mut state = prepared.state(&w, mode, 110);
        state.error = matrix(41, 110, 62);
        let block = Block {
            columns: 45..110,
            span: 0,
            group: 13,
            grid: None,
            rule: GridRule { grid: Grid::Mse, ..RULE },
            factor: Some(&prepared.factor),
            cross: (mode != Mode::Gptq).then_some(&prepared.cross),
        };
        same_with_every_seed(|| quantize_block(&block, &state));
    }
    let state = SolveState { residual: w, carried: None, shift: None, error: Matrix::default(), cross: None };
    let rule = GridRule { grid: Grid::Mse, ..RULE };
    let block = Block { columns: 0..110, span: 0, group: 55, grid: None, rule, factor: None, cross: None };
    same_with_every_seed(|| quantize_block(&block, &state));
}

/// From 8192 rows on fewer lanes share a row: its bits stay what they are among few rows.
#[test]
fn many_rows_are_as_few() {
    let columns = if Variant::current() == Variant::Plain { 75 } else { 18 };
    let prepared = Prepared::new(columns, &[0..columns]);
    let (few, many) = (37, 8192 + 3);
    let w = matrix(many, columns, 71);
    let error = matrix(many, columns, 72);
    for mode in MODES {
        let run = |rows: usize| {
            let top = |x: &Matrix| Matrix::new(rows, columns, x.data()[..rows * columns].to_vec()).unwrap();
            let mut state = prepared.state(&top(&w), mode, columns);
            state.error = top(&error);
            let block = Block {
                columns: 0..columns,
                span: 0,
                group: columns / 3,
                grid: None,
                rule: RULE,
                factor: Some(&prepared.factor),
                cross: (mode != Mode::Gptq).then_some(&prepared.cross),
            };
            (quantize_block(&block, &state), on_cpu(&block, &state))
        };
        let ((a, _), (b, cpu)) = (run(few), run(many));
        let mut tally = Tally::default();
        tally.compare(&b, &cpu, columns, false, "many rows");
        tally.finish("many rows");
        for (few, many) in a.bits().iter().zip(b.bits()) {
            // The status is the last of them.
            assert!(few[..] == many[..few.len()], "{mode:?}");
        }
    }
}

#[test]
fn a_scale_that_does_not_fit_is_told() {
    let prepared = Prepared::new(40, &[0..40]);
    let mut w = matrix(50, 40, 81);
    w.row_mut(33)[20] = 3e6; // beyond f16 by three bits
    w.row_mut(47)[3] = f32::NAN;
    w.row_mut(47)[4] = f32::INFINITY;
    for factor in [None, Some(&prepared.factor)] {
        let block = Block { columns: 0..40, span: 0, group: 20, grid: None, rule: RULE, factor, cross: None };
        let span = if factor.is_some() { 40 } else { 0 };
        let state = prepared.state(&w, Mode::Gptq, span);
        assert_eq!(quantize_block(&block, &state).status, 33);
    }
    let state = prepared.state(&w, Mode::Gptq, 40);
    assert_eq!(group_grid(&state, 0..40, RULE, None, &[]).1, 33);
    assert_eq!(group_grid(&state, 0..40, RULE, Some(&prepared.factor), &[40]).1, 33);
}

/// Runs `vlmq_group_grid` and hands back the status too.
fn group_grid(
    state: &SolveState<Matrix>,
    columns: std::ops::Range<usize>,
    rule: GridRule,
    factor: Option<&Factor<Matrix>>,
    ends: &[i32],
) -> (GroupGrid, i32) {
    let rows = state.residual.rows();
    let (mut scales, mut zeros) = (Guarded::<f32>::output(rows), Guarded::<u8>::output(rows));
    let mut status = Guarded::holding(&[i32::MAX]);
    let factor_matrix = |x: fn(&Factor<Matrix>) -> &Matrix| factor.map_or(std::ptr::null(), |f| x(f).data().as_ptr());
    let mut args = vlmq_group_grid_args {
        residual: state.residual.data().as_ptr(),
        error: if factor.is_some() { state.error.data().as_ptr() } else { std::ptr::null() },
        cross: match (&state.cross, factor) {
            (Some(cross), Some(_)) => cross.data().as_ptr(),
            _ => std::ptr::null(),
        },
        root: factor_matrix(|f| &f.root),
        inverses: factor_matrix(|f| &f.inverses),
        blocks: ends.as_ptr(),
        block_count: ends.len() as i64,
        scales: scales.ptr(),
        zeros: zeros.ptr(),
        status: status.ptr(),
        rows: rows as i64,
        features: state.residual.cols() as i64,
        first: columns.start as i64,
        columns: columns.len() as i64,
        rule: c_rule(&rule),
        workspace: std::ptr::null_mut(),
        workspace_bytes: 0,
    };
    let bytes = workspace_bytes("vlmq_group_grid", &args);
    assert_eq!(bytes == 0, factor.is_none());
    // NaN, aligned to 256 bytes, a guard behind it.
    let mut workspace = vec![0xffu8; bytes + 512];
    let start = workspace.as_ptr().align_offset(256);
    (args.workspace, args.workspace_bytes) = (workspace[start..].as_mut_ptr().cast(), bytes);
    assert_eq!(call("vlmq_group_grid", &args), vlmq_status::VLMQ_OK);
    assert!(workspace[start + bytes..].iter().all(|&byte| byte == 0xff), "written behind the work space");
    (GroupGrid { scales: scales.values().to_vec(), zeros: zeros.values().to_vec() }, status.values()[0])
}

#[test]
fn grids_of_wide_groups() {
    let plain = Variant::current() == Variant::Plain;
    let features = if plain { 651 } else { 150 };
    let ends: &[usize] = if plain { &[11, 139, 203, 331, 448, 651] } else { &[11, 139, 150] };
    let mut blocks: Vec<std::ops::Range<usize>> = Vec::new();
    for &end in ends {
        let mut start = blocks.last().map_or(0, |block| block.end);
        while start < end {
            blocks.push(start..end.min(start + BLOCK));
            start = blocks.last().unwrap().end;
        }
    }
    let prepared = Prepared::new(features, &blocks);
    let mut tally = Tally::default();
    for (number, rows) in [1, 17, 33, 129].into_iter().take(if plain { 4 } else { 2 }).enumerate() {
        for (turn, span) in [blocks[1].start..features, 0..blocks[2].end].into_iter().enumerate() {
            for (mode, grid) in [(Mode::Gptq, Grid::Minmax), (Mode::Carried, Grid::Minmax), (Mode::Gptq, Grid::Mse)] {
                let mut state = prepared.state(&matrix(rows, features, 90 + number as u64), mode, span.len());
                state.error = matrix(rows, span.len(), 91);
                state.error.data_mut().iter_mut().for_each(|x| *x *= 0.3);
                state.cross = (mode != Mode::Gptq).then(|| matrix(rows, span.len(), 92));
                let rule = GridRule { bits: 4, symmetric: turn == 1, grid, scale_type: ScaleType::F32, ..RULE };
                let inside: Vec<_> =
                    blocks.iter().filter(|b| span.start <= b.start && b.end <= span.end).cloned().collect();
                let ends: Vec<i32> = inside.iter().map(|block| block.end as i32).collect();
                let what = format!("{rows} rows, {span:?}, {mode:?}, {rule:?}");

                let cpu = Cpu.group_grid(&state, span.clone(), rule, None, &[]).unwrap();
                let (ours, status) = group_grid(&state, span.clone(), rule, None, &[]);
                assert_eq!((bits(&ours.scales), &ours.zeros), (bits(&cpu.scales), &cpu.zeros), "{what}");
                assert_eq!(status, i32::MAX);

                let factor = Some(&prepared.factor);
                let cpu = Cpu.group_grid(&state, span.clone(), rule, factor, &inside).unwrap();
                let (ours, status) = group_grid(&state, span.clone(), rule, factor, &ends);
                assert_eq!(status, i32::MAX);
                let exact = corrected(&state, span.clone(), &prepared.factor);
                for row in 0..rows {
                    tally.scales += 1;
                    let off = |a: f32, b: f64| (f64::from(a) / b - 1.0).abs();
                    // Another float32 order: the last bits of a range, or another candidate among equals.
                    tally.wrong_scales += usize::from(off(ours.scales[row], cpu.scales[row].into()) > 1e-5);
                    if grid == Grid::Minmax {
                        let low = exact[row].iter().copied().fold(0.0, f64::min);
                        let high = exact[row].iter().copied().fold(0.0, f64::max);
                        let range = if turn == 1 { 2.0 * high.max(-low) } else { high - low };
                        let scale = ours.scales[row];
                        assert!(off(scale, range / 15.0) < 1e-5, "{what} row {row}: {scale}, {}", range / 15.0);
                        assert_eq!(ours.zeros[row], cpu.zeros[row], "{what} row {row}");
                    }
                }
                if number == 1 {
                    set_seed(kernels(), 5);
                    assert_eq!(group_grid(&state, span.clone(), rule, factor, &ends).0, ours, "{what}");
                    set_seed(kernels(), 0);
                }
            }
        }
    }
    println!("wide groups: {tally:?}");
    assert!(tally.wrong_scales * 50 <= tally.scales, "{tally:?}");
}

/// `W + (error + cross)·R̄⁻¹` by substitution in float64.
fn corrected(state: &SolveState<Matrix>, span: std::ops::Range<usize>, factor: &Factor<Matrix>) -> Vec<Vec<f64>> {
    let row = |r: usize| {
        let mut solved = vec![0.0; span.len()];
        for c in 0..span.len() {
            let cross = state.cross.as_ref().map_or(0.0, |x| x.row(r)[c]);
            let acc = f64::from(state.error.row(r)[c]) + f64::from(cross);
            let before = (0..c).map(|k| solved[k] * f64::from(factor.root.row(span.start + k)[span.start + c]));
            solved[c] = acc - before.sum::<f64>();
        }
        let w = &state.residual.row(r)[span.clone()];
        w.iter().zip(&solved).map(|(w, s)| f64::from(*w) + s).collect()
    };
    (0..state.residual.rows()).map(row).collect()
}

#[test]
fn bad_arguments_are_refused() {
    let prepared = Prepared::new(40, &[0..40]);
    let (rows, features) = (3, 40);
    let mut floats: [Guarded<f32>; 5] = std::array::from_fn(|_| Guarded::output(rows * features));
    let [residual, carried, shift, error, scales] = floats.each_mut().map(Guarded::ptr);
    let mut bytes: [Guarded<u8>; 2] = std::array::from_fn(|_| Guarded::output(rows * features));
    let [codes, zeros] = bytes.each_mut().map(Guarded::ptr);
    let (mut row_errors, mut status) = (Guarded::<f64>::output(rows), Guarded::<i32>::output(1));
    let cross = vec![0.0f32; rows * features];
    let good = vlmq_quantize_block_args {
        residual,
        carried,
        shift,
        error,
        cross: cross.as_ptr(),
        root: prepared.factor.root.data().as_ptr(),
        inverses: prepared.factor.inverses.data().as_ptr(),
        diagonal: prepared.factor.diagonal.as_ptr(),
        products: prepared.cross.blocks.data().as_ptr(),
        codes,
        scales,
        zeros,
        row_errors: row_errors.ptr(),
        status: status.ptr(),
        rows: rows as i64,
        features: features as i64,
        first: 8,
        columns: 32,
        span_first: 0,
        span: 40,
        group: 16,
        given_grid: 0,
        rule: c_rule(&RULE),
    };
    let bad: [fn(&mut vlmq_quantize_block_args); 27] = [
        |a| a.residual = std::ptr::null_mut(),
        |a| a.carried = std::ptr::null_mut(),
        |a| a.error = std::ptr::null_mut(),
        |a| a.root = std::ptr::null(),
        |a| a.inverses = std::ptr::null(),
        |a| a.diagonal = std::ptr::null(),
        |a| a.products = std::ptr::null(),
        |a| a.codes = std::ptr::null_mut(),
        |a| a.scales = std::ptr::null_mut(),
        |a| a.zeros = std::ptr::null_mut(),
        |a| a.row_errors = std::ptr::null_mut(),
        |a| a.status = std::ptr::null_mut(),
        |a| a.rows = -1,
        |a| a.rows = 1 << 31,
        |a| a.features = 39,
        |a| a.first = -1,
        |a| a.first = 9,
        |a| a.columns = -1,
        |a| (a.features, a.span, a.columns, a.group) = (400, 400, 144, 16),
        |a| a.span_first = 9,
        |a| a.span = 39,
        |a| a.span = 41,
        |a| a.group = 12,
        |a| a.group = 0,
        |a| a.rule.bits = 5,
        |a| a.rule.scale_type = vlmq_dtype(7),
        |a| a.rule.smallest_zero = 8,
    ];
    for (number, spoil) in bad.iter().enumerate() {
        let mut args = good;
        spoil(&mut args);
        assert_eq!(call("vlmq_quantize_block", &args), vlmq_status::VLMQ_BAD_ARGUMENT, "{number}");
    }
    for empty in [vlmq_quantize_block_args { rows: 0, ..good }, vlmq_quantize_block_args { columns: 0, ..good }] {
        assert_eq!(call("vlmq_quantize_block", &empty), vlmq_status::VLMQ_OK);
    }

    let ends = [16, 40];
    let mut workspace = vec![0u8; 1024];
    let start = workspace.as_ptr().align_offset(256);
    let good = vlmq_group_grid_args {
        residual,
        error,
        cross: cross.as_ptr(),
        root: good.root,
        inverses: good.inverses,
        blocks: ends.as_ptr(),
        block_count: 2,
        scales,
        zeros,
        status: good.status,
        rows: rows as i64,
        features: features as i64,
        first: 8,
        columns: 32,
        rule: good.rule,
        workspace: workspace[start..].as_mut_ptr().cast(),
        workspace_bytes: 3 * 32 * 4,
    };
    assert_eq!(workspace_bytes("vlmq_group_grid", &good), good.workspace_bytes);
    let bad: [fn(&mut vlmq_group_grid_args); 17] = [
        |a| a.residual = std::ptr::null(),
        |a| a.error = std::ptr::null(),
        |a| a.root = std::ptr::null(),
        |a| a.inverses = std::ptr::null(),
        |a| a.blocks = std::ptr::null(),
        |a| a.block_count = 0,
        |a| a.block_count = 1,
        |a| a.scales = std::ptr::null_mut(),
        |a| a.zeros = std::ptr::null_mut(),
        |a| a.status = std::ptr::null_mut(),
        |a| a.rows = -3,
        |a| a.first = 16,
        |a| a.columns = 31,
        |a| a.rule.grid = vlmq_grid(2),
        |a| a.workspace = std::ptr::null_mut(),
        |a| a.workspace = a.workspace.wrapping_byte_add(16),
        |a| a.workspace_bytes -= 1,
    ];
    for (number, spoil) in bad.iter().enumerate() {
        let mut args = good;
        spoil(&mut args);
        assert_eq!(call("vlmq_group_grid", &args), vlmq_status::VLMQ_BAD_ARGUMENT, "{number}");
    }
    assert_eq!(call("vlmq_group_grid", &vlmq_group_grid_args { rows: 0, ..good }), vlmq_status::VLMQ_OK);

    assert!(floats.iter().all(|x| x.values().iter().all(|x| x.is_nan())), "written to");
    assert!(bytes.iter().all(|x| x.values().iter().all(|&x| x == 0xff)), "written to");
    assert!(row_errors.values().iter().all(|x| x.is_nan()));
    assert_eq!(status.values(), Guarded::<i32>::output(1).values());
}

#[test]
fn small_cases_pass_under_the_sanitizers() {
    let tests = [
        "blocks_follow_the_cpu",
        "a_first_block_is_exact",
        "round_to_nearest_is_exact",
        "numbers_of_few_bits_are_exact",
        "schedules_do_not_matter",
        "many_rows_are_as_few",
        "a_scale_that_does_not_fit_is_told",
        "grids_of_wide_groups",
        "bad_arguments_are_refused",
    ];
    pass_under_sanitizers(&tests, &[("vlmq_kernels", "kernels")]);
}
