//! The evaluation of a checkpoint: its memory planned, its samples answered together, scored, and compared with a reference.

pub use super::devices::{answer_logits, evaluate, plan_comparison, run_against};

use crate::checkpoint::Checkpoint;
use crate::data::dataset::{self, Conversation, Part};
use crate::data::sequence::{Sequence, SequenceBuilder};
use crate::data::template::TemplateChoice;
use crate::device::ModelOps;
use crate::device::counting::Counting;
use crate::evaluate::metrics::Metric;
use crate::evaluate::presets::Preset;
use crate::evaluate::seen::Seen;
use crate::evaluate::{Conditions, Evaluation, SampleResult, generate, likelihood};
use crate::heap;
use crate::model::families::{self, ImageOptions, ModelConfig};
use crate::model::language_model::{LanguageModel, Residency, check_headers};
use crate::parallel::try_map;
use crate::plan::evaluation::{EvaluationPlan, ModelSize, Planner};
use crate::plan::system::status_bytes;
use crate::progress::{Observer, Stage, StageClock};
use crate::tensor::Matrix;
use anyhow::{Context, Result, ensure};

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most tokens of an answer, where nobody says.
const MAX_NEW_TOKENS: usize = 64;

/// Samples that are read together.
const BATCH: usize = 16;

/// What to evaluate, and on what.
#[derive(Clone, Debug)]
pub struct EvaluationSettings {
    /// Checkpoint folder: float, or anything that this crate writes.
    pub model: PathBuf,
    /// Conversations; the last assistant turn of each is its answer.
    pub data: PathBuf,
    /// Where relative image paths start; `None`: the data file's folder.
    pub image_root: Option<PathBuf>,
    /// Checkpoint whose answer distributions the divergence is measured from.
    pub reference: Option<PathBuf>,
    /// Only the first so many samples.
    pub limit: Option<usize>,
    /// Benchmark whose questions, limits and metrics the data gets where it says nothing itself.
    pub preset: Option<&'static Preset>,
    /// Whether the model answers, which costs a pass over each question and one more a token. Without, answers are empty
    /// and scores those of empty answers: what remains is what the model makes of the answers that are given.
    pub decode: bool,
    /// Most tokens of an answer, where the sample says nothing; `None`: the preset's, or 64.
    pub max_new_tokens: Option<usize>,
    /// Overrides of the checkpoint's image sizes.
    pub image_options: ImageOptions,
    /// What turns conversations into text.
    pub chat_template: TemplateChoice,
}

impl EvaluationSettings {
    /// All samples, no reference, no preset, the checkpoint's own image sizes, decoded answers of at most 64 tokens.
    pub fn new(model: PathBuf, data: PathBuf) -> Self {
        Self {
            model,
            data,
            image_root: None,
            reference: None,
            limit: None,
            preset: None,
            decode: true,
            max_new_tokens: None,
            image_options: ImageOptions::default(),
            chat_template: TemplateChoice::default(),
        }
    }

    fn max_new_tokens(&self, conversation: &Conversation) -> usize {
        let preset = self.preset.map(|preset| preset.max_new_tokens);
        conversation.max_new_tokens.or(self.max_new_tokens).or(preset).unwrap_or(MAX_NEW_TOKENS)
    }
}

/// A checkpoint with what feeds it, before a weight is read.
struct Opened {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    answers_stop: bool,
    builder: SequenceBuilder,
}

impl Opened {
    /// The checkpoint in `folder`, fed as `settings` say. Errors for a tensor that is missing, or of another shape or type, for a
    /// missing head, and for what the tokenizer, template or image processor lack.
    fn read<D: ModelOps>(folder: &Path, settings: &EvaluationSettings) -> Result<Self> {
        let checkpoint = Arc::new(Checkpoint::open(folder)?);
        let family = families::of::<D>(&checkpoint)?;
        let config = family.config(&checkpoint)?;
        config.head_name().with_context(|| folder.display().to_string())?;
        let vision = family.vision_input(&checkpoint, settings.image_options)?;
        let builder = SequenceBuilder::with_template(folder, vision, &settings.chat_template)?;
        check_headers::<D>(&checkpoint, &config, true)?;
        Ok(Self { checkpoint, config, answers_stop: family.answers_stop(), builder })
    }

