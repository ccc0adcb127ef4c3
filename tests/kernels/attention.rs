//! Attention forward and backward of `kernels/decoder`, against float64 and the CPU device.

use crate::activations::matrix;
use crate::buffers::{BF16, Buffer, DTYPES, F32, noise, rounded};
use crate::calls::{accepted, every_schedule, refused_each};
use crate::support::golden::{relative_error, widened};
use crate::support::kernels::{Variant, pass_under_sanitizers, workspace_bytes};
use std::ops::Range;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::bindings::*;
use vlmq::device::{AttentionOperands, AttentionShape, ModelOps, Span};

/// A call's operands.
#[derive(Clone)]
struct Case {
    dtype: vlmq_dtype,
    shape: AttentionShape,
    /// Query and key rows of each span.
    spans: Vec<(Range<usize>, Range<usize>)>,
    q_rows: usize,
    k_rows: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    /// Elements by which all operands miss the 16 bytes of an access.
    shift: usize,
}

impl Case {
    /// Sequences that attend to themselves, two rows of nobody before each.
    fn own(dtype: vlmq_dtype, heads: (usize, usize), head_dim: usize, causal: bool, lengths: &[usize]) -> Self {
        let pairs: Vec<(usize, usize)> = lengths.iter().map(|&length| (length, length)).collect();
        Self::new(dtype, heads, head_dim, causal, &pairs)
    }

    fn new(
        dtype: vlmq_dtype,
        (heads, kv_heads): (usize, usize),
        head_dim: usize,
        causal: bool,
        lengths: &[(usize, usize)],
    ) -> Self {
        let (mut spans, mut q_rows, mut k_rows) = (Vec::new(), 0, 0);
        for &(queries, keys) in lengths {
            spans.push((q_rows + 2..q_rows + 2 + queries, k_rows + 2..k_rows + 2 + keys));
            q_rows += 2 + queries;
            k_rows += 2 + keys;
        }
        let (q_cols, k_cols) = (heads * head_dim, kv_heads * head_dim);
        Self {
            dtype,
            shape: AttentionShape { heads, kv_heads, head_dim, causal },
            spans,
            q_rows,
            k_rows,
            q: noise(dtype, q_rows * q_cols, 1),
            k: noise(dtype, k_rows * k_cols, 2),
            v: noise(dtype, k_rows * k_cols, 3),
            d_out: noise(dtype, q_rows * q_cols, 4),
            shift: 0,
        }
    }

    fn spans(&self) -> Vec<vlmq_span> {
        let ends = |range: &Range<usize>| [range.start as i32, range.end as i32];
        let spans = self.spans.iter().map(|(q, k)| (ends(q), ends(k)));
        spans.map(|([q_begin, q_end], [k_begin, k_end])| vlmq_span { q_begin, q_end, k_begin, k_end }).collect()
    }

    fn longest_q(&self) -> i64 {
        self.spans.iter().map(|(q, _)| q.len()).max().unwrap_or(0) as i64
    }

