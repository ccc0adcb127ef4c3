//! The operations of a device, each with what it is measured by: `cargo bench --bench kernels [-- [--cpu] [FILTER]]`.
//!
//! On the first GPU where there is one, else, or with `--cpu`, on the CPU. Each line: time of a call (median of samples, each
//! of as many calls as take 5 ms, and one wait), TFLOP/s, GB/s, and the
//! larger of its shares of what this machine reaches in the same run: the rate of a large plain matrix product, and that
//! of a large copy. `VLMQ_BENCH_REFERENCE=FILE`, written by `gpu_probe.py --reference FILE` on the same machine, adds how many
//! times as long PyTorch takes. Work is counted as the method needs it: half of a symmetric product, n³/3 for a factorization.

mod timing;

use anyhow::{Result, bail, ensure};
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::{CodeMatrix, CodesAlong, Cuda};
use vlmq::device::{
    Activation, AttentionOperands, AttentionShape, BLOCK, Device, ModelOps, PermuteSymmetric, ProductRange,
    QuantizedWeight, Rotary, SolveOps, Span,
};
use vlmq::quantize::settings::{Grid, Solver, SolverSettings};
use vlmq::quantize::solve::{enqueue, prepare, solve};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// Time spent on one line, at most about; a line is sampled twice at least.
const BUDGET: Duration = Duration::from_secs(2);

/// A sample takes so long at least: a wait, and what the host does before a first call, take tens of microseconds.
const SAMPLE: Duration = Duration::from_millis(5);

fn main() -> Result<()> {
    let (mut cpu, mut filter) = (false, None);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            // cargo passes it.
            "--bench" => {}
            "--cpu" => cpu = true,
            _ if argument.starts_with("--") || filter.is_some() => bail!("{argument}: known are --cpu and one filter"),
            _ => filter = Some(argument),
        }
    }
    let filter = filter.unwrap_or_default();
    let mut lines = 0;
    match Cuda::open(0, Float::Bf16) {
        _ if cpu => {}
        Ok(cuda) => {
            let layers = [(4096, 4096), (3584, 18944), (18944, 3584)];
            let bench = Bench::new(&cuda, &filter, 8192)?;
            bench.all(&layers, 32_768)?;
            bench.standalone()?;
            lines += bench.lines.get();
        }
        Err(why) => {
            println!("no GPU is measured: {why:#}\n");
            cpu = true;
        }
    }
    if cpu {
        let bench = Bench::new(&Cpu, &filter, 2048)?;
        bench.all(&[(1024, 1024)], 2048)?;
        lines += bench.lines.get();
    }
    ensure!(lines > 0, "no line's name contains {filter:?}");
    Ok(())
}

impl Bench<'_, Cuda> {
    /// What only the C API and its Rust twin offer.
    fn standalone(&self) -> Result<()> {
        let (rows, cols, bits) = (18944, 3584, 3);
        let count = (rows * cols) as f64;
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 8) as u8).collect();
        let matrix = CodeMatrix { rows, cols, bits, along: CodesAlong::Rows, offset: 0 };
        self.line("pack 3 bits, with copies", 0.0, 1.375 * count, || self.device.pack(&codes, &matrix).map(drop))?;
        let words = self.device.pack(&codes, &matrix)?;
        self.line("unpack 3 bits, with copies", 0.0, 1.375 * count, || self.device.unpack(&words, &matrix).map(drop))?;
        let n = 4096;
        let mut h = noise(n, n, 7);
        (0..n).for_each(|i| h.row_mut(i)[i] = n as f32);
        let h = self.device.upload(h)?;
        let cubed = (n as f64).powi(3);
        self.line("inverse factor 4096", 2.0 / 3.0 * cubed, 8.0 * (n * n) as f64, || {
            self.device.cholesky_inverse(self.device.slice_rows(&h, 0..n)?, 0.01).map(drop)
        })?;
        println!();
        Ok(())
    }
}

