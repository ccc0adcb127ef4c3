//! What the CPU's operations take for themselves, for memory plans.

use super::gemm;
use super::model::QUERY_BLOCK;
use super::solve::statistics_workspace;
use super::strips::STRIP_BYTES;
use crate::device::{AttentionShape, BLOCK, Work};

/// Bytes of a float32.
const F32: u64 = 4;

/// Columns that products pack at a time, in the model and in the solver's norms.
const PACKED_COLUMNS: u64 = 512;

/// Bytes that `work` takes on `threads` threads.
pub(super) fn bytes(work: Work, threads: u64) -> u64 {
    match work {
        Work::Linear { inner, outputs } => packed(inner, outputs),
        // Beside the packed columns, the product by them.
        Work::WeightedNorm { rows, features } => packed(features + rows, features),
        Work::Bias { .. } => 0,
        // Every head's rows are made on their own and put in their places when all are there.
        Work::Attention { tokens, longest, shape } => {
            F32 * tokens as u64 * query(shape) + scores(longest, shape.head_dim, 1, threads)
        }
        Work::AttentionBackward { tokens, longest, shape } => {
            F32 * tokens as u64 * (query(shape) + 2 * key(shape)) + scores(longest, shape.head_dim, 2, threads)
        }
        Work::Statistics { tokens, features, .. } => statistics_workspace(tokens, features, threads),
        // A panel of columns, and the rows that it is multiplied by.
        Work::Factor { features } => 2 * F32 * (features * BLOCK) as u64,
        Work::Carry { features, columns } => {
            (features.saturating_sub(columns) * columns.next_multiple_of(STRIP_BYTES / 4)) as u64 * F32
        }
    }
}

/// Some columns of a product's right operand, or of all `columns` where they are fewer.
fn packed(inner: usize, columns: usize) -> u64 {
    F32 * inner as u64 * (columns as u64).min(PACKED_COLUMNS)
}

/// Matrices of scores that each thread has.
fn scores(longest: usize, head_dim: usize, matrices: u64, threads: u64) -> u64 {
    let packed = gemm::packing_bytes(head_dim, longest, 4).max(gemm::packing_bytes(longest, head_dim, 4));
    threads * (matrices * F32 * (QUERY_BLOCK.min(longest) * longest) as u64 + packed)
}

fn query(shape: AttentionShape) -> u64 {
    (shape.heads * shape.head_dim) as u64
}

fn key(shape: AttentionShape) -> u64 {
    (shape.kv_heads * shape.head_dim) as u64
}

/// Bytes that a matrix `[features, features]` takes of which rows are written from their tile of the diagonal on, `tile` rows
/// a tile, where the system gives memory by pages of `page` bytes as they are first written.
pub(super) fn triangle(features: u64, tile: u64, page: u64) -> u64 {
    let whole = F32 * features * features;
    // Above the diagonal, half a tile a row, and a page in which the row begins.
    whole.min(whole / 2 + features * (page + F32 * tile / 2))
}

/// Bytes of the pages in which the system gives memory to this program: huge ones only where it does so unasked.
pub(super) fn page_bytes() -> u64 {
    let huge = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if huge.is_ok_and(|huge| huge.contains("[always]")) { 2 << 20 } else { 4096 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triangle_is_half_a_matrix_in_small_pages_and_all_of_it_in_huge_ones() {
        assert_eq!(triangle(8192, 256, 4096), (1 << 27) + 8192 * (4096 + 512));
        assert_eq!(triangle(8192, 256, 2 << 20), 1 << 28);
        // A row is less than a page.
        assert_eq!(triangle(256, 64, 4096), 1 << 18);
    }
}
