//! The books of a counting device: what is alive, under which label, and the moment at which that was most.

use super::pace::Pace;
use crate::device::work::ByKind;
use std::collections::{BTreeMap, BTreeSet};
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

/// How many alike a tensor, or an operation, stands for of which one is made in the place of all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StandsFor {
    /// Tensors.
    pub bytes: f64,
    /// Operations.
    pub work: f64,
}

impl StandsFor {
    /// Itself.
    pub const ONE: Self = Self { bytes: 1.0, work: 1.0 };
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
    /// Peaks of the moments at which these labels were the current ones.
    peaks: Vec<(&'static str, Peak)>,
    /// What is made under these labels stands for others as well.
    alike: Vec<(&'static str, StandsFor)>,
    /// Most bytes that an operation took for itself since the peak is looked for.
    most_passing: u64,
    step: String,
    label: &'static str,
    work: ByKind,
    pace: Option<Pace>,
    /// How often the host waited for the device, by what for.
    waits: BTreeMap<&'static str, u64>,
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
            peaks: Vec::new(),
            alike: Vec::new(),
            most_on_host: 0,
            most_passing: 0,
            step: String::new(),
            label: UNNAMED,
            work: ByKind::default(),
            pace: None,
            waits: BTreeMap::new(),
        }
    }
}

impl Peak {
    /// Makes this moment the peak if more is alive than ever before.
    fn note(&mut self, total: u64, alive: &[Holding], step: &str, during: &'static str) {
        if total <= self.bytes {
            return;
        }
        (self.bytes, self.during) = (total, during);
        self.held.clear();
        self.held.extend(alive.iter().filter(|holding| holding.bytes > 0));
        if self.step != step {
            step.clone_into(&mut self.step);
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
        self.note();
    }

    fn take(&mut self, label: &'static str, bytes: u64) {
        if let Some(holding) = self.alive.iter_mut().find(|holding| holding.label == label) {
            holding.bytes -= bytes;
        }
        self.total -= bytes;
    }

    fn note(&mut self) {
        let Self { alive, total, peak, peaks, step, label, .. } = self;
        peak.note(*total, alive, step, label);
        let own = match peaks.iter().position(|(during, _)| during == label) {
            Some(own) => own,
            None => {
                peaks.push((label, Peak::default()));
                peaks.len() - 1
            }
        };
        peaks[own].1.note(*total, alive, step, label);
    }

    fn alike(&self, label: &str) -> StandsFor {
        let alike = self.alike.iter().find(|(of, _)| *of == label);
        alike.map_or(StandsFor::ONE, |(_, alike)| *alike)
    }

    /// Bytes that stand for more under a label.
    fn for_all(&self, label: &str, bytes: u64) -> u64 {
        // Whole numbers are exact up to 2^53.
        (bytes as f64 * self.alike(label).bytes) as u64
    }
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is made under `label` stands for so many alike.
    pub(super) fn stands_for(&self, label: &'static str, alike: StandsFor) {
        let mut books = self.books();
        books.alike.retain(|(of, _)| *of != label);
        books.alike.push((label, alike));
    }

    /// Bytes of a tensor that are alive from now on, under the current label, which comes back.
    pub(super) fn add(&self, bytes: u64) -> &'static str {
        let mut books = self.books();
        let label = books.label;
        books.sizes.insert(bytes);
        let bytes = books.for_all(label, bytes);
        books.add(label, bytes);
        label
    }

    /// Adds bytes of a tensor under a label that they had before.
    pub(super) fn add_to(&self, label: &'static str, bytes: u64) {
        let mut books = self.books();
        let bytes = books.for_all(label, bytes);
        books.add(label, bytes);
    }

    /// Bytes of a tensor under a label that are gone.
    pub(super) fn take(&self, label: &'static str, bytes: u64) {
        let mut books = self.books();
        let bytes = books.for_all(label, bytes);
        books.take(label, bytes);
    }

    /// A tensor under a label takes other bytes in the place of those that it had: of all that it stands for one after the other has
    /// both at once.
    pub(super) fn grow(&self, label: &'static str, before: u64, bytes: u64) {
        let mut books = self.books();
        let (all_before, all) = (books.for_all(label, before), books.for_all(label, bytes));
        books.take(label, all_before);
        books.add(label, all);
        books.add(label, before);
        books.take(label, before);
    }

    /// Bytes that an operation takes for itself at the moment.
    pub(super) fn pass(&self, bytes: u64) {
        let mut books = self.books();
        books.most_passing = books.most_passing.max(bytes);
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
        let work = work * books.alike(books.label).work;
        books.work = books.work + work;
        books.pace.iter_mut().for_each(|pace| pace.enqueue(work));
    }

    /// Has work take its time from now on.
    pub(super) fn set_pace(&self, rates: ByKind) {
        self.books().pace = Some(Pace::new(rates));
    }

    /// What all work took so far, in seconds; 0 of a device that takes no time.
    pub(super) fn busy(&self) -> f64 {
        self.books().pace.as_ref().map_or(0.0, Pace::busy)
    }

    /// Waits for the work so far, of which the host wants to see `what`.
    pub(super) fn wait(&self, what: &'static str) {
        let mut books = self.books();
        *books.waits.entry(what).or_default() += 1;
        let left = books.pace.as_ref().map(Pace::left);
        drop(books);
        left.into_iter().for_each(std::thread::sleep);
    }

    pub(super) fn waits(&self) -> BTreeMap<&'static str, u64> {
        self.books().waits.clone()
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

    pub(super) fn sizes(&self) -> Vec<u64> {
        self.books().sizes.iter().copied().collect()
    }

    pub(super) fn most_on_host(&self) -> u64 {
        self.books().most_on_host
    }

    /// Most bytes that an operation took for itself beside what is held at `peak`.
    pub(super) fn passing_beside(&self, peak: &Peak) -> u64 {
        self.books().most_passing.saturating_sub(peak.bytes_of(WORKSPACE))
    }

    pub(super) fn peak(&self) -> Peak {
        self.books().peak.clone()
    }

    /// The moment at which most bytes were alive of those at which one of these labels was the current one.
    pub(super) fn peak_during(&self, labels: &[&str]) -> Peak {
        let books = self.books();
        let peaks = books.peaks.iter().filter(|(during, _)| labels.contains(during)).map(|(_, peak)| peak);
        peaks.max_by_key(|peak| peak.bytes).cloned().unwrap_or_default()
    }

    pub(super) fn work_done(&self) -> ByKind {
        self.books().work
    }

    /// Looks for a new peak, from what is alive on.
    pub(super) fn reset_peak(&self) {
        let mut books = self.books();
        books.peak = Peak::default();
        books.peaks.clear();
        books.sizes.clear();
        (books.most_on_host, books.most_passing) = (books.on_host, 0);
        let Books { alive, total, peak, step, label, .. } = &mut *books;
        peak.note(*total, alive, step, label);
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
