//! Matrices of which there is nothing but their shape.

use super::ledger::Ledger;
use crate::device::checks::Header;
use crate::tensor::Float;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;

/// A matrix `[rows, cols]` of a [`Counting`](super::Counting) device: a place in its books, given back when dropped.
#[derive(Debug)]
pub struct CountedTensor {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) float: Float,
    /// In device memory, or there again once it is fetched: more than the values take where rows are appended, less where only a part
    /// of them is ever written.
    bytes: u64,
    label: &'static str,
    parked: bool,
    /// Whether the tensor has a place in page-locked host memory, which stays when it is fetched.
    has_place: bool,
    ledger: Arc<Ledger>,
}

impl CountedTensor {
    pub(super) fn new(ledger: &Arc<Ledger>, rows: usize, cols: usize, float: Float) -> Result<Self> {
        let bytes = bytes(rows, cols, float)?;
        Ok(Self::holding(ledger, (rows, cols), float, bytes))
    }

    /// One that takes so many bytes, whatever its shape.
    pub(super) fn holding(ledger: &Arc<Ledger>, (rows, cols): (usize, usize), float: Float, bytes: u64) -> Self {
        let label = ledger.add(bytes);
        Self { rows, cols, float, bytes, label, parked: false, has_place: false, ledger: Arc::clone(ledger) }
    }

    /// Values.
    pub(super) fn count(&self) -> f64 {
        self.rows as f64 * self.cols as f64
    }

    /// Errors where it may not be used: a tensor of another device, or one that is parked.
    pub(super) fn check(&self, ledger: &Arc<Ledger>) -> Result<()> {
        self.check_owner(ledger)?;
        ensure!(!self.parked, "a tensor is used that is parked in host memory: it must be fetched first");
        Ok(())
    }

    /// Errors where it is a tensor of another device.
    pub(super) fn check_owner(&self, ledger: &Arc<Ledger>) -> Result<()> {
        ensure!(Arc::ptr_eq(&self.ledger, ledger), "a tensor of another device");
        Ok(())
    }

    /// Makes room for rows behind its own; `larger` says what is taken where there is none, by what is needed.
    pub(super) fn append(&mut self, rows: usize, larger: impl Fn(u64, u64) -> u64) -> Result<()> {
        let all = self.rows.checked_add(rows).context("too many rows")?;
        let (needed, before) = (bytes(all, self.cols, self.float)?, self.bytes);
        if needed > before {
            let bytes = larger(before, needed);
            self.ledger.grow(self.label, before, bytes);
            self.bytes = bytes;
        }
        self.rows = all;
        Ok(())
    }

    pub(super) fn park(&mut self) {
        if !std::mem::replace(&mut self.parked, true) {
            if !std::mem::replace(&mut self.has_place, true) {
                self.ledger.park(self.bytes);
            }
            self.ledger.take(self.label, self.bytes);
        }
    }

    pub(super) fn fetch(&mut self) {
        if std::mem::replace(&mut self.parked, false) {
            self.ledger.add_to(self.label, self.bytes);
        }
    }
}

impl Header for CountedTensor {
    fn header(&self) -> (usize, usize, Float) {
        (self.rows, self.cols, self.float)
    }
}

impl Drop for CountedTensor {
    fn drop(&mut self) {
        if !self.parked {
            self.ledger.take(self.label, self.bytes);
        }
        if self.has_place {
            self.ledger.unpark(self.bytes);
        }
    }
}

/// Bytes of a matrix.
fn bytes(rows: usize, cols: usize, float: Float) -> Result<u64> {
    let bytes = rows.checked_mul(cols).and_then(|count| count.checked_mul(float.bytes()));
    let bytes = bytes.with_context(|| format!("a tensor of {rows}x{cols} is larger than memory can be"))?;
    Ok(bytes as u64)
}
