//! The decoder's blocks, one after the other: what goes on beside the device, and when what there is is saved.

use super::ahead::Ahead;
use super::blocks::BlockRun;
use super::places::Places;
use super::resume::{Begin, Saved, Saver, Session, Spent, State};
use super::start::Started;
use super::tail::{Job, Line, Save, Tail};
use crate::checkpoint::growing::Growing;
use crate::checkpoint::write::Writer;
use crate::device::{ModelOps, SolveOps};
use crate::evaluate::paths::{self, Paths};
use crate::heap;
use crate::plan::MemoryPlan;
use crate::progress::{Stage, StageClock, StageTime, Stop};
use crate::quantize::block::{Chunk, rows_of_paths};
use crate::report::RunObserver;
use crate::report::check::ModelCheck;
use anyhow::{Context, Result};
use std::thread;
use std::time::{Duration, Instant};

/// A run between its first block and its last.
pub(super) struct Walk<'a, D: ModelOps> {
    pub(super) session: &'a Session<'a, D>,
    pub(super) begin: Begin<'a>,
    /// Errors where a file that is read has been found wrong by now.
    pub(super) check_files: &'a dyn Fn() -> Result<()>,
    /// The files of tensors that are written.
    pub(super) growing: &'a Growing,
    /// Least time between two saves.
    pub(super) between_saves: Duration,
    pub(super) stop: &'a Stop,
    /// What tells what came of the model, and how many samples of it were held out.
    pub(super) places: &'a [Places],
    pub(super) held_out: usize,
    /// When the run, or this process's part of it, began.
    pub(super) time: Instant,
    /// What earlier processes took.
    pub(super) before: &'a Spent,
    /// What this one took so far, and takes for the blocks.
    pub(super) stages: &'a [StageTime],
    pub(super) clock: &'a StageClock,
}

/// What saving goes by.
struct Saves {
    /// Blocks behind the last state, saved or on its way.
    blocks: Option<usize>,
    last: Instant,
    /// Whether image features for later blocks have their file.
    levels: bool,
}

impl<D: ModelOps + SolveOps> Walk<'_, D> {
    /// Takes all blocks that are left; `saved` is told of every state that reaches the disk. Returns what is done, and what wrote it.
    pub(super) fn run(
        &self,
        started: Started<D::Tensor>,
        plan: &mut MemoryPlan,
        saved: &Saved,
        observer: &mut dyn RunObserver,
    ) -> Result<(State, Writer)> {
        let Started { state, writer, chunks } = started;
        let Session { device, input, work, .. } = *self.session;
        let (done, beside) = (state.finished(), device.works_beside_host());
        thread::scope(|scope| {
            let saver = Saver::new(scope, work, saved, self.begin, beside);
            let tail = Tail { input, writer, growing: self.growing, state, saver };
            let mut steps = Steps {
                walk: self,
                chunks,
                ahead: Ahead::new(scope, device, input),
                line: Line::start(scope, tail, beside)?,
                saves: Saves { blocks: saved.blocks(), last: self.time, levels: saved.blocks().is_some() },
            };
            let walked = steps.take(done, plan, observer);
            // What has failed there came before what has failed here.
            let (written, tail) = steps.line.finish()?;
            written.iter().for_each(|report| observer.layer_finished(report));
            walked?;
            let Tail { state, writer, .. } = tail.context("an error that was told and not heeded")?;
            Ok((state, writer))
        })
    }
}

/// A walk under way.
struct Steps<'w, 'scope, 'env, D: ModelOps> {
    walk: &'w Walk<'w, D>,
    chunks: Vec<Chunk<D::Tensor>>,
    ahead: Ahead<'scope, 'env, D>,
    line: Line<'scope, 'env>,
    saves: Saves,
}

impl<D: ModelOps + SolveOps> Steps<'_, '_, '_, D> {
    /// Takes the blocks behind those that are `done`.
    fn take(&mut self, done: usize, plan: &mut MemoryPlan, observer: &mut dyn RunObserver) -> Result<()> {
        let walk = self.walk;
        let Session { device, input, activations, .. } = *walk.session;
        let blocks = input.config.decoder.layers;
        device.reset_peak();
        observer.stage_advanced(Stage::Blocks, done as u64, "");
        if self.saves.blocks.is_none() && self.is_due() {
            self.save(done, plan, None)?;
        }
        for index in done..blocks {
            // Blocks that no state has yet are not given up for the rest of one more.
            let stop = if self.are_unsaved(index) { Stop::default() } else { walk.stop.clone() };
            stop.check()?;
            (walk.check_files)()?;
            let float = self.ahead.take(index)?;
            heap::trim();
            let block = BlockRun { device, input, activations, stop: &stop, index };
            block.quantize(float, &mut self.chunks, &mut self.line, observer)?;
            let finished = index + 1;
            let mut check = None;
            if finished == blocks {
                observer.stage_advanced(Stage::Blocks, blocks as u64, "comparing the paths");
                check = self.compare(&stop)?;
                // Nothing is left to go through another block.
                self.chunks.clear();
            }
            plan.measured(Stage::Blocks, device.peak_bytes());
            let is_asked_to_end = walk.stop.check().is_err() && self.are_unsaved(finished);
            if finished == blocks || is_asked_to_end || self.is_due() {
                self.save(finished, plan, check)?;
            }
        }
        Ok(())
    }

    /// Whether blocks, of so many that are finished, are in no state.
    fn are_unsaved(&self, finished: usize) -> bool {
        self.saves.blocks.unwrap_or(0) < finished
    }

    /// Whether enough time has passed for another state.
    fn is_due(&self) -> bool {
        self.saves.last.elapsed() >= self.walk.between_saves
    }

    /// Has a state saved, behind all that was given to the line so far.
    fn save(&mut self, finished: usize, plan: &MemoryPlan, check: Option<ModelCheck>) -> Result<()> {
        let Walk { session, time, before, stages, clock, .. } = *self.walk;
        let spent = before.and(time, stages.iter().cloned().chain([clock.time()]));
        let save = Save { spent, measured: plan.measurements(), check };
        let streams = session.streams(&self.chunks, finished, self.saves.levels)?;
        self.line.give(Job::Save(save, streams))?;
        self.saves = Saves { blocks: Some(finished), last: Instant::now(), levels: true };
        Ok(())
    }

    /// How both paths predict the tokens that are looked at; `None` where there are none.
    fn compare(&mut self, stop: &Stop) -> Result<Option<ModelCheck>> {
        let Walk { session, places, held_out, .. } = *self.walk;
        let Session { device, input, activations, .. } = *session;
        let rows = places.iter().map(|places| (places.chunk, places.rows.as_slice()));
        let Some([float, quantized]) = rows_of_paths(device, &mut self.chunks, rows, activations, stop)? else {
            return Ok(None);
        };
        let next = places.iter().flat_map(|places| &places.next).copied().collect();
        let both = Paths { float, quantized, next };
        let found = paths::compare(device, &input.checkpoint, &input.config, both, stop)?;
        Ok(Some(ModelCheck::of_paths(found, held_out)))
    }
}
