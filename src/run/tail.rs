//! What the host makes of layers that have their codes: their errors, their place in the file, checksums, reports, and the states to go on
//! from. Where the device works beside the host, all of it is done behind the thread that drives the device.

use super::findings;
use super::input::Input;
use super::resume::{Saver, Spent, State, Streams};
use crate::checkpoint::checksum::of_bytes;
use crate::checkpoint::growing::Growing;
use crate::checkpoint::weight_error;
use crate::checkpoint::write::Writer;
use crate::heap;
use crate::model::decoder::module_name;
use crate::parallel::join;
use crate::plan::WAITING;
use crate::progress::Stage;
use crate::quantize::block::SolvedLayer;
use crate::report::check::ModelCheck;
use crate::report::{BlockReport, LayerReport};
use anyhow::{Context, Result};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Something that has happened on the device.
pub(super) enum Job<'a> {
    /// A layer of this block has its codes.
    Layer(usize, Box<SolvedLayer>),
    /// A block is done, all of its layers before it.
    Block(Box<BlockReport>),
    /// What there is behind the last block is to be saved.
    Save(Save, Streams<'a>),
}

impl Job<'_> {
    /// This job with memory of its own.
    fn into_owned(self) -> Job<'static> {
        match self {
            Self::Layer(block, layer) => Job::Layer(block, layer),
            Self::Block(report) => Job::Block(report),
            Self::Save(save, streams) => Job::Save(save, streams.into_owned()),
        }
    }
}

/// What a state holds beside the blocks and their streams.
pub(super) struct Save {
    pub(super) spent: Spent,
    pub(super) measured: Vec<(Stage, Option<u64>)>,
    pub(super) check: Option<ModelCheck>,
}

/// Takes jobs, in their order.
pub(super) struct Tail<'scope, 'env> {
    pub(super) input: &'env Input,
    pub(super) writer: Writer,
    /// The files that it writes.
    pub(super) growing: &'env Growing,
    pub(super) state: State,
    pub(super) saver: Saver<'scope, 'env>,
}

impl Tail<'_, '_> {
    /// Works a job off. Returns the report of a layer that was written.
    fn take(&mut self, job: Job<'_>) -> Result<Option<LayerReport>> {
        match job {
            Job::Layer(block, layer) => self.layer(block, *layer).map(Some),
            Job::Block(report) => {
                self.state.done.blocks.push(*report);
                Ok(None)
            }
            Job::Save(Save { spent, measured, check }, streams) => {
                self.state = State { spent, measured, check, ..std::mem::take(&mut self.state) };
                self.saver.save(&self.state, streams, self.writer.flush())?;
                Ok(None)
            }
        }
    }

    /// Writes a layer and reports it.
    fn layer(&mut self, block: usize, layer: SolvedLayer) -> Result<LayerReport> {
        let Self { input, writer, growing, state, .. } = self;
        let SolvedLayer { projection, linear, report, importance } = layer;
        let name = module_name(&input.config.names, block, projection);
        let weight = format!("{name}.weight");
        let weight_error = weight_error::of_layer(input.format, input.checkpoint.tensor(&weight)?, &linear)?;
        input.checkpoint.release(&weight);
        let report = LayerReport {
            name,
            block,
            rows: linear.out_features,
            cols: linear.in_features,
            bits: linear.bits,
            group_columns: linear.group_columns,
            weight_error,
            solve: report,
            importance,
        };
        findings::tell(&report, &state.done.layers, input.strict)?;
        let tensors = writer.write(&report.name, &linear).with_context(|| format!("cannot write {}", report.name))?;
        growing.grow(tensors.iter().map(|(name, _)| name.clone()));
        state.checksums.extend(tensors.into_iter().map(|(name, bytes)| (name, of_bytes(&bytes))));
        state.done.layers.push(report.clone());
        heap::trim();
        Ok(report)
    }
}

/// A [`Tail`] at work: here, or on a thread of its own.
pub(super) enum Line<'scope, 'env> {
    /// Jobs are done as they are given.
    Here(Box<Tail<'scope, 'env>>, Vec<LayerReport>),
    /// Jobs are done behind.
    Behind(SyncSender<Job<'static>>, Receiver<LayerReport>, ScopedJoinHandle<'scope, Result<Tail<'scope, 'env>>>),
    /// A job has failed, and its error was told.
    Broken,
}

impl<'scope, 'env> Line<'scope, 'env> {
    /// Sets a tail to work, on a thread of its own where it is to be `behind`.
    pub(super) fn start(scope: &'scope Scope<'scope, 'env>, tail: Tail<'scope, 'env>, behind: bool) -> Result<Self> {
        if !behind {
            return Ok(Self::Here(Box::new(tail), Vec::new()));
        }
        let (jobs, to_do) = sync_channel(WAITING);
        let (reported, reports) = channel();
        let thread = Builder::new().name("layers".into()).spawn_scoped(scope, move || work(tail, &to_do, &reported));
        Ok(Self::Behind(jobs, reports, thread.context("cannot start a thread to write layers")?))
    }

    /// Gives a job; waits where too many wait already. Errors with that of an earlier job, or, here, of this one.
    pub(super) fn give(&mut self, job: Job<'_>) -> Result<()> {
        match self {
            Self::Here(tail, reports) => {
                reports.extend(tail.take(job)?);
                Ok(())
            }
            Self::Behind(jobs, ..) => match jobs.send(job.into_owned()) {
                Ok(()) => Ok(()),
                // The thread ends early with an error alone.
                Err(_) => std::mem::replace(self, Self::Broken).finish().map(drop),
            },
            Self::Broken => Ok(()),
        }
    }

    /// Reports of layers that were written since this was last asked, in their order.
    pub(super) fn written(&mut self) -> Vec<LayerReport> {
        match self {
            Self::Here(_, reports) => std::mem::take(reports),
            Self::Behind(_, reports, _) => reports.try_iter().collect(),
            Self::Broken => Vec::new(),
        }
    }

    /// Waits until all jobs are done, states on their way to the disk included. Returns the reports of the layers that were not asked for
    /// yet, and the tail, unless an error has taken it.
    pub(super) fn finish(self) -> Result<(Vec<LayerReport>, Option<Tail<'scope, 'env>>)> {
        let (reports, mut tail) = match self {
            Self::Here(tail, reports) => (reports, *tail),
            Self::Behind(jobs, reports, thread) => {
                drop(jobs);
                let tail = join(thread)?;
                (reports.try_iter().collect(), tail)
            }
            Self::Broken => return Ok((Vec::new(), None)),
        };
        tail.saver.finish()?;
        Ok((reports, Some(tail)))
    }
}

/// Has a tail do jobs until no more come, or one fails.
fn work<'scope, 'env>(
    mut tail: Tail<'scope, 'env>,
    jobs: &Receiver<Job<'static>>,
    reported: &Sender<LayerReport>,
) -> Result<Tail<'scope, 'env>> {
    for job in jobs {
        if let Some(report) = tail.take(job)? {
            // Nobody listens any more where the run has failed.
            let _ = reported.send(report);
        }
    }
    Ok(tail)
}
