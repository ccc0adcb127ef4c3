//! The kernel that finds the grid of a wide group, against the CPU device and against float64.

use crate::buffers::{Bits, Buffer, F32, I32, U8};
use crate::calls::{accepted, refused_each, schedules};
use crate::solving::*;
use crate::support::kernels::{Variant, pass_under_sanitizers, workspace_bytes};
use std::ops::Range;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{BLOCK, Factor, Grid, GridRule, Group, SolveOps, SolveState};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

#[test]
fn grids_of_wide_groups() {
    let plain = Variant::current() == Variant::Plain;
    let features = if plain { 651 } else { 150 };
    let ends: &[usize] = if plain { &[11, 139, 203, 331, 448, 651] } else { &[11, 139, 150] };
    let mut blocks: Vec<Range<usize>> = Vec::new();
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
            for (mode, grid) in [
                (Mode::Gptq, Grid::Minmax),
                (Mode::Carried, Grid::Minmax),
                (Mode::Gptq, Grid::Mse),
                (Mode::Gptq, Grid::Loss),
                (Mode::Carried, Grid::Loss),
            ] {
                let mut state = prepared.state(&matrix(rows, features, 90 + number as u64), mode, span.len());
                state.error = matrix(rows, span.len(), 91);
                state.error.data_mut().iter_mut().for_each(|x| *x *= 0.3);
                state.cross = (mode != Mode::Gptq).then(|| matrix(rows, span.len(), 92));
                let rule = GridRule { bits: 4, symmetric: turn == 1, grid, scale_type: Float::F32, ..RULE };
                let inside: Vec<_> =
                    blocks.iter().filter(|b| span.start <= b.start && b.end <= span.end).cloned().collect();
                let what = format!("{rows} rows, {span:?}, {mode:?}, {rule:?}");
                let group = |factor, is_span| Group {
                    columns: span.clone(),
                    blocks: &inside,
                    rule,
                    factor,
                    cross: (mode != Mode::Gptq).then_some(&prepared.cross),
                    is_span,
                };

                // Of the weights as they are all devices know the same bits.
                for factor in [None, Some(&prepared.factor)] {
                    let cpu = Cpu.group_grid(&state, &group(factor, false)).unwrap();
                    let (ours, status) = group_grid(&state, &group(factor, false));
                    assert_eq!(ours.bits(), cpu.bits(), "{what}");
                    assert_eq!(status, i32::MAX);
                }

                let corrected_group = group(Some(&prepared.factor), true);
                let cpu = Cpu.group_grid(&state, &corrected_group).unwrap();
                let (ours, status) = group_grid(&state, &corrected_group);
                assert_eq!(status, i32::MAX);
                let exact = corrected(&state, span.clone(), &prepared.factor);
                for (row, exact) in exact.iter().enumerate() {
                    tally.scales += 1;
                    let off = |a: f32, b: f64| (f64::from(a) / b - 1.0).abs();
                    // Another float32 order: the last bits of a range, or another candidate among equals.
                    tally.wrong_scales += usize::from(off(ours.scales[row], cpu.scales[row].into()) > 1e-5);
                    if grid == Grid::Minmax {
                        let low = exact.iter().copied().fold(0.0, f64::min);
                        let high = exact.iter().copied().fold(0.0, f64::max);
                        let range = if turn == 1 { 2.0 * high.max(-low) } else { high - low };
                        let scale = ours.scales[row];
                        assert!(off(scale, range / 15.0) < 1e-5, "{what} row {row}: {scale}, {}", range / 15.0);
                        assert_eq!(ours.zeros[row], cpu.zeros[row], "{what} row {row}");
                    }
                }
                if number == 1 {
                    let again = schedules(5..7, || group_grid(&state, &corrected_group).0.bits());
                    assert!(again == ours.bits(), "{what}");
                }
            }
        }
    }
    println!("wide groups: {tally:?}");
    assert!(tally.wrong_scales * 200 <= tally.scales, "{tally:?}");
}

/// `W + (error + cross)·R̄⁻¹` by substitution in float64.
fn corrected(state: &SolveState<Matrix>, span: Range<usize>, factor: &Factor<Matrix>) -> Vec<Vec<f64>> {
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
fn a_scale_that_does_not_fit_is_told() {
    let prepared = Prepared::whole(40);
    let mut w = matrix(50, 40, 81);
    w.row_mut(33)[20] = 3e6; // beyond f16 by three bits
    w.row_mut(47)[3] = f32::NAN;
    w.row_mut(47)[4] = f32::INFINITY;
    let state = prepared.state(&w, Mode::Gptq, 40);
    for grid in [Grid::Minmax, Grid::Mse, Grid::Loss] {
        for factor in [None, Some(&prepared.factor)] {
            let rule = GridRule { grid, ..RULE };
            let blocks = std::slice::from_ref(&(0..40));
            let group = Group { columns: 0..40, blocks, rule, factor, cross: None, is_span: true };
            assert_eq!(group_grid(&state, &group).1, 33, "{grid:?}");
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let prepared = Prepared::new(40, &[0..16, 16..40]);
    let (rows, features) = (3, 40);
    let input = vec![0.0f32; rows * features];
    let (mut scales, mut zeros) = (Buffer::output(F32, rows, 0), Buffer::output(U8, rows, 0));
    let mut status = Buffer::output(I32, 1, 0);
    let ends = [16, 40];
    let mut workspace = Buffer::workspace(3 * 32 * 4);
    let good = vlmq_group_grid_args {
        residual: input.as_ptr(),
        error: input.as_ptr(),
        cross: input.as_ptr(),
        root: prepared.factor.root.data().as_ptr(),
        inverses: prepared.factor.inverses.data().as_ptr(),
        diagonal: prepared.factor.diagonal.data().as_ptr(),
        products: prepared.cross.blocks.data().as_ptr(),
        blocks: ends.as_ptr(),
        block_count: 2,
        scales: scales.ptr_mut(),
        zeros: zeros.ptr_mut(),
        status: status.ptr_mut(),
        rows: rows as i64,
        features: features as i64,
        first: 8,
        columns: 32,
        rule: c_rule(&RULE),
        workspace: workspace.ptr_mut(),
        workspace_bytes: 3 * 32 * 4,
    };
    assert_eq!(workspace_bytes("vlmq_group_grid", &good), good.workspace_bytes);
    let bad: [fn(&mut vlmq_group_grid_args); 22] = [
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
        |a| a.rule.bits = 5,
        |a| a.rule.grid = vlmq_grid(3),
        |a| a.rule.grid = vlmq_grid(7),
        |a| a.rule.scale_type = vlmq_dtype(7),
        |a| a.workspace = std::ptr::null_mut(),
        |a| a.workspace = a.workspace.wrapping_byte_add(16),
        |a| a.workspace_bytes -= 1,
        |a| {
            a.rule.grid = vlmq_grid::VLMQ_LOSS;
            a.diagonal = std::ptr::null();
        },
        |a| a.rule.grid = vlmq_grid::VLMQ_LOSS, // which takes more work space
    ];
    refused_each("vlmq_group_grid", &good, &bad);
    let mut unknown = good;
    unknown.rule.grid = vlmq_grid(7);
    assert_eq!(workspace_bytes("vlmq_group_grid", &unknown), 0);
    accepted("vlmq_group_grid", &vlmq_group_grid_args { rows: 0, ..good });
    assert!(scales.is_untouched() && zeros.is_untouched() && status.is_untouched());
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_the_sanitizers() {
    let tests = ["grids_of_wide_groups", "a_scale_that_does_not_fit_is_told", "bad_arguments_are_refused"];
    pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
}
