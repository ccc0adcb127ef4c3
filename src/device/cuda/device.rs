//! The device itself: where it comes from, its tensors, and how kernels are called.
#![allow(unsafe_code)]

use super::bindings::{vlmq_add_args, vlmq_first_non_finite_row_args, vlmq_scaled_squares_rows_args, vlmq_status};
use super::driver::Driver;
use super::emulated::Emulated;
use super::heap::Heap;
use super::kernels::{Arguments, Kernels, NeedsWorkspace};
use super::memory::Memory;
use super::runtime::{Product, Runtime};
use super::tensor::{CudaTensor, dtype_of, encode};
use crate::device::checks::{self, Header};
use crate::device::{Device, PoolPeak, Work};
use crate::tensor::Float;
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

/// A GPU, or the host in its place where kernels are emulated.
///
/// Statistics, factors and all that the solver works on are float32. What [`upload_model`](crate::device::ModelOps)
/// brings, and every activation computed from it, is of the precision that the device was opened with: that of the
/// checkpoint. Arithmetic inside an operation is float32, with one rounding at its end.
#[derive(Clone)]
pub struct Cuda {
    kernels: Arc<Kernels>,
    pub(super) runtime: Arc<Heap>,
    pub(super) precision: Float,
    /// Each call waits for its work, so that an error which comes late has a name.
    sync: bool,
}

/// Asks for [`Cuda::sync`].
const SYNC: &str = "VLMQ_SYNC";

/// Rows of a product that cuBLAS computes at a time.
const TILE_ROWS: usize = 128;

impl Cuda {
    /// Takes GPU `ordinal`, counted from 0. Errors, saying what is missing, where this program was built without kernels,
    /// where there is no driver, no such GPU or no cuBLAS, and where the GPU is older than compute capability 8.0.
    ///
    /// It uses what memory the GPU has free now, less a sixteenth; [`limit_memory`](Self::limit_memory) sets another limit.
    pub fn open(ordinal: usize, precision: Float) -> Result<Self> {
        let kernels = Arc::new(Kernels::linked()?);
        Self::new(kernels, Box::new(Driver::open(ordinal)?), precision)
    }

    /// Runs a library of kernels that was built for the emulator on host memory. For tests: it is slow.
    pub fn emulated(library: &Path, precision: Float) -> Result<Self> {
        let kernels = Arc::new(Kernels::load(library)?);
        let runtime = Box::new(Emulated::new(kernels.clone()));
        Self::new(kernels, runtime, precision)
    }

    fn new(kernels: Arc<Kernels>, runtime: Box<dyn Runtime>, precision: Float) -> Result<Self> {
        let sync = match std::env::var(SYNC).as_deref() {
            Err(_) | Ok("" | "0") => false,
            Ok("1") => true,
            Ok(other) => bail!("{SYNC}={other}: must be 0 or 1"),
        };
        Ok(Self { kernels, runtime: Arc::new(Heap::new(runtime)?), precision, sync })
    }

    /// A handle of the same device for a model of another precision; tensors of both work with both.
    pub fn with_precision(&self, precision: Float) -> Self {
        Self { precision, ..self.clone() }
    }

    /// Limits the memory that this device, and every clone of it, holds at once: a pool of the driver's own keeps to it, and
    /// of a GPU's a sixteenth is left to what that loses between tensors. What would pass the limit fails, with the numbers.
    /// Errors where the GPU has less than that free, and once there are tensors.
    pub fn limit_memory(&self, bytes: u64) -> Result<()> {
        self.runtime.set_limit(bytes)
    }

    /// Waits until everything that was enqueued is done.
    pub fn synchronize(&self) -> Result<()> {
        self.runtime.synchronize()
    }

    /// Enqueues a call of the C API. The argument structs are made in this folder only, of addresses of live tensors and of
    /// sizes that were checked against the tensors' own; memory that is dropped meanwhile is given back behind the call.
    pub(super) fn launch<A: Arguments>(&self, arguments: &A) -> Result<()> {
        let stream = self.runtime.stream()?;
        // SAFETY: the struct is live during the call, and its pointers are good for what it says: see above.
        match unsafe { A::function(&self.kernels)(arguments, stream) } {
            vlmq_status::VLMQ_OK => self.done(|| A::NAME.into()),
            vlmq_status::VLMQ_NO_KERNEL_IMAGE => bail!(
                "{}. This program holds no kernels for {}; build it again with VLMQ_ARCHS naming that GPU",
                self.kernels.last_error(),
                self.runtime.name()
            ),
            // Begins with A::NAME.
            _ => bail!("{}", self.kernels.last_error()),
        }
    }

    /// Waits for what was just enqueued, if asked to, and names it in the error.
    fn done(&self, what: impl FnOnce() -> String) -> Result<()> {
        if self.sync { self.runtime.synchronize().with_context(what) } else { Ok(()) }
    }

