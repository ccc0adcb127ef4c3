//! How a run comes to its next block: from the start, or from what an earlier process left.

use super::encode::{self, Encoded};
use super::findings;
use super::input::{Data, Input};
use super::resume::{self, Found, Session, Spent, State};
use crate::checkpoint::sums::SUMS;
use crate::checkpoint::work::WorkFolder;
use crate::checkpoint::write::{SHARD_BYTES, Writer};
use crate::device::{ModelOps, SolveOps};
use crate::plan::{MemoryPlan, StateBytes};
use crate::progress::{Stage, StageClock, StageTime, Stop};
use crate::quantize::block::Chunk;
use crate::report::card;
use crate::report::settings::RunSettings;
use crate::report::{RunObserver, RunReport};
use crate::run::places::Chunked;
use anyhow::Result;
use std::collections::BTreeMap;
use std::time::Instant;

/// What a run starts with.
pub(super) struct Start<'a, 'd, D> {
    pub(super) device: &'a D,
    pub(super) input: &'a Input,
    /// Settings as they take effect.
    pub(super) settings: &'a RunSettings,
    pub(super) data: &'d Data,
    /// What a state of the run takes on disk.
    pub(super) state: StateBytes,
    pub(super) stop: &'a Stop,
    pub(super) time: Instant,
}

/// A run at the beginning of a block.
pub(super) struct Started<T> {
    pub(super) state: State,
    pub(super) writer: Writer,
    /// None behind the last block.
    pub(super) chunks: Vec<Chunk<T>>,
}

impl<'a, D: ModelOps + SolveOps> Start<'a, '_, D> {
    /// From the start. The space for all that is to come is taken first.
    pub(super) fn afresh(
        &self,
        work: &mut WorkFolder,
        plan: &mut MemoryPlan,
        stages: &mut Vec<StageTime>,
        observer: &mut dyn RunObserver,
    ) -> Result<Started<D::Tensor>> {
        let Self { device, input, settings, data, stop, .. } = *self;
        let mut writer = self.writer(work)?;
        work.clear()?;
        input.disk(self.state, &settings.out)?;
        let source = &input.checkpoint;
        writer.begin(source, &input.linears)?;
        resume::begin(work, self.state)?;

        let clock = StageClock::start(Stage::Write, writer.bytes_to_copy(source).div_ceil(MEGA), observer);
        let mut copied = 0;
        writer.copy_tensors(source, &mut |bytes| {
            copied += bytes;
            observer.stage_advanced(Stage::Write, copied / MEGA, "");
            Ok(stop.check()?)
        })?;
        stages.push(clock.finish(observer));

        device.reset_peak();
        let Encoded { chunks, time } = encode::encode(device, input, data, plan.activations, observer)?;
        stages.extend(time);
        plan.measured(Stage::Vision, device.peak_bytes());
        let spent = Spent::default().and(self.time, stages.iter().cloned());
        let state = State { spent, measured: plan.measurements(), ..State::default() };
        Ok(Started { state, writer, chunks })
    }

    /// From what an earlier process left, in which the copied tensors are to have the checksums of the `kept` ones.
    pub(super) fn again(
        &self,
        work: &mut WorkFolder,
        found: Found,
        kept: &BTreeMap<String, String>,
        plan: &mut MemoryPlan,
    ) -> Result<Started<D::Tensor>> {
        let Self { input, settings, data, stop, .. } = *self;
        let state = found.state.clone();
        if settings.strict {
            state.done.layers.iter().try_for_each(|layer| findings::tell(layer, &[], true))?;
            state.check.iter().try_for_each(|check| findings::tell_of_model(check, true))?;
        }
        let writer = resume::reopen(self.writer(work)?, input, &state, kept, &|| Ok(stop.check()?))?;
        let packed = match state.finished() < input.config.decoder.layers {
            true => data.packed(),
            false => Chunked::default(),
        };
        let chunks = self.session(work, plan).restore(found, &packed, stop)?;
        state.measured.iter().for_each(|&(stage, bytes)| plan.measured(stage, bytes));
        Ok(Started { state, writer, chunks })
    }

    /// What writes the checkpoint, planned, with all that it is to have: the work folder is told.
    fn writer(&self, work: &mut WorkFolder) -> Result<Writer> {
        let (source, layout) = (&self.input.checkpoint, self.input.solver.layout());
        let mut writer = Writer::planned(SHARD_BYTES, &work.checkpoint(), &self.input.copy(&layout))?;
        writer.announce(card::names(source.folder()));
        writer.announce(RunReport::NAMES);
        writer.announce([SUMS]);
        work.expect(writer.names());
        Ok(writer)
    }

    /// What saves and restores; it outlives the data.
    pub(super) fn session<'w>(&self, work: &'w WorkFolder, plan: &MemoryPlan) -> Session<'w, D>
    where
        'a: 'w,
    {
        Session { device: self.device, input: self.input, work, activations: plan.activations }
    }
}

/// What the stage of writing counts.
const MEGA: u64 = 1_000_000;