/// Prints lines.
struct Bench<'a, D> {
    device: &'a D,
    filter: &'a str,
    /// Operations a second of a large plain product.
    product: f64,
    /// Bytes a second, read and written, of a large copy.
    copy: f64,
    /// Seconds that PyTorch takes, by line.
    reference: BTreeMap<String, f64>,
    /// Lines printed.
    lines: Cell<usize>,
}

impl<'a, D: ModelOps + SolveOps> Bench<'a, D> {
    /// Measures the machine's rates by squares of `side`.
    fn new(device: &'a D, filter: &'a str, side: usize) -> Result<Self> {
        let square = device.upload_model(noise(side, side, 1))?;
        let tiny = device.upload(Matrix::zeros(1, 1))?;
        let work = 2.0 * (side as f64).powi(3);
        let product = work / median(device, &tiny, || device.linear(&square, &square, None).map(drop))?;
        let long = device.upload(Matrix::zeros(4 * side, side))?;
        let bytes = 2.0 * 4.0 * 4.0 * (side as f64).powi(2);
        let copy = bytes / median(device, &tiny, || device.slice_rows(&long, 0..4 * side).map(drop))?;
        let reference = match std::env::var_os("VLMQ_BENCH_REFERENCE") {
            Some(file) => serde_json::from_slice(&std::fs::read(file)?)?,
            None => BTreeMap::new(),
        };
        println!("{}", device.name());
        println!(
            "measured rates: plain product {:.2} TFLOP/s, copy {:.1} GB/s (read and written)",
            product / 1e12,
            copy / 1e9
        );
        // Without a reference there is no column for it.
        let (head, line) = if reference.is_empty() { ("", "") } else { (" PyTorch takes |", "---|") };
        println!("| operation | ms | TFLOP/s | GB/s | of the measured rate |{head}\n|---|---|---|---|---|{line}");
        Ok(Self { device, filter, product, copy, reference, lines: Cell::new(0) })
    }