    /// Output and log sums.
    fn forward(&self) -> Vec<Buffer> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| Buffer::input(self.dtype, x, self.shift));
        let spans = self.spans();
        every_schedule(|| {
            let mut out = Buffer::output(self.dtype, self.q.len(), self.shift);
            let mut log_sum = Buffer::output(F32, self.q_rows * self.shape.heads, 0);
            let args = vlmq_attention_args {
                q: q.ptr(),
                k: k.ptr(),
                v: v.ptr(),
                out: out.ptr_mut(),
                log_sum: log_sum.ptr_mut(),
                spans: spans.as_ptr(),
                span_count: spans.len() as i64,
                longest_q: self.longest_q(),
                q_rows: self.q_rows as i64,
                k_rows: self.k_rows as i64,
                heads: self.shape.heads as i64,
                kv_heads: self.shape.kv_heads as i64,
                head_dim: self.shape.head_dim as i64,
                causal: self.shape.causal.into(),
                dtype: self.dtype,
            };
            accepted("vlmq_attention", &args);
            vec![out, log_sum]
        })
    }

    /// Gradients of queries, keys and values, from what the forward call gave.
    fn backward(&self) -> Vec<Buffer> {
        let forward = self.forward();
        let [q, k, v, d_out] =
            [&self.q, &self.k, &self.v, &self.d_out].map(|x| Buffer::input(self.dtype, x, self.shift));
        let spans = self.spans();
        every_schedule(|| {
            let [mut d_q, mut d_k, mut d_v] =
                [&self.q, &self.k, &self.v].map(|x| Buffer::output(self.dtype, x.len(), self.shift));
            let mut args = vlmq_attention_backward_args {
                q: q.ptr(),
                k: k.ptr(),
                v: v.ptr(),
                out: forward[0].ptr(),
                log_sum: forward[1].ptr(),
                d_out: d_out.ptr(),
                d_q: d_q.ptr_mut(),
                d_k: d_k.ptr_mut(),
                d_v: d_v.ptr_mut(),
                spans: spans.as_ptr(),
                span_count: spans.len() as i64,
                longest_q: self.longest_q(),
                longest_k: self.spans.iter().map(|(_, k)| k.len()).max().unwrap_or(0) as i64,
                q_rows: self.q_rows as i64,
                k_rows: self.k_rows as i64,
                heads: self.shape.heads as i64,
                kv_heads: self.shape.kv_heads as i64,
                head_dim: self.shape.head_dim as i64,
                causal: self.shape.causal.into(),
                dtype: self.dtype,
                workspace: std::ptr::null_mut(),
                workspace_bytes: 0,
            };
            args.workspace_bytes = workspace_bytes("vlmq_attention_backward", &args);
            let mut workspace = Buffer::workspace(args.workspace_bytes);
            args.workspace = workspace.ptr_mut();
            accepted("vlmq_attention_backward", &args);
            workspace.bytes();
            vec![d_q, d_k, d_v]
        })
    }
}

/// What float64 gives, zeros in rows of nobody.
struct Exact {
    out: Vec<f64>,
    log_sum: Vec<f64>,
    d_q: Vec<f64>,
    d_k: Vec<f64>,
    d_v: Vec<f64>,
}

fn exact(case: &Case) -> Exact {
    let AttentionShape { heads, kv_heads, head_dim: dim, causal } = case.shape;
    let scale = (dim as f64).powf(-0.5);
    let mut exact = Exact {
        out: vec![0.0; case.q.len()],
        log_sum: vec![0.0; case.q_rows * heads],
        d_q: vec![0.0; case.q.len()],
        d_k: vec![0.0; case.k.len()],
        d_v: vec![0.0; case.v.len()],
    };
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    for (q_span, k_span) in &case.spans {
        for head in 0..heads {
            for i in q_span.clone() {
                let q_at = (i * heads + head) * dim;
                let k_at = |j: usize| (j * kv_heads + head / (heads / kv_heads)) * dim;
                // The last query stands at the last key.
                let seen = if causal { k_span.len() - (q_span.end - 1 - i) } else { k_span.len() };
                let keys = k_span.start..k_span.start + seen;
                if keys.is_empty() {
                    exact.log_sum[i * heads + head] = f64::NEG_INFINITY;
                    continue;
                }
                let (q, d_out) = (&case.q[q_at..q_at + dim], &case.d_out[q_at..q_at + dim]);
                let scores: Vec<f64> = keys.clone().map(|j| scale * dot(q, &case.k[k_at(j)..k_at(j) + dim])).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                exact.log_sum[i * heads + head] = largest + sum.ln();
                let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp() / sum).collect();
                let d_p: Vec<f64> = keys.clone().map(|j| dot(d_out, &case.v[k_at(j)..k_at(j) + dim])).collect();
                let mean: f64 = p.iter().zip(&d_p).map(|(p, d)| p * d).sum();
                for (index, j) in keys.enumerate() {
                    let d_s = scale * p[index] * (d_p[index] - mean);
                    for c in 0..dim {
                        exact.out[q_at + c] += p[index] * f64::from(case.v[k_at(j) + c]);
                        exact.d_v[k_at(j) + c] += p[index] * f64::from(d_out[c]);
                        exact.d_q[q_at + c] += d_s * f64::from(case.k[k_at(j) + c]);
                        exact.d_k[k_at(j) + c] += d_s * f64::from(q[c]);
                    }
                }
            }
        }
    }
    exact
}

