//! Memory plans of a 7B decoder (3584 wide, MLP 18944, 28/4 heads of 128, 28 blocks) for 512 samples of 512 tokens in bfloat16,
//! against counts by hand.

use crate::support::message;
use vlmq::model::families::VisionLoad;
use vlmq::plan::DecoderShape;
use vlmq::plan::{CheckSize, EmbedderSize, Job, MemoryPlan};
use vlmq::plan::{ChunkSize, Costs, StagePlan};
use vlmq::progress::Stage;
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::{Grid, Importance, Order, Refit, Solver, SolverSettings};

const SHAPE: DecoderShape =
    DecoderShape { blocks: 28, hidden: 3584, intermediate: 18944, heads: 28, kv_heads: 4, head_dim: 128 };

/// 128 chunks of four samples.
const TOKENS: u64 = 512 * 512;
const CHUNK: u64 = 2048;

/// 233 046 016 weights (inspect.rs), two norms of 3584, biases of 3584 + 2 · 512, twice, 2 bytes each.
const WEIGHTS: u64 = 2 * 2 * (233_046_016 + 2 * 3584 + 3584 + 2 * 512);

/// 18944² float32.
const SQUARE: u64 = 1_435_500_544;

/// Both streams in bfloat16 and 64 cosines and sines in float32: 14 848 bytes a token.
const TOKEN: u64 = 2 * 2 * 3584 + 2 * 4 * 64;

/// Those of down_proj with what belongs to its 148 blocks of 128 columns, where each is a group.
const CODES: u64 = 3584 * (18944 + 148 * (4 + 1 + 8)) + 148 * 4 * 256;

fn settings(solver: Solver) -> SolverSettings {
    SolverSettings { solver, ..SolverSettings::default() }
}

fn job(solver: &SolverSettings, importance: Importance) -> Job<'_> {
    let chunk = ChunkSize { tokens: CHUNK as usize, ..ChunkSize::default() };
    Job {
        shape: SHAPE,
        solver,
        importance,
        refit: Refit::None,
        chunks: vec![chunk; 128],
        deepstack: 0,
        embedder: None,
        check: CheckSize::default(),
    }
}

fn fit(job: &Job<'_>, limit: Option<u64>) -> MemoryPlan {
    MemoryPlan::fit(job, &Costs::plain(2), limit).unwrap()
}

fn bytes_of(stage: &StagePlan, name: &str) -> u64 {
    stage.entries.iter().find(|entry| entry.name.contains(name)).unwrap_or_else(|| panic!("{name} in {stage:?}")).bytes
}

#[test]
fn gptaq_is_at_its_worst_when_it_factors_down_proj() {
    let solver = settings(Solver::Gptaq);
    let plan = fit(&job(&solver, Importance::Vlmq), None);
    let stage = &plan.stages[0];
    assert_eq!((plan.stages.len(), stage.stage, stage.step.as_str()), (1, Stage::Blocks, "factoring mlp.down_proj"));
    assert_eq!(bytes_of(stage, "weights of a block"), WEIGHTS);
    assert_eq!(bytes_of(stage, "residual streams of all samples"), TOKENS * TOKEN);
    assert_eq!(bytes_of(stage, "H and C"), 2 * SQUARE);
    // Both again, two columns of 128x128 blocks, diagonal and order, and one block to finish a factorization with.
    let factors = 2 * SQUARE + 2 * 18944 * 128 * 4 + 2 * 18944 * 4 + 128 * 128 * 4;
    assert_eq!(bytes_of(stage, "processing order"), factors);
    // 9.86 GiB.
    assert_eq!(plan.device_bytes, 10_586_163_200);
    assert_eq!((plan.activations, plan.host_bytes), (Activations::Resident, 0));
}

#[test]
fn what_does_not_fit_is_streamed() {
    let solver = settings(Solver::Gptaq);
    let job = job(&solver, Importance::Vlmq);
    let resident = fit(&job, Some(10_586_163_200));
    assert_eq!(resident.activations, Activations::Resident);
    let plan = fit(&job, Some(10_586_163_199));
    assert_eq!((plan.activations, plan.host_bytes), (Activations::Streamed, TOKENS * TOKEN));
    // Nothing of them is there while down_proj is factored: 6.23 GiB.
    assert_eq!(plan.device_bytes, 10_586_163_200 - TOKENS * TOKEN);
    assert_eq!(fit(&job, Some(plan.device_bytes)), MemoryPlan { limit_bytes: Some(plan.device_bytes), ..plan });
    // Twice the samples take twice the host memory.
    let more = Job { chunks: vec![job.chunks[0]; 256], ..job.clone() };
    let more = fit(&more, Some(plan.device_bytes));
    assert_eq!((more.device_bytes, more.host_bytes), (plan.device_bytes, 2 * plan.host_bytes));
}

