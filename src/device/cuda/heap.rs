//! How much of a device's memory is out, and how much may be.

use super::runtime::Runtime;
use anyhow::{Result, ensure};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

/// Of the memory that a GPU has free when it is opened, one part in so many is left alone: the code of kernels,
/// and what the driver's pool loses between allocations of different sizes.
const RESERVE: u64 = 16;

/// A [`Runtime`] whose memory is counted.
pub(super) struct Heap {
    runtime: Box<dyn Runtime>,
    live: AtomicU64,
    peak: AtomicU64,
    /// `u64::MAX`: none.
    limit: AtomicU64,
}

impl Heap {
    /// Of a runtime, limited to what it has free less a reserve of a sixteenth.
    pub(super) fn new(runtime: Box<dyn Runtime>) -> Result<Self> {
        let limit = runtime.free_bytes()?.map_or(u64::MAX, |free| free - free / RESERVE);
        Ok(Self { runtime, live: AtomicU64::new(0), peak: AtomicU64::new(0), limit: AtomicU64::new(limit) })
    }

    /// Limits it, with what the runtime holds for itself, to `bytes`, which the GPU must have.
    pub(super) fn set_limit(&self, bytes: u64) -> Result<()> {
        let own = self.runtime.own_bytes();
        if let Some(free) = self.runtime.free_bytes()? {
            let there = free + self.live.load(Ordering::Relaxed) + own;
            ensure!(bytes <= there, "a limit of {bytes} bytes of GPU memory, where {there} bytes are free");
        }
        self.limit.store(bytes.saturating_sub(own), Ordering::Relaxed);
        Ok(())
    }

    /// Bytes that may be out at once.
    pub(super) fn limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|&limit| limit != u64::MAX)
    }

    /// Most bytes that were out at once since [`reset_peak`](Self::reset_peak).
    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Begins to look for a new peak.
    pub(super) fn reset_peak(&self) {
        self.peak.store(self.live.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Counts bytes that are about to be allocated. Errors where that would be more than the limit.
    pub(super) fn count(&self, bytes: usize) -> Result<()> {
        let (bytes, limit) = (bytes as u64, self.limit.load(Ordering::Relaxed));
        let within = |live: u64| live.checked_add(bytes).filter(|&sum| sum <= limit);
        match self.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
            Ok(live) => self.peak.fetch_max(live + bytes, Ordering::Relaxed),
            Err(live) => anyhow::bail!(
                "{bytes} bytes more than the {live} in use would pass the limit of {limit} bytes of GPU memory"
            ),
        };
        Ok(())
    }

    /// Counts bytes that were given back.
    pub(super) fn discount(&self, bytes: usize) {
        self.live.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

impl Deref for Heap {
    type Target = dyn Runtime;

    fn deref(&self) -> &Self::Target {
        &*self.runtime
    }
}
