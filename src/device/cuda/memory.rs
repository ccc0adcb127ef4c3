//! Device memory with an owner: the checked way to everything that a [`Runtime`] copies.
#![allow(unsafe_code)]

use super::runtime::{Address, Runtime};
use anyhow::{Result, ensure};
use bytemuck::Pod;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// Some bytes of device memory, given back when dropped.
pub(super) struct Memory {
    runtime: Arc<dyn Runtime>,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// Arbitrary contents.
    pub(super) fn new(runtime: &Arc<dyn Runtime>, bytes: usize) -> Result<Self> {
        Ok(Self { runtime: runtime.clone(), address: runtime.allocate(bytes)?, bytes })
    }

    /// A copy of `values`.
    pub(super) fn of<T: Pod>(runtime: &Arc<dyn Runtime>, values: &[T]) -> Result<Self> {
        let mut memory = Self::new(runtime, size_of_val(values))?;
        memory.write(0, bytemuck::cast_slice(values))?;
        Ok(memory)
    }

    /// Size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether this is memory of `runtime`.
    pub(super) fn is_of(&self, runtime: &Arc<dyn Runtime>) -> bool {
        Arc::ptr_eq(&self.runtime, runtime)
    }

    /// Where it starts.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// The place `offset` bytes from the start, for a kernel to read.
    pub(super) fn at<T>(&self, offset: usize) -> *const T {
        assert!(offset <= self.bytes, "an address outside its memory");
        (self.address + offset) as *const T
    }

    /// The same, for a kernel to write.
    pub(super) fn at_mut<T>(&mut self, offset: usize) -> *mut T {
        self.at::<c_void>(offset) as *mut T
    }

    /// Copies `from` to the bytes from `offset` on.
    pub(super) fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        // SAFETY: the range was checked to lie inside this memory, which is live.
        unsafe { self.runtime.write(self.address + offset, from) }
    }

    /// `count` values from the byte `offset` on. Waits.
    pub(super) fn read<T: Pod>(&self, offset: usize, count: usize) -> Result<Vec<T>> {
        self.check(offset, count * size_of::<T>())?;
        let mut values = vec![T::zeroed(); count];
        // SAFETY: the range was checked to lie inside this memory, which is live.
        unsafe { self.runtime.read(self.address + offset, bytemuck::cast_slice_mut(&mut values)) }?;
        Ok(values)
    }

    /// Copies the bytes `range` of other memory to those from `offset` on.
    pub(super) fn copy_from(&mut self, offset: usize, from: &Memory, range: Range<usize>) -> Result<()> {
        ensure!(range.start <= range.end && from.is_of(&self.runtime), "a copy between devices");
        from.check(range.start, range.len())?;
        self.check(offset, range.len())?;
        // SAFETY: both ranges were checked; they do not overlap, as `self` is borrowed for itself.
        unsafe { self.runtime.copy(self.address + offset, from.address + range.start, range.len()) }
    }

    /// Sets every byte.
    pub(super) fn fill(&mut self, byte: u8) -> Result<()> {
        // SAFETY: this memory is live.
        unsafe { self.runtime.fill(self.address, byte, self.bytes) }
    }

    fn check(&self, offset: usize, bytes: usize) -> Result<()> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        ensure!(inside, "{bytes} bytes from {offset} on of memory of {}", self.bytes);
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the address came from `allocate` with this size; a value is dropped once.
        unsafe { self.runtime.free(self.address, self.bytes) };
    }
}