#[test]
fn gptq_is_at_its_worst_when_it_solves_down_proj() {
    let solver = settings(Solver::Gptq);
    let plan = fit(&job(&solver, Importance::None), None);
    let stage = &plan.stages[0];
    assert_eq!(stage.step, "solving mlp.down_proj");
    // One stream.
    assert_eq!(bytes_of(stage, "residual streams of all samples"), TOKENS * (2 * 3584 + 2 * 4 * 64));
    let factor = SQUARE + 18944 * 128 * 4 + 2 * 18944 * 4 + 128 * 128 * 4;
    assert_eq!(bytes_of(stage, "its factor"), factor);
    // Residuals of all columns, errors of a span of 512, codes, and for each of 148 blocks a scale, a zero and an error.
    let state = 3584 * (18944 + 512) * 4 + CODES;
    assert_eq!(bytes_of(stage, "solver's state"), state);
    // 5.76 GiB.
    assert_eq!(plan.device_bytes, WEIGHTS + TOKENS * 7680 + SQUARE + factor + state);
    assert_eq!(plan.device_bytes, 6_180_278_272);
}

#[test]
fn wide_layers_of_small_inputs_are_seen_too() {
    // Few heads and a narrow MLP: the attention's backward pass takes more than any matrix of statistics.
    let shape = DecoderShape { blocks: 2, hidden: 64, intermediate: 64, heads: 2, kv_heads: 1, head_dim: 32 };
    let solver = SolverSettings { group_size: Some(32), ..settings(Solver::Gptq) };
    let chunks = [300, 2048, 700].map(|tokens| ChunkSize { tokens, ..ChunkSize::default() }).to_vec();
    let job = Job {
        shape,
        solver: &solver,
        importance: Importance::Vlmq,
        refit: Refit::None,
        chunks,
        deepstack: 0,
        embedder: None,
        check: CheckSize::default(),
    };
    let plan = fit(&job, None);
    let stage = &plan.stages[0];
    assert_eq!(stage.step, "importance");
    // Four of the stream's width, five of the queries', four of the keys'; row numbers and factors.
    let temporary = 2048 * 2 * (4 * 64 + 5 * 64 + 4 * 32) + 4096 + 16 * 2048;
    assert_eq!(bytes_of(stage, "intermediate results"), temporary);
    // Streamed: the longest chunk and the one behind it.
    let streamed = fit(&job, Some(plan.device_bytes - 1));
    assert_eq!(bytes_of(&streamed.stages[0], "residual streams of two chunks"), (2048 + 700) * (2 * 2 * 64 + 4 * 32));
    // One block alone has no importance to compute.
    let job = Job { shape: DecoderShape { blocks: 1, ..shape }, ..job };
    assert!(fit(&job, None).stages[0].step.starts_with("statistics of"));
}

#[test]
fn the_vision_stage_holds_the_tower_and_what_went_before() {
    let solver = settings(Solver::Gptq);
    let chunk = ChunkSize { tokens: 2048, image_tokens: 2000, patches: 8000, ..ChunkSize::default() };
    // Qwen2-VL's: 1280 wide, MLP of 5120, heads of 80.
    let load = VisionLoad { patch: 1176, width: 1280, inner: 5120, rotary: 80, depth: 32, ..VisionLoad::default() };
    let embedder = EmbedderSize { tower: 675_759_104, load };
    let job = Job { chunks: vec![chunk; 128], embedder: Some(embedder), ..job(&solver, Importance::None) };
    let plan = fit(&job, None);
    let stage = &plan.stages[0];
    assert_eq!((stage.stage, stage.step.as_str(), plan.stages.len()), (Stage::Vision, "encoding images", 2));
    assert_eq!(bytes_of(stage, "tower"), 2 * 675_759_104);
    assert_eq!(bytes_of(stage, "streams so far"), 127 * 2048 * 7680);
    // The stream and both results inside the MLP, and the rotary tables.
    let per_patch = 2 * (1280 + 2 * 5120) + 320;
    assert_eq!(bytes_of(stage, "intermediate"), 8000 * per_patch + 4096 + 16 * 8000 + 2 * 2000 * 3584);
    // Tiles of a large image wait beside the tower's work, then beside its last output while they are reduced.
    let tiled =
        VisionLoad { patch: 588, width: 1152, inner: 4304, depth: 26, projected: 3584, ..VisionLoad::default() };
    let of = |chunk: ChunkSize| {
        let embedder = EmbedderSize { load: tiled, ..embedder };
        let plan = fit(&Job { chunks: vec![chunk], embedder: Some(embedder), ..job.clone() }, None);
        bytes_of(&plan.stages[0], "intermediate")
    };
    let small = ChunkSize { patches: 5832, joined: 10_000, reducing: 16_000, ..chunk };
    let features = 2 * 2000 * 3584;
    // The stream and both results inside the MLP.
    let encoding = 5832 * 2 * (1152 + 2 * 4304) + 4096 + 16 * 5832;
    assert_eq!(of(small), features + 10_000 * 2 * 3584 + encoding);
    let large = ChunkSize { joined: 26_244, reducing: 70_000, ..small };
    assert_eq!(of(large), features + 2 * 3584 * (70_000 + 5832));
    // Without images the last chunk's own stream is what is added.
    let chunk = ChunkSize { tokens: 2048, ..ChunkSize::default() };
    let embedder = EmbedderSize { tower: 0, ..embedder };
    let job = Job { chunks: vec![chunk; 128], embedder: Some(embedder), ..job };
    let stage = &fit(&job, None).stages[0];
    assert_eq!((stage.step.as_str(), bytes_of(stage, "streams so far")), ("embedding", 128 * 2048 * 7680));
}

