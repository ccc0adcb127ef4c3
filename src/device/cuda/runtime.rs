//! What the kernels need around them.
#![allow(unsafe_code)]

use super::bindings::vlmq_stream;
use crate::device::PoolPeak;
use crate::tensor::Float;
use anyhow::Result;
use cudarc::driver::CudaEvent;
use std::collections::BTreeMap;
use std::fmt;

/// An address in device memory.
pub(super) type Address = usize;

/// A plain product of dense row-major matrices, summed in float32 and rounded once: `c = a · op(b)`. Never `c += a · op(b)`:
/// for some shapes cuBLAS rounds the product before it adds.
pub(super) struct Product {
    /// Address of `a`, `[rows, inner]`.
    pub(super) a: Address,
    /// `[inner, cols]`, or `[cols, inner]` where `transposed`.
    pub(super) b: Address,
    /// Address of `c`, `[rows, cols]`.
    pub(super) c: Address,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) inner: usize,
    pub(super) transposed: bool,
    /// Type of `a` and `b`.
    pub(super) precision: Float,
    /// Type of `c`: that of `a` and `b`, or float32.
    pub(super) rounded_to: Float,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, cols, inner, .. } = self;
        write!(f, "product of {rows}x{inner} by {inner}x{cols}")
    }
}

/// Context of an error that comes behind the call that caused it.
pub(super) const LATE: &str =
    "the GPU failed in work that was enqueued before (with VLMQ_SYNC=1 each call waits for its own and is named)";

/// A copy to device memory that is under way.
pub(super) enum Arrival {
    /// Comes when it is done.
    Event(CudaEvent),
    /// The emulator copies as late as it may, so that work which did not wait reads something else.
    Late { to: Address, from: Address, bytes: usize },
}

/// Memory, copies and a stream. Everything is enqueued in order, on the one stream; only [`park`](Self::park) and
/// [`fetch`](Self::fetch) copy beside it.
pub(super) trait Runtime: Send + Sync {
    /// Name for logs and reports.
    fn name(&self) -> String;

    /// Libraries and drivers that results may depend on, with their versions.
    fn libraries(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::new()
    }

    /// Bytes of device memory that the runtime holds for itself from the start.
    fn own_bytes(&self) -> u64 {
        0
    }

    /// Bytes of float32 products that wait for their bias at once, at least a row: what a GPU's second-level cache keeps.
    fn sum_bytes(&self) -> usize {
        32 << 20
    }

    /// The stream, ready for use by the calling thread.
    fn stream(&self) -> Result<vlmq_stream>;

    /// At least `bytes` bytes with arbitrary contents, aligned to 256. Errors where they do not fit.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back as soon as the work that was enqueued so far is done.
    ///
    /// # Safety
    /// `address` comes from [`allocate`](Self::allocate) for as many bytes, and is freed once.
    unsafe fn free(&self, address: Address, bytes: usize);

    /// Copies from the host. `from` may change as soon as the call returns.
    ///
    /// # Safety
    /// `to` starts at least `from.len()` bytes of live memory.
    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Copies to the host, and waits for it.
    ///
    /// # Safety
    /// `from` starts at least `to.len()` bytes of live memory.
    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Copies between two places that do not overlap.
    ///
    /// # Safety
    /// Both start at least `bytes` bytes of live memory.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Sets every byte.
    ///
    /// # Safety
    /// `to` starts at least `bytes` bytes of live memory.
    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()>;

    /// Bytes of device memory that nobody uses; `None` where there is no end to them.
    fn free_bytes(&self) -> Result<Option<u64>>;

    /// Allocates from now on from a pool that never holds more than `bytes` bytes. Nothing is out when this is called. Errors
    /// where the device has not as much free. Memory without an end has no pool: nothing happens.
    fn limit_pool(&self, bytes: u64) -> Result<()>;

    /// The most that the pool held since it was made; `None` where there is none.
    fn pool_peak(&self) -> Result<Option<PoolPeak>>;

    /// `bytes` bytes of page-locked host memory with arbitrary contents. Errors where the system grants none.
    fn allocate_host(&self, bytes: usize) -> Result<Address>;

    /// Gives page-locked memory back, once the copies from and to it are done.
    ///
    /// # Safety
    /// `address` comes from [`allocate_host`](Self::allocate_host) for as many bytes, and is freed once.
    unsafe fn free_host(&self, address: Address, bytes: usize);

    /// Copies, behind the work that was enqueued so far, device memory to page-locked memory, where that is given, and gives
    /// it back. Work enqueued later does not wait for the copy.
    ///
    /// # Safety
    /// `address` comes from [`allocate`](Self::allocate) or [`fetch`](Self::fetch) for as many bytes and is used no more;
    /// `to` is live page-locked memory of as many bytes, used by nothing but parking and fetching.
    unsafe fn park(&self, address: Address, to: Option<Address>, bytes: usize) -> Result<()>;

    /// Waits until what was [parked](Self::park) so far is in its place.
    fn finish_parking(&self) -> Result<()>;

    /// Allocates device memory and starts to copy `bytes` bytes of page-locked memory to it, behind the copies of
    /// [`park`](Self::park) so far. Work enqueued later does not wait for the copy until [`wait`](Self::wait) says so.
    ///
    /// # Safety
    /// `from` is live page-locked memory of as many bytes, used by nothing but parking and fetching.
    unsafe fn fetch(&self, from: Address, bytes: usize) -> Result<(Address, Arrival)>;

    /// Orders all work enqueued from now on behind a copy.
    ///
    /// # Safety
    /// The memory that [`fetch`](Self::fetch) copies from and to is still live.
    unsafe fn wait(&self, arrival: Arrival) -> Result<()>;

    /// The product; no dimension is 0.
    ///
    /// # Safety
    /// The addresses start live matrices of the shapes that the product names; `c` overlaps neither operand.
    unsafe fn product(&self, product: &Product) -> Result<()>;

    /// Waits until all work is done.
    fn synchronize(&self) -> Result<()>;
}
