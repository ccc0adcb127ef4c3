//! The books of a counting device: what is alive, under which label, and the moment at which that was most.

use crate::device::work::ByKind;
use crate::heap;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is made without a label.
const UNNAMED: &str = "other";

/// What an operation takes for itself while it runs.
const WORKSPACE: &str = "work space";

/// Codes of layers that have left the device, where its memory is the host's.
const CODES: &str = "codes of layers";

/// Bytes of device memory under one label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// What holds them, see [`Device::label`](crate::device::Device::label).
    pub label: &'static str,
    /// How many.
    pub bytes: u64,
}

/// The moment at which most bytes were alive, the first of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peak {
    /// All bytes.
    pub bytes: u64,
    /// What they belong to, in the order in which labels came up; none of 0 bytes.
    pub held: Vec<Holding>,
    /// The step that was named last, see [`Counting::step`](super::Counting::step).
    pub step: String,
    /// The label under which the last of them were made.
    pub during: &'static str,
}

impl Peak {
    /// Bytes under a label.
    pub fn bytes_of(&self, label: &str) -> u64 {
        self.held.iter().filter(|holding| holding.label == label).map(|holding| holding.bytes).sum()
    }
}

/// Books, shared by a device and its tensors.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Books>);

#[derive(Debug)]
struct Books {
    alive: Vec<Holding>,
    total: u64,
    /// Tensors that are in page-locked host memory, or have their place there.
    parked: u64,
    most_parked: u64,
    peak: Peak,
    /// Bytes of the tensors that were made since the peak is looked for, each size once.
    sizes: BTreeSet<u64>,
    /// Bytes that the host holds beside a device with memory of its own.
    on_host: u64,
    /// Most bytes that the host had since the peak is looked for, those of an operation included.
    most_on_host: u64,
    step: String,
    label: &'static str,
    work: ByKind,
}

impl Default for Books {
    fn default() -> Self {
        Self {
            alive: Vec::new(),
            total: 0,
            parked: 0,
            most_parked: 0,
            peak: Peak::default(),
            sizes: BTreeSet::new(),
            on_host: 0,
            most_on_host: 0,
            step: String::new(),
            label: UNNAMED,
            work: ByKind::default(),
        }
    }
}

impl Books {
    fn add(&mut self, label: &'static str, bytes: u64) {
        match self.alive.iter_mut().find(|holding| holding.label == label) {
            Some(holding) => holding.bytes += bytes,
            None => self.alive.push(Holding { label, bytes }),
        }
        self.total += bytes;
        if self.total > self.peak.bytes {
            self.note();
        }
    }

    fn take(&mut self, label: &'static str, bytes: u64) {
        if let Some(holding) = self.alive.iter_mut().find(|holding| holding.label == label) {
            holding.bytes -= bytes;
        }
        self.total -= bytes;
    }

    /// Makes this moment the peak.
    fn note(&mut self) {
        self.peak.bytes = self.total;
        self.peak.held.clear();
        self.peak.held.extend(self.alive.iter().filter(|holding| holding.bytes > 0));
        self.peak.during = self.label;
        if self.peak.step != self.step {
            self.peak.step.clone_from(&self.step);
        }
    }
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are alive from now on, under the current label, which comes back.
    pub(super) fn add(&self, bytes: u64) -> &'static str {
        let mut books = self.books();
        let label = books.label;
        books.sizes.insert(bytes);
        books.add(label, bytes);
        label
    }

    /// Adds bytes under a label that they had before.
    pub(super) fn add_to(&self, label: &'static str, bytes: u64) {
        self.books().add(label, bytes);
    }

    /// Bytes under a label that are gone.
    pub(super) fn take(&self, label: &'static str, bytes: u64) {
        self.books().take(label, bytes);
    }

    /// Bytes that an operation takes for itself at the moment.
    pub(super) fn pass(&self, bytes: u64) {
        let mut books = self.books();
        books.add(WORKSPACE, bytes);
        books.take(WORKSPACE, bytes);
    }

    /// Codes that the host has from now on.
    pub(super) fn keep_codes(&self, bytes: u64) {
        self.books().add(CODES, bytes);
    }

    /// Codes that became weights again, after which nobody keeps them; again and again is once.
    pub(super) fn drop_codes(&self, bytes: u64) {
        let mut books = self.books();
        let there = books.alive.iter().find(|holding| holding.label == CODES).map_or(0, |holding| holding.bytes);
        if there > 0 {
            books.take(CODES, bytes.min(there));
        }
    }

    /// Bytes of page-locked host memory that are taken.
    pub(super) fn park(&self, bytes: u64) {
        let mut books = self.books();
        books.parked += bytes;
        books.most_parked = books.most_parked.max(books.parked);
    }

    /// Bytes of page-locked host memory that are given back.
    pub(super) fn unpark(&self, bytes: u64) {
        self.books().parked -= bytes;
    }

    /// Bytes that the host has of an operation at the moment.
    pub(super) fn pass_on_host(&self, bytes: u64) {
        let mut books = self.books();
        books.most_on_host = books.most_on_host.max(books.on_host + bytes);
    }

    /// Bytes that the host holds from now on.
    pub(super) fn hold_on_host(&self, bytes: u64) {
        self.books().on_host += bytes;
        self.pass_on_host(0);
    }

    /// Bytes that the host gives back.
    pub(super) fn leave_host(&self, bytes: u64) {
        self.books().on_host -= bytes;
    }

    /// Adds work.
    pub(super) fn work(&self, work: ByKind) {
        let mut books = self.books();
        books.work = books.work + work;
    }

    /// Names the step from now on.
    pub(super) fn step(&self, step: &str) {
        let mut books = self.books();
        books.step.clear();
        books.step.push_str(step);
    }

    pub(super) fn total(&self) -> u64 {
        self.books().total
    }

    pub(super) fn most_parked(&self) -> u64 {
        self.books().most_parked
    }

    /// Bytes that the host's heap keeps between tensors that are in it.
    pub(super) fn between_arrays(&self) -> u64 {
        heap::between_arrays(self.books().sizes.iter().copied())
    }

    pub(super) fn most_on_host(&self) -> u64 {
        self.books().most_on_host
    }

    pub(super) fn peak(&self) -> Peak {
        self.books().peak.clone()
    }

    pub(super) fn work_done(&self) -> ByKind {
        self.books().work
    }

    /// Looks for a new peak, from what is alive on.
    pub(super) fn reset_peak(&self) {
        let mut books = self.books();
        books.peak = Peak::default();
        books.most_on_host = books.on_host;
        books.sizes.clear();
        books.note();
    }
}

/// Gives what a device makes a name, until it is dropped; then the name before it is back. Of a device without books it does nothing.
#[derive(Debug, Default)]
pub struct Label(Option<(Arc<Ledger>, &'static str)>);

impl Label {
    pub(super) fn new(ledger: &Arc<Ledger>, label: &'static str) -> Self {
        let before = std::mem::replace(&mut ledger.books().label, label);
        Self(Some((Arc::clone(ledger), before)))
    }
}

impl Drop for Label {
    fn drop(&mut self) {
        if let Some((ledger, before)) = &self.0 {
            ledger.books().label = before;
        }
    }
}