/// Of a small model with a large vocabulary nothing takes as much as the predictions behind its last block.
#[test]
fn the_output_head_comes_part_by_part() {
    let shape = DecoderShape { blocks: 2, hidden: 64, intermediate: 64, heads: 2, kv_heads: 1, head_dim: 32 };
    let solver = SolverSettings { group_size: Some(32), ..settings(Solver::Gptq) };
    let mut chunks = vec![ChunkSize { tokens: 300, ..ChunkSize::default() }; 5];
    chunks[4].checked = true;
    let check = CheckSize { tokens: 512, vocab: 150_000 };
    let (importance, refit) = (Importance::None, Refit::None);
    let job = Job { shape, solver: &solver, importance, refit, chunks, deepstack: 0, embedder: None, check };
    let plan = fit(&job, None);
    let stage = &plan.stages[0];
    assert_eq!(stage.step, "comparing the paths");
    // The last chunk has both streams.
    assert_eq!(bytes_of(stage, "residual streams of all samples"), 300 * (6 * 2 * 64 + 5 * 4 * 32));
    assert_eq!(bytes_of(stage, "tokens that are predicted"), 2 * 512 * 2 * 64 + 4096 + 16 * 512);
    assert_eq!(bytes_of(stage, "rows of the output head"), 2048 * 2 * 64);
    assert_eq!(bytes_of(stage, "logits"), 512 * 2048 * 2);
    // No stream is there while logits are.
    let streamed = fit(&job, Some(plan.device_bytes - 1));
    assert_eq!(streamed.device_bytes, plan.device_bytes - bytes_of(stage, "residual streams"));
    // Nothing is asked where no sample has text.
    let job = Job { check: CheckSize::default(), ..job };
    assert!(fit(&job, None).stages[0].step != "comparing the paths");
}

#[test]
fn features_for_later_blocks_last_as_long_as_the_streams() {
    let solver = settings(Solver::Gptaq);
    let chunk = ChunkSize { tokens: 2048, image_tokens: 2000, patches: 8000, ..ChunkSize::default() };
    let without = Job { chunks: vec![chunk; 128], ..job(&solver, Importance::Vlmq) };
    let with = Job { deepstack: 3, ..without.clone() };
    let features = 128 * 3 * 2000 * 3584 * 2;
    let resident = fit(&with, None);
    assert_eq!(resident.device_bytes, fit(&without, None).device_bytes + features);
    // Streamed they are in host memory, as the streams are.
    let streamed = fit(&with, Some(resident.device_bytes - 1));
    assert_eq!(streamed.host_bytes, TOKENS * TOKEN + features);
    assert_eq!(streamed.device_bytes, resident.device_bytes - TOKENS * TOKEN - features);
}

#[test]
fn the_solvers_settings_count() {
    let state = |settings: SolverSettings| {
        let solver = SolverSettings { solver: Solver::Gptq, ..settings };
        let plan = fit(&job(&solver, Importance::None), None);
        bytes_of(&plan.stages[0], "solver's state")
    };
    let usual = state(SolverSettings::default());
    assert_eq!(state(SolverSettings { order: Order::Act, ..SolverSettings::default() }), usual);
    // One group a row: one scale a block, spans as before.
    let minmax = |group_size| SolverSettings { group_size, grid: Grid::Minmax, ..SolverSettings::default() };
    assert_eq!(state(minmax(None)), usual);
    // A group of two blocks is a span, and is brought up to date once more for its grid.
    assert_eq!(state(minmax(Some(256))), 3584 * (18944 + 256 + 256) * 4 + CODES);
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
fn rounding_needs_a_block_and_nothing_else() {
    let solver = settings(Solver::Rtn);
    let job = Job { chunks: Vec::new(), ..job(&solver, Importance::None) };
    assert_eq!(fit(&job, None).device_bytes, WEIGHTS / 2);
}

#[test]
fn what_cannot_fit_is_refused_with_the_numbers() {
    let solver = settings(Solver::Gptaq);
    let job = job(&solver, Importance::Vlmq);
    let error = message(MemoryPlan::fit(&job, &Costs::plain(2), Some(4 << 30)));
    for part in [
        "does not fit into 4.00 GiB",
        "factoring mlp.down_proj takes 6.23 GiB",
        "weights of a block, float and quantized 889.04 MiB",
        "H and C 2.67 GiB",
        "--solver gptq would take 3.88 GiB",
        "--solver rtn would take 444.52 MiB",
        "--max-gpu-memory",
    ] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert!(!error.contains('\n'));
}
