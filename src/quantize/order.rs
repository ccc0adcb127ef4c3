//! The order in which columns are quantized (method section 3, step 2).

use super::settings::Order;
use std::cmp::Ordering;

/// Place → original column. Columns of equal `H_ii` keep their order, and so do groups.
///
/// `diagonal` is H's; `group` divides its length.
pub fn processing_order(diagonal: &[f32], group: usize, order: Order) -> Vec<u32> {
    let falling = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
    let columns = 0..diagonal.len() as u32;
    let by_diagonal = |a: &u32, b: &u32| falling(diagonal[*a as usize], diagonal[*b as usize]);
    match order {
        Order::None => columns.collect(),
        Order::Act => {
            let mut columns: Vec<u32> = columns.collect();
            columns.sort_by(by_diagonal);
            columns
        }
        Order::ActGroup => {
            let mut columns: Vec<u32> = columns.collect();
            let mut groups: Vec<&mut [u32]> = columns.chunks_mut(group).collect();
            groups.iter_mut().for_each(|group| group.sort_by(by_diagonal));
            // The first of a sorted group is its largest.
            groups.sort_by(|a, b| by_diagonal(&a[0], &b[0]));
            groups.concat()
        }
    }
}

/// Columns of a block that is quantized at a time, and of a span of blocks that products over all earlier columns
/// bring up to date at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ColumnSpan {
    /// First column.
    pub(crate) start: usize,
    /// Past the last column.
    pub(crate) end: usize,
    /// Consecutive blocks.
    pub(crate) blocks: Vec<std::ops::Range<usize>>,
}

/// Cuts `columns` columns into spans of blocks of at most `widest` columns. Small groups lie whole in a block; a larger
/// group is a span of its own, because its range is taken over all of its columns, current at its first.
pub(crate) fn spans(columns: usize, group: usize, widest: usize) -> Vec<ColumnSpan> {
    // Four blocks: wide enough for products to run at full speed, narrow enough to stay in cache.
    const BLOCKS: usize = 4;
    let small = group <= widest || group >= columns;
    let width = if group <= widest { widest / group * group } else { widest };
    let length = if small { width * BLOCKS } else { group };
    (0..columns)
        .step_by(length)
        .map(|start| {
            let end = (start + length).min(columns);
            let blocks = (start..end).step_by(width).map(|first| first..(first + width).min(end)).collect();
            ColumnSpan { start, end, blocks }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders() {
        let h = [1.0, 5.0, 5.0, 2.0, 9.0, 3.0, 9.0, 5.0];
        assert_eq!(processing_order(&h, 4, Order::None), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(processing_order(&h, 4, Order::Act), [4, 6, 1, 2, 7, 5, 3, 0]);
        assert_eq!(processing_order(&h, 4, Order::ActGroup), [4, 6, 7, 5, 1, 2, 3, 0]);
        assert_eq!(processing_order(&[2.0; 8], 4, Order::ActGroup), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn spans_cover_all_columns_and_respect_groups() {
        for (columns, group) in [(1024, 128), (1024, 32), (960, 96), (1024, 256), (576, 192), (1000, 1000), (40, 40)] {
            let spans = spans(columns, group, 128);
            let blocks: Vec<_> = spans.iter().flat_map(|span| span.blocks.clone()).collect();
            assert_eq!((blocks[0].start, blocks[blocks.len() - 1].end), (0, columns));
            assert!(blocks.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(blocks.iter().all(|block| block.len() <= 128));
            if group <= 128 {
                assert!(blocks.iter().all(|block| block.len() % group == 0));
            } else if group < columns {
                assert!(spans.iter().all(|span| span.end - span.start == group));
            }
        }
    }
}
