//! The host as a device, for kernels built for the emulator (`kernels/emulator`): tests run the whole program on it.
#![allow(unsafe_code)]

use super::bindings::vlmq_stream;
use super::kernels::Kernels;
use super::runtime::{Address, Arrival, LATE, Product, Runtime};
use super::staging::{Engine, Staging};
use super::tensor::encode;
use crate::device::cpu::Cpu;
use crate::device::{ModelOps, PoolPeak};
use crate::tensor::Float;
use crate::tensor::Matrix;
use anyhow::{Context, Result, anyhow};
use std::alloc::Layout;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Alignment of every allocation, as the C API asks of work space.
const ALIGNMENT: usize = 256;

/// Bytes of a slot that copies go through: so few that tests come round the ring.
const SLOT: usize = 1 << 16;

/// Host memory; every call but a write and a fetch is done when it returns. Those are done as late as they may be.
pub(super) struct Emulated {
    staging: Staging<Late>,
    /// Say of errors that come late, as a GPU's do.
    kernels: Arc<Kernels>,
}

impl Emulated {
    pub(super) fn new(kernels: Arc<Kernels>) -> Self {
        Self { staging: Staging::new(Late::default(), SLOT), kernels }
    }

    /// Catches up with what was enqueued before the call at hand.
    fn catch_up(&self) {
        self.staging.engine().run(u64::MAX);
    }
}

/// Copies that wait until somebody waits for them.
#[derive(Default)]
pub(super) struct Late(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    /// Copies that are done.
    done: u64,
    /// To, from, bytes.
    waiting: VecDeque<(Address, Address, usize)>,
}

impl Late {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies that are done.
    #[cfg(test)]
    pub(super) fn done(&self) -> u64 {
        self.queue().done
    }

    /// Runs the first `count` copies ever enqueued, where they are not done yet.
    fn run(&self, count: u64) {
        let mut queue = self.queue();
        while queue.done < count
            && let Some((to, from, bytes)) = queue.waiting.pop_front()
        {
            // SAFETY: the promise of whoever enqueued it: both are live, and neither is used until this is done.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
            queue.done += 1;
        }
    }
}

impl Engine for Late {
    /// Copies before it.
    type Mark = u64;

    fn allocate(&self, bytes: usize) -> Result<Address> {
        allocate(bytes)
    }

    unsafe fn free(&self, address: Address, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { free(address, bytes) };
    }

    unsafe fn upload(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.queue().waiting.push_back((to, from, bytes));
        Ok(())
    }

    unsafe fn download(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.queue().waiting.push_back((to, from, bytes));
        Ok(())
    }

    fn record(&self, mark: &mut Option<u64>) -> Result<()> {
        let queue = self.queue();
        *mark = Some(queue.done + queue.waiting.len() as u64);
        Ok(())
    }

    fn wait(&self, mark: &u64) -> Result<()> {
        self.run(*mark);
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.run(u64::MAX);
        Ok(())
    }
}

impl Runtime for Emulated {
    fn name(&self) -> String {
        "cuda (emulated)".into()
    }

    /// Shows in tests what becomes of a GPU's.
    fn libraries(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([("emulator", env!("CARGO_PKG_VERSION").to_owned())])
    }

    /// So few that tests make products in several parts.
    fn sum_bytes(&self) -> usize {
        1 << 16
    }

    fn stream(&self) -> Result<vlmq_stream> {
        self.catch_up();
        Ok(std::ptr::null_mut())
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        allocate(bytes)
    }

    unsafe fn free(&self, address: Address, bytes: usize) {
        self.catch_up();
        // SAFETY: the caller's promise.
        unsafe { free(address, bytes) };
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise; everything that uses or frees the memory catches up before.
        unsafe { self.staging.write(to, from) }
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        // SAFETY: as in `write`.
        unsafe { self.staging.read(from, to) }
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.catch_up();
        // SAFETY: the caller's promise.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        self.catch_up();
        // SAFETY: the caller's promise.
        unsafe { (to as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn limit_pool(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn pool_peak(&self) -> Result<Option<PoolPeak>> {
        Ok(None)
    }

    fn allocate_host(&self, bytes: usize) -> Result<Address> {
        self.allocate(bytes)
    }

    unsafe fn free_host(&self, address: Address, bytes: usize) {
        // SAFETY: the caller's promise; the memory is that of `allocate`.
        unsafe { self.free(address, bytes) };
    }

    unsafe fn park(&self, address: Address, to: Option<Address>, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise, for both.
        unsafe {
            if let Some(to) = to {
                self.copy(to, address, bytes)?;
            }
            self.free(address, bytes);
        }
        Ok(())
    }

    fn finish_parking(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn fetch(&self, from: Address, bytes: usize) -> Result<(Address, Arrival)> {
        let to = self.allocate(bytes)?;
        Ok((to, Arrival::Late { to, from, bytes }))
    }

    unsafe fn wait(&self, arrival: Arrival) -> Result<()> {
        match arrival {
            // SAFETY: the caller's promise; `fetch` made the one and was given the other, of this size.
            Arrival::Late { to, from, bytes } => unsafe { self.copy(to, from, bytes) },
            Arrival::Event(_) => unreachable!("the emulator has no events"),
        }
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        self.catch_up();
        let &Product { rows, cols, inner, precision, rounded_to, .. } = product;
        let (b_rows, b_cols) = if product.transposed { (cols, inner) } else { (inner, cols) };
        // SAFETY: the caller's promise, for both operands.
        let (a, b) =
            unsafe { (floats(product.a, rows, inner, precision)?, floats(product.b, b_rows, b_cols, precision)?) };
        let sum = if product.transposed { Cpu.linear(&a, &b, None)? } else { Cpu.matmul(&a, &b)? };
        // SAFETY: `c` has room for as many elements as the sum.
        unsafe { self.write(product.c, &encode(rounded_to, sum.data())) }
    }

    fn synchronize(&self) -> Result<()> {
        self.catch_up();
        match self.kernels.late_error() {
            None => Ok(()),
            Some(error) => Err(anyhow!(error)).context(LATE),
        }
    }
}

/// Memory of the host.
fn allocate(bytes: usize) -> Result<Address> {
    // SAFETY: the layout is never of size 0.
    let pointer = unsafe { std::alloc::alloc(layout(bytes)) };
    anyhow::ensure!(!pointer.is_null(), "{bytes} bytes do not fit into memory");
    // NaN in every type: what is read before it is written shows.
    // SAFETY: the allocation is at least as long.
    unsafe { pointer.write_bytes(0xff, bytes) };
    Ok(pointer as Address)
}

/// # Safety
/// `address` comes from [`allocate`] for as many bytes, and is freed once.
unsafe fn free(address: Address, bytes: usize) {
    // What is read after it was given back shows too.
    // SAFETY: the caller's promise.
    unsafe { (address as *mut u8).write_bytes(0xff, bytes) };
    // SAFETY: the caller's promise; the layout is that of the allocation.
    unsafe { std::alloc::dealloc(address as *mut u8, layout(bytes)) };
}

fn layout(bytes: usize) -> Layout {
    // A size that overflows is refused by the allocator.
    Layout::from_size_align(bytes.clamp(1, isize::MAX as usize - ALIGNMENT), ALIGNMENT).expect("a power of two")
}

/// # Safety
/// `address` starts a live matrix of that shape.
unsafe fn floats(address: Address, rows: usize, cols: usize, precision: Float) -> Result<Matrix> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, rows * cols * precision.bytes()) };
    Matrix::new(rows, cols, precision.widen(bytes))
}
