//! Memory plans of a 7B decoder (3584 wide, MLP 18944, 28/4 heads of 128, 28 blocks) for 512 samples of 512 tokens in bfloat16,
//! against counts by hand.

use crate::published::{Hollow, Method};
use crate::support::message;
use vlmq::data::sequence::Sequence;
use vlmq::device::counting::Counting;
use vlmq::plan::{DecoderShape, MemoryPlan, StagePlan, Subject};
use vlmq::progress::Stage;
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::{Grid, Importance, Order, Refit, Solver, SolverSettings};
use vlmq::tensor::Float;

/// Of these sizes.
fn seven_billion() -> Hollow {
    let model = Hollow::published("Qwen2-VL-7B-Instruct");
    let sizes = DecoderShape { blocks: 28, hidden: 3584, intermediate: 18944, heads: 28, kv_heads: 4, head_dim: 128 };
    assert_eq!(DecoderShape::of(&model.config.decoder), sizes);
    model
}

/// 128 chunks of four samples.
const TOKENS: u64 = 512 * 512;
const CHUNK: u64 = 2048;

/// 233 046 016 weights (inspect.rs), two norms of 3584, biases of 3584 + 2 · 512, twice, 2 bytes each.
const WEIGHTS: u64 = 2 * 2 * (233_046_016 + 2 * 3584 + 3584 + 2 * 512);

/// 18944² float32.
const SQUARE: u64 = 1_435_500_544;

/// Both streams in bfloat16 and 64 cosines and sines in float32: 14 848 bytes a token.
const TOKEN: u64 = 2 * 2 * 3584 + 2 * 4 * 64;

/// Those of down_proj with what belongs to its 148 blocks of 128 columns, where each is a group, and a place for what goes wrong.
const CODES: u64 = 3584 * (18944 + 148 * (4 + 1 + 8)) + 256;

fn settings(solver: Solver) -> SolverSettings {
    SolverSettings { solver, ..SolverSettings::default() }
}

fn method(solver: SolverSettings, importance: Importance) -> Method {
    Method { solver, importance, refit: Refit::None }
}

/// The plan on a device in bfloat16 that takes no work space.
fn fit(subject: &Subject<'_>, limit: Option<u64>) -> MemoryPlan {
    let device = Counting::plain(Float::Bf16);
    let device = if let Some(limit) = limit { device.limited(limit) } else { device };
    MemoryPlan::fit(subject, &device).unwrap().0
}

/// The plan of 128 chunks.
fn of_text(model: &Hollow, method: &Method, limit: Option<u64>) -> MemoryPlan {
    let sample = model.sample(CHUNK as usize, None);
    fit(&model.subject(vec![&sample; 128], method), limit)
}

fn bytes_of(stage: &StagePlan, name: &str) -> u64 {
    stage.entries.iter().find(|entry| entry.name.contains(name)).unwrap_or_else(|| panic!("{name} in {stage:?}")).bytes
}

/// The blocks' stage, which is the last.
fn blocks(plan: &MemoryPlan) -> &StagePlan {
    let stage = plan.stages.last().unwrap();
    assert_eq!(stage.stage, Stage::Blocks);
    stage
}

#[test]
fn gptaq_is_at_its_worst_when_it_factors_down_proj() {
    let (model, method) = (seven_billion(), method(settings(Solver::Gptaq), Importance::Vlmq));
    let plan = of_text(&model, &method, None);
    let stage = blocks(&plan);
    assert_eq!((plan.stages.len(), stage.step.as_str()), (2, "factoring mlp.down_proj"));
    assert_eq!(bytes_of(stage, "weights of a block"), WEIGHTS);
    assert_eq!(bytes_of(stage, "weights of the next block"), WEIGHTS / 2);
    assert_eq!(bytes_of(stage, "residual streams of all samples"), TOKENS * TOKEN);
    assert_eq!(bytes_of(stage, "H and C"), 2 * SQUARE);
    // Both again, two columns of 128x128 blocks, diagonal, and one block to finish a factorization with.
    let factors = 2 * SQUARE + 2 * 18944 * 128 * 4 + 18944 * 4;
    assert_eq!(bytes_of(stage, "processing order"), factors);
    assert_eq!(bytes_of(stage, "for themselves"), 128 * 128 * 4);
    // 10.29 GiB.
    assert_eq!(plan.device_bytes, 11_052_203_008);
    assert_eq!((plan.activations, plan.host_bytes), (Activations::Resident, 0));
}

