//! What a device does in a moment of each kind of work.

use super::{DecoderShape, Subject, SubjectChunk};
use crate::checkpoint::checksum;
use crate::device::{AttentionOperands, AttentionShape, BLOCK, ModelOps, PermuteSymmetric, SolveOps, Span};
use crate::parallel::{each_chunk, map};
use crate::plan::Rates;
use crate::quantize::settings::{Solver, SolverSettings};
use crate::quantize::solve;
use crate::quantize::statistics::Statistics;
use crate::tensor::Matrix;
use anyhow::Result;
use std::hint::black_box;
use std::time::Instant;

/// A probe that took so long, in seconds, is long enough.
const ENOUGH: f64 = 0.04;

/// Runs `probe`, which returns its work and its seconds, at growing sizes until it takes long enough, and once more at the last
/// one; the smallest also wakes threads and memory up.
fn rate(sizes: &[usize], mut probe: impl FnMut(usize) -> Result<(f64, f64)>) -> Result<f64> {
    let mut best = 0.0;
    for &size in sizes {
        let mut run = || probe(size).map(|(work, seconds)| (work / seconds.max(1e-9), seconds));
        let (speed, seconds) = run()?;
        best = speed;
        if seconds > ENOUGH || Some(&size) == sizes.last() {
            best = f64::max(best, run()?.0);
            break;
        }
    }
    Ok(best)
}

impl Rates {
    /// Rates of a device for a run, by short probes of sizes at hand; about a second in all. Errors where the device fails.
    pub fn measure<D: ModelOps + SolveOps>(device: &D, subject: &Subject<'_>) -> Result<Self> {
        let (shape, solver) = (&DecoderShape::of(&subject.config.decoder), subject.solver);
        let most = |wanted: usize, there: usize| wanted.min(there.max(1));
        let (hidden, inner) = (most(2048, shape.hidden), most(4096, shape.intermediate));
        let noise = |rows, cols, seed| device.upload_model(noise(rows, cols, seed)?);
        let longest = subject.chunks.iter().map(SubjectChunk::tokens).max().unwrap_or(512).max(16);
        let tokens: Vec<usize> = [64, 256, 1024, 2048].into_iter().map(|tokens| most(tokens, longest)).collect();
        let wait = |tensor: &D::Tensor| device.download(&device.slice_rows(tensor, 0..1)?).map(drop);
        let timed = |work: f64, run: &dyn Fn() -> Result<D::Tensor>| -> Result<(f64, f64)> {
            let start = Instant::now();
            wait(&run()?)?;
            Ok((work, start.elapsed().as_secs_f64()))
        };

        let weight = noise(inner, hidden, 1)?;
        let products = rate(&tokens, |tokens| {
            let x = noise(tokens, hidden, 2)?;
            timed(2.0 * (tokens * hidden * inner) as f64, &|| device.linear(&x, &weight, None))
        })?;
        drop(weight);
        let values = rate(&tokens, |tokens| {
            let x = noise(tokens, inner, 3)?;
            timed((tokens * inner) as f64, &|| device.scaled_difference(&x, &x, 2.0))
        })?;

        // As many samples of the usual length as fill a chunk.
        let lengths = || subject.chunks.iter().flat_map(|chunk| &chunk.sequences).map(|sequence| sequence.tokens.len());
        let usual = lengths().map(|tokens| tokens * tokens).sum::<usize>() / lengths().sum::<usize>().max(1);
        let usual = usual.clamp(16, 2048);
        let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let heads_of = AttentionShape { heads, kv_heads, head_dim, causal: true };
        let attention = rate(&[1, 4, 16], |spans| {
            let rows = spans * usual;
            let (q, k) = (noise(rows, heads * head_dim, 4)?, noise(rows, kv_heads * head_dim, 5)?);
            let spans: Vec<Span> = (0..spans).map(|i| Span::own(i * usual..(i + 1) * usual)).collect();
            let work = 2.0 * (rows * usual * heads * head_dim) as f64;
            let operands = AttentionOperands { q: &q, k: &k, v: &k, spans: &spans, shape: heads_of };
            timed(work, &|| device.attention(&operands))
        })?;

        let widest = shape.intermediate.max(shape.hidden);
        let features = most(2048, widest);
        let cross = solver.solver == Solver::Gptaq;
        let share = if cross { 1.5 } else { 0.5 };
        let mut sums = Statistics::new(device, features, cross)?;
        let statistics = rate(&tokens, |tokens| {
            let (u, f) = (noise(tokens, features, 6)?, noise(tokens, features, 7)?);
            let start = Instant::now();
            sums.accumulate(device, &u, cross.then_some(&f), None)?;
            wait(&sums.hessian)?;
            Ok((2.0 * share * (tokens * features * features) as f64, start.elapsed().as_secs_f64()))
        })?;
        drop(sums);
        let factors = rate(&[256, 1024, 2048].map(|size| most(size, widest)), |size| {
            let order: Vec<u32> = (0..size as u32).collect();
            let how = PermuteSymmetric { order: &order, diagonal: &vec![2.0; size] };
            let matrix = device.permute_symmetric(&device.zeros(size, size)?, how)?;
            let blocks: Vec<_> = (0..size).step_by(BLOCK).map(|first| first..(first + BLOCK).min(size)).collect();
            let start = Instant::now();
            black_box(device.factor(matrix, &blocks)?);
            Ok(((size as f64).powi(3) / 3.0, start.elapsed().as_secs_f64()))
        })?;
        let codes = Self::codes(device, shape, solver)?;
        let checked = rate(&[1 << 20, 8 << 20], |bytes| {
            let bytes = vec![1u8; bytes];
            let threads = rayon::current_num_threads();
            let start = Instant::now();
            map(threads, |_| drop(black_box(checksum::of_bytes(&bytes))));
            Ok(((threads * bytes.len()) as f64, start.elapsed().as_secs_f64()))
        })?;
        Ok(Self { products, attention, statistics, factors, codes, values, checked })
    }

