//! A model that is evaluated on a device that counts: the real code, with one block in the place of all and some rows of the output
//! head in the place of the whole.

use super::size::ModelSize;
use crate::data::sequence::Sequence;
use crate::device::counting::{CountedTensor, Counting, Peak, StandsFor};
use crate::device::{ByKind, Device, ModelOps};
use crate::evaluate::seen::Seen;
use crate::evaluate::{generate, likelihood};
use crate::model::config::DecoderConfig;
use crate::model::decoder::Block;
use crate::model::families::ModelConfig;
use crate::model::labels;
use crate::model::language_model::{Embedder, HEAD_ROWS, LanguageModel, Residency, Stream};
use crate::model::source::Weights;
use crate::plan::{Entry, F32, entry};
use anyhow::Result;

/// What a pass through the blocks makes, or brings to the device.
const IN_A_BLOCK: [&str; 5] = [labels::PASS, labels::CACHE, labels::LOADED, labels::LEVELS, labels::STREAMS];

/// What is made behind them.
const AT_THE_HEAD: [&str; 2] = [labels::ROWS, labels::LOGITS];

/// What an entry of a plan calls all that lasts from block to block.
const LASTING: &str = "samples that are answered together";

/// What an entry of a plan calls all that is made in a block.
const INSIDE: &str = "intermediate results";

/// A kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// The vision tower.
    Images,
    /// A block of the decoder.
    Block,
    /// The output head.
    Head,
}

/// A step at the moment at which most is on the device.
pub(super) struct Moment {
    pub(super) at: At,
    /// What the device holds.
    pub(super) held: Vec<Entry>,
    /// Bytes beside it that the host has: pixels, or logits.
    pub(super) on_host: u64,
}

impl Moment {
    fn of(at: At, peak: &Peak, device: &Counting, on_host: u64) -> Self {
        let mut held: Vec<Entry> = Vec::new();
        for holding in &peak.held {
            let name = match holding.label {
                labels::WEIGHTS | labels::BLOCKS | labels::HEAD => "weights",
                labels::TOWER => "vision tower",
                labels::LOADED => "weights of a block",
                labels::ROWS => "rows of the output head",
                _ if at == At::Images => "features of images on their way",
                labels::FEATURES | labels::STREAMS | labels::CACHE => LASTING,
                labels::LOGITS => "logits of a chunk",
                _ => INSIDE,
            };
            match held.iter_mut().find(|entry| entry.name == name) {
                Some(there) => there.bytes += holding.bytes,
                None => held.push(entry(name, holding.bytes)),
            }
        }
        let kept = Some(device.kept_beside(peak)).filter(|&kept| kept > 0);
        held.extend(kept.map(|kept| entry("work space that threads keep", kept)));
        Self { at, held, on_host }
    }
}

/// Samples that are answered together.
pub(super) struct Run<'a> {
    pub(super) whole: &'a [Sequence],
    /// What is asked for answers of at most so many tokens; none where nothing is decoded.
    pub(super) prompts: &'a [Sequence],
    pub(super) limits: &'a [usize],
}

/// A model on a device that counts.
pub(super) struct CountedModel {
    pub(super) size: ModelSize,
    device: Counting,
    model: LanguageModel<Counting>,
    /// Stands for the blocks that are held where others are not.
    _some: Option<Block<CountedTensor>>,
    resident: bool,
}

impl CountedModel {
    /// A model in the place of one on `device`, weights where `residency` says. Errors as loading does of sizes.
    pub(super) fn load(device: &Counting, size: ModelSize, residency: Residency) -> Result<Self> {
        Self::with_rows(device, size, residency, HEAD_ROWS)
    }

    /// With so many rows in the place of the output head, which are no other than [`HEAD_ROWS`] where weights are streamed.
    fn with_rows(device: &Counting, size: ModelSize, residency: Residency, rows: usize) -> Result<Self> {
        let device = device.afresh();
        let layers = size.layers();
        let (resident, held) = match residency {
            Residency::Resident => (true, layers),
            Residency::Streamed { held } => (false, held.min(layers)),
        };
        let whole = &size.config;
        let vocab = whole.decoder.vocab.min(rows);
        let decoder = DecoderConfig { layers: 1, vocab, ..whole.decoder.clone() };
        let part = ModelConfig { decoder, ..whole.clone() };
        let of = |bytes: f64, work: f64| StandsFor { bytes, work };
        let (blocks, parts) = (layers as f64, whole.decoder.vocab as f64 / vocab as f64);
        let alike = [
            (labels::BLOCKS, of(held as f64, held as f64)),
            (labels::LOADED, of(1.0, (layers - held) as f64)),
            (labels::PASS, of(1.0, blocks)),
            (labels::CACHE, of(blocks, blocks)),
            (labels::HEAD, of(parts, parts)),
            (labels::ROWS, of(1.0, parts)),
            (labels::LOGITS, of(if resident { parts } else { 1.0 }, parts)),
        ];
        alike.into_iter().for_each(|(label, alike)| device.stands_for(label, alike));
        let residency = match residency {
            Residency::Resident => Residency::Resident,
            Residency::Streamed { .. } => Residency::Streamed { held: held / layers },
        };
        let model = LanguageModel::with_config(&device, &size.checkpoint, [&part, whole], residency)?;
        let some = 0 < held && held < layers;
        let some = some.then(|| {
            let _label = device.label(labels::BLOCKS);
            Block::load(&Weights::new(&device, &size.checkpoint), &part.decoder, &part.names, 0)
        });
        Ok(Self { _some: some.transpose()?, device, model, size, resident })
    }