/// Largest relative Frobenius errors allowed: forward, backward.
fn allowed(dtype: vlmq_dtype) -> (f64, f64) {
    match dtype {
        F32 => (1e-6, 1e-5),
        BF16 => (5e-3, 1e-2),
        _ => (6e-4, 1.5e-3),
    }
}

/// Largest errors seen, by type: output, dQ, dK, dV.
type Seen = [[f64; 4]; 3];

fn check_rows_of_nobody<'a>(x: &[f32], rows: usize, spans: impl Iterator<Item = &'a Range<usize>>, what: &str) {
    let owned: Vec<usize> = spans.flat_map(Clone::clone).collect();
    for (row, values) in x.chunks(x.len() / rows).enumerate().filter(|(row, _)| !owned.contains(row)) {
        assert!(values.iter().all(|&x| x == 0.0), "{what}: row {row} of nobody");
    }
}

fn check_forward(case: &Case, exact: &Exact, seen: &mut Seen, what: &str) {
    let outputs = case.forward();
    let (limit, _) = allowed(case.dtype);
    let out = outputs[0].values();
    let found = relative_error(&out, &exact.out);
    assert!(found <= limit, "{what}: output error {found:e}");
    let worst = &mut seen[case.dtype.0 as usize][0];
    *worst = worst.max(found);
    check_rows_of_nobody(&out, case.q_rows, case.spans.iter().map(|(q, _)| q), what);
    for (i, (value, &expected)) in widened(&outputs[1].values()).into_iter().zip(&exact.log_sum).enumerate() {
        let same = value == expected || (value - expected).abs() <= 2e-6 * expected.abs().max(1.0);
        assert!(same, "{what}: log sum {value} instead of {expected} at {i}");
    }
}

fn check_backward(case: &Case, exact: &Exact, seen: &mut Seen, what: &str) {
    let (_, limit) = allowed(case.dtype);
    for (i, (output, exact)) in case.backward().iter().zip([&exact.d_q, &exact.d_k, &exact.d_v]).enumerate() {
        let values = output.values();
        let found = relative_error(&values, exact);
        assert!(found <= limit, "{what}: {} error {found:e}", ["dQ", "dK", "dV"][i]);
        let worst = &mut seen[case.dtype.0 as usize][i + 1];
        *worst = worst.max(found);
        let owned = case.spans.iter().map(|(q, k)| if i == 0 { q } else { k });
        check_rows_of_nobody(&values, if i == 0 { case.q_rows } else { case.k_rows }, owned, what);
    }
}

/// Every head width (each padding, odd pieces, scalar loads), heads and lengths.
fn cases() -> Vec<(String, Case)> {
    let mut cases = Vec::new();
    let mut add = |what: &str, case: Case| {
        cases.push((format!("{what}, {:?} {:?} {:?}", case.dtype, case.shape, case.spans), case));
    };
    for dtype in DTYPES {
        if Variant::current() == Variant::Thread {
            // Three tiles of each kind: each of the two buffers is used again.
            add("causal", Case::own(dtype, (2, 1), 16, true, &[1, 70]));
            add("last chunk", Case::new(dtype, (2, 1), 32, true, &[(17, 140)]));
            add("scalar loads", Case::new(dtype, (1, 1), 6, false, &[(35, 67)]));
            add("halves of wide heads", Case::own(dtype, (1, 1), 136, false, &[17]));
            continue;
        }
        for (head_dim, heads) in
            [(8, (4, 2)), (16, (4, 2)), (40, (6, 1)), (64, (4, 2)), (72, (1, 1)), (80, (2, 2)), (128, (4, 2))]
        {
            add("causal", Case::own(dtype, heads, head_dim, true, &[1, 5, 17, 65]));
            add("all keys", Case::own(dtype, heads, head_dim, false, &[33, 1]));
        }
        add("several tiles", Case::own(dtype, (2, 1), 64, true, &[130, 64]));
        add("several tiles", Case::own(dtype, (1, 1), 128, false, &[129]));
        add("wide heads", Case::own(dtype, (2, 1), 256, true, &[70]));
        add("odd heads", Case::own(dtype, (2, 1), 6, true, &[19]));
        add("odd heads", Case::own(dtype, (2, 2), 130, false, &[19]));
        add("misaligned", Case { shift: 1, ..Case::own(dtype, (2, 1), 32, true, &[40]) });
        add("decoding", Case::new(dtype, (6, 1), 64, true, &[(1, 200), (1, 1), (2, 67)]));
        add("last chunk", Case::new(dtype, (2, 2), 16, true, &[(70, 150)]));
        add("other lengths", Case::new(dtype, (2, 1), 32, false, &[(3, 70), (66, 5)]));
        add("no keys", Case::new(dtype, (2, 1), 16, false, &[(3, 0), (4, 7)]));
        add("no queries", Case::new(dtype, (2, 1), 16, true, &[(0, 3), (4, 7)]));
        add("windows", Case::own(dtype, (2, 2), 80, false, &[16; 9]));
    }
    cases
}

