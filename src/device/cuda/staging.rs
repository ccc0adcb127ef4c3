//! Copies between ordinary host memory and a device, through page-locked memory of our own.
//!
//! A device may copy ordinary memory after the call that asked for it has returned: the driver promises no more that it
//! takes the bytes first. So they are put into page-locked slots here, and a slot is written again only when the copies out
//! of it are done. Page-locked memory is also what a device copies fastest.
#![allow(unsafe_code)]

use super::runtime::Address;
use anyhow::{Context, Result};
use std::sync::{Mutex, PoisonError};

/// Slots for what goes to the device: as many pieces may be under way while another is filled.
const SLOTS: usize = 4;

/// Slots for what comes from it: one is filled while the other is emptied.
const SLOTS_BACK: usize = 2;

/// Pieces start at multiples of it in their slot.
const ALIGNMENT: usize = 256;

/// Bytes that a thread copies, at least, before another is worth its start.
const SHARE: usize = 4 << 20;

/// What copies: one queue of work, done in its order.
pub(super) trait Engine: Send + Sync {
    /// A place in the queue.
    type Mark: Send;

    /// `bytes` bytes of page-locked host memory with arbitrary contents. Errors where the system grants none.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives page-locked memory back.
    ///
    /// # Safety
    /// `address` comes from [`allocate`](Self::allocate) for as many bytes, is freed once, and no copy of it is under way.
    unsafe fn free(&self, address: Address, bytes: usize);

    /// Enqueues a copy from page-locked memory to the device.
    ///
    /// # Safety
    /// Both start at least `bytes` bytes of live memory; those of `from` do not change until the copy is done.
    unsafe fn upload(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Enqueues a copy from the device to page-locked memory.
    ///
    /// # Safety
    /// Both start at least `bytes` bytes of live memory; nobody but the queue touches those of `to` until the copy is done.
    unsafe fn download(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Moves a mark behind everything that was enqueued so far; makes it where there is none yet.
    fn record(&self, mark: &mut Option<Self::Mark>) -> Result<()>;

    /// Waits until everything before a mark is done.
    fn wait(&self, mark: &Self::Mark) -> Result<()>;

    /// Waits until everything is done.
    fn finish(&self) -> Result<()>;
}

/// Page-locked memory that bytes go through, either way.
pub(super) struct Staging<E: Engine> {
    engine: E,
    /// Bytes of a slot.
    size: usize,
    up: Mutex<Ring<E::Mark>>,
    down: Mutex<[Slot<E::Mark>; SLOTS_BACK]>,
}

/// Slots that are filled one after the other, then again from the first on.
struct Ring<M> {
    slots: [Slot<M>; SLOTS],
    /// The one that is being filled.
    at: usize,
    /// Bytes of it that copies which were enqueued read.
    filled: usize,
}

struct Slot<M> {
    /// Address of the buffer; `None` before its first use.
    address: Option<Address>,
    /// Mark behind the last copies from or to the buffer.
    mark: Option<M>,
}

impl<M> Slot<M> {
    fn new() -> Self {
        Self { address: None, mark: None }
    }
}

impl<E: Engine> Staging<E> {
    /// Slots of about `size` bytes; each is allocated when it is first used.
    pub(super) fn new(engine: E, size: usize) -> Self {
        let up = Ring { slots: [(); SLOTS].map(|()| Slot::new()), at: 0, filled: 0 };
        let down = [(); SLOTS_BACK].map(|()| Slot::new());
        let size = size.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        Self { engine, size, up: Mutex::new(up), down: Mutex::new(down) }
    }

    /// The engine that copies.
    pub(super) fn engine(&self) -> &E {
        &self.engine
    }

    /// Enqueues a copy to the device. `from` may change as soon as the call returns. Small pieces share a slot, behind each
    /// other; a large one goes through as many as it needs, and waits for those that the device still copies.
    ///
    /// # Safety
    /// `to` starts at least `from.len()` bytes of live memory.
    pub(super) unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        let mut ring = self.up.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut to, mut rest) = (to, from);
        while !rest.is_empty() {
            if ring.filled == self.size {
                self.advance(&mut ring)?;
            }
            let (at, filled) = (ring.at, ring.filled);
            let place = self.address(&mut ring.slots[at])? + filled;
            let (piece, behind) = rest.split_at(rest.len().min(self.size - filled));
            // SAFETY: this part of the slot is live, and free: no copy was enqueued of it since all of the slot's were waited
            // for, and the lock is held.
            copy(unsafe { std::slice::from_raw_parts_mut(place as *mut u8, piece.len()) }, piece)?;
            // Taken, whether the call below succeeds or not.
            ring.filled += piece.len().next_multiple_of(ALIGNMENT);
            // SAFETY: the caller's promise, and the slot's part is written again only behind a mark.
            unsafe { self.engine.upload(to, place, piece.len()) }?;
            (to, rest) = (to + piece.len(), behind);
        }
        Ok(())
    }

