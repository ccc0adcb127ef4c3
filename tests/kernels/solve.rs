//! The block kernel of `kernels/solve`, against the CPU device and against float64.

use crate::buffers::{Buffer, F32, F64, I32, U8};
use crate::calls::{accepted, refused_each, schedules};
use crate::solving::*;
use crate::support::kernels::{Variant, pass_under_sanitizers};
use crate::support::uniform;
use std::ops::Range;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{
    BLOCK, ColumnBlock, CrossFactor, Factor, Grid, GridRule, GroupGrid, ProductRange, SolveOps, SolveState, WIDTHS,
};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// Quantizes a whole layer on the CPU, and each of its blocks on the kernel from the same state.
fn follow(prepared: &Prepared, blocks: &[Range<usize>], w: &Matrix, job: Job, tally: &mut Tally) {
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
        let block = ColumnBlock {
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
        tally.compare(&ours, &cpu, false, &what);
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
const BLOCKS: [Range<usize>; 6] = [0..32, 32..120, 120..248, 248..265, 265..393, 393..397];

#[test]
#[ignore = "slow: many blocks on the emulator"]
fn blocks_follow_the_cpu() {
    let plain = Variant::current() == Variant::Plain;
    let (blocks, rows): (_, &[usize]) = if plain { (&BLOCKS[..], &[1, 5, 17, 33, 129]) } else { (&BLOCKS[..4], &[33]) };
    let features = blocks.last().unwrap().end;
    let prepared = Prepared::new(features, blocks);
    let mut tally = Tally::default();
    let grids = [(2, Float::F16), (3, Float::Bf16), (4, Float::F32), (8, Float::F16)];
    for (number, &rows) in rows.iter().enumerate() {
        let w = matrix(rows, features, 20 + number as u64);
        for mode in MODES {
            for (index, (bits, scale_type)) in grids.into_iter().enumerate() {
                if plain || index == mode as usize {
                    let rule = GridRule { bits, scale_type, symmetric: index % 2 == 1, ..RULE };
                    let group = [Some(16), Some(8), Some(128), None][(index + number) % 4];
                    follow(&prepared, blocks, &w, Job { mode, rule, group }, &mut tally);
                    if group.is_some() {
                        let rule = GridRule { grid: Grid::Loss, ..rule };
                        follow(&prepared, blocks, &w, Job { mode, rule, group }, &mut tally);
                    }
                }
            }
        }
    }
    tally.finish("blocks");
}

/// Every rule there is, but for the smallest zero.
fn rules(smallest_zero: u8) -> Vec<GridRule> {
    let mut rules = Vec::new();
    for bits in WIDTHS {
        for symmetric in [false, true] {
            for scale_type in [Float::F16, Float::Bf16, Float::F32] {
                let rule = |grid| GridRule { bits, symmetric, grid, scale_type, smallest_zero };
                rules.extend([rule(Grid::Minmax), rule(Grid::Mse), rule(Grid::Loss)]);
            }
        }
    }
    rules
}

/// Without corrections nothing but the grid, its search and the column loop is at work, and they round as the CPU's do.
#[test]
#[ignore = "slow: many blocks on the emulator"]
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
            for (turn, rule) in rules(index as u8 % 2).into_iter().enumerate() {
                if !plain && turn % 5 != 0 {
                    continue;
                }
                let mode = MODES[(turn + index) % 3];
                let block = ColumnBlock {
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
                tally.compare(&quantize_block(&block, &state), &on_cpu(&block, &state), true, &what);
            }
        }
    }
    assert_eq!((tally.wrong_codes, tally.wrong_scales), (0, 0));
    tally.finish("first blocks");
}

