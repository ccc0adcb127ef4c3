//! From a checkpoint and conversations to a quantized checkpoint: the `input` is read and checked, `encode`d into the decoder's
//! input, and walks through the `blocks`. What is done is kept on the way, to `resume` from.

use super::awaited::Awaited;
use super::encode;
use super::findings;
use super::input::{Data, Input};
use super::resume::{self, Saved, Spent, Unfinished, Unusable};
use super::start::Start;
use super::walk::Walk;
use crate::checkpoint::checksum::Check;
use crate::checkpoint::growing::Growing;
use crate::checkpoint::own::Foreign;
use crate::checkpoint::sums::{SUMS, Sums};
use crate::checkpoint::work::WorkFolder;
use crate::device::counting::Counting;
use crate::device::{ModelOps, SolveOps};
use crate::plan::{Counted, DecoderShape, MemoryPlan, StateBytes};
use crate::progress::{Interrupted, Stage, StageClock, StageTime};
use crate::quantize::block::{Activations, NotFinite};
use crate::report::card;
use crate::report::provenance::{self, FileSums, Provenance};
use crate::report::settings::RunSettings;
use crate::report::split::largest_split;
use crate::report::spread::bin_edges;
use crate::report::{RunObserver, RunReport};
use anyhow::Result;
use std::thread;
use std::time::{Duration, Instant};

/// Counts a run's memory, see [`plan`](super::plan).
pub(super) fn plan<D: ModelOps + SolveOps>(device: &D, settings: &RunSettings) -> Result<MemoryPlan> {
    settings.check()?;
    let (input, data) = Input::read::<D>(settings, &mut Vec::new(), &mut ())?;
    Ok(input.plan(&Counting::of(device), &data, &input.subject(&data.packed()))?.0)
}

/// What a run with these settings takes on a device that only counts, with activations where they are said to be: the run's own
/// steps, but for weights and pixels. Errors as [`plan`](super::plan) does.
pub fn count(device: &Counting, settings: &RunSettings, activations: Activations) -> Result<Counted> {
    settings.check()?;
    let (input, data) = Input::read::<Counting>(settings, &mut Vec::new(), &mut ())?;
    input.subject(&data.packed()).count(device, activations)
}

/// Quantizes a checkpoint, see [`run`](super::run).
pub(super) fn run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &RunSettings,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    settings.check()?;
    let settings = &settings.plain();
    let mut work = WorkFolder::open(&settings.out)?;
    if settings.restart {
        work.restart()?;
    }
    let mut saved = None;
    let report = quantize(device, settings, &mut work, &mut saved, observer);
    let error = match report.and_then(|report| work.finish().map(|()| report)) {
        Ok(report) => return Ok(report),
        Err(error) => error,
    };
    let Some(unfinished) = saved.filter(|_| !error.is::<Unusable>()) else { return Err(error) };
    if error.is::<NotFinite>() {
        work.keep(false);
        return Err(if unfinished.finished > 0 { error.context(unfinished.lost()) } else { error });
    }
    // What comes of the input comes again, and is told again, in no time.
    let not_of_the_input = || error.is::<Interrupted>() || error.chain().any(|cause| cause.is::<std::io::Error>());
    work.keep(unfinished.finished > 0 || error.is::<Foreign>() || not_of_the_input());
    Err(if work.is_kept() { error.context(unfinished) } else { error })
}

/// The whole run, but for giving the output its name. `saved` is the last state on the disk that this process has found or made.
fn quantize<D: ModelOps + SolveOps>(
    device: &D,
    settings: &RunSettings,
    work: &mut WorkFolder,
    saved: &mut Option<Unfinished>,
    observer: &mut dyn RunObserver,
) -> Result<RunReport> {
    let time = Instant::now();
    let mut stages = Vec::new();
    let (input, data) = Input::read::<D>(settings, &mut stages, observer)?;
    let plan = input.plan(&Counting::of(device), &data, &input.subject(&data.packed()))?.0;
    plan.lines().iter().for_each(|line| log::info!("{line}"));
    // From here on threads work beside each other, whose memory no plan would know from the program's.
    thread::scope(|scope| {
        let (checkpoint, replaced) = (&input.checkpoint, input.replaced());
        let calibration = settings.calib.as_deref().filter(|_| data.all().next().is_some());
        let files = Awaited::start(scope, "checksums", move |check| {
            FileSums::of(checkpoint, |name| !replaced.contains(name), calibration, check)
        })?;
        let read = Read { device, settings, input: &input, plan, files: &files, time, stages };
        read.quantize(data, work, saved, observer)
    })
}

/// What a run has read, and reads on its way.
struct Read<'a, 'scope, D> {
    device: &'a D,
    settings: &'a RunSettings,
    input: &'a Input,
    plan: MemoryPlan,
    files: &'a Awaited<'scope, FileSums>,
    time: Instant,
    stages: Vec<StageTime>,
}