    /// Copies from the device, and waits for it.
    ///
    /// # Safety
    /// `from` starts at least `to.len()` bytes of live memory.
    pub(super) unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        let mut slots = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut from, mut coming) = (from, None);
        for (index, piece) in to.chunks_mut(self.size).enumerate() {
            let slot = &mut slots[index % SLOTS_BACK];
            let place = self.address(slot)?;
            // SAFETY: the caller's promise; the slot's last piece was taken out. One that an error left on its way is copied
            // before this one.
            unsafe { self.engine.download(place, from, piece.len()) }?;
            self.engine.record(&mut slot.mark)?;
            from += piece.len();
            if let Some((before, piece)) = coming.replace((index % SLOTS_BACK, piece)) {
                self.collect(&slots[before], piece)?;
            }
        }
        coming.map_or(Ok(()), |(slot, piece)| self.collect(&slots[slot], piece))
    }

    /// Goes on to the next slot once the copies out of it are done.
    fn advance(&self, ring: &mut Ring<E::Mark>) -> Result<()> {
        self.engine.record(&mut ring.slots[ring.at].mark)?;
        let next = (ring.at + 1) % SLOTS;
        if let Some(mark) = &ring.slots[next].mark {
            self.engine.wait(mark)?;
        }
        (ring.at, ring.filled) = (next, 0);
        Ok(())
    }

    /// Takes a piece out of its slot once it is there.
    fn collect(&self, slot: &Slot<E::Mark>, to: &mut [u8]) -> Result<()> {
        let (Some(address), Some(mark)) = (slot.address, &slot.mark) else {
            unreachable!("a piece is on its way to it")
        };
        self.engine.wait(mark)?;
        // SAFETY: the slot is live and as long, and the copy to it is done.
        copy(to, unsafe { std::slice::from_raw_parts(address as *const u8, to.len()) })
    }

    fn address(&self, slot: &mut Slot<E::Mark>) -> Result<Address> {
        if let Some(address) = slot.address {
            return Ok(address);
        }
        let address = self.engine.allocate(self.size).context("memory for copies between the host and the device")?;
        Ok(*slot.address.insert(address))
    }
}

impl<E: Engine> Drop for Staging<E> {
    fn drop(&mut self) {
        // A device that fails its work may still copy: then the memory stays.
        if self.engine.finish().is_err() {
            return;
        }
        let up = self.up.get_mut().unwrap_or_else(PoisonError::into_inner);
        let down = self.down.get_mut().unwrap_or_else(PoisonError::into_inner);
        for address in up.slots.iter().chain(down.iter()).filter_map(|slot| slot.address) {
            // SAFETY: allocated with this size, freed once, and all copies are done.
            unsafe { self.engine.free(address, self.size) };
        }
    }
}