    /// `bits`: as if its layers were stored so.
    fn size(&self, bits: Option<u32>) -> Result<ModelSize> {
        ModelSize::of(&self.checkpoint, &self.config, bits)
    }

    fn build(&self, batch: &[Conversation]) -> Result<Vec<Sequence>> {
        try_map(batch.len(), |i| self.builder.build_answered(&batch[i]))
    }

    /// What is asked, by the sequences with their answers.
    fn prompts(&self, batch: &[Conversation], whole: &[Sequence]) -> Result<Vec<Sequence>> {
        try_map(whole.len(), |i| self.builder.prompt_of(&batch[i], &whole[i]))
    }

    fn load<D: ModelOps>(self, device: &D, residency: Residency) -> Result<Evaluated<D>> {
        self.config.remarks(&self.checkpoint).iter().for_each(|remark| log::warn!("{remark}"));
        Ok(Evaluated { model: LanguageModel::load(device, &self.checkpoint, residency)?, opened: self })
    }
}

/// A model that answers.
struct Evaluated<D: ModelOps> {
    opened: Opened,
    model: LanguageModel<D>,
}

/// Where the distributions come from that the divergence is measured from.
enum Reference<'a, D: ModelOps> {
    None,
    Model(Box<Evaluated<D>>),
    /// Logits of every sample, `[answer tokens, vocab]`.
    Kept(&'a [Matrix]),
}

/// Plans both evaluations, see [`plan_comparison`](super::devices::plan_comparison).
pub(super) fn plans_of_comparison<D: ModelOps>(
    device: &D,
    settings: &EvaluationSettings,
    bits: u32,
) -> Result<[EvaluationPlan; 2]> {
    let conversations = read(settings)?;
    conversations.iter().try_for_each(|conversation| rule(conversation).map(drop))?;
    let opened = Opened::read::<D>(&settings.model, settings)?;
    let (float, quantized) = (opened.size(None)?, opened.size(Some(bits))?);
    let device = Counting::of(device);
    let mut planners = [
        Planner::new(device.clone(), float.clone(), None, settings.decode)?,
        Planner::new(device, quantized, Some(float), settings.decode)?,
    ];
    for batch in conversations.chunks(BATCH) {
        let whole = opened.build(batch)?;
        let prompts = opened.prompts(batch, &whole)?;
        let limits: Vec<usize> = batch.iter().map(|c| settings.max_new_tokens(c)).collect();
        for planner in &mut planners {
            planner.batch(&whole, &prompts, &limits)?;
        }
    }
    Ok(planners.map(Planner::plan))
}

/// Logits of every answer, see [`answer_logits`](super::devices::answer_logits).
pub(super) fn logits_of_answers<D: ModelOps>(device: &D, settings: &EvaluationSettings) -> Result<Vec<Matrix>> {
    let conversations = read(settings)?;
    let opened = Opened::read::<D>(&settings.model, settings)?;
    let planner = Planner::new(Counting::of(device), opened.size(None)?, None, false)?;
    let [residency, _] = planner.residency();
    let evaluated = opened.load(device, residency)?;
    let mut logits = Vec::with_capacity(conversations.len());
    for batch in conversations.chunks(BATCH) {
        let sequences = evaluated.opened.build(batch)?;
        logits.extend(evaluated.answer_logits(device, &sequences, &evaluated.see(device, &sequences)?)?);
    }
    Ok(logits)
}

fn read(settings: &EvaluationSettings) -> Result<Vec<Conversation>> {
    ensure!(settings.limit != Some(0), "a limit of 0 samples leaves nothing to evaluate");
    let prepare = |row| match settings.preset {
        Some(preset) => preset.prepare(row),
        None => Ok(row),
    };
    let reads = |column: &str| settings.preset.is_some() && Preset::reads(column);
    let mut conversations = dataset::read_with(&settings.data, settings.image_root.as_deref(), &reads, &prepare)?;
    conversations.truncate(settings.limit.unwrap_or(usize::MAX));
    Ok(conversations)
}