    /// Launches a kernel that needs a work space.
    pub(super) fn launch_with_workspace<A: NeedsWorkspace>(&self, mut arguments: A) -> Result<()> {
        let bytes = self.workspace_bytes(&arguments);
        let mut workspace = Memory::new(&self.runtime, bytes)?;
        arguments.set_workspace(workspace.at_mut(0), bytes);
        self.launch(&arguments)
    }

    /// Bytes of work space that a call needs.
    pub(super) fn workspace_bytes<A: NeedsWorkspace>(&self, arguments: &A) -> usize {
        // SAFETY: the query reads the struct's sizes, which of its pointers are null, and nothing else.
        unsafe { A::query(&self.kernels)(arguments) }
    }

    /// A tensor with arbitrary contents.
    pub(super) fn tensor(&self, rows: usize, cols: usize, precision: Float) -> Result<CudaTensor> {
        let Some(bytes) = rows.checked_mul(cols).and_then(|count| count.checked_mul(precision.bytes())) else {
            bail!("a tensor of {rows}x{cols} is larger than memory can be");
        };
        Ok(CudaTensor { rows, cols, precision, memory: Memory::new(&self.runtime, bytes)? })
    }

    /// A tensor with the numbers of `matrix`.
    pub(super) fn tensor_of(&self, matrix: &Matrix, precision: Float) -> Result<CudaTensor> {
        let mut tensor = self.tensor(matrix.rows(), matrix.cols(), precision)?;
        tensor.memory.write(0, &encode(precision, matrix.data()))?;
        Ok(tensor)
    }

    /// Where a tensor lies, for a kernel to read. Errors where it is another device's.
    pub(super) fn read<T>(&self, tensor: &CudaTensor) -> Result<*const T> {
        ensure!(tensor.memory.is_of(&self.runtime), "a tensor of another device");
        tensor.memory.settle()?;
        Ok(tensor.memory.at(0))
    }

    /// Address of a tensor for a kernel to write.
    pub(super) fn write<T>(&self, tensor: &mut CudaTensor) -> Result<*mut T> {
        tensor.memory.settle_mut()?;
        Ok(self.read::<T>(tensor)?.cast_mut())
    }

    /// Address of a tensor that must be float32.
    pub(super) fn floats(&self, tensor: &CudaTensor) -> Result<*const f32> {
        ensure!(tensor.precision == Float::F32, "{} where float32 is needed", tensor.describe());
        self.read(tensor)
    }

    /// Address of a tensor that must be float32, for a kernel to write.
    pub(super) fn floats_mut(&self, tensor: &mut CudaTensor) -> Result<*mut f32> {
        self.floats(tensor)?;
        self.write(tensor)
    }

    /// `c = op(b)` times rows of `a`, those from `first` on, as many as `c` has, which is of the operands' precision or float32;
    /// see [`Product`].
    pub(super) fn product(
        &self,
        (a, first): (&CudaTensor, usize),
        (b, transposed): (&CudaTensor, bool),
        c: &mut CudaTensor,
    ) -> Result<()> {
        let (inner, cols) = if transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
        ensure!(
            a.cols == inner
                && first <= a.rows
                && c.rows <= a.rows - first
                && c.cols == cols
                && a.precision == b.precision
                && [a.precision, Float::F32].contains(&c.precision),
            "product of {} and {}{}",
            a.describe(),
            b.describe(),
            if transposed { ", transposed" } else { "" }
        );
        for tensor in [a, b] {
            self.read::<c_void>(tensor)?;
        }
        self.write::<c_void>(c)?;
        if c.bytes() == 0 {
            return Ok(());
        }
        if inner == 0 {
            return c.memory.fill(0);
        }
        let product = Product {
            a: a.memory.address() + first * a.row_bytes(),
            b: b.memory.address(),
            c: c.memory.address(),
            rows: c.rows,
            cols,
            inner,
            transposed,
            precision: a.precision,
            rounded_to: c.precision,
        };
        // SAFETY: shapes, types and owner were just checked, no dimension is 0, and `c` is borrowed for itself.
        unsafe { self.runtime.product(&product) }?;
        self.done(|| format!("cuBLAS: {product}"))
    }

    /// `y = x · weightᵀ + bias`, rounded once: products wait in float32 for their bias, some rows at a time, so that they need
    /// little memory and are still in the GPU's cache when it comes.
    pub(super) fn biased_product(
        &self,
        x: &CudaTensor,
        weight: &CudaTensor,
        bias: &CudaTensor,
        y: &mut CudaTensor,
    ) -> Result<()> {
        let fit = self.runtime.sum_bytes() / (Float::F32.bytes() * y.cols.max(1));
        // Whole tiles of cuBLAS's, where there is room for them.
        let rows = if fit < TILE_ROWS { fit.max(1) } else { fit / TILE_ROWS * TILE_ROWS };
        let mut sums = self.tensor(rows.min(y.rows), y.cols, Float::F32)?;
        // Without a row once, for what is checked.
        for first in (0..y.rows.max(1)).step_by(rows) {
            sums.rows = rows.min(y.rows - first);
            self.product((x, first), (weight, true), &mut sums)?;
            self.launch(&vlmq_add_args {
                a: self.read(&sums)?,
                b: self.read(bias)?,
                out: y.memory.at_mut(first * y.row_bytes()),
                rows: sums.rows as i64,
                b_rows: 1,
                cols: y.cols as i64,
                sign: 1.0,
                factor: 1.0,
                dtype: dtype_of(y.precision),
                float_a: 1,
            })?;
        }
        Ok(())
    }

