//! Evaluation: greedy decoding, log-likelihood, divergence, metrics.

mod comparison;
pub mod generate;
pub mod likelihood;
pub mod metrics;
pub mod presets;
mod report;

pub use comparison::{ComparedAnswer, ComparedScores, Comparison};
pub use report::{Answer, Conditions, Evaluation, GroupResult, SampleResult};

use crate::calibration::dataset::{self, Conversation, Part};
use crate::calibration::sequence::{Sequence, SequenceBuilder};
use crate::calibration::template::TemplateChoice;
use crate::checkpoint::Checkpoint;
use crate::device::ModelOps;
use crate::model::families::{self, Features, ImageOptions};
use crate::model::language_model::LanguageModel;
use crate::progress::{Observer, Stage, StageClock};
use crate::tensor::Matrix;
use anyhow::{Context, Result, ensure};
use metrics::Metric;
use presets::Preset;
use rayon::prelude::*;

use std::ops::Range;
use std::path::{Path, PathBuf};

/// Most tokens of an answer, where nobody says.
const MAX_NEW_TOKENS: usize = 64;

/// Samples that are decoded together.
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

/// A model with what feeds it.
struct Evaluated<D: ModelOps> {
    answers_stop: bool,
    model: LanguageModel<D>,
    builder: SequenceBuilder,
}

impl<D: ModelOps> Evaluated<D> {
    /// The model in `folder`, fed as `settings` say.
    fn load(device: &D, folder: &Path, settings: &EvaluationSettings) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let family = families::of::<D>(&checkpoint)?;
        family.config(&checkpoint)?.remarks(&checkpoint).iter().for_each(|remark| log::warn!("{remark}"));
        let vision = family.vision_input(&checkpoint, settings.image_options)?;
        let builder = SequenceBuilder::with_template(folder, vision, &settings.chat_template)?;
        Ok(Self { answers_stop: family.answers_stop(), model: LanguageModel::load(device, &checkpoint)?, builder })
    }
}

/// Where the distributions come from that the divergence is measured from.
enum Reference<'a, D: ModelOps> {
    None,
    Model(Box<Evaluated<D>>),
    /// Of every sample, `[answer tokens, vocab]`.
    Kept(&'a [Matrix]),
}

/// Decodes and scores every sample.
pub fn run<D: ModelOps>(device: &D, settings: &EvaluationSettings, observer: &mut dyn Observer) -> Result<Evaluation> {
    let reference = match settings.reference.as_deref() {
        None => Reference::None,
        Some(folder) => Reference::Model(Box::new(
            Evaluated::load(device, folder, settings)
                .with_context(|| format!("cannot use {} as the reference", folder.display()))?,
        )),
    };
    score(device, settings, &reference, observer)
}

/// Refuses what [`run`] would refuse of the data after a model was loaded, but for what it answers: reads the data, and
/// builds the sequences with the checkpoint's tokenizer, template and image processor, which leaves the weights alone.
/// Returns the number of samples.
pub fn check<D: ModelOps>(settings: &EvaluationSettings) -> Result<usize> {
    let conversations = read(settings)?;
    conversations.iter().try_for_each(|conversation| rule(conversation).map(drop))?;
    let checkpoint = Checkpoint::open(&settings.model)?;
    let family = families::of::<D>(&checkpoint)?;
    family.config(&checkpoint)?.head_name().with_context(|| checkpoint.folder().display().to_string())?;
    let vision = family.vision_input(&checkpoint, settings.image_options)?;
    let builder = SequenceBuilder::with_template(checkpoint.folder(), vision, &settings.chat_template)?;
    let check =
        |conversation| builder.build_answered(conversation).and_then(|_| builder.prompt(conversation)).map(drop);
    let checked: Vec<Result<()>> = conversations.par_iter().map(check).collect();
    checked.into_iter().collect::<Result<()>>()?;
    Ok(conversations.len())
}

/// As [`run`], against logits that [`answer_logits`] found before: one pass of the reference model serves many runs.
pub fn run_against<D: ModelOps>(
    device: &D,
    settings: &EvaluationSettings,
    reference: &[Matrix],
    observer: &mut dyn Observer,
) -> Result<Evaluation> {
    score(device, settings, &Reference::Kept(reference), observer)
}