/// Decodes and scores every sample, against the reference that the settings name or against logits that were `kept`.
pub(super) fn score<D: ModelOps>(
    device: &D,
    settings: &EvaluationSettings,
    kept: Option<&[Matrix]>,
    observer: &mut dyn Observer,
) -> Result<Evaluation> {
    let conversations = read(settings)?;
    let rules: Vec<(Metric, Vec<String>)> = conversations.iter().map(rule).collect::<Result<_>>()?;
    let cannot_refer = |folder: &Path| format!("cannot use {} as the reference", folder.display());
    let cannot_evaluate = || format!("cannot evaluate {}", settings.model.display());
    let reference = settings.reference.as_deref().filter(|_| kept.is_none());
    let reference = reference
        .map(|folder| Opened::read::<D>(folder, settings).with_context(|| cannot_refer(folder)))
        .transpose()?;
    let model = Opened::read::<D>(&settings.model, settings).with_context(cannot_evaluate)?;
    let size = reference.as_ref().map(|reference| reference.size(None)).transpose()?;
    let mut planner = Planner::new(Counting::of(device), model.size(None)?, size, settings.decode)?;
    let [residency, of_reference] = planner.residency();
    let reference = match (kept, reference) {
        (Some(kept), _) => {
            ensure!(kept.len() == conversations.len(), "{} reference answers for {} samples", kept.len(), rules.len());
            Reference::Kept(kept)
        }
        (None, None) => Reference::None,
        (None, Some(opened)) => {
            let folder = opened.checkpoint.folder().to_path_buf();
            let loaded = opened.load(device, of_reference).with_context(|| cannot_refer(&folder))?;
            Reference::Model(Box::new(loaded))
        }
    };
    let evaluated = model.load(device, residency).with_context(cannot_evaluate)?;
    heap::trim();
    let clock = StageClock::start(Stage::Evaluate, conversations.len() as u64, observer);
    let mut samples = Vec::with_capacity(conversations.len());
    for batch in conversations.chunks(BATCH) {
        let whole = evaluated.opened.build(batch)?;
        let limits: Vec<usize> = batch.iter().map(|c| settings.max_new_tokens(c)).collect();
        if let Reference::Model(reference) = &reference {
            // The plan sends the model's sequences through the reference.
            let one = whole.iter().position(|sequence| !sequence.images.is_empty()).unwrap_or(0);
            same_tokens(&whole[one..=one], &reference.opened.build(&batch[one..=one])?)?;
        }
        let prompts = if settings.decode { evaluated.opened.prompts(batch, &whole)? } else { Vec::new() };
        for run in planner.batch(&whole, &prompts, &limits)? {
            let first = samples.len();
            let asked = Asked {
                conversations: &batch[run.clone()],
                whole: &whole[run.clone()],
                prompts: if settings.decode { &prompts[run.clone()] } else { &[] },
                limits: &limits[run.clone()],
                rules: &rules[first..][..run.len()],
                settings,
            };
            let own;
            let reference = match &reference {
                Reference::Kept(all) => {
                    own = Reference::Kept(&all[first..][..run.len()]);
                    &own
                }
                Reference::Model(_) | Reference::None => &reference,
            };
            samples.extend(asked.score(device, &evaluated, reference)?);
            observer.stage_advanced(Stage::Evaluate, samples.len() as u64, "");
        }
    }
    clock.finish(observer);
    let plan = planner.plan();
    plan.lines().iter().for_each(|line| log::info!("{line}"));
    if let Some(peak) = status_bytes("VmHWM") {
        log::info!("peak memory: {peak} bytes; {} bytes were planned", plan.host.bytes);
    }
    let conditions = Conditions::new(settings.preset, evaluated.opened.builder.pixel_limits());
    Ok(Evaluation::under(conditions, samples))
}

/// How a sample is scored, and its right answers.
fn rule(conversation: &Conversation) -> Result<(Metric, Vec<String>)> {
    let metric = conversation.metric.unwrap_or_default();
    let turn = conversation.answer();
    let answers = metric.right_answers(turn.as_deref(), &conversation.answers);
    metric.check_answers(&answers).with_context(|| conversation.origin.clone())?;
    Ok((metric, answers.into_iter().map(str::to_owned).collect()))
}

impl<D: ModelOps> Evaluated<D> {
    /// Looks at the images of some sequences.
    fn see(&self, device: &D, sequences: &[Sequence]) -> Result<Seen<D::Tensor>> {
        Seen::of(device, self.model.embedder(), sequences)
    }

