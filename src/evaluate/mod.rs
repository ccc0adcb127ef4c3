//! Evaluation: greedy decoding, log-likelihood, divergence, metrics.

pub mod generate;
pub mod likelihood;
pub mod metrics;
mod report;

pub use report::{Answer, Evaluation, GroupResult, SampleResult};

use crate::calibration::dataset::{self, Conversation};
use crate::calibration::sequence::{Sequence, SequenceBuilder};
use crate::checkpoint::Checkpoint;
use crate::device::ModelOps;
use crate::model::families::{self, PixelLimits};
use crate::model::language_model::LanguageModel;
use crate::quantize::report::{Observer, Stage, StageClock};
use crate::tensor::Matrix;
use anyhow::{Context, Result, ensure};
use metrics::Metric;

use std::ops::Range;
use std::path::{Path, PathBuf};

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
    /// Most tokens of an answer, where the sample says nothing.
    pub max_new_tokens: usize,
    /// Overrides of the checkpoint's image sizes.
    pub pixel_limits: PixelLimits,
}

impl EvaluationSettings {
    /// All samples, no reference, the checkpoint's own image sizes, answers of at most 64 tokens.
    pub fn new(model: PathBuf, data: PathBuf) -> Self {
        Self {
            model,
            data,
            image_root: None,
            reference: None,
            limit: None,
            max_new_tokens: 64,
            pixel_limits: PixelLimits::default(),
        }
    }
}

/// A model with what feeds it.
struct Evaluated<D: ModelOps> {
    model: LanguageModel<D>,
    builder: SequenceBuilder,
}

impl<D: ModelOps> Evaluated<D> {
    fn load(device: &D, folder: &Path, limits: PixelLimits) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let vision = families::of::<D>(&checkpoint)?.vision_input(&checkpoint, limits)?;
        let builder = SequenceBuilder::new(folder, vision)?;
        Ok(Self { model: LanguageModel::load(device, &checkpoint)?, builder })
    }
}

/// Decodes and scores every sample.
pub fn run<D: ModelOps>(device: &D, settings: &EvaluationSettings, observer: &mut dyn Observer) -> Result<Evaluation> {
    ensure!(settings.limit != Some(0), "a limit of 0 samples leaves nothing to evaluate");
    let mut conversations = dataset::read(&settings.data, settings.image_root.as_deref())?;
    conversations.truncate(settings.limit.unwrap_or(usize::MAX));
    let evaluated = Evaluated::load(device, &settings.model, settings.pixel_limits)
        .with_context(|| format!("cannot evaluate {}", settings.model.display()))?;
    let reference = settings
        .reference
        .as_deref()
        .map(|folder| {
            Evaluated::load(device, folder, settings.pixel_limits)
                .with_context(|| format!("cannot use {} as the reference", folder.display()))
        })
        .transpose()?;

    let clock = StageClock::start(Stage::Evaluate, conversations.len() as u64, observer);
    let mut samples = Vec::with_capacity(conversations.len());
    for batch in conversations.chunks(BATCH) {
        samples.extend(score_batch(device, &evaluated, reference.as_ref(), batch, settings)?);
        observer.stage_advanced(Stage::Evaluate, samples.len() as u64, "");
    }
    clock.finish(observer);
    Ok(Evaluation::new(samples))
}

fn score_batch<D: ModelOps>(
    device: &D,
    evaluated: &Evaluated<D>,
    reference: Option<&Evaluated<D>>,
    batch: &[Conversation],
    settings: &EvaluationSettings,
) -> Result<Vec<SampleResult>> {
    let Evaluated { model, builder } = evaluated;
    let whole: Vec<Sequence> = batch.iter().map(|c| builder.build(c)).collect::<Result<_>>()?;
    let prompts: Vec<Sequence> = batch.iter().map(|c| builder.prompt(c)).collect::<Result<_>>()?;
    let (whole_refs, prompt_refs): (Vec<_>, Vec<_>) = (whole.iter().collect(), prompts.iter().collect());

    // A prompt has the images of its whole conversation: the vision tower runs once for both.
    let features = model.embedder().image_features(device, &prompt_refs)?;
    let limits: Vec<usize> = batch.iter().map(|c| c.max_new_tokens.unwrap_or(settings.max_new_tokens)).collect();
    let decoded = generate::greedy(device, model, &prompt_refs, features.as_ref(), &limits, builder.end_tokens())?;
    let logits = likelihood::answer_logits(device, model, &whole_refs, features.as_ref())?;
    let reference_logits = reference
        .map(|reference| {
            let sequences: Vec<Sequence> = batch.iter().map(|c| reference.builder.build(c)).collect::<Result<_>>()?;
            for (ours, theirs) in whole.iter().zip(&sequences) {
                ensure!(
                    ours.tokens == theirs.tokens,
                    "sample {}: the reference model's tokenizer or template gives other tokens than the model's",
                    ours.id
                );
            }
            let sequences: Vec<&Sequence> = sequences.iter().collect();
            let features = reference.model.embedder().image_features(device, &sequences)?;
            likelihood::answer_logits(device, &reference.model, &sequences, features.as_ref())
        })
        .transpose()?;

    let mut first_row = 0;
    batch
        .iter()
        .zip(&whole)
        .zip(decoded)
        .map(|((conversation, sequence), tokens)| {
            let answer_tokens = sequence.answer.len();
            let rows = first_row..first_row + answer_tokens;
            first_row = rows.end;
            let own = slice(&logits, rows.clone())?;
            let kl = match &reference_logits {
                Some(reference) => Some(likelihood::divergence(&slice(reference, rows)?, &own)?),
                None => None,
            };
            let nll = likelihood::negative_log_likelihood(&own, &sequence.tokens[sequence.answer.clone()]);
            let answer = builder.decode(&tokens)?.trim().to_owned();
            let score = score_answer(conversation, &answer)?;
            let (id, group) = (conversation.id.clone(), conversation.group.clone());
            Ok(SampleResult { id, group, answer, score, answer_tokens, nll, kl })
        })
        .collect()
}

fn slice(matrix: &Matrix, rows: Range<usize>) -> Result<Matrix> {
    let cols = matrix.cols();
    Matrix::new(rows.len(), cols, matrix.data()[rows.start * cols..rows.end * cols].to_vec())
}

fn score_answer(conversation: &Conversation, text: &str) -> Result<f64> {
    let metric: Metric = conversation.metric.as_deref().unwrap_or("exact").parse()?;
    let expected = match conversation.answers.is_empty() {
        false => conversation.answers.clone(),
        true => vec![conversation.answer().with_context(|| {
            format!("{}: no assistant turn and no \"answers\" to score against", conversation.origin)
        })?],
    };
    Ok(metric.score(text, &expected))
}