    /// `out = factor · (a + sign · b)`; one row of `b` is repeated. `out` may lie where `a` does.
    pub(super) fn add(
        &self,
        a: *const c_void,
        b: &CudaTensor,
        out: &mut CudaTensor,
        (sign, factor): (f32, f32),
    ) -> Result<()> {
        self.launch(&vlmq_add_args {
            a,
            b: self.read(b)?,
            out: self.write(out)?,
            rows: out.rows as i64,
            b_rows: b.rows as i64,
            cols: out.cols as i64,
            sign,
            factor,
            dtype: dtype_of(out.precision),
            float_a: 0,
        })
    }
}

impl Device for Cuda {
    type Tensor = CudaTensor;

    fn name(&self) -> String {
        self.runtime.name()
    }

    fn libraries(&self) -> BTreeMap<&'static str, String> {
        self.runtime.libraries()
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CudaTensor> {
        let mut tensor = self.tensor(rows, cols, Float::F32)?;
        tensor.memory.fill(0)?;
        Ok(tensor)
    }

    fn clear(&self, tensor: &mut CudaTensor) -> Result<()> {
        tensor.memory.fill(0)
    }

    fn upload(&self, matrix: Matrix) -> Result<CudaTensor> {
        self.tensor_of(&matrix, Float::F32)
    }

    fn download(&self, tensor: &CudaTensor) -> Result<Matrix> {
        tensor.to_host()
    }

    fn bytes<'a>(&self, tensor: &'a CudaTensor) -> Result<Cow<'a, [u8]>> {
        tensor.memory.first_bytes(tensor.bytes()).map(Cow::Owned)
    }

    fn first_non_finite_row(&self, tensor: &CudaTensor) -> Result<Option<usize>> {
        let mut row = Memory::of(&self.runtime, &[i32::MAX])?;
        self.launch(&vlmq_first_non_finite_row_args {
            x: self.read(tensor)?,
            row: row.at_mut(0),
            rows: tensor.rows as i64,
            cols: tensor.cols as i64,
            dtype: dtype_of(tensor.precision),
        })?;
        let row = row.read::<i32>(0, 1)?[0];
        Ok((row != i32::MAX).then_some(row as usize))
    }

    fn scaled_squares_rows(&self, tensor: &CudaTensor, scales: &[f32]) -> Result<Vec<f32>> {
        checks::scaled(tensor, scales)?;
        let scales = Memory::of(&self.runtime, scales)?;
        let mut sums = self.tensor(tensor.rows, 1, Float::F32)?;
        self.launch(&vlmq_scaled_squares_rows_args {
            x: self.read(tensor)?,
            scales: scales.at(0),
            sums: self.floats_mut(&mut sums)?,
            rows: tensor.rows as i64,
            cols: tensor.cols as i64,
            dtype: dtype_of(tensor.precision),
        })?;
        sums.memory.read(0, tensor.rows)
    }

    fn park(&self, tensor: &mut CudaTensor) -> Result<()> {
        ensure!(tensor.memory.is_of(&self.runtime), "a tensor of another device");
        tensor.memory.park()
    }

    fn fetch(&self, tensor: &mut CudaTensor) -> Result<()> {
        tensor.memory.fetch()
    }

    fn works_beside_host(&self) -> bool {
        true
    }

    fn memory_limit(&self) -> Option<u64> {
        self.runtime.limit()
    }

    fn peak_bytes(&self) -> Option<u64> {
        Some(self.runtime.peak())
    }

    fn reset_peak(&self) {
        self.runtime.reset_peak();
    }

    fn pool_peak(&self) -> Result<Option<PoolPeak>> {
        self.runtime.pool_peak()
    }

    fn workspace(&self, work: Work) -> u64 {
        match work {
            Work::Statistics { tokens, features, cross } => self.statistics_workspace(tokens, features, cross) as u64,
            // The output once more, log-sums of the forward pass, and as much work space.
            Work::AttentionBackward { tokens, shape, .. } => {
                (tokens * shape.heads * (shape.head_dim * self.precision.bytes() + 2 * Float::F32.bytes())) as u64
            }
            // As many rows as fit, but one at least.
            Work::Bias { rows, outputs } => {
                let row = outputs * Float::F32.bytes();
                (rows * row).min(self.runtime.sum_bytes().max(row)) as u64
            }
            _ => 0,
        }
    }

    fn shape(&self, tensor: &CudaTensor) -> (usize, usize) {
        (tensor.rows, tensor.cols)
    }
}