    /// Logits of every sequence's answer, `[answer tokens, vocab]`.
    fn answer_logits(&self, device: &D, sequences: &[Sequence], seen: &Seen<D::Tensor>) -> Result<Vec<Matrix>> {
        let streams = seen.embed(device, self.model.embedder(), sequences)?;
        likelihood::answer_logits(device, &self.model, sequences, streams)
    }
}

/// Samples that are answered together.
struct Asked<'a> {
    conversations: &'a [Conversation],
    /// Samples with their right answers.
    whole: &'a [Sequence],
    /// What is asked, without images; none where nothing is decoded.
    prompts: &'a [Sequence],
    /// Most tokens of an answer.
    limits: &'a [usize],
    rules: &'a [(Metric, Vec<String>)],
    settings: &'a EvaluationSettings,
}

impl Asked<'_> {
    fn score<D: ModelOps>(
        &self,
        device: &D,
        evaluated: &Evaluated<D>,
        reference: &Reference<'_, D>,
    ) -> Result<Vec<SampleResult>> {
        let Self { conversations, whole, prompts, limits, rules, settings } = *self;
        let Opened { builder, answers_stop, .. } = &evaluated.opened;
        // A prompt has the images of its whole conversation: the vision tower runs once for both.
        let seen = evaluated.see(device, whole)?;
        heap::trim();
        let which = || format!("samples {} to {}", whole[0].id, whole[whole.len() - 1].id);
        let decoded = if settings.decode {
            let streams = seen.embed(device, evaluated.model.embedder(), prompts)?;
            let endings = generate::Endings { limits, tokens: builder.end_tokens() };
            let answers = generate::greedy(device, &evaluated.model, prompts, streams, endings);
            heap::trim();
            answers.with_context(which)?
        } else {
            vec![Vec::new(); whole.len()]
        };
        let logits = evaluated.answer_logits(device, whole, &seen).with_context(which)?;
        drop(seen);
        heap::trim();
        let computed;
        let reference: Option<&[Matrix]> = match reference {
            Reference::None => None,
            Reference::Kept(kept) => Some(kept),
            Reference::Model(reference) => {
                let sequences = reference.opened.build(conversations)?;
                same_tokens(whole, &sequences)?;
                computed = reference.answer_logits(device, &sequences, &reference.see(device, &sequences)?)?;
                Some(&computed)
            }
        };

        // Each over the whole vocabulary, for every token of an answer.
        try_map(whole.len(), |i| {
            let (conversation, sequence, (metric, answers)) = (&conversations[i], &whole[i], &rules[i]);
            let kl = reference.map(|reference| likelihood::divergence(&reference[i], &logits[i])).transpose()?;
            let agreeing = reference.map(|reference| likelihood::agreeing(&reference[i], &logits[i]));
            let nll = likelihood::negative_log_likelihood(&logits[i], &sequence.tokens[sequence.answer.clone()]);
            let said = builder.decode(&decoded[i])?;
            let answer = settings.preset.map_or(said.as_str(), |preset| preset.kept(*answers_stop, &said));
            let answer = answer.trim().to_owned();
            Ok(SampleResult {
                id: conversation.id.clone(),
                group: conversation.group.clone(),
                question: last_turn(conversation),
                expected: answers.clone(),
                score: metric.score(&answer, answers),
                answer,
                answer_tokens: sequence.answer.len(),
                nll,
                kl,
                agreeing,
            })
        })
    }
}

/// Errors where sequences of a model and of its reference differ.
fn same_tokens(ours: &[Sequence], theirs: &[Sequence]) -> Result<()> {
    for (ours, theirs) in ours.iter().zip(theirs) {
        ensure!(
            ours.tokens == theirs.tokens,
            "sample {}: the reference model's tokenizer or template gives other tokens than the model's",
            ours.id
        );
    }
    Ok(())
}

/// The turn that asks for the answer, as text.
fn last_turn(conversation: &Conversation) -> String {
    let Some(turn) = conversation.question().last() else { return String::new() };
    let parts = turn.content.iter().map(|part| match part {
        Part::Text(text) => text.as_str(),
        Part::Image(_) => "[image] ",
    });
    parts.collect::<String>().trim().to_owned()
}
