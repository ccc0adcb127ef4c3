//! The model against transformers in float32 (tests/golden/make_model.py).

use crate::support::golden::{Golden, RANDOM, largest_error, relative_error};
use crate::support::{data, golden};
use std::cell::Cell;
use std::sync::Arc;
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset;
use vlmq::data::sequence::{Sequence, SequenceBuilder};
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::generate;
use vlmq::model::families::{self, ImageOptions};
use vlmq::model::language_model::{LanguageModel, Residency, Stream};

const TRAINED: [&str; 2] = ["tiny-qwen2-vl", "tiny-qwen2-vl-narrow"];

/// Float32 here and there differ by up to 2.5e-6; the other kind of GELU in a tower or behind it is worth only 1e-4, and
/// enough to change codes.
const TOLERANCE: f64 = 1e-5;

struct Case {
    golden: Golden,
    model: LanguageModel<Cpu>,
    /// The same, its weights read anew for every pass.
    streamed: LanguageModel<Cpu>,
    builder: SequenceBuilder,
    conversations: Vec<dataset::Conversation>,
}

impl Case {
    fn load(name: &str) -> Self {
        let folder = match TRAINED.contains(&name) {
            true => data(name),
            false => golden("model").join(name),
        };
        let checkpoint = Arc::new(Checkpoint::open(&folder).unwrap());
        let vision =
            families::of::<Cpu>(&checkpoint).unwrap().vision_input(&checkpoint, ImageOptions::default()).unwrap();
        let data = golden("model").join(format!("{name}.jsonl"));
        Self {
            golden: Golden::read(&format!("model/{name}.outputs.safetensors")),
            model: LanguageModel::load(&Cpu, &checkpoint, Residency::Resident).unwrap(),
            streamed: LanguageModel::load(&Cpu, &checkpoint, Residency::Streamed { held: 1 }).unwrap(),
            builder: SequenceBuilder::new(&folder, vision).unwrap(),
            conversations: dataset::read(&data, None).unwrap(),
        }
    }

    /// Calls `check` with the name and the sequence of every conversation.
    fn each(name: &str, check: impl Fn(&Self, &str, &Sequence)) {
        let case = Self::load(name);
        assert!(case.conversations.len() >= 4);
        for conversation in &case.conversations {
            check(&case, &conversation.id, &case.builder.build(conversation).unwrap());
        }
    }
}

#[test]
fn token_ids_and_positions_equal_transformers() {
    for name in RANDOM.iter().copied().chain(TRAINED) {
        Case::each(name, |case, id, sequence| {
            let tokens: Vec<f64> = sequence.tokens.iter().map(|&t| f64::from(t)).collect();
            assert_eq!(tokens, case.golden.values(&format!("{id}.input_ids")), "{name} {id}");
            let positions: Vec<f64> =
                (0..3).flat_map(|axis| sequence.positions.iter().map(move |p| f64::from(p[axis]))).collect();
            assert_eq!(positions, case.golden.values(&format!("{id}.position_ids")), "{name} {id}");
        });
    }
}