#[test]
fn against_float64() {
    let mut seen = Seen::default();
    for (what, case) in cases() {
        let exact = exact(&case);
        check_forward(&case, &exact, &mut seen, &what);
        check_backward(&case, &exact, &mut seen, &what);
    }
    for (dtype, errors) in ["f32", "bf16", "f16"].iter().zip(seen) {
        println!("{dtype}: output {:.1e}, dQ {:.1e}, dK {:.1e}, dV {:.1e}", errors[0], errors[1], errors[2], errors[3]);
    }
}

/// Equal scores give equal probabilities; a power of two of them and small integers leave nothing to round.
#[test]
fn means_of_integers_are_exact() {
    for dtype in DTYPES {
        let mut case = Case::own(dtype, (2, 1), 64, false, &[128, 16]);
        case.q.fill(0.0);
        case.v.iter_mut().for_each(|v| *v = (*v * 8.0).round());
        let out = case.forward()[0].values();
        for (q, k) in &case.spans {
            for (row, head, c) in q.clone().flat_map(|r| (0..2).flat_map(move |h| (0..64).map(move |c| (r, h, c)))) {
                let sum: f32 = k.clone().map(|j| case.v[j * 64 + c]).sum();
                let mean = rounded(dtype, sum / k.len() as f32);
                assert_eq!(out[(row * 2 + head) * 64 + c], mean, "{dtype:?} row {row}");
            }
        }
    }
}

/// Scores far from zero, of either sign, and one far above the others: no overflow, no NaN, the right winner.
#[test]
fn extreme_scores() {
    for dtype in DTYPES {
        for level in [-1.0f32, 1.0] {
            let mut case = Case::own(dtype, (2, 1), 16, true, &[70]);
            // q·k = 16 · 64 · 64 · level: exp of it overflows or vanishes without the running maximum.
            case.q.iter_mut().for_each(|q| *q = 64.0);
            case.k.iter_mut().enumerate().for_each(|(i, k)| *k = level * if i / 16 == 42 { 68.0 } else { 64.0 });
            let exact = exact(&case);
            let what = format!("{dtype:?} level {level}");
            check_forward(&case, &exact, &mut Seen::default(), &what);
            let gradients = case.backward();
            assert!(gradients.iter().all(|x| x.values().iter().all(|x| x.is_finite())), "{what}");
            // dQ and dK cancel here. The probabilities come back from the log sum, 2^14 rounded to float32.
            let limit = allowed(dtype).1 + 2f64.powi(14 - 24);
            assert!(relative_error(&gradients[2].values(), &exact.d_v) <= limit, "{what}");
        }
    }
}

/// The CPU device, which is float32 all through.
#[test]
fn against_the_cpu_device() {
    let case = Case::own(F32, (4, 2), 40, true, &[65, 7]);
    let of_heads = |values: &[f32], heads: usize| matrix(values.len() / (heads * 40), heads * 40, values);
    let (q, k, v) = (of_heads(&case.q, 4), of_heads(&case.k, 2), of_heads(&case.v, 2));
    let spans: Vec<Span> = case.spans.iter().map(|(q, k)| Span { q: q.clone(), k: k.clone() }).collect();
    let operands = AttentionOperands { q: &q, k: &k, v: &v, spans: &spans, shape: case.shape };
    let out = Cpu.attention(&operands).unwrap();
    assert!(relative_error(&case.forward()[0].values(), &widened(out.data())) <= 2e-6);
    let gradients = Cpu.attention_backward(&operands, &of_heads(&case.d_out, 4)).unwrap();
    for (found, twin) in case.backward().iter().zip([&gradients.0, &gradients.1, &gradients.2]) {
        assert!(relative_error(&found.values(), &widened(twin.data())) <= 1e-5);
    }
}