#[test]
fn what_does_not_fit_is_streamed() {
    let (model, method) = (seven_billion(), method(settings(Solver::Gptaq), Importance::Vlmq));
    let resident = of_text(&model, &method, Some(11_052_203_008));
    assert_eq!(resident.activations, Activations::Resident);
    let plan = of_text(&model, &method, Some(11_052_203_007));
    assert_eq!((plan.activations, plan.host_bytes), (Activations::Streamed, TOKENS * TOKEN));
    // Nothing of them is there while down_proj is factored: 6.67 GiB.
    assert_eq!(plan.device_bytes, 11_052_203_008 - TOKENS * TOKEN);
    let again = of_text(&model, &method, Some(plan.device_bytes));
    assert_eq!(again, MemoryPlan { limit_bytes: Some(plan.device_bytes), ..plan.clone() });
    // Twice the samples take twice the host memory.
    let sample = model.sample(CHUNK as usize, None);
    let more = fit(&model.subject(vec![&sample; 256], &method), Some(plan.device_bytes));
    assert_eq!((more.device_bytes, more.host_bytes), (plan.device_bytes, 2 * plan.host_bytes));
}

#[test]
fn gptq_is_at_its_worst_when_it_solves_down_proj() {
    let (model, method) = (seven_billion(), method(settings(Solver::Gptq), Importance::None));
    let plan = of_text(&model, &method, None);
    let stage = blocks(&plan);
    assert_eq!(stage.step, "solving mlp.down_proj");
    // One stream.
    assert_eq!(bytes_of(stage, "residual streams of all samples"), TOKENS * (2 * 3584 + 2 * 4 * 64));
    let factor = SQUARE + 18944 * 128 * 4 + 18944 * 4;
    assert_eq!(bytes_of(stage, "its factor"), factor);
    // Residuals of all columns, errors of a span of 512, codes, and for each of 148 blocks a scale, a zero and an error.
    let state = 3584 * (18944 + 512) * 4 + CODES;
    assert_eq!(bytes_of(stage, "solver's state"), state);
    // 6.19 GiB.
    assert_eq!(plan.device_bytes, WEIGHTS * 3 / 2 + TOKENS * 7680 + SQUARE + factor + state);
}

/// Few heads and a narrow MLP: the attention's backward pass takes more than any matrix of statistics.
const NARROW: DecoderShape =
    DecoderShape { blocks: 2, hidden: 64, intermediate: 64, heads: 2, kv_heads: 1, head_dim: 32 };

#[test]
fn wide_layers_of_small_inputs_are_seen_too() {
    let solver = SolverSettings { group_size: Some(32), ..settings(Solver::Gptq) };
    let method = method(solver, Importance::Vlmq);
    let model = Hollow::decoder(NARROW, 640);
    let samples = [300, 2048, 700].map(|tokens| model.sample(tokens, None));
    let plan = fit(&model.subject(samples.iter().collect(), &method), None);
    let stage = blocks(&plan);
    assert_eq!(stage.step, "importance");
    // Four of the stream's width, five of the queries', four of the keys'.
    let temporary = 2048 * 2 * (4 * 64 + 5 * 64 + 4 * 32);
    // For each of four projections a factor of the tokens before, and of its own.
    let factors = 4 * 4 * (300 + 2048);
    assert_eq!(bytes_of(stage, "intermediate results"), temporary + factors);
    // Streamed: the longest chunk and the one behind it.
    let streamed = fit(&model.subject(samples.iter().collect(), &method), Some(plan.device_bytes - 1));
    assert_eq!(bytes_of(blocks(&streamed), "residual streams of two chunks"), (2048 + 700) * (2 * 2 * 64 + 4 * 32));
    // One block alone has no importance to compute.
    let model = Hollow::decoder(DecoderShape { blocks: 1, ..NARROW }, 640);
    assert!(blocks(&fit(&model.subject(samples.iter().collect(), &method), None)).step.starts_with("statistics of"));
}