/// Copies by several threads where that pays: a device takes page-locked memory faster than one core fills it.
///
/// They are threads of its own: those of a pool could all be waiting for the lock that the caller holds.
pub(super) fn copy(to: &mut [u8], from: &[u8]) -> Result<()> {
    let last = from.len().saturating_sub(1) / SHARE;
    let shares = to.chunks_mut(SHARE).zip(from.chunks(SHARE)).enumerate();
    std::thread::scope(|scope| {
        for (index, (to, from)) in shares {
            if index == last {
                to.copy_from_slice(from);
            } else {
                let thread = std::thread::Builder::new().spawn_scoped(scope, || to.copy_from_slice(from));
                thread.context("the system grants no thread to copy memory with")?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::emulated::Late;
    use super::*;

    const SIZE: usize = 4 * ALIGNMENT;

    /// Bytes that differ from place to place and from seed to seed.
    fn bytes(count: usize, seed: usize) -> Vec<u8> {
        (0..count).map(|i| ((i + 1) * (2 * seed + 3) % 251) as u8).collect()
    }

    /// Lengths on both sides of all bounds: of a piece's alignment, of a slot, of all slots.
    const LENGTHS: [usize; 14] = [
        0,
        1,
        4,
        ALIGNMENT,
        ALIGNMENT + 1,
        SIZE - 1,
        SIZE,
        SIZE + 1,
        3 * SIZE + 7,
        SLOTS * SIZE,
        SLOTS * SIZE + 1,
        11 * SIZE + 300,
        2,
        700,
    ];

    #[test]
    fn what_was_written_arrives_whatever_happens_to_its_source() {
        let staging = Staging::new(Late::default(), SIZE);
        for round in 0..SLOTS + 1 {
            let mut there: Vec<Vec<u8>> = LENGTHS.iter().map(|&length| vec![0xee; length]).collect();
            for (seed, to) in there.iter_mut().enumerate() {
                let mut from = bytes(to.len(), seed + round);
                // SAFETY: as long as the source, and live until all copies are done below.
                unsafe { staging.write(to.as_mut_ptr() as Address, &from) }.unwrap();
                from.fill(0xdd);
            }
            // Late: what nobody had to wait for is not there yet.
            assert!(there.last().unwrap().iter().all(|&byte| byte == 0xee));
            staging.engine().finish().unwrap();
            for (seed, to) in there.iter().enumerate() {
                assert!(*to == bytes(to.len(), seed + round), "round {round}: {} bytes are other ones", to.len());
            }
        }
    }

    #[test]
    fn small_pieces_share_a_slot_and_slots_are_made_when_needed() {
        let staging = Staging::new(Late::default(), SIZE);
        let mut there = [0u8; 16];
        let mut made = Vec::new();
        for index in 0..SLOTS * SIZE / ALIGNMENT + 1 {
            // SAFETY: live until the end of this test, where all copies are done.
            unsafe { staging.write(there.as_mut_ptr() as Address, &[index as u8; 16]) }.unwrap();
            made.push(staging.up.lock().unwrap().slots.iter().filter(|slot| slot.address.is_some()).count());
            // Nothing is waited for until the ring comes round, and then the first slot alone.
            let expected = if index < SLOTS * SIZE / ALIGNMENT { 0 } else { SIZE / ALIGNMENT };
            assert_eq!(staging.engine().done(), expected as u64, "behind piece {index}");
        }
        let expected: Vec<usize> =
            (0..SLOTS * SIZE / ALIGNMENT + 1).map(|index| (index * ALIGNMENT / SIZE + 1).min(SLOTS)).collect();
        assert_eq!(made, expected);
        drop(staging);
        assert_eq!(there, [(SLOTS * SIZE / ALIGNMENT) as u8; 16]);
    }

    #[test]
    fn what_is_read_is_what_is_there_once_earlier_writes_are_done() {
        let staging = Staging::new(Late::default(), SIZE);
        for (seed, &length) in LENGTHS.iter().enumerate() {
            let mut there = vec![0xee; length];
            let expected = bytes(length, seed);
            let mut found = vec![0xdd; length];
            // SAFETY: as long as each other, and live until the read has waited.
            unsafe {
                staging.write(there.as_mut_ptr() as Address, &expected).unwrap();
                staging.read(there.as_ptr() as Address, &mut found).unwrap();
            }
            assert!(found == expected, "{length} bytes are other ones");
        }
    }

    #[test]
    fn threads_do_not_get_each_others_bytes() {
        let staging = Staging::new(Late::default(), SIZE);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let staging = &staging;
                scope.spawn(move || {
                    for (seed, &length) in LENGTHS.iter().enumerate() {
                        let (mut there, mut found) = (vec![0xee; length], vec![0xdd; length]);
                        let expected = bytes(length, seed + 17 * thread);
                        // SAFETY: as above.
                        unsafe {
                            staging.write(there.as_mut_ptr() as Address, &expected).unwrap();
                            staging.read(there.as_ptr() as Address, &mut found).unwrap();
                        }
                        assert!(found == expected, "thread {thread}: {length} bytes are other ones");
                    }
                });
            }
        });
    }

    #[test]
    fn copies_by_several_threads_are_whole() {
        for length in [0, 1, SHARE, SHARE + 1, 2 * SHARE, 3 * SHARE + 5] {
            let from = bytes(length, 1);
            let mut to = vec![0; length];
            copy(&mut to, &from).unwrap();
            assert!(to == from, "{length} bytes");
        }
    }
}