#[test]
fn bad_arguments() {
    let mut space = [0f32; 64];
    let (x, y) = (space.as_ptr().cast(), space.as_mut_ptr().cast());
    let span = [vlmq_span { q_begin: 0, q_end: 1, k_begin: 0, k_end: 1 }];
    let forward = vlmq_attention_args {
        q: x,
        k: x,
        v: x,
        out: y,
        log_sum: std::ptr::null_mut(),
        spans: span.as_ptr(),
        span_count: 1,
        longest_q: 1,
        q_rows: 1,
        k_rows: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        causal: 1,
        dtype: F32,
    };
    let bad: [fn(&mut vlmq_attention_args); 16] = [
        |a| a.q = std::ptr::null(),
        |a| a.v = std::ptr::null(),
        |a| a.out = std::ptr::null_mut(),
        |a| a.spans = std::ptr::null(),
        |a| a.span_count = -1,
        |a| (a.span_count, a.longest_q) = (i64::from(i32::MAX), 1 << 20),
        |a| a.longest_q = -1,
        |a| a.q_rows = 1 << 31,
        |a| a.k_rows = -1,
        |a| a.kv_heads = 0,
        |a| (a.heads, a.kv_heads) = (3, 2),
        |a| a.heads = 65536,
        |a| a.head_dim = 5,
        |a| a.head_dim = 258,
        |a| a.head_dim = 0,
        |a| a.dtype = vlmq_dtype(7),
    ];
    refused_each("vlmq_attention", &forward, &bad);
    accepted("vlmq_attention", &vlmq_attention_args { q_rows: 0, q: std::ptr::null(), span_count: 0, ..forward });
    space[..8].fill(f32::NAN);
    accepted("vlmq_attention", &vlmq_attention_args { span_count: 0, spans: std::ptr::null(), ..forward });
    assert_eq!(space[..8], [0.0; 8], "rows outside all spans are zero");

    let mut workspace = Buffer::workspace(8);
    let backward = vlmq_attention_backward_args {
        q: x,
        k: x,
        v: x,
        out: x,
        log_sum: space.as_ptr(),
        d_out: x,
        d_q: y,
        d_k: y,
        d_v: y,
        spans: span.as_ptr(),
        span_count: 1,
        longest_q: 1,
        longest_k: 1,
        q_rows: 1,
        k_rows: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        causal: 1,
        dtype: F32,
        workspace: workspace.ptr_mut(),
        workspace_bytes: 8,
    };
    assert_eq!(workspace_bytes("vlmq_attention_backward", &backward), 8);
    let bad: [fn(&mut vlmq_attention_backward_args); 10] = [
        |a| a.log_sum = std::ptr::null(),
        |a| a.d_out = std::ptr::null(),
        |a| a.d_k = std::ptr::null_mut(),
        |a| a.longest_k = -1,
        |a| (a.span_count, a.longest_k) = (i64::from(i32::MAX), 1 << 20),
        |a| a.head_dim = 7,
        |a| a.workspace_bytes = 7,
        |a| a.workspace = std::ptr::null_mut(),
        |a| a.workspace = a.workspace.wrapping_byte_add(4),
        |a| a.dtype = vlmq_dtype(7),
    ];
    refused_each("vlmq_attention_backward", &backward, &bad);
    let empty = vlmq_attention_backward_args { q_rows: 0, k_rows: 0, span_count: 0, q: std::ptr::null(), ..backward };
    accepted("vlmq_attention_backward", &empty);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn clean_under_sanitizers() {
    if Variant::current() == Variant::Plain {
        pass_under_sanitizers(module_path!(), &["against_float64", "bad_arguments"], &[("vlmq_kernels", "kernels")]);
    }
}