#[test]
fn the_vision_stage_holds_the_tower_and_what_went_before() {
    let (model, method) = (seven_billion(), method(settings(Solver::Gptq), Importance::None));
    // 80 x 100 patches, merged by four.
    let sample = model.sample(2048, Some((1400, 1120)));
    assert_eq!(sample.vision_tokens, 2000);
    let plan = fit(&model.subject(vec![&sample; 128], &method), None);
    let stage = &plan.stages[0];
    assert_eq!((stage.stage, stage.step.as_str(), plan.stages.len()), (Stage::Vision, "encoding images", 2));
    assert_eq!(model.values("visual."), 675_759_104);
    assert_eq!(bytes_of(stage, "tower"), 2 * 675_759_104);
    assert_eq!(bytes_of(stage, "streams so far"), 127 * 2048 * 7680);
    // The stream and both results inside the MLP, 1280 and 5120 wide, and the rotary tables, 40 cosines and sines.
    let per_patch = 2 * (1280 + 2 * 5120) + 2 * 4 * 40;
    assert_eq!(bytes_of(stage, "intermediate"), 8000 * per_patch);
    // Without images the last chunk's own stream is what is added.
    let plan = of_text(&model, &method, None);
    let stage = &plan.stages[0];
    assert_eq!((stage.step.as_str(), bytes_of(stage, "streams so far")), ("embedding", 128 * 2048 * 7680));
    assert!(stage.entries.iter().all(|entry| !entry.name.contains("tower")));
}

/// Of a small model with a large vocabulary nothing takes as much as the predictions behind its last block.
#[test]
fn the_output_head_comes_part_by_part() {
    let solver = SolverSettings { group_size: Some(32), ..settings(Solver::Gptq) };
    let method = method(solver, Importance::None);
    let model = Hollow::decoder(NARROW, 150_000);
    let sample = model.sample(600, None);
    let subject = |asked: usize| {
        let mut subject = model.subject(vec![&sample; 5], &method);
        subject.chunks[4].checked = true;
        subject.places = vec![(4, (0..asked as u32).collect())];
        subject.places.retain(|(_, rows)| !rows.is_empty());
        subject
    };
    let plan = fit(&subject(512), None);
    let stage = blocks(&plan);
    assert_eq!(stage.step, "comparing the paths");
    // The last chunk has both streams.
    assert_eq!(bytes_of(stage, "residual streams of all samples"), 600 * (6 * 2 * 64 + 5 * 4 * 32));
    // The last norm, rows of both paths, a part of the head, and one path's logits of it.
    let rest = 2 * 64 + 2 * 512 * 2 * 64 + 2048 * 2 * 64 + 512 * 2048 * 2;
    assert_eq!(bytes_of(stage, "for themselves"), rest);
    // No stream is there while logits are.
    let streamed = fit(&subject(512), Some(plan.device_bytes - 1));
    assert_eq!(streamed.device_bytes, rest);
    // Nothing is asked where no sample has text.
    assert!(blocks(&fit(&subject(0), None)).step != "comparing the paths");
}

#[test]
fn features_for_later_blocks_last_as_long_as_the_streams() {
    let (model, method) =
        (Hollow::published("Qwen3-VL-8B-Instruct"), method(settings(Solver::Gptaq), Importance::Vlmq));
    assert_eq!((model.config.deepstack, model.config.decoder.hidden), (3, 4096));
    // 80 x 100 patches of 16 x 16 pixels, merged by four.
    let (with, without) = (model.sample(2048, Some((1600, 1280))), model.sample(2048, None));
    assert_eq!(with.vision_tokens, 2000);
    let plan = |sample: &Sequence, limit| fit(&model.subject(vec![sample; 128], &method), limit);
    let features = 128 * 3 * 2000 * 4096 * 2;
    let resident = plan(&with, None);
    assert_eq!(blocks(&resident).bytes, blocks(&plan(&without, None)).bytes + features);
    // Streamed they are in host memory, as the streams are.
    let streams = TOKENS * (2 * 2 * 4096 + 2 * 4 * 64);
    let streamed = plan(&with, Some(resident.device_bytes - 1));
    assert_eq!(streamed.host_bytes, streams + features);
    assert_eq!(blocks(&streamed).bytes, blocks(&resident).bytes - streams - features);
}

