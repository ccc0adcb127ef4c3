//! The devices that the programs are compiled for, once and here.
//!
//! A generic function is compiled by each crate that calls it, for each device that it is called with. The programs are all of this
//! library, so what is public of them goes through the trait [`Runs`], whose implementations are compiled with the library.

use super::dry_run::{self, DryRun};
use super::evaluation::{self, EvaluationSettings};
use super::inspect::{self, Inspection};
use super::quantization;
use crate::device::counting::Counting;
use crate::device::cpu::Cpu;
use crate::device::cuda::Cuda;
use crate::device::{ModelOps, SolveOps};
use crate::evaluate::Evaluation;
use crate::plan::MemoryPlan;
use crate::plan::evaluation::EvaluationPlan;
use crate::progress::Observer;
use crate::report::settings::RunSettings;
use crate::report::{RunObserver, RunReport};
use crate::tensor::Matrix;
use anyhow::Result;
use std::path::Path;

/// A device that the programs run on. Its functions are those of this module and of its neighbours, which say what they do.
pub trait Runs: ModelOps + SolveOps {
    /// Quantizes a checkpoint, see [`run`].
    fn run(&self, settings: &RunSettings, observer: &mut dyn RunObserver) -> Result<RunReport>;

    /// Counts a run's memory, see [`plan`].
    fn plan(&self, settings: &RunSettings) -> Result<MemoryPlan>;

    /// Checks and counts a run, see [`dry_run()`].
    fn dry_run(&self, settings: &RunSettings, observer: &mut dyn Observer) -> Result<DryRun>;

    /// Reads a checkpoint's configuration and headers, see [`inspect()`].
    fn inspect(&self, folder: &Path) -> Result<Inspection>;

    /// Evaluates a checkpoint, see [`evaluate`] and, for `kept` logits of a reference, [`run_against`].
    fn evaluate(
        &self,
        settings: &EvaluationSettings,
        kept: Option<&[Matrix]>,
        observer: &mut dyn Observer,
    ) -> Result<Evaluation>;

    /// Plans two evaluations, see [`plan_comparison`].
    fn plan_comparison(&self, settings: &EvaluationSettings, bits: u32) -> Result<[EvaluationPlan; 2]>;

    /// Logits of every answer, see [`answer_logits`].
    fn answer_logits(&self, settings: &EvaluationSettings) -> Result<Vec<Matrix>>;
}

macro_rules! runs {
    ($($device:ty),+) => {$(
        impl Runs for $device {
            fn run(&self, settings: &RunSettings, observer: &mut dyn RunObserver) -> Result<RunReport> {
                quantization::run(self, settings, observer)
            }

            fn plan(&self, settings: &RunSettings) -> Result<MemoryPlan> {
                quantization::plan(self, settings)
            }

            fn dry_run(&self, settings: &RunSettings, observer: &mut dyn Observer) -> Result<DryRun> {
                dry_run::dry_run(self, settings, observer)
            }

            fn inspect(&self, folder: &Path) -> Result<Inspection> {
                inspect::of(self, folder)
            }

            fn evaluate(
                &self,
                settings: &EvaluationSettings,
                kept: Option<&[Matrix]>,
                observer: &mut dyn Observer,
            ) -> Result<Evaluation> {
                evaluation::score(self, settings, kept, observer)
            }

            fn plan_comparison(&self, settings: &EvaluationSettings, bits: u32) -> Result<[EvaluationPlan; 2]> {
                evaluation::plans_of_comparison(self, settings, bits)
            }

            fn answer_logits(&self, settings: &EvaluationSettings) -> Result<Vec<Matrix>> {
                evaluation::logits_of_answers(self, settings)
            }
        }
    )+};
}

runs!(Cpu, Cuda, Counting);

/// What a run with these settings would take on the device, without running it. Errors as [`run`] does before it loads
/// anything there.
pub fn plan<D: Runs>(device: &D, settings: &RunSettings) -> Result<MemoryPlan> {
    device.plan(settings)
}

/// Quantizes a checkpoint. Everything that can be refused is refused before anything is computed.
///
/// The output grows in the folder `.NAME.vlmq` beside it. A run that ends early, in whatever way, leaves that folder if a block
/// was done, or if it was [`Interrupted`](crate::progress::Interrupted) or could not write once the images were encoded: then a run of the same settings goes
/// on behind the last finished block, and the error has the context [`Unfinished`](super::Unfinished). Otherwise it leaves nothing; nor does one that ends at
/// activations which are not finite: no run could go on from there.
pub fn run<D: Runs>(device: &D, settings: &RunSettings, observer: &mut dyn RunObserver) -> Result<RunReport> {
    device.run(settings, observer)
}

/// Everything that [`run`] does before it reads a weight or writes a byte, and what it would take: errors as it
/// has them of settings, headers, templates, data and room. It takes seconds, whatever the size of the model: reading the
/// data, and about a second of products that show how fast the device is.
pub fn dry_run<D: Runs>(device: &D, settings: &RunSettings, observer: &mut dyn Observer) -> Result<DryRun> {
    device.dry_run(settings, observer)
}

/// Reads configuration and tensor headers of a checkpoint, no weights; the time of the estimate is from short probes of this
/// machine.
///
/// Errors as [`Checkpoint::open`](crate::checkpoint::Checkpoint::open), and for a family that is not known or a tensor that is missing or of another shape.
pub fn inspect<D: Runs>(device: &D, folder: &Path) -> Result<Inspection> {
    device.inspect(folder)
}

/// Decodes and scores every sample. Errors, with the numbers, where there is not enough memory for it.
pub fn evaluate<D: Runs>(device: &D, settings: &EvaluationSettings, observer: &mut dyn Observer) -> Result<Evaluation> {
    device.evaluate(settings, None, observer)
}

/// Decodes and scores every sample against logits that [`answer_logits`] found before: one pass of the reference model serves
/// many evaluations.
pub fn run_against<D: Runs>(
    device: &D,
    settings: &EvaluationSettings,
    reference: &[Matrix],
    observer: &mut dyn Observer,
) -> Result<Evaluation> {
    device.evaluate(settings, Some(reference), observer)
}

/// Refuses what [`evaluate`] would refuse of a float model, its data and memory, but for what it answers, and says what it would take to
/// evaluate that model, and what its quantized self of so many `bits` against it. Reads the data and builds the sequences with the
/// checkpoint's tokenizer, template and image processor, which leaves the weights alone.
pub fn plan_comparison<D: Runs>(device: &D, settings: &EvaluationSettings, bits: u32) -> Result<[EvaluationPlan; 2]> {
    device.plan_comparison(settings, bits)
}

/// Logits of `settings.model` that predict the answer of every sample, `[answer tokens, vocab]` each. All are kept in
/// memory.
pub fn answer_logits<D: Runs>(device: &D, settings: &EvaluationSettings) -> Result<Vec<Matrix>> {
    device.answer_logits(settings)
}
