//! The whole pipeline on emulated kernels, against the CPU device: given the same statistics the same codes; from the images on
//! a model as good.

use crate::support::data;
use crate::support::kernels::{Variant, build};
use crate::support::program::{copy_folder, emulated_run, read_json, stderr, succeed, text, vlmq_run};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset;
use vlmq::data::sequence::{Sequence, SequenceBuilder};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::{Cuda, CudaTensor};
use vlmq::device::{Device, ModelOps};
use vlmq::evaluate::Evaluation;
use vlmq::model::decoder::{Block, Layout, Projection};
use vlmq::model::families::{self, ImageOptions, ModelConfig};
use vlmq::model::language_model::Embedder;
use vlmq::model::source::Weights;
use vlmq::quantize::settings::SolverSettings;
use vlmq::quantize::solve::{prepare, solve_layer};
use vlmq::quantize::statistics::Statistics;
use vlmq::run;
use vlmq::run::evaluation::EvaluationSettings;
use vlmq::tensor::Float;

const MODEL: &str = "tiny-qwen2-vl-narrow";

/// Calibration samples of one run, and of each of many.
const SAMPLES: usize = 8;
const SAMPLES_OF_DRAW: usize = 16;

/// Draws of calibration samples that a mean is taken over.
const DRAWS: u64 = 32;

/// Questions that scores and divergence are measured on.
const QUESTIONS: usize = 96;

fn library() -> PathBuf {
    build("vlmq_kernels", "kernels", Variant::Plain)
}

/// Quantizes a checkpoint, otherwise with the settings of the command line.
fn quantize(model: &Path, device: &str, (samples, seed): (usize, u64), out: &Path) {
    let (model, calib, out) = (text(model), text(data("vqa/calib.jsonl")), text(out));
    let (samples, seed) = (samples.to_string(), seed.to_string());
    let flags = ["--samples", &samples, "--seed", &seed, "--device", device, "--quiet"];
    let output = emulated_run(&[["quantize", &model, "--calib", &calib, "--out", &out].as_slice(), &flags].concat());
    assert!(output.status.success(), "{}", stderr(&output));
}

/// On the CPU, with the divergence from the float model.
fn evaluate(model: &Path, questions: Option<usize>) -> Evaluation {
    let settings = EvaluationSettings {
        reference: Some(data(MODEL)),
        limit: questions,
        ..EvaluationSettings::new(model.to_owned(), data("vqa/eval.jsonl"))
    };
    run::evaluation::evaluate(&Cpu, &settings, &mut ()).unwrap()
}

/// What the CPU device and the emulated one make of the images and a checkpoint.
fn both(model: &Path) -> [(Evaluation, Vec<(String, f64)>); 2] {
    let work = tempfile::tempdir().unwrap();
    ["cpu", "cuda"].map(|device| {
        let out = work.path().join(device);
        quantize(model, device, (SAMPLES, 0), &out);
        let named = read_json(out.join("report.json"))["device"].as_str().unwrap().to_owned();
        assert_eq!(named, if device == "cpu" { "cpu" } else { "cuda (emulated)" });
        let report = read_json(out.join("report.json"));
        let error = |layer: &Value| (layer["name"].to_string(), layer["relative_error"].as_f64().unwrap());
        (evaluate(&out, Some(QUESTIONS)), report["layers"].as_array().unwrap().iter().map(error).collect())
    })
}

/// The small checkpoint with every tensor in float32: a model of that type runs in it on both devices.
fn float32_copy(to: &Path) {
    copy_folder(&data(MODEL), to);
    let bytes = std::fs::read(data(MODEL).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let widened: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::BF16);
            let values = view.data().as_chunks::<2>().0.iter().flat_map(|&[low, high]| [0, 0, low, high]);
            (name.to_owned(), view.shape().to_vec(), values.collect())
        })
        .collect();
    let views =
        widened.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A last digit in a statistic flips codes, every later block answers to the flips, and what that does to the divergence of
/// so small a model is chance: on the CPU alone, six draws of 240 of the 256 samples give KLs from 2.6e-4 to 6.2e-4. No
/// single run can hold a KL to 10 %. The layers' own errors can, where no importance redraws their weights: those are held
/// to it, and the KL to a clear gain over rounding to nearest.
#[test]
#[ignore = "slow: whole runs on the emulator"]
fn from_the_images_on_the_model_beats_rounding_to_nearest() {
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("rounded");
    succeed(&["quantize", &text(data(MODEL)), "--solver", "rtn", "--out", &text(&out), "--quiet"]);
    let rounded = evaluate(&out, Some(QUESTIONS)).kl.unwrap();
    let float32 = work.path().join("float32");
    float32_copy(&float32);
    for model in [float32, data(MODEL)] {
        let [(cpu, expected), (cuda, found)] = both(&model);
        assert!(expected.len() == 28 && found.len() == 28);
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            // Attention layers behind block 0 weigh their tokens by importance.
            if name.contains("mlp") || name.contains("layers.0.") {
                assert!((found / expected - 1.0).abs() <= 0.1, "{name}: error {found} against the CPU's {expected}");
            }
        }
        println!("{}: score {} and {}, kl {:?} and {:?}", model.display(), cpu.score, cuda.score, cpu.kl, cuda.kl);
        assert!(cuda.kl.unwrap() < 0.7 * rounded, "KL {:?} against {rounded}", cuda.kl);
    }
}