#[test]
fn the_solvers_settings_count() {
    let model = seven_billion();
    let state = |settings: SolverSettings| {
        let solver = SolverSettings { solver: Solver::Gptq, ..settings };
        let plan = of_text(&model, &method(solver, Importance::None), None);
        let stage = blocks(&plan);
        let searching = stage.entries.iter().filter(|entry| entry.name.contains("for themselves"));
        bytes_of(stage, "solver's state") + searching.map(|entry| entry.bytes).sum::<u64>()
    };
    let usual = state(SolverSettings::default());
    assert_eq!(state(SolverSettings { order: Order::Act, ..SolverSettings::default() }), usual);
    // One group a row: one scale a block, spans as before, and the grid of a group that is no block.
    let minmax = |group_size| SolverSettings { group_size, grid: Grid::Minmax, ..SolverSettings::default() };
    assert_eq!(state(minmax(None)), usual + 3584 * 5);
    // A group of two blocks is a span, and is brought up to date once more for its grid.
    assert_eq!(state(minmax(Some(256))), 3584 * (18944 + 256 + 256) * 4 + CODES + 3584 * 5);
    // Groups wider than a block: a range, a grid and 24 losses a row.
    for group_size in [None, Some(256)] {
        let loss = state(SolverSettings { grid: Grid::Loss, ..minmax(group_size) });
        assert_eq!(loss, state(minmax(group_size)) + 3584 * 28 * 4);
    }
    // Small groups bring more scales.
    let small = state(SolverSettings { group_size: Some(32), ..SolverSettings::default() });
    assert_eq!(small, usual + 3584 * 3 * 148 * 5);
}

#[test]
fn rounding_needs_a_block_and_the_next_and_nothing_else() {
    let (model, method) = (seven_billion(), method(settings(Solver::Rtn), Importance::None));
    let plan = fit(&model.subject(Vec::new(), &method), None);
    assert_eq!((plan.stages.len(), plan.device_bytes), (1, WEIGHTS));
}

#[test]
fn what_cannot_fit_is_refused_with_the_numbers() {
    let (model, method) = (seven_billion(), method(settings(Solver::Gptaq), Importance::Vlmq));
    let sample = model.sample(CHUNK as usize, None);
    let subject = model.subject(vec![&sample; 128], &method);
    let error = message(MemoryPlan::fit(&subject, &Counting::plain(Float::Bf16).limited(4 << 30)));
    for part in [
        "does not fit into 4.00 GiB",
        "factoring mlp.down_proj takes 6.67 GiB",
        "weights of a block, float and quantized 889.04 MiB",
        "H and C 2.67 GiB",
        "--solver gptq would take 4.31 GiB",
        "--solver rtn would take 889.04 MiB",
        "--max-gpu-memory",
    ] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert!(!error.contains('\n'));
    // What another solver does not look at is not there with it.
    let (gptaq, gptq) = (self::method(settings(Solver::Gptaq), Importance::None), settings(Solver::Gptq));
    let subject = model.subject(vec![&sample; 128], &gptaq);
    let streams = |subject: &Subject<'_>| {
        let counted = subject.count(&Counting::plain(Float::Bf16), Activations::Streamed).unwrap();
        counted.parked_bytes
    };
    assert_eq!(streams(&subject), TOKENS * TOKEN);
    assert_eq!(streams(&Subject { solver: &gptq, ..subject.clone() }), TOKENS * 7680);
}
