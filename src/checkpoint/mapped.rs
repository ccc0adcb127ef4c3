//! Tensors on their way out of a checkpoint as the file holds them: checked, and nothing of them copied.

#[cfg(feature = "run")]
use super::convert::first_non_finite;
use super::read::{Checkpoint, StoredTensor};
use crate::tensor::{Float, Matrix, Stored, StoredMatrix};
use anyhow::Result;
#[cfg(feature = "run")]
use anyhow::ensure;
use std::borrow::Cow;
use std::fmt;
#[cfg(feature = "run")]
use std::ops::Range;

/// Finite numbers of a tensor. With this value the pages of the file that they were read from leave the process's memory.
pub struct Mapped<'a> {
    checkpoint: &'a Checkpoint,
    name: String,
    float: Float,
    rows: usize,
    cols: usize,
    /// Borrowed from the file, or copies of some of its rows.
    bytes: Cow<'a, [u8]>,
}

impl Stored for Mapped<'_> {
    fn stored(&self) -> StoredMatrix<'_> {
        StoredMatrix::new(self.float, self.rows, self.cols, &self.bytes).expect("a shape that was checked")
    }
}

impl Mapped<'_> {
    /// The numbers in float32.
    pub fn to_matrix(&self) -> Matrix {
        self.stored().to_matrix()
    }
}

impl fmt::Debug for Mapped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{} {:?}", self.name, self.rows, self.cols, self.float)
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        if matches!(self.bytes, Cow::Borrowed(_)) {
            self.checkpoint.release(&self.name);
        }
    }
}

impl Checkpoint {
    /// The float tensor `name` as a matrix `[rows, cols]`, as it is stored.
    ///
    /// Its first dimension is `rows`; all further ones together are `cols` (a convolution `[E, 3, 2, 14, 14]` is
    /// `[E, 1176]`). Errors when it is absent, of another shape, not f16, bf16 or f32, or holds a NaN or an infinity.
    pub fn stored_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Mapped<'_>> {
        self.whole(name, self.shaped(name, rows, cols)?, (rows, cols))
    }

    /// The float tensor `name` of `len` values as one row, as it is stored. Errors as [`stored_matrix`](Self::stored_matrix) does.
    pub fn stored_vector(&self, name: &str, len: usize) -> Result<Mapped<'_>> {
        self.whole(name, self.shaped_vector(name, len)?, (1, len))
    }

    /// Some rows of [`stored_matrix`](Self::stored_matrix), without reading the others. Errors as it does; of numbers that are not
    /// finite it sees those rows only.
    #[cfg(feature = "run")]
    pub(crate) fn stored_rows(&self, name: &str, rows: usize, cols: usize, some: Range<usize>) -> Result<Mapped<'_>> {
        let tensor = self.shaped(name, rows, cols)?;
        let float = self.float_type_of(name, tensor.dtype)?;
        let row_bytes = tensor.bytes.len() / rows;
        let bytes = &tensor.bytes[some.start * row_bytes..some.end * row_bytes];
        let mapped = self.mapped(name, float, (some.len(), cols), Cow::Borrowed(bytes));
        self.check_part(name, float, bytes)?;
        Ok(mapped)
    }

    /// Rows of [`stored_matrix`](Self::stored_matrix) by their numbers, each as often as it is asked for. Errors as
    /// [`stored_rows`](Self::stored_rows) does, and where there is no such row.
    #[cfg(feature = "run")]
    pub(crate) fn gathered_rows(&self, name: &str, rows: usize, cols: usize, indices: &[u32]) -> Result<Mapped<'_>> {
        // Each row brings pages of others with it.
        const ROWS: usize = 256;
        let tensor = self.shaped(name, rows, cols)?;
        let float = self.float_type_of(name, tensor.dtype)?;
        let row_bytes = tensor.bytes.len() / rows;
        let mut bytes = Vec::with_capacity(indices.len() * row_bytes);
        for some in indices.chunks(ROWS) {
            for &index in some {
                let index = index as usize;
                ensure!(index < rows, "row {index} of tensor {name} is asked for, which has {rows}");
                let row = &tensor.bytes[index * row_bytes..][..row_bytes];
                self.check_part(name, float, row)?;
                bytes.extend_from_slice(row);
            }
            self.release(name);
        }
        Ok(self.mapped(name, float, (indices.len(), cols), Cow::Owned(bytes)))
    }

    /// Some values of [`stored_vector`](Self::stored_vector) as one row.
    #[cfg(feature = "run")]
    pub(crate) fn stored_part(&self, name: &str, len: usize, part: Range<usize>) -> Result<Mapped<'_>> {
        let tensor = self.shaped_vector(name, len)?;
        let float = self.float_type_of(name, tensor.dtype)?;
        self.check_finite(name)?;
        let bytes = &tensor.bytes[part.start * float.bytes()..part.end * float.bytes()];
        Ok(self.mapped(name, float, (1, part.len()), Cow::Borrowed(bytes)))
    }

    /// All of a tensor. Errors where it is no float, or not finite.
    fn whole<'a>(&'a self, name: &str, tensor: StoredTensor<'a>, shape: (usize, usize)) -> Result<Mapped<'a>> {
        let float = self.float_type_of(name, tensor.dtype)?;
        self.check_finite(name)?;
        Ok(self.mapped(name, float, shape, Cow::Borrowed(tensor.bytes)))
    }

    /// Errors, naming the first of the whole tensor, where one of these numbers of it is not finite.
    #[cfg(feature = "run")]
    fn check_part(&self, name: &str, float: Float, bytes: &[u8]) -> Result<()> {
        if first_non_finite(float, bytes).is_some() { self.check_finite(name) } else { Ok(()) }
    }

    fn mapped<'a>(
        &'a self,
        name: &str,
        float: Float,
        (rows, cols): (usize, usize),
        bytes: Cow<'a, [u8]>,
    ) -> Mapped<'a> {
        Mapped { checkpoint: self, name: name.to_owned(), float, rows, cols, bytes }
    }
}