    /// A narrow layer under the run's own settings: of its time most goes to the columns one after the other.
    fn codes<D: ModelOps + SolveOps>(device: &D, shape: &DecoderShape, solver: &SolverSettings) -> Result<f64> {
        let group = solver.group_size.unwrap_or(256);
        let features = group * 256usize.div_ceil(group);
        let rows = [64, 512, 2048].map(|rows| rows.min(shape.intermediate.max(1)));
        if solver.solver == Solver::Rtn {
            return rate(&rows, |rows| {
                let weight = noise(rows, features, 8)?;
                let start = Instant::now();
                black_box(solve::round_to_nearest(&weight, solver)?);
                Ok(((rows * features) as f64, start.elapsed().as_secs_f64()))
            });
        }
        let inputs = device.upload_model(noise(2 * features, features, 9)?)?;
        let mut statistics = Statistics::new(device, features, solver.solver == Solver::Gptaq)?;
        let float = statistics.cross.is_some().then_some(&inputs);
        statistics.accumulate(device, &inputs, float, None)?;
        let prepared = solve::prepare(device, &statistics, solver)?;
        rate(&rows, |rows| {
            let weight = device.upload_model(noise(rows, features, 10)?)?;
            let start = Instant::now();
            black_box(solve::solve(device, &prepared, &weight, solver)?);
            Ok(((rows * features) as f64, start.elapsed().as_secs_f64()))
        })
    }
}

/// Numbers between -1 and 1, the same every time.
fn noise(rows: usize, cols: usize, seed: u64) -> Result<Matrix> {
    let mut data = vec![0.0f32; rows * cols];
    each_chunk(&mut data, cols, |row, values| {
        let mut random = fastrand::Rng::with_seed(seed << 32 | row as u64);
        values.iter_mut().for_each(|value| *value = 2.0 * random.f32() - 1.0);
    });
    Matrix::new(rows, cols, data)
}
