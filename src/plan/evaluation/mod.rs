//! What evaluating a model takes: where its weights are, which samples it answers together, memory, and work.

mod counted;
mod size;

pub(crate) use size::ModelSize;

use crate::data::chunks::chunks;
use crate::data::sequence::Sequence;
use crate::device::Device;
use crate::device::counting::Counting;
use crate::evaluate::seen::CHUNK_TOKENS;
use crate::model::language_model::{HEAD_ROWS, Residency};
use crate::plan::{Entry, F32, HostPlan, Load, Process, StagePlan, Step, bytes_of, entry, told};
use crate::progress::{Stage, human_bytes};
use anyhow::{Result, ensure};
use counted::{At, CountedModel, Moment, Run};
use serde::Serialize;
use std::ops::Range;

/// Bytes of weights up to which models are held where the device's memory is the host's. Larger ones are read from their files for
/// every pass.
const HELD_BYTES: u64 = 1 << 30;

/// What evaluating a larger one may take beyond the size of its file. As many of its blocks are held as that leaves room for.
const BESIDE_FILE: u64 = 1_500_000_000;

/// Most bytes of caches, residual streams, image features and logits of samples that are answered together; what takes more is
/// answered alone.
const RUN_BYTES: u64 = 512 << 20;

/// What a model keeps beside its weights: gaps that loading leaves between them, and what its tokenizer makes as it meets text (2 to
/// 4 MB were measured on small models).
const KEPT_BYTES: u64 = 3 << 20;

/// A cache that grows has room for more.
const CACHE_ROOM: f64 = 1.125;

/// What an evaluation takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationPlan {
    /// Samples that were counted.
    pub samples: usize,
    /// Where the model's weights are between passes; a reference, which decodes nothing, holds no block where they are streamed.
    pub weights: Residency,
    /// Memory of the process on the host.
    pub host: HostPlan,
    /// Memory of a device that has its own, at the worst step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<StagePlan>,
    /// The work.
    pub load: Load,
}

impl EvaluationPlan {
    /// The plan in lines.
    pub fn lines(&self) -> Vec<String> {
        let device = self
            .device
            .iter()
            .flat_map(|stage| [format!("GPU memory: {}", human_bytes(stage.bytes))].into_iter().chain(stage.lines()));
        device.chain(self.host.lines()).collect()
    }
}

/// Counts an evaluation while its samples become known.
pub(crate) struct Planner {
    device: Counting,
    /// The model, and the reference behind it.
    models: Vec<CountedModel>,
    decode: bool,
    residency: Residency,
    process: Process,
    /// The worst step so far: on a device of its own, and on the host.
    steps: [Step; 2],
    load: Load,
    samples: usize,
    /// Blocks behind which image features are added, once there was an image.
    levels: Option<u64>,
}

impl Planner {
    /// Planner of a model on the device in whose place `device` is, without samples yet. Errors, with the numbers, where there is not enough
    /// memory for it.
    pub(crate) fn new(device: Counting, model: ModelSize, reference: Option<ModelSize>, decode: bool) -> Result<Self> {
        let sizes: Vec<ModelSize> = [Some(model), reference].into_iter().flatten().collect();
        let mut planner = Self {
            models: models(&device, &sizes, Residency::Resident)?,
            decode,
            residency: Residency::Resident,
            process: Process::with_data(),
            steps: Default::default(),
            load: Load::default(),
            samples: 0,
            levels: None,
            device,
        };
        let all = planner.weights();
        let held = match planner.device.memory_limit() {
            None if planner.device.is_host() => all <= HELD_BYTES,
            None => true,
            // Half as much again for what goes through.
            Some(limit) => all + all / 2 <= limit,
        };
        if !held {
            planner.stream(&sizes, 0)?;
            planner.start()?;
            planner.stream(&sizes, planner.room_for_blocks()?)?;
        }
        planner.load = planner.models.iter().map(CountedModel::work).fold(Load::default(), |all, work| all + work);
        planner.start()?;
        Ok(planner)
    }

