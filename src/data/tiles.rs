//! The tiles that a large image is cut into, and what is left of their features.

use std::ops::Range;

/// The tiles of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Tiles from top to bottom.
    pub rows: usize,
    /// Tiles from left to right.
    pub columns: usize,
    /// What is left of their features.
    pub kept: Kept,
}

/// The features of an image's tiles, taken as one grid, that become tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Rows of the grid that do not only show padding.
    pub rows: Range<usize>,
    /// Columns of the grid that do not only show padding.
    pub columns: Range<usize>,
    /// `(rows, columns)` to which those are then reduced, bilinearly.
    pub reduced: Option<(usize, usize)>,
}

impl Kept {
    /// `(rows, columns)` in the end.
    pub fn size(&self) -> (usize, usize) {
        self.reduced.unwrap_or((self.rows.len(), self.columns.len()))
    }

    /// Tokens, the one that ends each row included.
    pub fn tokens(&self) -> usize {
        let (rows, columns) = self.size();
        rows * (columns + 1)
    }

    /// Features that are put together before they are reduced; 0 where they are not.
    pub fn joined(&self) -> usize {
        self.reduced.map_or(0, |_| self.rows.len() * self.columns.len())
    }

    /// Features that are reduced, and what the reduction along one side makes of them, together.
    pub fn reducing(&self) -> usize {
        self.reduced.map_or(0, |(rows, _)| (self.rows.len() + rows) * self.columns.len())
    }
}