/// What one run cannot show a mean over draws can: accuracy and divergence are those of the CPU. A quarter of an hour, so
/// not every time: `cargo test --release --test gpu -- --ignored`.
#[test]
#[ignore = "takes a quarter of an hour"]
fn over_many_draws_accuracy_and_divergence_are_those_of_the_cpu() {
    let work = tempfile::tempdir().unwrap();
    let mut sums = [[0.0; 2]; 2];
    for seed in 1..=DRAWS {
        for (device, sums) in ["cpu", "cuda"].into_iter().zip(&mut sums) {
            let out = work.path().join(format!("{device}-{seed}"));
            quantize(&data(MODEL), device, (SAMPLES_OF_DRAW, seed), &out);
            let evaluation = evaluate(&out, None);
            sums[0] += evaluation.score;
            sums[1] += evaluation.kl.unwrap();
        }
    }
    let [cpu, cuda] = sums.map(|sums| sums.map(|sum| sum / DRAWS as f64));
    println!("score {} and {}, kl {} and {}, means of {DRAWS} draws", cpu[0], cuda[0], cpu[1], cuda[1]);
    // A question in a hundred; scores of single draws differ by twice that.
    assert!((cuda[0] - cpu[0]).abs() <= 0.01);
    assert!((cuda[1] / cpu[1] - 1.0).abs() <= 0.1);
}

/// The float checkpoint and one quantized from it, both as far as some samples' inputs of block 1.
struct Paths {
    config: ModelConfig,
    blocks: [Block<CudaTensor>; 2],
    inputs: [CudaTensor; 2],
    layout: Layout<CudaTensor>,
}

impl Paths {
    fn new(device: &Cuda, quantized: &Path) -> Self {
        let checkpoints =
            [data(MODEL), quantized.to_path_buf()].map(|folder| Arc::new(Checkpoint::open(&folder).unwrap()));
        let family = families::of::<Cuda>(&checkpoints[0]).unwrap();
        let config = family.config(&checkpoints[0]).unwrap();
        let vision = family.vision_input(&checkpoints[0], ImageOptions::default()).unwrap();
        let builder = SequenceBuilder::new(&data(MODEL), vision).unwrap();
        let conversations = dataset::read(&data("vqa/calib.jsonl"), None).unwrap();
        let sequences: Vec<Sequence> = conversations[..4].iter().map(|c| builder.build(c).unwrap()).collect();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let embedder = Embedder::load(device, &checkpoints[0], &config, true).unwrap();
        let features = embedder.image_features(device, &sequences).unwrap();
        let (x, layout) = embedder.embed(device, &sequences, features.as_ref()).unwrap();
        let load = |checkpoint: &Checkpoint, index| {
            Block::load(&Weights::new(device, checkpoint), &config.decoder, &config.names, index).unwrap()
        };
        let inputs = checkpoints.each_ref().map(|checkpoint| {
            let block = load(checkpoint, 0);
            let mut x = device.slice_rows(&x, 0..device.shape(&x).0).unwrap();
            let attention = block.output_input(device, &config.decoder, &x, &layout).unwrap();
            block.add_output(device, &mut x, Projection::O, &attention).unwrap();
            let inner = block.down_input(device, &config.decoder, &x).unwrap();
            block.add_output(device, &mut x, Projection::Down, &inner).unwrap();
            x
        });
        let blocks = checkpoints.each_ref().map(|checkpoint| load(checkpoint, 1));
        Self { config, blocks, inputs, layout }
    }

    /// Inputs of a layer of block 1 on the float path and on the quantized one, and its float weight.
    fn layer(&self, device: &Cuda, projection: Projection) -> [CudaTensor; 2] {
        let decoder = &self.config.decoder;
        [0, 1].map(|path| {
            let (block, x) = (&self.blocks[path], &self.inputs[path]);
            match projection {
                Projection::O => block.output_input(device, decoder, x, &self.layout),
                Projection::Down => block.down_input(device, decoder, x),
                Projection::Gate | Projection::Up => block.mlp_input(device, decoder, x),
                Projection::Q | Projection::K | Projection::V => block.attention_input(device, decoder, x),
            }
            .unwrap()
        })
    }
}

