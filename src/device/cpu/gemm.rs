//! Single-thread product of strided matrices, float32 or float64: the one place that calls matrixmultiply.
//!
//! Callers split work into tiles of fixed size and hand tiles to threads; a tile is always computed by one call of the
//! same shape, so results do not depend on the number of threads.

use crate::tensor::Matrix;

/// Bytes that a product takes for packing its operands: blocks of at most 256 by 1024 columns of the one, 64 rows by 256 of
/// the other (matrixmultiply's `kernel_params`), of elements of `size` bytes.
pub(crate) fn packing_bytes(inner: usize, columns: usize, size: usize) -> u64 {
    (inner.min(256) * (columns.min(1024) + 64) * size) as u64
}

/// `(rows, inner, columns, alpha, a, row stride, column stride, b, …, beta, c, …)`, as matrixmultiply has it.
type Product<T> =
    unsafe fn(usize, usize, usize, T, *const T, isize, isize, *const T, isize, isize, T, *mut T, isize, isize);

/// A number that matrices are made of.
pub(crate) trait Element: Copy {
    /// matrixmultiply's function for it.
    const PRODUCT: Product<Self>;
}

impl Element for f32 {
    const PRODUCT: Product<f32> = matrixmultiply::sgemm;
}

impl Element for f64 {
    const PRODUCT: Product<f64> = matrixmultiply::dgemm;
}

/// A strided read-only view: element (r, c) is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Strided<'a, T> {
    /// Row-major view of `rows` rows of `cols` columns, `row_stride` apart.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "view outside its data");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

impl<'a> From<&'a Matrix> for Strided<'a> {
    fn from(matrix: &'a Matrix) -> Self {
        Self::new(matrix.data(), matrix.rows(), matrix.cols(), matrix.cols())
    }
}

/// A row-major view to write to, rows `row_stride` apart.
pub(crate) struct StridedMut<'a, T = f32> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> StridedMut<'a, T> {
    /// Row-major view of `rows` rows of `cols` columns, `row_stride` apart.
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "view outside its data");
        assert!(rows <= 1 || row_stride >= cols, "rows of a mutable view overlap");
        Self { data, rows, cols, row_stride }
    }
}

/// `c = beta · c + alpha · a · b`. With `beta` 0 the old content of `c` is never read.
pub(crate) fn gemm<T: Element>(alpha: T, a: Strided<'_, T>, b: Strided<'_, T>, beta: T, c: StridedMut<'_, T>) {
    assert!(a.cols == b.rows && a.rows == c.rows && b.cols == c.cols, "product of shapes that do not fit");
    // SAFETY: the constructors checked that every element of the three views lies inside its slice, `c` is borrowed
    // mutably and so overlaps neither operand, and its elements are distinct (rows at least `cols` apart).
    #[allow(unsafe_code)]
    unsafe {
        (T::PRODUCT)(
            a.rows,
            a.cols,
            b.cols,
            alpha,
            a.data.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            b.data.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            beta,
            c.data.as_mut_ptr(),
            c.row_stride as isize,
            1,
        );
    }
}
