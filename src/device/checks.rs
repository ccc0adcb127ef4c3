//! Whether tensors go together, for every device that checks their shapes before it takes their addresses, or in place of values.

use crate::device::{
    AttentionOperands, AttentionShape, BLOCK, ColumnBlock, CrossFactor, Factor, Group, LayerInputs, PermuteSymmetric,
    ProductRange, Rotary, SolveState, Span,
};
use crate::tensor::Float;
use anyhow::{Context, Result, bail, ensure};
use std::ops::Range;

/// A tensor whose shape and storage type are known without a look at its values.
pub(super) trait Header {
    /// Rows, columns and storage type.
    fn header(&self) -> (usize, usize, Float);

    /// Rows and columns.
    fn size(&self) -> (usize, usize) {
        let (rows, cols, _) = self.header();
        (rows, cols)
    }

    /// The tensor for messages: `3x4 Bf16`.
    fn describe(&self) -> String {
        let (rows, cols, float) = self.header();
        format!("{rows}x{cols} {float:?}")
    }
}

/// Errors where two tensors differ in shape or type.
pub(super) fn alike<T: Header>(a: &T, b: &T) -> Result<()> {
    ensure!(a.header() == b.header(), "{} against {}", a.describe(), b.describe());
    Ok(())
}

/// Errors where a tensor is not of this shape.
pub(super) fn shaped<T: Header>(x: &T, rows: usize, cols: usize) -> Result<()> {
    ensure!(x.size() == (rows, cols), "{} where {rows}x{cols} is needed", x.describe());
    Ok(())
}

/// Errors where a tensor is no square of this side.
pub(super) fn square<T: Header>(x: &T, n: usize) -> Result<()> {
    shaped(x, n, n)
}

/// Errors where a norm's weight or bias does not go with every row of `x`.
pub(super) fn fits_rows<T: Header>(part: &T, x: &T) -> Result<()> {
    let (_, cols, float) = x.header();
    ensure!(part.header() == (1, cols, float), "norm of {} on {}", part.describe(), x.describe());
    Ok(())
}

/// Errors where a bias does not go with a product's outputs.
pub(super) fn fits_outputs<T: Header>(bias: &T, x: &T, outputs: usize) -> Result<()> {
    let (_, _, float) = x.header();
    ensure!(bias.header() == (1, outputs, float), "bias {} for {outputs} outputs of {float:?}", bias.describe());
    Ok(())
}

/// Errors where a row is asked for that a table has not.
pub(super) fn gathered<T: Header>(table: &T, indices: &[u32]) -> Result<()> {
    let (rows, _) = table.size();
    match indices.iter().find(|&&row| row as usize >= rows) {
        Some(row) => bail!("row {row} asked of a table of {rows} rows"),
        None => Ok(()),
    }
}

/// Errors where rows do not go into a target, each into one of its own.
pub(super) fn scattered<T: Header>(target: &T, indices: &[u32], source: &T) -> Result<()> {
    let ((rows, cols, float), (wanted, width, from)) = (target.header(), source.header());
    ensure!(
        indices.len() == wanted && cols == width && float == from,
        "{} does not go into {} rows of {}",
        source.describe(),
        indices.len(),
        target.describe()
    );
    let mut taken = vec![false; rows];
    for &row in indices {
        let place = taken.get_mut(row as usize);
        let place = place.with_context(|| format!("row {row} of a target of {rows} rows"))?;
        ensure!(!std::mem::replace(place, true), "row {row} of the target is named twice");
    }
    Ok(())
}

/// Errors where a tensor has no such rows.
pub(super) fn sliced<T: Header>(x: &T, rows: &Range<usize>) -> Result<()> {
    ensure!(rows.start <= rows.end && rows.end <= x.size().0, "rows {rows:?} of {}", x.describe());
    Ok(())
}

/// Errors where rows do not go behind those of `x`.
pub(super) fn appended<T: Header>(x: &T, more: &T) -> Result<()> {
    let ((_, cols, float), (_, width, from)) = (x.header(), more.header());
    ensure!(cols == width && float == from, "{} does not append to {}", more.describe(), x.describe());
    Ok(())
}

/// Errors where a row's squares have no scale for each of its columns.
pub(super) fn scaled<T: Header>(x: &T, scales: &[f32]) -> Result<()> {
    let (_, cols) = x.size();
    ensure!(cols == scales.len(), "{} scales for {cols} columns", scales.len());
    Ok(())
}

