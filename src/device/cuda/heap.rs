//! How much of a device's memory is out, and how much may be.

use super::runtime::Runtime;
use anyhow::{Result, ensure};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

/// The part, one in so many, of the memory that a GPU has free when it is opened, and of a limit that is set, that is left alone: for
/// the code of kernels, and for what a pool loses as it holds whole blocks, some of them between allocations of different
/// sizes.
pub(super) const RESERVE: u64 = 16;

/// A [`Runtime`] whose memory is counted.
pub(super) struct Heap {
    runtime: Box<dyn Runtime>,
    live: AtomicU64,
    peak: AtomicU64,
    /// The limit in bytes; `u64::MAX` where there is none.
    limit: AtomicU64,
}

impl Heap {
    /// The heap of a runtime, limited to what it has free less a reserve of a sixteenth.
    pub(super) fn new(runtime: Box<dyn Runtime>) -> Result<Self> {
        let limit = runtime.free_bytes()?.map_or(u64::MAX, without_reserve);
        Ok(Self { runtime, live: AtomicU64::new(0), peak: AtomicU64::new(0), limit: AtomicU64::new(limit) })
    }

    /// Limits it, with what the runtime holds for itself, to `bytes`, which the runtime must have. Where it has a pool, the pool
    /// holds no more than is left of that, and what may be out at once is less by the reserve. Errors where anything is out.
    pub(super) fn set_limit(&self, bytes: u64) -> Result<()> {
        let live = self.live.load(Ordering::Relaxed);
        ensure!(live == 0, "a limit of GPU memory is set before the first tensor; now {live} bytes are in use");
        let has_pool = self.runtime.free_bytes()?.is_some();
        let (pool, limit) = shares(bytes, self.runtime.own_bytes(), has_pool)?;
        self.runtime.limit_pool(pool)?;
        self.limit.store(limit, Ordering::Relaxed);
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

/// The shares of a limit: what a pool may hold beside what the runtime holds for itself, and what of that may be out at once.
fn shares(bytes: u64, own: u64, has_pool: bool) -> Result<(u64, u64)> {
    ensure!(bytes > own, "a limit of {bytes} bytes of GPU memory, of which cuBLAS alone takes {own}");
    let pool = bytes - own;
    Ok((pool, if has_pool { without_reserve(pool) } else { pool }))
}

fn without_reserve(bytes: u64) -> u64 {
    bytes - bytes / RESERVE
}

impl Deref for Heap {
    type Target = dyn Runtime;

    fn deref(&self) -> &Self::Target {
        &*self.runtime
    }
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn a_limit_is_shared_by_cublas_a_reserve_and_tensors() {
        let own = 32 << 20;
        let of_gpu = |bytes| shares(bytes, own, true).map_err(|error| error.to_string());
        assert_eq!(of_gpu(own + (160 << 20)), Ok((160 << 20, 150 << 20)));
        for bytes in [0, 1, own] {
            let expected = format!("a limit of {bytes} bytes of GPU memory, of which cuBLAS alone takes {own}");
            assert_eq!(of_gpu(bytes), Err(expected));
        }
        assert_eq!(shares(160, 0, false).unwrap(), (160, 160));
    }
}
