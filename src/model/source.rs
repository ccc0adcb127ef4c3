//! Where a model's tensors come from while it is loaded.
//!
//! Loading is written once, over [`Source`]: from a checkpoint [onto a device](Weights), or of its [headers](Headers) alone, which
//! finds a tensor that is missing, of another shape or of another type without reading a weight.

use crate::checkpoint::Checkpoint;
use crate::device::ModelOps;
use crate::tensor::Matrix;
use anyhow::Result;
use std::ops::Range;

/// A checkpoint's tensors as a model asks for them. Errors are those of [`Checkpoint::stored_matrix`],
/// [`Checkpoint::stored_vector`] and [`Checkpoint::linear`].
pub trait Source {
    /// What becomes of a tensor.
    type Tensor;

    /// The checkpoint.
    fn checkpoint(&self) -> &Checkpoint;

    /// The float tensor `name`, `[rows, cols]`.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// The float tensor `name` of `len` values as one row.
    fn vector(&self, name: &str, len: usize) -> Result<Self::Tensor>;

    /// Some values of [`vector`](Self::vector) as one row.
    fn part_of_vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Self::Tensor>;

    /// The weight `[out, in]` of the linear layer `module`, plain or quantized.
    fn linear(&self, module: &str, shape: (usize, usize)) -> Result<Self::Tensor>;

    /// Some rows of a tensor.
    fn rows(&self, whole: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor>;

    /// As [`matrix`](Self::matrix), in float32 to be used on the host; of a source that reads no weights it is empty.
    fn on_host(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix>;
}

/// Weights on their way to a device.
#[derive(Debug)]
pub struct Weights<'a, D> {
    device: &'a D,
    checkpoint: &'a Checkpoint,
}

impl<'a, D: ModelOps> Weights<'a, D> {
    /// The weights of `checkpoint`, for `device`.
    pub fn new(device: &'a D, checkpoint: &'a Checkpoint) -> Self {
        Self { device, checkpoint }
    }
}

impl<D: ModelOps> Source for Weights<'_, D> {
    type Tensor = D::Tensor;

    fn checkpoint(&self) -> &Checkpoint {
        self.checkpoint
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<D::Tensor> {
        self.device.upload_stored_with((rows, cols), || self.checkpoint.stored_matrix(name, rows, cols))
    }

    fn vector(&self, name: &str, len: usize) -> Result<D::Tensor> {
        self.device.upload_stored_with((1, len), || self.checkpoint.stored_vector(name, len))
    }

    fn part_of_vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<D::Tensor> {
        self.device.upload_stored_with((1, part.len()), || self.checkpoint.stored_part(name, len, part))
    }

    fn linear(&self, module: &str, (outputs, inputs): (usize, usize)) -> Result<D::Tensor> {
        match self.checkpoint.is_plain(module) {
            true => self.matrix(&format!("{module}.weight"), outputs, inputs),
            false => {
                self.device.upload_model_with((outputs, inputs), || self.checkpoint.linear(module, outputs, inputs))
            }
        }
    }

    fn rows(&self, whole: &D::Tensor, rows: Range<usize>) -> Result<D::Tensor> {
        self.device.slice_rows(whole, rows)
    }

    fn on_host(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.checkpoint.matrix(name, rows, cols)
    }
}

/// Names, shapes and types of a checkpoint's tensors.
#[derive(Debug)]
pub struct Headers<'a>(pub &'a Checkpoint);

impl Source for Headers<'_> {
    type Tensor = ();

    fn checkpoint(&self) -> &Checkpoint {
        self.0
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<()> {
        self.0.check_matrix(name, rows, cols)
    }

    fn vector(&self, name: &str, len: usize) -> Result<()> {
        self.0.check_vector(name, len)
    }

    fn part_of_vector(&self, name: &str, len: usize, _part: Range<usize>) -> Result<()> {
        self.0.check_vector(name, len)
    }

    fn linear(&self, module: &str, (outputs, inputs): (usize, usize)) -> Result<()> {
        self.0.check_linear(module, outputs, inputs)
    }

    fn rows(&self, _whole: &(), _rows: Range<usize>) -> Result<()> {
        Ok(())
    }

    fn on_host(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.0.check_matrix(name, rows, cols)?;
        Ok(Matrix::default())
    }
}