    /// Leaves all but so many blocks of the model in the files.
    fn stream(&mut self, sizes: &[ModelSize], held: usize) -> Result<()> {
        self.residency = Residency::Streamed { held };
        self.models = models(&self.device, sizes, self.residency)?;
        Ok(())
    }

    /// Bytes of all weights between passes.
    fn weights(&self) -> u64 {
        self.models.iter().map(CountedModel::weights).sum()
    }

    /// How many blocks may be held beside what the steps take at most.
    fn room_for_blocks(&self) -> Result<usize> {
        let model = &self.models[0];
        let inside = model.in_a_block(CHUNK_TOKENS as usize, self.decode)?;
        let (most, there) = match self.device.memory_limit() {
            Some(limit) => (limit, &self.steps[0]),
            None => {
                let total = self.host_plan(Step::default()).total_bytes.unwrap_or(u64::MAX);
                ((model.size.file + BESIDE_FILE).min(total), &self.steps[1])
            }
        };
        let room = most.saturating_sub(bytes_of(there) + RUN_BYTES + inside);
        Ok((room / model.block()?.max(1)).min(model.size.layers() as u64) as usize)
    }

    /// Where the weights of the model, and of the reference, are to be.
    pub(crate) fn residency(&self) -> [Residency; 2] {
        [self.residency, of_reference(self.residency)]
    }

    /// Takes in some samples, and where answers are decoded what is asked for them, with the most tokens that each may answer, and cuts
    /// them into runs that are answered together. Errors where there is not enough memory for one.
    pub(crate) fn batch(
        &mut self,
        sequences: &[Sequence],
        prompts: &[Sequence],
        most_new: &[usize],
    ) -> Result<Vec<Range<usize>>> {
        let kept: u64 = sequences.iter().map(Process::data_of).sum();
        let first = sequences.iter().position(|sequence| !sequence.images.is_empty());
        if let (Some(first), None) = (first, self.levels) {
            self.levels = Some(self.models[0].levels(&sequences[first..=first])? as u64);
        }
        let runs = chunks(sequences.iter().zip(most_new).map(|(s, &new)| self.lasting(s, new)), RUN_BYTES);
        for run in &runs {
            let own = &sequences[run.clone()];
            // What the reference is asked has its images once more; before that, reading them left about as much free in the threads.
            let data = kept + own.iter().map(Process::data_of).sum::<u64>();
            // All of the model's, which are there while the reference is asked.
            let logits = F32 * own.iter().map(|s| s.answer.len() as u64).sum::<u64>();
            let mut steps = Vec::new();
            for (i, model) in self.models.iter().enumerate() {
                let decoded = if self.decode && i == 0 { run.clone() } else { 0..0 };
                let (prompts, limits) = (&prompts[decoded.clone()], &most_new[decoded]);
                let (moments, work) = model.count(&Run { whole: own, prompts, limits })?;
                let before = if i == 0 { 0 } else { logits * model.size.vocab() };
                steps.extend(moments.iter().map(|moment| self.step(i, moment, [data, before])));
                self.load = self.load + work;
            }
            self.samples += own.len();
            self.add(steps)?;
        }
        Ok(runs)
    }

    pub(crate) fn plan(self) -> EvaluationPlan {
        let [device, host] = self.steps.clone();
        EvaluationPlan {
            samples: self.samples,
            weights: self.residency,
            host: self.host_plan(host),
            device: (!self.device.is_host()).then(|| StagePlan::new(Stage::Evaluate, device)),
            load: self.load,
        }
    }

    fn host_plan(&self, step: Step) -> HostPlan {
        let data = entry("program, tokenizer and questions, at most", self.process.peak);
        let data = StagePlan::new(Stage::Data, ("reading data".into(), vec![data]));
        HostPlan::new(vec![data, StagePlan::new(Stage::Evaluate, step)], &self.process)
    }

