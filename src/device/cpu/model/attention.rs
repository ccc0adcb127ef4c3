//! Softmax attention forward and backward. Scores exist for one block of queries at a time, so memory grows with the
//! length of a sequence and not with its square.

use crate::device::cpu::gemm::{Strided, StridedMut, gemm};
use crate::device::cpu::vector::{LANES, dispatch, dot, exp, sum};
use crate::device::{AttentionOperands, AttentionShape, Span};
use crate::parallel::map;
use crate::tensor::Matrix;
use anyhow::{Result, ensure};

/// Queries whose scores exist at a time.
pub(in crate::device::cpu) const QUERY_BLOCK: usize = 256;

/// One head of one span: where its columns start, and its rows.
struct Head<'a> {
    shape: AttentionShape,
    span: &'a Span,
    q_column: usize,
    k_column: usize,
}

impl Head<'_> {
    /// The head's columns of some rows of a packed tensor.
    fn view<'m>(&self, x: &'m Matrix, rows: std::ops::Range<usize>, column: usize) -> Strided<'m> {
        Strided::new(&x.data()[rows.start * x.cols() + column..], rows.len(), self.shape.head_dim, x.cols())
    }

    /// Softmax of the scaled scores of queries `block` (relative to the span): `[block, keys]` and the number of keys
    /// that the block's last query sees; keys beyond are left out.
    fn probabilities(&self, q: &Matrix, k: &Matrix, block: std::ops::Range<usize>) -> (Vec<f32>, usize) {
        let (queries, all_keys) = (self.span.q.len(), self.span.k.len());
        let visible = |query: usize| if self.shape.causal { all_keys - queries + query + 1 } else { all_keys };
        let keys = visible(block.end - 1);
        let mut scores = vec![0.0; block.len() * keys];
        let q_rows = self.span.q.start + block.start..self.span.q.start + block.end;
        let k_rows = self.span.k.start..self.span.k.start + keys;
        gemm(
            (self.shape.head_dim as f32).powf(-0.5),
            self.view(q, q_rows, self.q_column),
            self.view(k, k_rows, self.k_column).t(),
            0.0,
            StridedMut::new(&mut scores, block.len(), keys, keys),
        );
        dispatch(|| {
            for (query, row) in block.zip(scores.chunks_exact_mut(keys)) {
                let (seen, unseen) = row.split_at_mut(visible(query));
                softmax(seen);
                unseen.fill(0.0);
            }
        });
        (scores, keys)
    }
}

pub(super) fn forward(operands: &AttentionOperands<'_, Matrix>) -> Result<Matrix> {
    check(operands)?;
    let &AttentionOperands { q, k, v, spans, shape } = operands;
    let dim = shape.head_dim;
    let tasks: Vec<(Head<'_>, std::ops::Range<usize>)> = spans
        .iter()
        .flat_map(|span| {
            (0..shape.heads)
                .flat_map(move |head| blocks(span.q.len()).map(move |block| (task(shape, span, head), block)))
        })
        .collect();
    let results = map(tasks.len(), |i| {
        let (head, block) = &tasks[i];
        let (scores, keys) = head.probabilities(q, k, block.clone());
        let mut out = vec![0.0; block.len() * dim];
        gemm(
            1.0,
            Strided::new(&scores, block.len(), keys, keys),
            head.view(v, head.span.k.start..head.span.k.start + keys, head.k_column),
            0.0,
            StridedMut::new(&mut out, block.len(), dim, dim),
        );
        out
    });
    let mut out = Matrix::zeros(q.rows(), q.cols());
    for ((head, block), rows) in tasks.iter().zip(&results) {
        place(&mut out, head.span.q.start + block.start, head.q_column, rows, dim);
    }
    Ok(out)
}

/// Gradients of one key/value head of one span, `[rows, head_dim]` each.
struct HeadGradients {
    /// One for each query head that reads this key/value head.
    queries: Vec<Vec<f32>>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Gradients of attention. With P the probabilities, dO the output gradient and s the scale: dV = Pᵀ dO; dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O));
