//! Device memory with an owner: the checked way to everything that a [`Runtime`](super::runtime::Runtime) copies.
#![allow(unsafe_code)]

use super::heap::Heap;
use super::runtime::{Address, Arrival};
use super::staging::copy;
use anyhow::{Result, ensure};
use bytemuck::Pod;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Some bytes of device memory, given back when dropped.
///
/// They may be parked in page-locked host memory: then only [`fetch`](Self::fetch) brings them back, and any other use is an
/// error.
pub(super) struct Memory {
    heap: Arc<Heap>,
    /// 0 while parked.
    address: Address,
    bytes: usize,
    parked: bool,
    /// Where the bytes are parked; kept for the next time.
    host: Option<HostCopy>,
    /// The copy that brings the bytes back, until work that uses them is ordered behind it.
    arrival: Mutex<Option<Arrival>>,
}

/// A copy in page-locked host memory, of as many bytes.
struct HostCopy {
    address: Address,
    /// Whether they are the same as those on the device.
    same: bool,
}

impl Memory {
    /// Arbitrary contents. Errors where they do not fit, or not into the device's limit.
    pub(super) fn new(heap: &Arc<Heap>, bytes: usize) -> Result<Self> {
        heap.count(bytes)?;
        let address = heap.allocate(bytes).inspect_err(|_| heap.discount(bytes))?;
        Ok(Self { heap: heap.clone(), address, bytes, parked: false, host: None, arrival: Mutex::new(None) })
    }

    /// A copy of `values`.
    pub(super) fn of<T: Pod>(heap: &Arc<Heap>, values: &[T]) -> Result<Self> {
        let mut memory = Self::new(heap, size_of_val(values))?;
        memory.write(0, bytemuck::cast_slice(values))?;
        Ok(memory)
    }

    /// Size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether this is memory of `heap`.
    pub(super) fn is_of(&self, heap: &Arc<Heap>) -> bool {
        Arc::ptr_eq(&self.heap, heap)
    }