/// Errors where rotary tables do not go with the rows and heads of `x`.
pub(super) fn rotated<T: Header>(x: &T, Rotary { cos, sin }: &Rotary<T>) -> Result<()> {
    let ((rows, cols), (tables, half)) = (x.size(), cos.size());
    ensure!(
        tables == rows && sin.size() == (rows, half) && half > 0 && cols.is_multiple_of(2 * half),
        "rotary tables {} and {} on {}",
        cos.describe(),
        sin.describe(),
        x.describe()
    );
    Ok(())
}

/// Errors where queries, keys and values are not of these heads.
pub(super) fn heads<T: Header>(operands: &AttentionOperands<'_, T>) -> Result<()> {
    let &AttentionOperands { q, k, v, shape: AttentionShape { heads, kv_heads, head_dim, .. }, .. } = operands;
    let ((_, queries, float), (keys, width, of_keys)) = (q.header(), k.header());
    ensure!(
        queries == heads * head_dim
            && width == kv_heads * head_dim
            && v.size() == (keys, width)
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && of_keys == float
            && v.header().2 == float,
        "attention of {heads}/{kv_heads} heads of {head_dim} on queries {}, keys {}, values {}",
        q.describe(),
        k.describe(),
        v.describe()
    );
    Ok(())
}

/// Errors where spans share queries, or are not among the rows.
pub(super) fn spans<T: Header>(operands: &AttentionOperands<'_, T>) -> Result<()> {
    let &AttentionOperands { q, k, spans, shape, .. } = operands;
    let ((queries, _), (keys, _)) = (q.size(), k.size());
    ensure!(apart(spans.iter().map(|span| &span.q)), "spans that share queries");
    for span in spans {
        ensure!(
            span.q.start <= span.q.end
                && span.k.start <= span.k.end
                && span.q.end <= queries
                && span.k.end <= keys
                && (!shape.causal || span.q.len() <= span.k.len()),
            "span {span:?} outside {queries} query and {keys} key rows"
        );
    }
    Ok(())
}

/// Errors where attention has no gradients for this one of its output.
pub(super) fn gradients<T: Header>(operands: &AttentionOperands<'_, T>, d_out: &T) -> Result<()> {
    alike(d_out, operands.q).context(OTHER_GRADIENT)?;
    ensure!(apart(operands.spans.iter().map(|span| &span.k)), "spans that share keys have no gradients of their own");
    Ok(())
}

/// What is wrong with a gradient that is not of the output's shape.
pub(super) const OTHER_GRADIENT: &str = "output gradient of another shape than the output";

/// Keys of the longest span.
pub(super) fn longest(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.k.len()).max().unwrap_or(0)
}

/// Whether no two ranges share a row.
fn apart<'a>(ranges: impl Iterator<Item = &'a Range<usize>>) -> bool {
    let mut ranges: Vec<&Range<usize>> = ranges.filter(|range| !range.is_empty()).collect();
    ranges.sort_by_key(|range| range.start);
    ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
}

/// Errors where tokens do not go into statistics.
pub(super) fn statistics<T: Header>(hessian: &T, cross: Option<&T>, inputs: &LayerInputs<'_, T>) -> Result<()> {
    let &LayerInputs { u, f, g } = inputs;
    let (tokens, features) = u.size();
    square(hessian, features)?;
    ensure!(cross.is_some() == f.is_some(), "cross statistics and float-path inputs come together");
    if let (Some(cross), Some(f)) = (cross, f) {
        square(cross, features)?;
        ensure!(
            f.header() == u.header(),
            "float-path inputs {} beside quantized-path inputs {}",
            f.describe(),
            u.describe()
        );
    }
    ensure!(g.is_none_or(|g| g.len() == tokens), "importance factors for another number of tokens than {tokens}");
    Ok(())
}

/// Errors where an order or inputs without signal are another weight's.
pub(super) fn columns<T: Header>(weight: &T, order: &[u32], dead: &[usize]) -> Result<()> {
    let (rows, cols) = weight.size();
    ensure!(order.len() == cols && dead.iter().all(|&i| i < cols), "an order of another matrix than {rows}x{cols}");
    Ok(())
}

/// Errors where an order is not that of a square matrix.
pub(super) fn order<T: Header>(x: &T, order: &[u32]) -> Result<()> {
    let (_, n) = x.size();
    square(x, n)?;
    ensure!(order.len() == n && order.iter().all(|&i| (i as usize) < n), "an order of another matrix than {n}x{n}");
    Ok(())
}

/// Errors where a diagonal is another matrix's.
pub(super) fn diagonal<T: Header>(x: &T, how: &PermuteSymmetric<'_>) -> Result<()> {
    let given = how.diagonal.len();
    ensure!(given == x.size().1, "a diagonal of {given} values for {}", x.describe());
    Ok(())
}