/// dQ = s dS K; dK = s dSᵀ Q. A task is one key/value head of one span, so that its sums have one fixed order.
pub(super) fn backward(operands: &AttentionOperands<'_, Matrix>, d_out: &Matrix) -> Result<(Matrix, Matrix, Matrix)> {
    check(operands)?;
    let &AttentionOperands { q, k, v, spans, shape } = operands;
    ensure!(d_out.rows() == q.rows() && d_out.cols() == q.cols(), "output gradient of another shape than the output");
    let dim = shape.head_dim;
    let per_kv = shape.heads / shape.kv_heads;
    let scale = (dim as f32).powf(-0.5);
    let tasks: Vec<(usize, &Span)> =
        spans.iter().flat_map(|span| (0..shape.kv_heads).map(move |kv_head| (kv_head, span))).collect();
    let results = map(tasks.len(), |i| {
        let (kv_head, span) = tasks[i];
        let mut d_k = vec![0.0; span.k.len() * dim];
        let mut d_v = vec![0.0; span.k.len() * dim];
        let d_q = (kv_head * per_kv..(kv_head + 1) * per_kv)
            .map(|index| {
                let head = task(shape, span, index);
                let mut d_q = vec![0.0; span.q.len() * dim];
                for block in blocks(span.q.len()) {
                    let (mut scores, keys) = head.probabilities(q, k, block.clone());
                    let q_rows = span.q.start + block.start..span.q.start + block.end;
                    let k_rows = span.k.start..span.k.start + keys;
                    let d_out = head.view(d_out, q_rows.clone(), head.q_column);
                    let p = Strided::new(&scores, block.len(), keys, keys);
                    gemm(1.0, p.t(), d_out, 1.0, StridedMut::new(&mut d_v, keys, dim, dim));
                    let mut d_p = vec![0.0; block.len() * keys];
                    let values = head.view(v, k_rows.clone(), head.k_column);
                    gemm(1.0, d_out, values.t(), 0.0, StridedMut::new(&mut d_p, block.len(), keys, keys));
                    dispatch(|| {
                        for (p, d_p) in scores.chunks_exact_mut(keys).zip(d_p.chunks_exact(keys)) {
                            let mean = dot(p, d_p);
                            for (p, d) in p.iter_mut().zip(d_p) {
                                *p *= d - mean;
                            }
                        }
                    });
                    let d_s = Strided::new(&scores, block.len(), keys, keys);
                    let block_d_q = &mut d_q[block.start * dim..block.end * dim];
                    let keys_view = head.view(k, k_rows, head.k_column);
                    gemm(scale, d_s, keys_view, 0.0, StridedMut::new(block_d_q, block.len(), dim, dim));
                    let queries = head.view(q, q_rows, head.q_column);
                    gemm(scale, d_s.t(), queries, 1.0, StridedMut::new(&mut d_k, keys, dim, dim));
                }
                d_q
            })
            .collect();
        HeadGradients { queries: d_q, keys: d_k, values: d_v }
    });
    let mut d_q = Matrix::zeros(q.rows(), q.cols());
    let mut d_k = Matrix::zeros(k.rows(), k.cols());
    let mut d_v = Matrix::zeros(v.rows(), v.cols());
    for (&(kv_head, span), gradients) in tasks.iter().zip(&results) {
        for (i, head) in gradients.queries.iter().enumerate() {
            place(&mut d_q, span.q.start, (kv_head * per_kv + i) * dim, head, dim);
        }
        place(&mut d_k, span.k.start, kv_head * dim, &gradients.keys, dim);
        place(&mut d_v, span.k.start, kv_head * dim, &gradients.values, dim);
    }
    Ok((d_q, d_k, d_v))
}

fn task(shape: AttentionShape, span: &Span, head: usize) -> Head<'_> {
    let kv_head = head / (shape.heads / shape.kv_heads);
    Head { shape, span, q_column: head * shape.head_dim, k_column: kv_head * shape.head_dim }
}

fn blocks(queries: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..queries).step_by(QUERY_BLOCK).map(move |start| start..(start + QUERY_BLOCK).min(queries))
}

/// Writes `[rows, dim]` into columns `column..` of `target`, from row `first` on.
fn place(target: &mut Matrix, first: usize, column: usize, rows: &[f32], dim: usize) {
    for (i, row) in rows.chunks_exact(dim).enumerate() {
        target.row_mut(first + i)[column..column + dim].copy_from_slice(row);
    }
}

#[inline(always)]
fn softmax(row: &mut [f32]) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in chunks {
        for lane in 0..LANES {
            largest[lane] = if x[lane] > largest[lane] { x[lane] } else { largest[lane] };
        }
    }
    let max = largest.into_iter().fold(tail, f32::max);
    for value in row.iter_mut() {
        *value = exp(*value - max);
    }
    let scale = 1.0 / sum(row, |x| x);
    for value in row.iter_mut() {
        *value *= scale;
    }
}

fn check(operands: &AttentionOperands<'_, Matrix>) -> Result<()> {
    let &AttentionOperands { q, k, v, spans, shape } = operands;
    ensure!(
        q.cols() == shape.heads * shape.head_dim
            && k.cols() == shape.kv_heads * shape.head_dim
            && v.cols() == k.cols()
            && v.rows() == k.rows()
            && shape.kv_heads > 0
            && shape.heads.is_multiple_of(shape.kv_heads),
        "attention of {}/{} heads of {} on queries {}x{}, keys {}x{}, values {}x{}",
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        q.rows(),
        q.cols(),
        k.rows(),
        k.cols(),
        v.rows(),
        v.cols()
    );
    for span in spans {
        ensure!(
            span.q.end <= q.rows() && span.k.end <= k.rows() && (!shape.causal || span.q.len() <= span.k.len()),
            "span {span:?} outside {} query and {} key rows",
            q.rows(),
            k.rows()
        );
    }
    Ok(())
}