    /// Orders work that is enqueued from now on behind the copy that brings the bytes back, if there is one under way.
    /// Errors while they are parked.
    pub(super) fn settle(&self) -> Result<()> {
        ensure!(!self.parked, "a tensor is used that is parked in host memory: it must be fetched first");
        match self.arrival.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // SAFETY: it copies between this memory's own two places, both live.
            Some(arrival) => unsafe { self.heap.wait(arrival) },
            None => Ok(()),
        }
    }

    /// As [`settle`](Self::settle), for work that changes the bytes.
    pub(super) fn settle_mut(&mut self) -> Result<()> {
        self.settle()?;
        if let Some(host) = &mut self.host {
            host.same = false;
        }
        Ok(())
    }

    /// Moves the bytes to page-locked host memory, behind the work enqueued so far, and gives the device memory back. What
    /// did not change since it was last fetched is not copied again. Nothing happens where they are parked already.
    pub(super) fn park(&mut self) -> Result<()> {
        if self.parked {
            return Ok(());
        }
        if self.host.is_none() {
            self.host = Some(HostCopy { address: self.heap.allocate_host(self.bytes)?, same: false });
        }
        let Some(host) = &mut self.host else { unreachable!("it was just made") };
        let to = (!host.same).then_some(host.address);
        // SAFETY: both are live memory of this size; nobody uses the device's any more, as `self` is borrowed for itself.
        unsafe { self.heap.park(self.address, to, self.bytes) }?;
        host.same = true;
        self.parked = true;
        self.address = 0;
        // Bytes that nobody waited for were not used: the copy back out is behind the copy in.
        self.arrival.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.heap.discount(self.bytes);
        Ok(())
    }

    /// Starts to bring parked bytes back; whoever uses them next is ordered behind the copy. Nothing happens where they are
    /// not parked. Errors where they do not fit.
    pub(super) fn fetch(&mut self) -> Result<()> {
        let Some(host) = self.host.as_ref().filter(|_| self.parked) else { return Ok(()) };
        self.heap.count(self.bytes)?;
        // SAFETY: the host memory is live and of this size, and not given back before the copy is done: see `drop`.
        let fetched = unsafe { self.heap.fetch(host.address, self.bytes) };
        let (address, arrival) = fetched.inspect_err(|_| self.heap.discount(self.bytes))?;
        self.address = address;
        self.parked = false;
        *self.arrival.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(arrival);
        Ok(())
    }

    /// Address of the first byte.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// The place `offset` bytes from the start, for a kernel to read.
    pub(super) fn at<T>(&self, offset: usize) -> *const T {
        assert!(!self.parked && offset <= self.bytes, "an address outside its memory");
        (self.address + offset) as *const T
    }

    /// Address of an element, for a kernel to write.
    pub(super) fn at_mut<T>(&mut self, offset: usize) -> *mut T {
        if let Some(host) = &mut self.host {
            host.same = false;
        }
        self.at::<c_void>(offset) as *mut T
    }

    /// Copies `from` to the bytes from `offset` on.
    pub(super) fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        self.settle_mut()?;
        // SAFETY: the range was checked to lie inside this memory, which is live.
        unsafe { self.heap.write(self.address + offset, from) }
    }

    /// `count` values from the byte `offset` on. Waits.
    pub(super) fn read<T: Pod>(&self, offset: usize, count: usize) -> Result<Vec<T>> {
        self.check(offset, count * size_of::<T>())?;
        self.settle()?;
        let mut values = vec![T::zeroed(); count];
        // SAFETY: the range was checked to lie inside this memory, which is live.
        unsafe { self.heap.read(self.address + offset, bytemuck::cast_slice_mut(&mut values)) }?;
        Ok(values)
    }

    /// The first `count` bytes, from wherever they are. Waits.
    pub(super) fn first_bytes(&self, count: usize) -> Result<Vec<u8>> {
        let Some(host) = self.host.as_ref().filter(|_| self.parked) else { return self.read(0, count) };
        self.check(0, count)?;
        self.heap.finish_parking()?;
        // SAFETY: the memory is live and of this size, and the copy to it is done: nothing writes to it before it is fetched and
        // parked again, for which `self` is borrowed for itself.
        let parked = unsafe { std::slice::from_raw_parts(host.address as *const u8, count) };
        let mut bytes = vec![0; count];
        copy(&mut bytes, parked)?;
        Ok(bytes)
    }

    /// Copies the bytes `range` of other memory to those from `offset` on.
    pub(super) fn copy_from(&mut self, offset: usize, from: &Memory, range: Range<usize>) -> Result<()> {
        ensure!(range.start <= range.end && from.is_of(&self.heap), "a copy between devices");
        from.check(range.start, range.len())?;
        self.check(offset, range.len())?;
        from.settle()?;
        self.settle_mut()?;
        // SAFETY: both ranges were checked; they do not overlap, as `self` is borrowed for itself.
        unsafe { self.heap.copy(self.address + offset, from.address + range.start, range.len()) }
    }

    /// Sets every byte.
    pub(super) fn fill(&mut self, byte: u8) -> Result<()> {
        self.settle_mut()?;
        // SAFETY: this memory is live.
        unsafe { self.heap.fill(self.address, byte, self.bytes) }
    }

    fn check(&self, offset: usize, bytes: usize) -> Result<()> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        ensure!(inside, "{bytes} bytes from {offset} on of memory of {}", self.bytes);
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.parked {
            // Bytes still on their way in must be there before their place is given to others. A device that cannot
            // order its work any more runs none that could suffer.
            let _ = self.settle();
            // SAFETY: the address came from `allocate` or `fetch` with this size; a value is dropped once.
            unsafe { self.heap.free(self.address, self.bytes) };
            self.heap.discount(self.bytes);
        }
        if let Some(host) = &self.host {
            // SAFETY: the address came from `allocate_host` with this size, and is freed once.
            unsafe { self.heap.free_host(host.address, self.bytes) };
        }
    }
}