#[test]
fn pixel_values_equal_transformers() {
    let checked = Cell::new(0);
    for name in RANDOM {
        Case::each(name, |case, id, sequence| {
            if !case.golden.contains(&format!("{id}.pixel_values")) {
                return;
            }
            let (shape, expected) = case.golden.get(&format!("{id}.pixel_values"));
            let values: Vec<f32> = sequence.images.iter().flat_map(|image| image.patches().data().to_vec()).collect();
            assert_eq!(shape.iter().product::<usize>(), values.len(), "{name} {id}");
            let worst = values.iter().zip(&expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
            assert!(worst <= 1e-6, "{name} {id}: {worst:e}");
            checked.set(checked.get() + 1);
        });
    }
    assert!(checked.get() >= 1);
}

#[test]
fn vision_features_equal_transformers() {
    for name in RANDOM.iter().copied().chain(TRAINED) {
        Case::each(name, |case, id, sequence| {
            let Some(features) = case.model.embedder().image_features(&Cpu, &[sequence]).unwrap() else {
                assert_eq!(id, "text-only");
                return;
            };
            let (shape, expected) = case.golden.get(&format!("{id}.vision_features"));
            let first = (features.tokens.rows() - shape[0]) * shape[1];
            let error = largest_error(&features.tokens.data()[first..], &expected);
            assert!(error < TOLERANCE, "{name} {id}: {error:e}");
            let levels = (0..).take_while(|level| case.golden.contains(&format!("{id}.deepstack.{level}"))).count();
            assert_eq!(features.deepstack.len(), levels, "{name} {id}");
            for (level, added) in features.deepstack.iter().enumerate() {
                let error = largest_error(added.data(), &case.golden.values(&format!("{id}.deepstack.{level}")));
                assert!(error < TOLERANCE, "{name} {id}, DeepStack {level}: {error:e}");
            }
        });
    }
}

#[test]
fn logits_equal_transformers() {
    for name in RANDOM.iter().copied().chain(TRAINED) {
        Case::each(name, |case, id, sequence| {
            let features = case.model.embedder().image_features(&Cpu, &[sequence]).unwrap();
            let embed = || case.model.embedder().embed(&Cpu, &[sequence], features.as_ref()).unwrap();
            let (x, layout) = embed();
            let hidden = case.model.forward(&Cpu, x, layout).unwrap();
            let (shape, expected) = case.golden.get(&format!("{id}.logits"));
            let tokens = sequence.tokens.len() as u32;
            let rows: Vec<u32> = (tokens - shape[0] as u32..tokens).collect();
            let logits = case.model.logits(&Cpu, &hidden, &rows).unwrap();
            let (x, layout) = embed();
            let hidden = case.streamed.forward(&Cpu, x, layout).unwrap();
            assert!(case.streamed.logits(&Cpu, &hidden, &rows).unwrap() == logits, "{name} {id}: streamed");
            let (norm, worst) = (relative_error(logits.data(), &expected), largest_error(logits.data(), &expected));
            assert!(norm < TOLERANCE && worst < TOLERANCE, "{name} {id}: {norm:e} in norm, {worst:e} at worst");
        });
    }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    let case = Case::load("nested-f16-sharded");
    let sequences: Vec<Sequence> = case.conversations.iter().map(|c| case.builder.build(c).unwrap()).collect();
    let all: Vec<&Sequence> = sequences.iter().collect();
    let features = case.model.embedder().image_features(&Cpu, &all).unwrap();
    let (x, layout) = case.model.embedder().embed(&Cpu, &all, features.as_ref()).unwrap();
    let spans = layout.spans.clone();
    let hidden = case.model.forward(&Cpu, x, layout).unwrap();
    for (sequence, span) in sequences.iter().zip(spans) {
        let (shape, expected) = case.golden.get(&format!("{}.logits", sequence.id));
        let rows: Vec<u32> = (span.q.end as u32 - shape[0] as u32..span.q.end as u32).collect();
        let logits = case.model.logits(&Cpu, &hidden, &rows).unwrap();
        assert!(largest_error(logits.data(), &expected) < TOLERANCE, "{}", sequence.id);
    }
}

#[test]
fn greedy_decoding_equals_transformers() {
    for name in TRAINED.into_iter().chain(["llava-v5-f32", "qwen3_vl-tied-bf16"]) {
        let case = Case::load(name);
        let prompts: Vec<Sequence> = case.conversations.iter().map(|c| case.builder.prompt(c).unwrap()).collect();
        let ends = case.builder.end_tokens();
        // All together, and one after the other.
        let decode = |model: &LanguageModel<Cpu>, groups: &[Vec<&Sequence>]| {
            let features = model.embedder().features_of_each(&Cpu, groups).unwrap();
            let streams = groups.iter().zip(&features).map(|(group, features)| {
                let (x, layout) = model.embedder().embed(&Cpu, group, features.as_ref()).unwrap();
                Stream { x, layout }
            });
            let endings = generate::Endings { limits: &vec![24; prompts.len()], tokens: ends };
            generate::greedy(&Cpu, model, &prompts, streams.collect(), endings).unwrap()
        };
        let decoded = decode(&case.model, &[prompts.iter().collect()]);
        let alone: Vec<Vec<&Sequence>> = prompts.iter().map(|prompt| vec![prompt]).collect();
        assert_eq!(decode(&case.streamed, &alone), decoded, "{name}");
        for (prompt, mut tokens) in prompts.iter().zip(decoded) {
            let expected = case.golden.values(&format!("{}.generated_ids", prompt.id));
            if tokens.len() < 24 {
                // transformers keeps the end token.
                assert!(ends.contains(&(*expected.last().unwrap() as u32)));
                tokens.push(*expected.last().unwrap() as u32);
            }
            let tokens: Vec<f64> = tokens.into_iter().map(f64::from).collect();
            assert_eq!(tokens, expected, "{name} {}", prompt.id);
        }
    }
}