/// The state of round to nearest, which corrects nothing.
fn weights_alone(residual: Matrix) -> SolveState<Matrix> {
    SolveState { residual, carried: None, shift: None, error: Matrix::default(), cross: None }
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
        for (turn, bits) in WIDTHS.into_iter().enumerate() {
            for grid in [Grid::Minmax, Grid::Mse, Grid::Loss] {
                let scale_type = [Float::F16, Float::Bf16, Float::F32][turn % 3];
                let rule = GridRule { bits, symmetric: turn % 2 == 0, grid, scale_type, smallest_zero: turn as u8 % 2 };
                let given = GroupGrid { scales: vec![0.125; rows], zeros: vec![1; rows] };
                for given in [None, Some(&given)] {
                    let block = ColumnBlock {
                        columns: 3..columns + 3,
                        span: 0,
                        group,
                        grid: given,
                        rule,
                        factor: None,
                        cross: None,
                    };
                    let state = weights_alone(w.clone());
                    let (ours, cpu) = (quantize_block(&block, &state), on_cpu(&block, &state));
                    let what = format!("{rows}x{columns} by {group}, {rule:?}, given {}", given.is_some());
                    tally.compare(&ours, &cpu, true, &what);
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
        let values: Vec<f32> = uniform(seed).take(features * features).collect();
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
        factor: Factor { root, inverses: block_rows(&inverse), diagonal: Matrix::row_vector(vec![2.0; features]) },
        cross: CrossFactor { scaled: Matrix::default(), blocks: block_rows(&products) },
    };
    let given = GroupGrid { scales: (0..rows).map(|r| [0.125, 0.25][r % 2]).collect(), zeros: vec![128; rows] };
    for mode in MODES {
        let block = ColumnBlock {
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
            x.data_mut().iter_mut().zip(uniform(seed)).for_each(|(x, v)| *x = few(v, 100.0) / 256.0);
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
                for (c, now) in now.iter_mut().enumerate().skip(i + 1) {
                    let cross = if mode == Mode::Gptq { 0.0 } else { kept[i] * entry(&products, i, c) };
                    *now += cross - error * entry(&inverse, i, c);
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

#[test]
fn schedules_do_not_matter() {
    let blocks = [0..45, 45..110];
    let prepared = Prepared::new(110, &blocks);
    let w = matrix(41, 110, 61);
    for mode in MODES {
        let mut state = prepared.state(&w, mode, 110);
        state.error = matrix(41, 110, 62);
        let block = ColumnBlock {
            columns: 45..110,
            span: 0,
            group: 13,
            grid: None,
            rule: GridRule { grid: Grid::Mse, ..RULE },
            factor: Some(&prepared.factor),
            cross: (mode != Mode::Gptq).then_some(&prepared.cross),
        };
        schedules(0..4, || quantize_block_as_is(&block, &state).bits());
    }
    let state = weights_alone(w);
    let rule = GridRule { grid: Grid::Mse, ..RULE };
    let block = ColumnBlock { columns: 0..110, span: 0, group: 55, grid: None, rule, factor: None, cross: None };
    schedules(0..4, || quantize_block_as_is(&block, &state).bits());
}

/// From 8192 rows on fewer lanes share a row: its bits stay what they are among few rows.
#[test]
fn many_rows_are_as_few() {
    // ThreadSanitizer takes its time over so many threads.
    let (columns, modes) = match Variant::current() {
        Variant::Plain => (75, &MODES[..2]),
        Variant::Address => (18, &MODES[..2]),
        Variant::Thread => (9, &MODES[..1]),
    };
    let prepared = Prepared::whole(columns);
    let (few, many) = (37, 8192 + 3);
    let w = matrix(many, columns, 71);
    let error = matrix(many, columns, 72);
    for &mode in modes {
        let run = |rows: usize| {
            let top = |x: &Matrix| Matrix::new(rows, columns, x.data()[..rows * columns].to_vec()).unwrap();
            let mut state = prepared.state(&top(&w), mode, columns);
            state.error = top(&error);
            let block = ColumnBlock {
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
        tally.compare(&b, &cpu, false, "many rows");
        tally.finish("many rows");
        for (few, many) in a.bits().iter().zip(b.bits()) {
            // The status is the last of them.
            assert!(few[..] == many[..few.len()], "{mode:?}");
        }
    }
}

#[test]
fn a_scale_that_does_not_fit_is_told() {
    let prepared = Prepared::whole(40);
    let mut w = matrix(50, 40, 81);
    w.row_mut(33)[20] = 3e6; // beyond f16 by three bits
    w.row_mut(47)[3] = f32::NAN;
    w.row_mut(47)[4] = f32::INFINITY;
    for factor in [None, Some(&prepared.factor)] {
        let block = ColumnBlock { columns: 0..40, span: 0, group: 20, grid: None, rule: RULE, factor, cross: None };
        let span = if factor.is_some() { 40 } else { 0 };
        let state = prepared.state(&w, Mode::Gptq, span);
        assert_eq!(quantize_block(&block, &state).status, 33);
    }
}

#[test]
fn bad_arguments_are_refused() {
    let prepared = Prepared::whole(40);
    let (rows, features) = (3, 40);
    let mut floats: [_; 5] = std::array::from_fn(|_| Buffer::output(F32, rows * features, 0));
    let [residual, carried, shift, error, scales] = floats.each_mut().map(Buffer::ptr_mut);
    let mut bytes: [_; 2] = std::array::from_fn(|_| Buffer::output(U8, rows * features, 0));
    let [codes, zeros] = bytes.each_mut().map(Buffer::ptr_mut);
    let (mut row_errors, mut status) = (Buffer::output(F64, rows, 0), Buffer::output(I32, 1, 0));
    let cross = vec![0.0f32; rows * features];
    let good = vlmq_quantize_block_args {
        residual,
        carried,
        shift,
        error,
        cross: cross.as_ptr(),
        root: prepared.factor.root.data().as_ptr(),
        inverses: prepared.factor.inverses.data().as_ptr(),
        diagonal: prepared.factor.diagonal.data().as_ptr(),
        products: prepared.cross.blocks.data().as_ptr(),
        codes,
        scales,
        zeros,
        row_errors: row_errors.ptr_mut(),
        status: status.ptr_mut(),
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
    let bad: [fn(&mut vlmq_quantize_block_args); 29] = [
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
        |a| a.rule.grid = vlmq_grid(3),
        |a| a.rule.grid = vlmq_grid(7),
        |a| a.rule.scale_type = vlmq_dtype(7),
        |a| a.rule.smallest_zero = 8,
    ];
    refused_each("vlmq_quantize_block", &good, &bad);
    for empty in [vlmq_quantize_block_args { rows: 0, ..good }, vlmq_quantize_block_args { columns: 0, ..good }] {
        accepted("vlmq_quantize_block", &empty);
    }
    assert!(floats.iter().all(Buffer::is_untouched) && bytes.iter().all(Buffer::is_untouched));
    assert!(row_errors.is_untouched() && status.is_untouched());
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_the_sanitizers() {
    let tests = [
        "blocks_follow_the_cpu",
        "a_first_block_is_exact",
        "round_to_nearest_is_exact",
        "numbers_of_few_bits_are_exact",
        "schedules_do_not_matter",
        "many_rows_are_as_few",
        "a_scale_that_does_not_fit_is_told",
        "bad_arguments_are_refused",
    ];
    pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
}
