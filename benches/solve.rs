//! Speed of the solver on the CPU: `cargo bench --bench solve`.
//!
//! `reference_column_loop.py` runs the first of these and the published column loop side by side.

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use vlmq::device::cpu::Cpu;
use vlmq::quantize::settings::{Grid, Solver, SolverSettings};
use vlmq::quantize::solve::{prepare, round_to_nearest, solve, solve_layer};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Matrix;

/// In and out features of the layer that the project's speed figure is about.
const FEATURES: usize = 4096;
const TOKENS: usize = 4608;

/// Uniform values in [-1, 1) from a fixed generator, channel c louder the smaller `c mod 97` is.
fn noise(rows: usize, cols: usize, mut seed: u64) -> Matrix {
    let data = (0..rows * cols).map(|i| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (seed >> 40) as f32 / 8_388_608.0 - 1.0;
        uniform / (1.0 + ((i % cols) % 97) as f32 / 16.0)
    });
    Matrix::new(rows, cols, data.collect()).unwrap()
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("solve");
    group.sample_size(10);
    let u = noise(TOKENS, FEATURES, 1);
    let mut f = noise(TOKENS, FEATURES, 2);
    f.data_mut().iter_mut().zip(u.data()).for_each(|(f, u)| *f = u + 0.1 * *f);
    let weight = noise(FEATURES, FEATURES, 3);
    let mut statistics = Statistics::new(&Cpu, FEATURES, true).unwrap();
    statistics.accumulate(&Cpu, &u, Some(&f), None).unwrap();

    // The grid of the loop that it is compared with.
    let settings = SolverSettings { grid: Grid::Minmax, ..SolverSettings::default() };
    group.bench_function("gptaq_w3g128_4096", |b| {
        b.iter(|| {
            let prepared = prepare(&Cpu, &statistics, &settings).unwrap();
            black_box(solve(&Cpu, &prepared, &weight, &settings).unwrap())
        })
    });
    let prepared = prepare(&Cpu, &statistics, &settings).unwrap();
    group.bench_function("prepare_4096", |b| b.iter(|| black_box(prepare(&Cpu, &statistics, &settings).unwrap())));
    group.bench_function("solve_4096", |b| b.iter(|| black_box(solve(&Cpu, &prepared, &weight, &settings).unwrap())));
    group.bench_function("solve_and_report_4096", |b| {
        b.iter(|| black_box(solve_layer(&Cpu, &prepared, &statistics.hessian, &weight, &settings).unwrap()))
    });
    let gptq = SolverSettings { solver: Solver::Gptq, ..settings.clone() };
    group.bench_function("gptq_w3g128_4096", |b| {
        b.iter(|| {
            let prepared = prepare(&Cpu, &statistics, &gptq).unwrap();
            black_box(solve(&Cpu, &prepared, &weight, &gptq).unwrap())
        })
    });
    group.bench_function("rtn_w3g128_4096", |b| b.iter(|| black_box(round_to_nearest(&weight, &settings).unwrap())));
    let mse = SolverSettings { grid: Grid::Mse, ..settings.clone() };
    group.bench_function("rtn_mse_w3g128_4096", |b| b.iter(|| black_box(round_to_nearest(&weight, &mse).unwrap())));
    group.bench_function("statistics_4096_4608_tokens", |b| {
        b.iter(|| statistics.accumulate(&Cpu, &u, Some(&f), None).unwrap())
    });
}

criterion_group!(all, benches);
criterion_main!(all);
