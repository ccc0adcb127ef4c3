//! What a plan enters into a device's books, and reads in them.

use super::device::Counting;
use super::ledger::{Peak, StandsFor};
use super::on_host::OnHost;
use crate::device::work::ByKind;
use std::collections::BTreeMap;

impl Counting {
    /// Names the step that the next operations belong to.
    pub fn step(&self, step: &str) {
        self.ledger.step(step);
    }

    /// Says that each tensor made and each operation done under a [label](crate::device::Device::label) stands for so many alike,
    /// before any tensor is made under it.
    pub fn stands_for(&self, label: &'static str, alike: StandsFor) {
        self.ledger.stands_for(label, alike);
    }

    /// Counts numbers that the host has beside the tensors, until the result is dropped.
    pub fn hold_on_host(&self, bytes: u64) -> OnHost {
        match self.host {
            true => OnHost::shared(&self.ledger, bytes),
            false => OnHost::beside(&self.ledger, bytes),
        }
    }

    /// Adds work that the host does beside its device.
    pub fn add_work(&self, work: ByKind) {
        self.ledger.work(work);
    }

    /// Bytes of device memory that are alive.
    pub fn alive(&self) -> u64 {
        self.ledger.total()
    }

    /// The moment at which most bytes of device memory were alive since [`reset_peak`](crate::device::Device::reset_peak).
    pub fn peak(&self) -> Peak {
        self.ledger.peak()
    }

    /// As [`peak`](Self::peak), of the moments at which one of these [labels](crate::device::Device::label) was the current one.
    pub fn peak_during(&self, labels: &[&str]) -> Peak {
        self.ledger.peak_during(labels)
    }

    /// Bytes that the operation which takes most for itself had beside what it has at a peak, since
    /// [`reset_peak`](crate::device::Device::reset_peak): where the device's memory is the host's, whose allocator keeps them in the
    /// thread that had them. 0 where the device has its own.
    pub fn kept_beside(&self, peak: &Peak) -> u64 {
        if self.host { self.ledger.passing_beside(peak) } else { 0 }
    }

    /// Most bytes of page-locked host memory that parked tensors had at once.
    pub fn parked_bytes(&self) -> u64 {
        self.ledger.most_parked()
    }

    /// Most bytes that the host had beside the tensors since [`reset_peak`](crate::device::Device::reset_peak): of weights on their way
    /// ([`reading`](Self::reading)) the pages of their file, and where the device has memory of its own, numbers that are made for it,
    /// fetched from it or [held](Self::hold_on_host).
    pub fn most_on_host(&self) -> u64 {
        self.ledger.most_on_host()
    }

    /// Bytes of the tensors that were made since [`reset_peak`](crate::device::Device::reset_peak), each size once.
    pub fn sizes(&self) -> Vec<u64> {
        self.ledger.sizes()
    }

    /// How often the host waited for the device, by what for.
    pub fn waits(&self) -> BTreeMap<&'static str, u64> {
        self.ledger.waits()
    }

    /// Seconds that all work so far takes a device that is [paced](Self::paced); 0 of another.
    pub fn busy_seconds(&self) -> f64 {
        self.ledger.busy()
    }

    /// All work so far, by kind.
    pub fn work(&self) -> ByKind {
        self.ledger.work_done()
    }
}
