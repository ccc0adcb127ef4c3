//! Work of a run by kind, as it is counted by running the method, against counts by hand of its passes, statistics and solves.

use crate::published::{Hollow, Method};
use vlmq::device::counting::Counting;
use vlmq::plan::{ByKind, DecoderShape, Subject};
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::{Importance, Refit, Solver, SolverSettings};
use vlmq::tensor::Float;

/// Of tokens that stand in samples of so many, by a paper's count of what one block does.
fn of_a_block(shape: &DecoderShape, method: &Method, importance: Importance, [tokens, length]: [f64; 2]) -> ByKind {
    let (hidden, inner) = (shape.hidden as f64, shape.intermediate as f64);
    let query = (shape.heads * shape.head_dim) as f64;
    let key = (shape.kv_heads * shape.head_dim) as f64;
    let gptaq = if method.solver.solver == Solver::Gptaq { 1.0 } else { 0.0 };
    let weighted = if importance == Importance::Vlmq { 1.0 } else { 0.0 };
    let refitted = if method.refit == Refit::Residual { 1.0 } else { 0.0 };
    let with_float = gptaq == 1.0 || method.importance == Importance::Vlmq || refitted == 1.0;
    let float = if with_float { 1.0 } else { 0.0 };

    // Per token, of a matrix of weights two operations a weight.
    let (attention, output, gate, down) =
        (hidden * (query + 2.0 * key), query * hidden, 2.0 * hidden * inner, hidden * inner);
    // On each path the inputs of o and of down for their statistics, on the quantized one once more when it advances and when scales
    // are refitted. Where inputs of two layers are the same, norms are all that computes them.
    let times = float + 2.0 + refitted;
    let passes = times * (attention + gate) + (float + 1.0 + refitted) * (output + down);
    // Importance looks through the attention module on both paths, and through o once back.
    let importance = weighted * (2.0 * (attention + output) + output);
    // Scores and mixtures of the half that is not masked; backward five products for two.
    let pairs = (length + 1.0) / 2.0;
    let attended = times + weighted * (2.0 + 2.5);

    // H of each distinct input, of q, k and v apart where each has its own importance; a half of it, being symmetric. C is not.
    let distinct = 1.0 + 2.0 * weighted;
    let squares = (distinct + 1.0) * hidden.powi(2) + query.powi(2) + inner.powi(2);
    let cubes = (distinct + 1.0) * hidden.powi(3) + query.powi(3) + inner.powi(3);
    // Rows of a layer times a triangle of its inputs: errors, the cross term, the error that is reported and what it is held against.
    let rows_squares =
        hidden.powi(2) * (query + 2.0 * key + 2.0 * inner) + query.powi(2) * hidden + inner.powi(2) * hidden;
    ByKind {
        products: 2.0 * tokens * (passes + importance) + rows_squares * (2.0 + gptaq),
        attention: 4.0 * tokens * pairs * query * attended,
        statistics: 2.0 * tokens * (squares * (0.5 + gptaq) + refitted * 2.0 * 1.5 * hidden.powi(2)),
        factors: cubes / 3.0 * (1.0 + gptaq),
        codes: shape.block_weights() as f64,
        ..ByKind::default()
    }
}

fn counted(subject: &Subject<'_>) -> [ByKind; 2] {
    let counted = subject.count(&Counting::plain(Float::Bf16), Activations::Resident).unwrap();
    [counted.vision, counted.blocks]
}

#[test]
fn blocks_do_what_the_method_says() {
    let model = Hollow::published("Qwen2-VL-7B-Instruct");
    let shape = DecoderShape::of(&model.config.decoder);
    let sample = model.sample(512, None);
    let methods = [
        (Solver::Gptaq, Importance::Vlmq, Refit::None),
        (Solver::Gptaq, Importance::None, Refit::None),
        (Solver::Gptq, Importance::None, Refit::None),
        (Solver::Gptq, Importance::Vlmq, Refit::Residual),
    ];
    for (solver, importance, refit) in methods {
        let method = Method { solver: SolverSettings { solver, ..SolverSettings::default() }, importance, refit };
        let [_, found] = counted(&model.subject(vec![&sample; 32], &method));
        // In the first block all tokens weigh alike.
        let of = |importance| of_a_block(&shape, &method, importance, [32.0 * 512.0, 512.0]);
        let expected = of(Importance::None) + of(importance) * 27.0;
        let what = format!("{solver:?} {importance:?} {refit:?}");
        println!("{what}: {found:?}, {expected:?}");
        let ratio = |of: fn(&ByKind) -> f64| of(&found) / of(&expected);
        for (kind, of) in [
            ("attention", (|work| work.attention) as fn(&ByKind) -> f64),
            ("statistics", |work| work.statistics),
            ("codes", |work| work.codes),
        ] {
            assert!((ratio(of) - 1.0).abs() < 1e-9, "{what}: {kind} {}", ratio(of));
        }
        assert!((ratio(|work| work.factors) - 1.0).abs() < 1e-9, "{what}: factors {}", ratio(|work| work.factors));
        assert!((ratio(|work| work.products) - 1.0).abs() < 0.005, "{what}: products {}", ratio(|work| work.products));
    }
}

#[test]
fn towers_do_what_their_weights_say() {
    let model = Hollow::published("Qwen2-VL-7B-Instruct");
    let method = Method { solver: SolverSettings::default(), importance: Importance::None, refit: Refit::None };
    let sample = model.sample(2048, Some((1400, 1120)));
    let [found, _] = counted(&model.subject(vec![&sample; 3], &method));
    let patches = 3.0 * 8000.0;
    let weights = |prefix: &str, but: &str| {
        let tensors = model.checkpoint.names().filter(|name| name.starts_with(prefix) && !name.starts_with(but));
        let shapes = tensors.map(|name| model.checkpoint.tensor(name).unwrap().shape.to_vec());
        // Norms and biases are no products.
        shapes.filter(|shape| shape.len() > 1).map(|shape| shape.iter().product::<usize>() as f64).sum::<f64>()
    };
    // What merges four patches into one runs on a quarter of them.
    let products = 2.0 * patches * (weights("visual.", "visual.merger.") + weights("visual.merger.", "-") / 4.0);
    assert_eq!(found.products, products);
    // 32 blocks of 1280, every patch of an image with every other.
    assert_eq!(found.attention, 32.0 * 3.0 * 4.0 * 8000.0 * 8000.0 * 1280.0);
}

#[test]
fn the_whole_head_is_asked() {
    let shape = DecoderShape { blocks: 1, hidden: 64, intermediate: 64, heads: 2, kv_heads: 1, head_dim: 32 };
    let model = Hollow::decoder(shape, 150_000);
    let solver = SolverSettings { group_size: Some(32), ..SolverSettings::default() };
    let method = Method { solver, importance: Importance::None, refit: Refit::None };
    let sample = model.sample(600, None);
    let work = |asked: u32| {
        let mut subject = model.subject(vec![&sample; 2], &method);
        subject.places = if asked > 0 { vec![(1, (0..asked).collect())] } else { Vec::new() };
        counted(&subject)[1].products
    };
    // Two paths.
    let asked = 2.0 * 2.0 * 512.0 * 64.0 * 150_000.0;
    let ratio = (work(512) - work(0)) / asked;
    assert!((ratio - 1.0).abs() < 1e-9, "{ratio}");
}