    /// Bytes of weights between passes.
    pub(super) fn weights(&self) -> u64 {
        self.device.alive()
    }

    /// All work so far: until something is asked, that of loading.
    pub(super) fn work(&self) -> ByKind {
        self.device.work()
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> Result<u64> {
        let device = self.device.afresh();
        let ModelSize { checkpoint, config, .. } = &self.size;
        let _block = Block::load(&Weights::new(&device, checkpoint), &config.decoder, &config.names, 0)?;
        Ok(device.alive())
    }

    /// Bytes of the vision tower.
    pub(super) fn tower(&self) -> Result<u64> {
        let device = self.device.afresh();
        let _embedder = Embedder::load(&device, &self.size.checkpoint, &self.size.config, true)?;
        Ok(device.alive())
    }

    /// Blocks behind which features of the images of these sequences are added.
    pub(super) fn levels(&self, sequences: &[Sequence]) -> Result<usize> {
        Ok(Seen::of(&self.device, self.model.embedder(), sequences)?.levels())
    }

    /// Bytes that a chunk of so many tokens takes in a block beside what lasts.
    pub(super) fn in_a_block(&self, tokens: usize, decode: bool) -> Result<u64> {
        let sequence = text(tokens);
        self.device.reset_peak();
        let (x, layout) = self.model.embedder().embed(&self.device, &[&sequence], None)?;
        let mut caches = [self.model.cache()];
        self.model.forward_all(
            &self.device,
            &mut [Stream { x, layout }],
            if decode { Some(&mut caches) } else { None },
        )?;
        let inside = Moment::of(At::Block, &self.device.peak_during(&[labels::PASS]), &self.device, 0);
        Ok(inside.held.iter().filter(|entry| entry.name == INSIDE).map(|entry| entry.bytes).sum())
    }

    /// The least that may be asked: two tokens.
    pub(super) fn at_least(&self, decode: bool) -> Result<Vec<Moment>> {
        let whole = [text(2)];
        let (prompts, limits) = if decode { (&whole[..], &[1][..]) } else { Default::default() };
        let (moments, _) = self.count(&Run { whole: &whole, prompts, limits })?;
        Ok(moments)
    }

    /// Answers samples together. What is expected to be decoded is as long as the right answers: that is the work. Memory is counted as
    /// if no answer ended before its limit.
    pub(super) fn count(&self, run: &Run<'_>) -> Result<(Vec<Moment>, ByKind)> {
        let (device, embedder) = (&self.device, self.model.embedder());
        let mut moments = Vec::new();
        let before = device.work();
        device.reset_peak();
        let seen = Seen::of(device, embedder, run.whole)?;
        if run.whole.iter().any(|sample| !sample.images.is_empty()) {
            moments.push(Moment::of(At::Images, &device.peak(), device, device.most_on_host()));
        }
        let levels = seen.levels().min(self.size.layers()) as f64;
        device.stands_for(labels::LEVELS, StandsFor { bytes: 1.0, work: levels });
        let mut longer = ByKind::default();
        if !run.prompts.is_empty() {
            let decode = |limits: &[usize]| -> Result<ByKind> {
                let before = device.work();
                let streams = seen.embed(device, embedder, run.prompts)?;
                let endings = generate::Endings { limits, tokens: &[] };
                generate::greedy(device, &self.model, run.prompts, streams, endings)?;
                Ok(device.work() + before * -1.0)
            };
            device.reset_peak();
            let most = decode(run.limits)?;
            let element = self.device.element_bytes() as u64;
            let value = F32 + if element == F32 { 0 } else { element };
            self.note(&mut moments, value * run.prompts.len() as u64 * self.size.vocab());
            let right = run.whole.iter().map(|sample| sample.answer.len());
            let expected: Vec<usize> = right.zip(run.limits).map(|(right, &limit)| right.min(limit)).collect();
            if expected != run.limits {
                decode(&expected)?;
                longer = most;
            }
        }
        device.reset_peak();
        let streams = seen.embed(device, embedder, run.whole)?;
        likelihood::answer_logits(device, &self.model, run.whole, streams)?;
        let answers = |samples: &[Sequence]| samples.iter().map(|sample| sample.answer.len() as u64).sum::<u64>();
        // Of a chunk as they come and cut into samples. On the host what is cut was there on the device before.
        let twice = seen.chunks().iter().map(|chunk| answers(&run.whole[chunk.clone()])).max().unwrap_or(0);
        let twice = if self.device.is_host() && self.resident { 0 } else { twice };
        self.note(&mut moments, F32 * self.size.vocab() * (answers(run.whole) + twice));
        Ok((moments, device.work() + (before + longer) * -1.0))
    }

    /// Notes the steps of passes since the peak is looked for; `logits`: bytes of them on the host at the end.
    fn note(&self, moments: &mut Vec<Moment>, logits: u64) {
        for (at, during, on_host) in [(At::Block, &IN_A_BLOCK[..], 0), (At::Head, &AT_THE_HEAD, logits)] {
            moments.push(Moment::of(at, &self.device.peak_during(during), &self.device, on_host));
        }
    }
}

/// Text of so many tokens, of which the last is the answer.
fn text(tokens: usize) -> Sequence {
    Sequence {
        id: String::new(),
        tokens: vec![0; tokens],
        vision_tokens: 0,
        images: Vec::new(),
        positions: vec![[0; 3]; tokens],
        answer: tokens - 1..tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::data::dataset;
    use crate::data::sequence::SequenceBuilder;
    use crate::model::families::{self, ImageOptions};
    use crate::plan::bytes_of;
    use crate::tensor::Float;
    use std::path::Path;
    use std::sync::Arc;

    /// What a whole model holds at most, and its work, with the prompts that an evaluation asks.
    fn whole(size: &ModelSize, residency: Residency, run: &Run<'_>) -> (u64, u64, ByKind) {
        let device = Counting::plain(Float::Bf16);
        let model = LanguageModel::load(&device, &size.checkpoint, residency).unwrap();
        let (rest, before) = (device.alive(), device.work());
        device.reset_peak();
        let seen = Seen::of(&device, model.embedder(), run.whole).unwrap();
        if !run.prompts.is_empty() {
            let streams = seen.embed(&device, model.embedder(), run.prompts).unwrap();
            let endings = generate::Endings { limits: run.limits, tokens: &[] };
            generate::greedy(&device, &model, run.prompts, streams, endings).unwrap();
        }
        let streams = seen.embed(&device, model.embedder(), run.whole).unwrap();
        likelihood::answer_logits(&device, &model, run.whole, streams).unwrap();
        (rest, device.peak().bytes, device.work() + before * -1.0)
    }

    #[test]
    fn one_block_and_some_rows_stand_for_a_whole_model() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model");
        let mut models = 0;
        for folder in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()) {
            let questions = folder.with_extension("jsonl");
            if !folder.is_dir() || !questions.exists() {
                continue;
            }
            models += 1;
            let name = folder.display();
            let checkpoint = Arc::new(Checkpoint::open(&folder).unwrap());
            let family = families::of::<Counting>(&checkpoint).unwrap();
            let config = family.config(&checkpoint).unwrap();
            let vision = family.vision_input(&checkpoint, ImageOptions::default()).unwrap();
            let builder = SequenceBuilder::new(checkpoint.folder(), vision).unwrap();
            let conversations = dataset::read(&questions, None).unwrap();
            let samples: Vec<_> = conversations.iter().map(|c| builder.build_answered(c).unwrap()).collect();
            let prompts = conversations.iter().zip(&samples).map(|(c, whole)| builder.prompt_of(c, whole).unwrap());
            let prompts: Vec<_> = prompts.collect();
            let size = ModelSize::of(&checkpoint, &config, None).unwrap();
            let streamed = (0..=size.layers()).map(|held| (Residency::Streamed { held }, HEAD_ROWS));
            for (residency, rows) in [(Residency::Resident, 160)].into_iter().chain(streamed) {
                for limit in [0, 2, 70] {
                    let what = format!("{name}, {residency:?}, {limit:?}");
                    let (prompts, limits) =
                        if limit == 0 { (&[][..], vec![]) } else { (&prompts[..], vec![limit; samples.len()]) };
                    let run = Run { whole: &samples, prompts, limits: &limits };
                    let device = Counting::plain(Float::Bf16);
                    let part = CountedModel::with_rows(&device, size.clone(), residency, rows).unwrap();
                    let rest = part.weights();
                    let (moments, work) = part.count(&run).unwrap();
                    let held = moments.into_iter().map(|moment| bytes_of(&(String::new(), moment.held))).max();
                    let found = whole(&size, residency, &run);
                    assert_eq!((rest, held), (found.0, Some(found.1)), "{what}");
                    assert_eq!(part.weights(), rest, "{what}");
                    // Answers of more than two tokens are expected to be as long as the right ones.
                    if limit != 70 {
                        let off = (work + found.2 * -1.0).flops().abs() / found.2.flops();
                        let values = (work.values / found.2.values - 1.0).abs();
                        assert!(off < 1e-9 && values < 1e-9, "{what}: {work:?}, {:?}", found.2);
                    }
                }
            }
        }
        assert!(models > 8, "{models}");
    }
}