    /// Every operation: layers `[out, in]`, and statistics of so many tokens.
    fn all(&self, layers: &[(usize, usize)], tokens: usize) -> Result<()> {
        for &(out, inputs) in layers {
            self.layer(out, inputs, tokens)?;
        }
        self.block(tokens.min(8192))?;
        self.steps(layers[0].1)?;
        let (rows, cols) = layers[0];
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 8) as u8).collect();
        let groups = rows * cols.div_ceil(128);
        let (scales, zeros) = (vec![0.5; groups], vec![3; groups]);
        let weight = QuantizedWeight { rows, cols, codes: &codes, scales: &scales, zeros: &zeros, group_index: None };
        let name = format!("dequantize {rows}x{cols}, from the host");
        self.line(&name, 0.0, 3.0 * (rows * cols) as f64, || self.device.dequantize(&weight).map(drop))?;
        println!();
        Ok(())
    }

    fn layer(&self, out: usize, inputs: usize, tokens: usize) -> Result<()> {
        let device = self.device;
        let wanted = ["hessian ", "statistics ", "prepare ", "solve ", "gptq solve "]
            .map(|what| format!("{what}{out}x{inputs}"));
        let to_host = format!("{}, codes on the host", wanted[3]);
        if !wanted.iter().chain([&to_host]).any(|name| name.contains(self.filter)) {
            return Ok(());
        }
        let (d, t, rows) = (inputs as f64, tokens as f64, out as f64);
        let u = device.upload_model(noise(tokens, inputs, 2))?;
        let f = device.upload_model(noise(tokens, inputs, 3))?;
        let g: Vec<f32> = (0..tokens).map(|token| 0.5 + (token % 7) as f32 / 7.0).collect();
        let mut hessian = Statistics::new(device, inputs, false)?;
        self.line(&wanted[0], t * d * d, t * d * 2.0 + d * d * 4.0, || hessian.accumulate(device, &u, None, Some(&g)))?;
        let mut statistics = Statistics::new(device, inputs, true)?;
        self.line(&wanted[1], 3.0 * t * d * d, t * d * 4.0 + d * d * 12.0, || {
            statistics.accumulate(device, &u, Some(&f), Some(&g))
        })?;
        // As measured before there was a search for the least loss.
        let settings = SolverSettings { grid: Grid::Minmax, ..SolverSettings::default() };
        self.line(&wanted[2], 2.0 * d.powi(3) / 3.0, d * d * 16.0, || {
            prepare(device, &statistics, &settings).map(drop)
        })?;
        let prepared = prepare(device, &statistics, &settings)?;
        let weight = device.upload_model(noise(out, inputs, 4))?;
        self.line(&wanted[3], 2.0 * rows * d * d, rows * d * 9.0 + d * d * 8.0, || {
            enqueue(device, &prepared, &weight, &settings).map(drop)
        })?;
        self.line(&to_host, 2.0 * rows * d * d, rows * d * 9.0 + d * d * 8.0, || {
            solve(device, &prepared, &weight, &settings).map(drop)
        })?;
        let gptq = SolverSettings { solver: Solver::Gptq, ..settings };
        self.line(&wanted[4], 4.0 * d.powi(3) / 12.0 + rows * d * d, rows * d * 9.0, || {
            solve(device, &prepare(device, &hessian, &gptq)?, &weight, &gptq).map(drop)
        })
    }

    /// What calibration runs, at the widths of a 7B model.
    fn block(&self, tokens: usize) -> Result<()> {
        let device = self.device;
        let (hidden, length, shape) =
            (3584, 512, AttentionShape { heads: 28, kv_heads: 4, head_dim: 128, causal: true });
        let (t, h, l, e) = (tokens as f64, hidden as f64, length as f64, device.element_bytes() as f64);
        let x = device.upload_model(noise(tokens, hidden, 5))?;
        let weight = device.upload_model(Matrix::row_vector(vec![1.0; hidden]))?;
        self.line("rms_norm", 4.0 * t * h, 2.0 * e * t * h, || device.rms_norm(&x, &weight, 1e-6).map(drop))?;
        // Queries of a decoder that normalises each head.
        let heads = device.upload_model(noise(tokens * shape.heads, shape.head_dim, 7))?;
        let weight = device.upload_model(Matrix::row_vector(vec![1.0; shape.head_dim]))?;
        self.line("rms_norm backward", 10.0 * t * h, 3.0 * e * t * h, || {
            device.rms_norm_backward(&heads, &weight, &heads, 1e-6).map(drop)
        })?;
        self.line("gated silu", 8.0 * t * h, 3.0 * e * t * h, || device.gated(&x, &x, Activation::Silu).map(drop))?;
        let keys = device.upload_model(noise(tokens, shape.kv_heads * shape.head_dim, 6))?;
        let spans: Vec<Span> = (0..tokens / length).map(|i| Span::own(i * length..(i + 1) * length)).collect();
        let (work, bytes) = (2.0 * t * l * h, e * t * h * 2.3);
        let operands = AttentionOperands { q: &x, k: &keys, v: &keys, spans: &spans, shape };
        self.line("attention", work, bytes, || device.attention(&operands).map(drop))?;
        self.line("attention backward", 3.5 * work, 2.0 * bytes, || {
            device.attention_backward(&operands, &x).map(drop)
        })?;
        let angles = device.upload(noise(tokens, shape.head_dim / 2, 8))?;
        let rotary = Rotary { cos: angles, sin: device.upload(noise(tokens, shape.head_dim / 2, 9))? };
        let mut y = device.slice_rows(&x, 0..tokens)?;
        self.line("rotary embedding", 4.0 * t * h, 2.0 * e * t * h, || device.rotate(&mut y, &rotary, false))?;
        self.line("add", t * h, 3.0 * e * t * h, || device.add_assign(&mut y, &x))?;
        let backwards: Vec<u32> = (0..tokens as u32).rev().collect();
        self.line("rows by index", 0.0, 2.0 * e * t * h, || device.gather_rows(&x, &backwards).map(drop))?;
        self.line("magnitudes of rows", t * h, e * t * h, || device.mean_abs_rows(&x).map(drop))?;
        self.line("first row that is not finite", 0.0, e * t * h, || device.first_non_finite_row(&x).map(drop))
    }

    /// Steps of a solve by themselves, on matrices of `n` columns.
    fn steps(&self, n: usize) -> Result<()> {
        let (device, square) = (self.device, (n * n) as f64);
        let order: Vec<u32> = (0..n as u32).rev().collect();
        let h = device.upload(noise(n, n, 10))?;
        let diagonal = vec![1.0; n];
        let how = PermuteSymmetric { order: &order, diagonal: &diagonal };
        self.line("H in processing order", 0.0, 4.0 * square, || device.permute_symmetric(&h, how).map(drop))?;
        let weight = device.upload_model(noise(n, n, 11))?;
        let bytes = (device.element_bytes() as f64 + 4.0) * square;
        self.line("weight in processing order", 0.0, bytes, || device.permute_columns(&weight, &order, &[]).map(drop))?;
        let mut c = device.zeros(n, BLOCK)?;
        let range = ProductRange { inner: 0..n, columns: 0..BLOCK, target: 0 };
        self.line("product with a block", 2.0 * square * BLOCK as f64, 4.0 * square, || {
            device.add_product(&mut c, &h, &h, &range)
        })?;
        self.line("norm in H", square * n as f64, 8.0 * square, || device.weighted_squared_norm(&h, &h).map(drop))
    }

    fn line(&self, name: &str, work: f64, bytes: f64, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        if !name.contains(self.filter) {
            return Ok(());
        }
        self.lines.set(self.lines.get() + 1);
        let tiny = self.device.upload(Matrix::zeros(1, 1))?;
        let seconds = median(self.device, &tiny, &mut run)?;
        let share = (work / seconds / self.product).max(bytes / seconds / self.copy);
        let times = |reference: &f64| format!(" {:.1} times |", reference / seconds);
        let times = match self.reference.is_empty() {
            true => String::new(),
            false => self.reference.get(name).map_or(" – |".into(), times),
        };
        println!(
            "| {name} | {:.3} | {:.2} | {:.1} | {:.0} % |{times}",
            seconds * 1e3,
            work / seconds / 1e12,
            bytes / seconds / 1e9,
            share * 100.0
        );
        Ok(())
    }
}

/// Median seconds of a call of `run`, finished work counted: reading anything back waits for all before it.
fn median<D: SolveOps>(device: &D, tiny: &D::Tensor, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut sample = |calls: u32| -> Result<Duration> {
        device.diagonal(tiny)?;
        let start = Instant::now();
        for _ in 0..calls {
            run()?;
        }
        device.diagonal(tiny)?;
        Ok(start.elapsed())
    };
    sample(1)?;
    let start = Instant::now();
    let (calls, first) = timing::repeat(SAMPLE, &mut sample)?;
    let mut times = vec![first];
    while times.len() < 2 || (start.elapsed() < BUDGET && times.len() < 50) {
        times.push(sample(calls)?);
    }
    times.sort();
    Ok(times[times.len() / 2].as_secs_f64() / f64::from(calls))
}

/// Uniform values in [-1, 1), each by its place and the seed, whichever thread makes it.
fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
    let value = |place: u64| {
        // splitmix64
        let mut x = (seed << 40).wrapping_add(place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let data = (0..(rows * cols) as u64).into_par_iter().map(value).collect();
    Matrix::new(rows, cols, data).expect("as many values as the shape has")
}
