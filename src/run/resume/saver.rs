//! Writing states, one after the other, beside the run where its device works beside the host.

use super::session::Streams;
use super::{REPORTS, State, recycle_all_but, spare};
use crate::checkpoint::own;
use crate::checkpoint::sealed::{self, Sealing};
use crate::checkpoint::work::{Kept, WorkFolder, sync_folder};
use crate::checkpoint::write::Flush;
use crate::parallel::join;
use anyhow::{Context, Result};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Blocks behind which there is a state on the disk.
#[derive(Debug)]
pub(in crate::run) struct Saved(AtomicUsize);

impl Saved {
    /// The blocks of the state that an earlier process has left; `None` where there is none.
    pub(in crate::run) fn new(finished: Option<usize>) -> Self {
        Self(AtomicUsize::new(finished.map_or(0, |finished| finished + 1)))
    }

    /// Blocks behind which there is a state; `None` where there is no state yet.
    pub(in crate::run) fn blocks(&self) -> Option<usize> {
        self.0.load(Ordering::Relaxed).checked_sub(1)
    }

    fn set(&self, finished: usize) {
        self.0.store(finished + 1, Ordering::Relaxed);
    }
}

/// Writes what makes a run of a work folder's contents.
pub(in crate::run) type Begin<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// Writes states into a work folder.
pub(in crate::run) struct Saver<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    work: &'env WorkFolder,
    saved: &'env Saved,
    /// Makes a run of the work folder's contents, before the first state.
    begin: Begin<'env>,
    /// Whether states are written beside the run.
    beside: bool,
    under_way: Option<ScopedJoinHandle<'scope, Result<()>>>,
}

impl<'scope, 'env> Saver<'scope, 'env> {
    /// One that notes in `saved` what it has saved.
    pub(in crate::run) fn new(
        scope: &'scope Scope<'scope, 'env>,
        work: &'env WorkFolder,
        saved: &'env Saved,
        begin: Begin<'env>,
        beside: bool,
    ) -> Self {
        Self { scope, work, saved, begin, beside, under_way: None }
    }

    /// Saves a state, `streams` being what comes out of its last block, and first brings the tensors written so far to the disk. Waits for
    /// the state before, and, beside the run, no longer.
    pub(in crate::run) fn save(&mut self, state: &State, streams: Streams<'_>, tensors: Flush) -> Result<()> {
        self.finish()?;
        // Unlike JSON it knows infinities, which a layer's error may be.
        let mut reports = Vec::new();
        ciborium::into_writer(state, &mut reports)?;
        let (finished, work, saved, begin) = (state.finished(), self.work, self.saved, self.begin);
        let write = move |streams: Streams<'_>| {
            tensors.wait()?;
            if saved.blocks().is_none() {
                begin()?;
            }
            write(work, finished, reports, streams)?;
            saved.set(finished);
            Ok(())
        };
        if !self.beside {
            return write(streams);
        }
        let streams = streams.into_owned();
        let thread = Builder::new().name("state".into()).spawn_scoped(self.scope, move || write(streams));
        self.under_way = Some(thread.context("cannot start a thread to save the run's state")?);
        Ok(())
    }

    /// Waits for the state that is being written.
    pub(in crate::run) fn finish(&mut self) -> Result<()> {
        self.under_way.take().map_or(Ok(()), join)
    }
}

/// Writes the state behind so many blocks, whose tensors have reached the disk.
fn write(work: &WorkFolder, finished: usize, reports: Vec<u8>, streams: Streams<'_>) -> Result<()> {
    let Streams { levels, mut residual } = streams;
    if !levels.is_empty() {
        let path = work.place(Kept::Levels);
        let write = || sealed::write(own::open_or_create(&path)?, levels);
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    residual.push(Sealing::bytes(REPORTS, reports));
    let (path, spare) = (work.place(Kept::State(finished)), spare(work));
    let write = || {
        sealed::write(own::open_or_create(&spare)?, residual)?;
        fs::rename(&spare, &path)?;
        sync_folder(work.path())
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    recycle_all_but(work, finished)
}