impl<D: ModelOps + SolveOps> Read<'_, '_, D> {
    fn quantize(
        self,
        data: Data,
        work: &mut WorkFolder,
        saved: &mut Option<Unfinished>,
        observer: &mut dyn RunObserver,
    ) -> Result<RunReport> {
        let Self { device, settings, input, mut plan, files, time, mut stages } = self;
        let stop = observer.stop();
        let check = || Ok(stop.check()?);
        let packed = data.packed();
        let used = RunSettings {
            solver: input.solver.clone(),
            importance: input.importance,
            importance_power: input.importance_power,
            refit: Some(input.refit),
            ..settings.clone()
        };
        let provenance = Provenance::of(&used, &data.calibration, &data.held_out);
        let provenance = |check: Check<'_>| files.get(check).map(|files| provenance.clone().with_files(files));
        let identity = |check: Check<'_>| resume::identity(&provenance(check)?, &device.name(), device.libraries());
        let calibration = encode::counts(&data.calibration, input.config.image_token);

        let blocks = input.config.decoder.layers;
        let unfinished =
            |work: &WorkFolder, finished| Some(Unfinished { folder: work.path().into(), finished, blocks });
        let bytes = StateBytes::of(&input.subject(&packed), device.element_bytes());
        let start = Start { device, input, settings: &used, data: &data, state: bytes, stop: &stop, time };
        let found = resume::find(work, || {
            let clock = StageClock::start(Stage::Checksums, 1, observer);
            let identity = identity(&check)?;
            clock.finish(observer);
            Ok(identity)
        })?;
        let (started, before, on_disk) = match found {
            None => (start.afresh(work, &mut plan, &mut stages, observer)?, Spent::default(), None),
            Some(found) => {
                let finished = found.state.finished();
                *saved = unfinished(work, finished);
                observer.resumed(finished, blocks, work.path());
                let before = found.state.spent.clone();
                (start.again(work, found, &files.get(&check)?.tensors, &mut plan)?, before, Some(finished))
            }
        };
        let (places, held_out) = (input.places(&packed), packed.held_out());
        let session = start.session(work, &plan);
        drop(data);

        let (growing, on_disk) = (Growing::of(&started.writer), Saved::new(on_disk));
        thread::scope(|scope| {
            let grown = Awaited::start(scope, "sums", |check| growing.checksums(check))?;
            let clock = StageClock::start(Stage::Blocks, blocks as u64, observer);
            let walk = Walk {
                session: &session,
                // What is wrong with a file ends the run, however far it is.
                begin: &|| work.write_run(&serde_json::to_vec_pretty(&identity(&|| Ok(()))?)?),
                check_files: &|| files.is_there().map(drop),
                growing: &growing,
                between_saves: Duration::from_secs(settings.save_every),
                stop: &stop,
                places: &places,
                held_out,
                time,
                before: &before,
                stages: &stages,
                clock: &clock,
            };
            let walked = walk.run(started, &mut plan, &on_disk, observer);
            if let Some(finished) = on_disk.blocks() {
                *saved = unfinished(work, finished);
            }
            let (state, writer) = walked?;
            let mut stages = stages.clone();
            stages.push(clock.finish(observer));
            // Behind the last save: without --strict the same command writes what is there.
            state.check.iter().try_for_each(|check| findings::tell_of_model(check, settings.strict))?;

            let spent = before.and(time, stages);
            plan.host.measured_bytes = spent.peak_memory_bytes;
            let layout = input.solver.layout();
            let report = RunReport {
                provenance: provenance(&check)?,
                family: input.family.into(),
                format: settings.format.name().into(),
                device: device.name(),
                calibration,
                layers: state.done.layers,
                blocks: state.done.blocks,
                check: state.check,
                importance_edges: bin_edges(),
                samples: input.samples.clone(),
                stages: spent.stages,
                seconds: spent.seconds,
                peak_memory_bytes: spent.peak_memory_bytes,
                peak_device_bytes: plan.measured_bytes(),
                device_pool: device.pool_peak()?,
                memory_plan: plan,
                bytes_before: input.sizes.before,
                bytes_after: input.sizes.before - input.sizes.float_layers + input.sizes.quantized_layers,
                quantized_bytes: input.sizes.quantized_layers,
                loaders: settings.format.loaders(&layout, input.support, &settings.out),
                shut_out: settings.format.shut_out(&layout, input.support),
                largest_split: largest_split(&DecoderShape::of(&input.config.decoder), settings.format, &input.solver),
                evaluation: None,
            };
            writer.add_to_config(provenance::KEY, &report.provenance.summary()?)?;
            for (name, bytes) in card::files(&report, input.support)? {
                writer.add_file(&name, &bytes)?;
            }
            for (name, bytes) in report.files()? {
                writer.add_file(name, &bytes)?;
            }
            // Checksums of all files are no place for one that is not ours.
            writer.check_contents()?;
            writer.check_complete()?;
            let clock = StageClock::start(Stage::Checksums, 1, observer);
            let tensors = files.get(&check)?.tensors.clone().into_iter().chain(state.checksums).collect();
            let sums = Sums::with(writer.folder(), grown.get(&check)?, tensors)?;
            writer.add_file(SUMS, sums.text().as_bytes())?;
            clock.finish(observer);
            writer.finish()?;
            Ok(report)
        })
    }
}