    /// Bytes of a sample that last from pass to pass, about.
    fn lasting(&self, sequence: &Sequence, new: usize) -> u64 {
        let (device, size) = (&self.device, &self.models[0].size);
        let attention = size.config.decoder.attention;
        let tokens = sequence.tokens.len() as u64;
        let cached = if self.decode { tokens + new as u64 } else { 0 };
        let key = 2 * size.layers() as u64 * (attention.kv_heads * attention.head_dim) as u64;
        let caches = (device.model_bytes(cached * key) as f64 * CACHE_ROOM) as u64;
        let streams = tokens * (device.model_bytes(size.hidden()) + F32 * attention.head_dim as u64);
        let features = (1 + self.levels.unwrap_or(0)) * tokens;
        let logits = sequence.answer.len() as u64 * size.vocab() * F32;
        caches + streams + device.model_bytes(features * size.hidden()) + logits * self.models.len() as u64
    }

    /// Counts what is there and what is read before there are samples.
    fn start(&mut self) -> Result<()> {
        let mut steps = Vec::new();
        for (i, model) in self.models.iter().enumerate() {
            let [of_tower, _, of_head] = model.size.mapped;
            let (name, tower, values, mapped) = match self.residency {
                Residency::Resident => ("loading", 0, model.size.vocab() * model.size.hidden(), of_head),
                Residency::Streamed { .. } => ("loading the vision tower", model.tower()?, 0, of_tower),
            };
            let held = vec![entry("weights", self.weights()), entry("vision tower", tower)];
            let mapped = entry("the largest tensor on its way", self.device.loading_bytes(values, mapped));
            steps.push((name, held, vec![self.held_by_process(), mapped]));
            let moments = model.at_least(self.decode && i == 0)?;
            steps.extend(moments.iter().map(|moment| self.step(i, moment, [0, 0])));
        }
        self.add(steps)
    }