/// Logits of `settings.model` that predict the answer of every sample, `[answer tokens, vocab]` each. All are kept in
/// memory.
pub fn answer_logits<D: ModelOps>(device: &D, settings: &EvaluationSettings) -> Result<Vec<Matrix>> {
    let conversations = read(settings)?;
    let evaluated = Evaluated::load(device, &settings.model, settings)?;
    let mut logits = Vec::with_capacity(conversations.len());
    for batch in conversations.chunks(BATCH) {
        let sequences = evaluated.build(batch)?;
        logits.extend(evaluated.answer_logits(device, &sequences, None)?);
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

fn score<D: ModelOps>(
    device: &D,
    settings: &EvaluationSettings,
    reference: &Reference<'_, D>,
    observer: &mut dyn Observer,
) -> Result<Evaluation> {
    let conversations = read(settings)?;
    let rules: Vec<(Metric, Vec<String>)> = conversations.iter().map(rule).collect::<Result<_>>()?;
    if let Reference::Kept(kept) = reference {
        ensure!(kept.len() == conversations.len(), "{} reference answers for {} samples", kept.len(), rules.len());
    }
    let evaluated = Evaluated::load(device, &settings.model, settings)
        .with_context(|| format!("cannot evaluate {}", settings.model.display()))?;
    let clock = StageClock::start(Stage::Evaluate, conversations.len() as u64, observer);
    let mut samples = Vec::with_capacity(conversations.len());
    for (batch, rules) in conversations.chunks(BATCH).zip(rules.chunks(BATCH)) {
        let kept;
        let reference = match reference {
            Reference::Kept(all) => {
                kept = Reference::Kept(&all[samples.len()..samples.len() + batch.len()]);
                &kept
            }
            Reference::Model(_) | Reference::None => reference,
        };
        samples.extend(score_batch(device, &evaluated, reference, batch, rules, settings)?);
        observer.stage_advanced(Stage::Evaluate, samples.len() as u64, "");
    }
    clock.finish(observer);
    let conditions = Conditions::new(settings.preset, evaluated.builder.pixel_limits());
    Ok(Evaluation::under(conditions, samples))
}

/// How a sample is scored, and its right answers.
fn rule(conversation: &Conversation) -> Result<(Metric, Vec<String>)> {
    let metric: Metric = conversation.metric.as_deref().unwrap_or("exact").parse()?;
    let turn = conversation.answer();
    let answers = metric.right_answers(turn.as_deref(), &conversation.answers);
    metric.check_answers(&answers).with_context(|| conversation.origin.clone())?;
    Ok((metric, answers.into_iter().map(str::to_owned).collect()))
}

impl<D: ModelOps> Evaluated<D> {
    fn build(&self, batch: &[Conversation]) -> Result<Vec<Sequence>> {
        batch.par_iter().map(|conversation| self.builder.build_answered(conversation)).collect()
    }

    /// Logits of every sequence's answer, `[answer tokens, vocab]`. `features`: those of the sequences' images, computed
    /// here when absent.
    fn answer_logits(
        &self,
        device: &D,
        sequences: &[Sequence],
        features: Option<&Features<D::Tensor>>,
    ) -> Result<Vec<Matrix>> {
        let references: Vec<&Sequence> = sequences.iter().collect();
        let own = match features {
            Some(_) => None,
            None => self.model.embedder().image_features(device, &references)?,
        };
        let logits = likelihood::answer_logits(device, &self.model, &references, features.or(own.as_ref()))?;
        let mut first = 0;
        sequences
            .iter()
            .map(|sequence| {
                let rows = first..first + sequence.answer.len();
                first = rows.end;
                slice(&logits, rows)
            })
            .collect()
    }
}

fn score_batch<D: ModelOps>(
    device: &D,
    evaluated: &Evaluated<D>,
    reference: &Reference<'_, D>,
    batch: &[Conversation],
    rules: &[(Metric, Vec<String>)],
    settings: &EvaluationSettings,
) -> Result<Vec<SampleResult>> {
    let Evaluated { answers_stop, model, builder } = evaluated;
    let whole = evaluated.build(batch)?;
    // A prompt has the images of its whole conversation: the vision tower runs once for both.
    let features = model.embedder().image_features(device, &whole.iter().collect::<Vec<_>>())?;
    let which = || format!("samples {} to {}", batch[0].id, batch[batch.len() - 1].id);
    let decoded = if settings.decode {
        let prompts: Vec<Sequence> = batch.par_iter().map(|c| builder.prompt(c)).collect::<Result<_>>()?;
        let prompts: Vec<&Sequence> = prompts.iter().collect();
        let limits: Vec<usize> = batch.iter().map(|c| settings.max_new_tokens(c)).collect();
        generate::greedy(device, model, &prompts, features.as_ref(), &limits, builder.end_tokens())
            .with_context(which)?
    } else {
        vec![Vec::new(); batch.len()]
    };
    let logits = evaluated.answer_logits(device, &whole, features.as_ref()).with_context(which)?;
    let computed;
    let reference: Option<&[Matrix]> = match reference {
        Reference::None => None,
        Reference::Kept(kept) => Some(kept),
        Reference::Model(reference) => {
            let sequences = reference.build(batch)?;
            for (ours, theirs) in whole.iter().zip(&sequences) {
                ensure!(
                    ours.tokens == theirs.tokens,
                    "sample {}: the reference model's tokenizer or template gives other tokens than the model's",
                    ours.id
                );
            }
            computed = reference.answer_logits(device, &sequences, None)?;
            Some(&computed)
        }
    };

    // Each over the whole vocabulary, for every token of an answer.
    (0..batch.len())
        .into_par_iter()
        .map(|i| {
            let (conversation, sequence, (metric, answers)) = (&batch[i], &whole[i], &rules[i]);
            let kl = reference.map(|reference| likelihood::divergence(&reference[i], &logits[i])).transpose()?;
            let agreeing = reference.map(|reference| likelihood::agreeing(&reference[i], &logits[i]));
            let nll = likelihood::negative_log_likelihood(&logits[i], &sequence.tokens[sequence.answer.clone()]);
            let whole = builder.decode(&decoded[i])?;
            let answer =
                settings.preset.map_or(whole.as_str(), |preset| preset.kept(*answers_stop, &whole)).trim().to_owned();
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
        .collect()
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

fn slice(matrix: &Matrix, rows: Range<usize>) -> Result<Matrix> {
    let cols = matrix.cols();
    Matrix::new(rows.len(), cols, matrix.data()[rows.start * cols..rows.end * cols].to_vec())
}