/// Errors where parts of `a` and `b` do not multiply into `c`.
pub(super) fn product<T: Header>([c, a, b]: [&T; 3], range: &ProductRange) -> Result<()> {
    let ProductRange { inner, columns, target } = range;
    let ((rows, cols), (of_a, width), (depth, of_b)) = (c.size(), a.size(), b.size());
    ensure!(
        rows == of_a
            && inner.start <= inner.end
            && columns.start <= columns.end
            && inner.end <= width.min(depth)
            && columns.end <= of_b
            && target + columns.len() <= cols,
        "{range:?} of {} times {} into {}",
        a.describe(),
        b.describe(),
        c.describe()
    );
    Ok(())
}

/// Errors where the parts of a factor are not of a matrix of this side.
pub(super) fn factor<T: Header>(Factor { root, inverses, diagonal }: &Factor<T>, n: usize) -> Result<()> {
    square(root, n)?;
    shaped(inverses, n, BLOCK)?;
    shaped(diagonal, 1, n)
}

/// Errors where blocks do not follow each other over all of `columns`, or one is wider than [`BLOCK`].
pub(super) fn consecutive(blocks: &[Range<usize>], columns: Range<usize>) -> Result<()> {
    let mut at = columns.start;
    for block in blocks {
        ensure!(block.start == at && block.end > at && block.len() <= BLOCK, "block {block:?} behind column {at}");
        at = block.end;
    }
    ensure!(at == columns.end, "blocks up to column {at} of {columns:?}");
    Ok(())
}

/// What a group's grid is found by beside its weights.
pub(super) struct GroupOperands<'a, T> {
    pub(super) factor: Option<&'a Factor<T>>,
    pub(super) cross: Option<&'a CrossFactor<T>>,
    /// Errors carried on from earlier columns, and the cross term's.
    pub(super) corrections: [Option<&'a T>; 2],
}

/// What is looked at for a group's grid: without corrections and losses nothing but the weights. Errors where that does not go together.
pub(super) fn group<'a, T: Header>(state: &'a SolveState<T>, group: &Group<'a, T>) -> Result<GroupOperands<'a, T>> {
    let (rows, features) = state.residual.size();
    let columns = &group.columns;
    ensure!(
        columns.start < columns.end && columns.end <= features,
        "group {columns:?} of {}",
        state.residual.describe()
    );
    let searched = group.rule.grid.reads_factor();
    let looked_at = group.factor.filter(|_| group.is_span || searched);
    let cross = group.cross.filter(|_| looked_at.is_some() && searched);
    let is_corrected = group.is_span && looked_at.is_some();
    let corrections = [Some(&state.error), state.cross.as_ref()].map(|part| part.filter(|_| is_corrected));
    if let Some(of_matrix) = looked_at {
        factor(of_matrix, features)?;
        corrections.into_iter().flatten().try_for_each(|part| shaped(part, rows, columns.len()))?;
    }
    if let Some(cross) = cross {
        shaped(&cross.blocks, features, BLOCK)?;
    }
    if looked_at.is_some() {
        consecutive(group.blocks, columns.clone())?;
    }
    Ok(GroupOperands { factor: looked_at, cross, corrections })
}

/// Groups of a block of columns. Errors where block, state and factor do not go together.
pub(super) fn block<T: Header>(block: &ColumnBlock<'_, T>, state: &SolveState<T>) -> Result<usize> {
    let (rows, features) = state.residual.size();
    let (columns, width) = (&block.columns, block.columns.len());
    ensure!(width > 0 && columns.end <= features, "block {columns:?} of {}", state.residual.describe());
    let groups = match block.grid {
        Some(grid) => {
            let (scales, zeros) = (grid.scales.len(), grid.zeros.len());
            ensure!(scales == rows && zeros == rows, "a grid of {scales} scales and {zeros} zeros for {rows} rows");
            1
        }
        None => {
            let whole = block.group > 0 && width.is_multiple_of(block.group);
            ensure!(whole, "groups of {} columns in a block of {width}", block.group);
            width / block.group
        }
    };
    let Some(of_matrix) = block.factor else { return Ok(groups) };
    factor(of_matrix, features)?;
    let (_, span) = state.error.size();
    ensure!(
        width <= BLOCK && block.span <= columns.start && columns.end <= block.span + span,
        "block {columns:?} in a span of {span} columns from {} on",
        block.span
    );
    for part in [Some(&state.error), state.cross.as_ref()].into_iter().flatten() {
        shaped(part, rows, span)?;
    }
    for part in [&state.carried, &state.shift].into_iter().flatten() {
        shaped(part, rows, features)?;
    }
    if let Some(cross) = block.cross {
        shaped(&cross.blocks, features, BLOCK)?;
    }
    ensure!(state.shift.is_none() || block.cross.is_some(), "a shift without a cross term");
    Ok(groups)
}