    /// Takes in steps with what they hold on the device, and on the host. Errors where that is more than there is.
    fn add(&mut self, steps: Vec<(&'static str, Vec<Entry>, Vec<Entry>)>) -> Result<()> {
        let mut found = self.steps.clone();
        for (name, device, host) in steps {
            let (device, host) = match self.device.is_host() {
                true => (Vec::new(), [host, device].concat()),
                false => (device, host),
            };
            for (worst, entries) in found.iter_mut().zip([device, host]) {
                let step = (name.to_owned(), entries);
                if bytes_of(&step) > bytes_of(worst) {
                    *worst = step;
                }
            }
        }
        let larger = bytes_of(&found[1]) > bytes_of(&self.steps[1]);
        self.steps = found;
        if let Some(limit) = self.device.memory_limit() {
            let (step, entries) = &self.steps[0];
            ensure!(
                bytes_of(&self.steps[0]) <= limit,
                "the evaluation does not fit into {} of GPU memory: {step} takes {} ({}); allow more with --max-gpu-memory where the \
                 GPU has it, or evaluate on the CPU",
                human_bytes(limit),
                human_bytes(bytes_of(&self.steps[0])),
                told(entries)
            );
        }
        if larger {
            let remedy = "smaller images (--max-pixels) or shorter samples take less";
            self.host_plan(self.steps[1].clone()).check("the evaluation", remedy)?;
        }
        Ok(())
    }

    fn held_by_process(&self) -> Entry {
        entry("program, tokenizer and questions", self.process.held + self.models.len() as u64 * KEPT_BYTES)
    }

    /// What a step of a model holds on the device, and on the host beside `data` and `logits` from before.
    fn step(&self, i: usize, moment: &Moment, [data, before]: [u64; 2]) -> (&'static str, Vec<Entry>, Vec<Entry>) {
        let (model, streamed) = (&self.models[i], self.residency != Residency::Resident);
        let size = &model.size;
        // Those of the other model are there as well.
        let others = self.weights() - model.weights();
        let mut held = moment.held.clone();
        match held.iter_mut().find(|entry| entry.name == "weights") {
            Some(weights) => weights.bytes += others,
            None => held.push(entry("weights", others)),
        }
        let mut host = vec![self.held_by_process(), entry("images of some samples", data)];
        let name = match moment.at {
            At::Images => {
                host.push(entry("logits", before));
                host.push(entry("patches of a chunk", moment.on_host));
                "encoding images"
            }
            At::Block => {
                host.push(entry("logits", before));
                if streamed {
                    let mapped = size.mapped[1] + (size.layer as f64 * size.unpacking) as u64;
                    host.push(entry("a layer on its way", self.device.loading_bytes(size.layer, mapped)));
                }
                "a block"
            }
            At::Head => {
                host.push(entry("logits", before + moment.on_host));
                if streamed {
                    let rows = (HEAD_ROWS as u64).min(size.vocab());
                    let mapped = rows * size.head_row;
                    host.push(entry("rows on their way", self.device.loading_bytes(rows * size.hidden(), mapped)));
                }
                "logits"
            }
        };
        (name, held, host)
    }
}

/// The model, and the reference where there is one, with their weights where the former's are to be.
fn models(device: &Counting, sizes: &[ModelSize], residency: Residency) -> Result<Vec<CountedModel>> {
    let residencies = [residency, of_reference(residency)];
    sizes.iter().zip(residencies).map(|(size, residency)| CountedModel::load(device, size.clone(), residency)).collect()
}

/// Where the weights of a reference are beside a model's.
fn of_reference(residency: Residency) -> Residency {
    match residency {
        Residency::Resident => Residency::Resident,
        Residency::Streamed { .. } => Residency::Streamed { held: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::device::cpu::Cpu;
    use crate::model::families;
    use crate::tensor::Float;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    /// A small model whose vision tower has about so many values, by its config.json: weights are not looked at.
    fn model(tower: u64) -> ModelSize {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model/flat-tied-bf16");
        let work = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(folder.join(file), work.path().join(file)).unwrap();
        }
        let size = |ratio: u64| {
            let mut config: serde_json::Value =
                serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
            config["vision_config"]["mlp_ratio"] = ratio.into();
            fs::write(work.path().join("config.json"), config.to_string()).unwrap();
            let checkpoint = Arc::new(Checkpoint::open(work.path()).unwrap());
            let config = families::of::<Cpu>(&checkpoint).unwrap().config(&checkpoint).unwrap();
            ModelSize::of(&checkpoint, &config, None).unwrap()
        };
        let bytes = |ratio: u64| {
            let device = Counting::plain(Float::Bf16);
            CountedModel::load(&device, size(ratio), Residency::Resident).unwrap().tower().unwrap()
        };
        // A straight line in the ratio.
        let (first, step) = (bytes(1), bytes(2) - bytes(1));
        size(1 + ((2 * tower).saturating_sub(first) + step / 2) / step)
    }

    fn message(planner: Result<Planner>) -> String {
        planner.err().map_or_else(|| "no error".into(), |error| format!("{error:#}"))
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_numbers() {
        // 4 TB: no machine that runs this has them.
        let said = message(Planner::new(Counting::of(&Cpu), model(1 << 40), None, true));
        for part in ["the evaluation does not fit into the ", "loading the vision tower takes 4.00 TiB", "--max-pixels"]
        {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
        let (small, model) = (Counting::plain(Float::Bf16).limited(1 << 20), model(1 << 20));
        let tower = CountedModel::load(&small, model.clone(), Residency::Resident).unwrap().tower().unwrap();
        assert!(tower.abs_diff(2 << 20) < 1 << 15, "{tower}");
        let said = message(Planner::new(small, model, None, true));
        for part in ["does not fit into 1.00 MiB of GPU memory", &format!("vision tower {}", human_bytes(tower))] {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }

    #[test]
    fn weights_are_held_while_they_leave_room() {
        let residency = |limit, tower| {
            let device = Counting::plain(Float::Bf16).limited(limit);
            Planner::new(device, model(tower), None, true).unwrap()
        };
        assert_eq!(residency(1 << 30, 1 << 20).residency(), [Residency::Resident; 2]);
        // Half as much again must be free, or else room for what is answered together.
        let streamed = |held| [Residency::Streamed { held }, Residency::Streamed { held: 0 }];
        assert_eq!(residency(7 << 20, 3 << 20).residency(), streamed(0));
        assert_eq!(residency(11 << 28, 1 << 30).residency(), streamed(2));
    }
}