#[test]
fn given_the_same_statistics_the_codes_are_the_same() {
    let work = tempfile::tempdir().unwrap();
    let quantized = work.path().join("quantized");
    quantize(&data(MODEL), "cpu", (SAMPLES, 0), &quantized);
    let device = Cuda::emulated(&library(), Float::Bf16).unwrap();
    let paths = Paths::new(&device, &quantized);
    let settings = SolverSettings { scale_type: Float::Bf16, ..SolverSettings::default() };
    let (mut different, mut total) = (0, 0);
    for projection in Projection::ALL {
        let [f, u] = paths.layer(&device, projection);
        let g: Vec<f32> = (0..device.shape(&u).0).map(|token| 0.5 + (token % 3) as f32).collect();
        let mut there = Statistics::new(&device, device.shape(&u).1, true).unwrap();
        there.accumulate(&device, &u, Some(&f), Some(&g)).unwrap();
        let here = Statistics {
            hessian: device.download(&there.hessian).unwrap(),
            cross: there.cross.as_ref().map(|cross| device.download(cross).unwrap()),
            tokens: there.tokens,
            shares: there.shares.clone(),
        };
        let on_device = &paths.blocks[0].linear(projection).weight;
        let weight = device.download(on_device).unwrap();
        let prepared = prepare(&Cpu, &here, &settings).unwrap();
        let (expected, _) = solve_layer(&Cpu, &prepared, &here.hessian, &weight, &settings).unwrap();
        let prepared = prepare(&device, &there, &settings).unwrap();
        let (found, _) = solve_layer(&device, &prepared, &there.hessian, on_device, &settings).unwrap();
        different += found.codes.iter().zip(&expected.codes).filter(|(a, b)| a != b).count();
        total += expected.codes.len();
    }
    println!("{different} of {total} codes differ");
    assert!(1000 * different <= total, "{different} of {total} codes differ");
}

/// In float32 both devices compute nearly the same, up to a code at a tie. A layer whose codes agree has the same scales before they are
/// refitted, and so the same factors; without a refit its scales are others.
#[test]
#[ignore = "slow: whole runs on the emulator"]
fn refitted_scales_are_those_of_the_cpu() {
    let work = tempfile::tempdir().unwrap();
    let model = work.path().join("float32");
    float32_copy(&model);
    let [cuda, cpu, plain] = [("cuda", "residual"), ("cpu", "residual"), ("cpu", "none")].map(|(device, refit)| {
        let (from, calib, out) = (text(&model), text(data("vqa/calib.jsonl")), work.path().join(device).join(refit));
        std::fs::create_dir_all(out.parent().unwrap()).unwrap();
        let flags = ["--samples", "4", "--refit", refit, "--device", device, "--quiet"];
        let output =
            emulated_run(&[["quantize", &from, "--calib", &calib, "--out", &text(&out)].as_slice(), &flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let report = read_json(out.join("report.json"));
        let mut names = report["layers"].as_array().unwrap().iter().map(|layer| layer["name"].as_str().unwrap());
        let layer = names.find(|name| name.ends_with("layers.0.self_attn.o_proj")).unwrap();
        Checkpoint::open(&out).unwrap().packed(layer, 128, 128).unwrap()
    });
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from((a / b - 1.0).abs())).fold(0.0, f64::max);
    assert!(cuda.codes == cpu.codes, "other codes: nothing can be said of the scales");
    assert!(off(&cuda.scales, &cpu.scales) < 1e-4, "{}", off(&cuda.scales, &cpu.scales));
    assert!(cpu.codes == plain.codes && off(&cpu.scales, &plain.scales) > 1e-3, "{}", off(&cpu.scales, &plain.scales));
}

#[test]
fn eval_and_inspect_run_on_the_device_too() {
    let (model, questions) = (text(data(MODEL)), text(data("vqa/eval.jsonl")));
    let arguments = ["eval", &model, &questions, "--limit", "2", "--log-level", "info", "--device", "cuda"];
    let output = emulated_run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("computing on cuda (emulated), the model in Bf16"), "{}", stderr(&output));
    let here = succeed(&["eval", &model, &questions, "--limit", "2", "--device", "cpu", "--quiet"]);
    let there = String::from_utf8(output.stdout).unwrap();
    let score = |table: &str| table.lines().last().unwrap().split_whitespace().nth(2).unwrap().to_owned();
    assert_eq!(score(&there), score(&here), "{there}{here}");

    // `auto` takes no emulated kernels, and says where it computes and why.
    let output = emulated_run(&["inspect", &model, "--log-level", "info", "--device", "auto"]);
    assert!(output.status.success() && stderr(&output).contains("computing on "), "{}", stderr(&output));
    assert!(!stderr(&output).contains("emulated"), "{}", stderr(&output));
}

#[test]
fn a_library_that_is_none_is_refused() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmq-run"));
    let model = text(data(MODEL));
    command.env("VLMQ_EMULATED_KERNELS", "no-such-library.so").args(["inspect", &model, "--device", "cuda"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no-such-library.so"), "{}", stderr(&output));
    let output = vlmq_run(&["inspect", &model, "--device", "cuda:77"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cuda:77"), "{}", stderr(&output));
}
