//! The memory of the CUDA device on emulated kernels, or on a GPU (`VLMQ_TEST_GPU`): parking and fetching tensors, the limit,
//! and runs of the whole pipeline against the plan that was made before their start.

use crate::support::devices::{self, on_gpu, whole};
use crate::support::kernels::{Variant, build};
use crate::support::program::{names_in, stderr, text};
use crate::support::{data, golden, message};
use std::path::Path;
use std::process::Command;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::Cuda;
use vlmq::device::{Device, ModelOps, SolveOps};
use vlmq::model::families::{ImageMode, ImageOptions};
use vlmq::plan::MemoryPlan;
use vlmq::progress::{Observer, Stage};
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::{Importance, Solver, SolverSettings};
use vlmq::report::{RunObserver, RunReport};
use vlmq::run::evaluation::{EvaluationSettings, evaluate, plan_comparison};
use vlmq::run::{self, RunSettings};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

fn device() -> Cuda {
    devices::own_device(Float::Bf16)
}

fn limited(limit: Option<u64>) -> Cuda {
    let device = device();
    if let Some(limit) = limit {
        limit_tensors(&device, limit);
    }
    device
}

/// Leaves so many bytes to tensors: a GPU gets as much more as it leaves to its pool, and cuBLAS its work space.
fn limit_tensors(device: &Cuda, limit: u64) {
    device.limit_memory(if on_gpu() { limit * 16 / 15 + (32 << 20) } else { limit }).unwrap();
    assert_eq!(device.memory_limit(), Some(limit));
}

#[test]
fn parked_tensors_come_back_as_they_were() {
    let device = device();
    let (x, y) = (whole(33, 65, 1), whole(33, 65, 2));
    let mut there = device.upload_model(x.clone()).unwrap();
    let mut other = device.upload_model(y.clone()).unwrap();
    for round in 0..3 {
        device.park(&mut there).unwrap();
        device.park(&mut there).unwrap();
        assert_eq!(device.shape(&there), (33, 65));
        device.fetch(&mut there).unwrap();
        device.fetch(&mut there).unwrap();
        assert_eq!(device.download(&there).unwrap(), x, "round {round}");
    }
    // What was changed since the last time is what comes back, whoever changed it.
    let mut expected = x;
    for round in 0..3 {
        device.park(&mut there).unwrap();
        device.fetch(&mut there).unwrap();
        match round {
            0 => {
                device.add_assign(&mut there, &other).unwrap();
                Cpu.add_assign(&mut expected, &y).unwrap();
            }
            1 => {
                device.scatter_rows(&mut there, &[7, 3], &device.slice_rows(&other, 0..2).unwrap()).unwrap();
                Cpu.scatter_rows(&mut expected, &[7, 3], &Cpu.slice_rows(&y, 0..2).unwrap()).unwrap();
            }
            _ => {
                device.clear(&mut there).unwrap();
                Cpu.clear(&mut expected).unwrap();
            }
        }
        device.park(&mut there).unwrap();
        device.fetch(&mut there).unwrap();
        assert_eq!(device.download(&there).unwrap(), expected, "round {round}");
    }
    let mut empty = device.upload_model(Matrix::zeros(0, 5)).unwrap();
    device.park(&mut empty).unwrap();
    device.fetch(&mut empty).unwrap();
    assert_eq!(device.download(&empty).unwrap(), Matrix::zeros(0, 5));
    // Parked again before anybody looked.
    device.park(&mut other).unwrap();
    device.fetch(&mut other).unwrap();
    device.park(&mut other).unwrap();
    device.fetch(&mut other).unwrap();
    assert_eq!(device.download(&other).unwrap(), y);
    // Given back while parked, and while on its way.
    device.park(&mut there).unwrap();
    drop(there);
    device.park(&mut empty).unwrap();
    device.fetch(&mut empty).unwrap();
    drop(empty);
    device.synchronize().unwrap();
}

#[test]
fn any_use_of_a_parked_tensor_is_an_error() {
    let device = device();
    let x = || device.upload_model(whole(4, 4, 1)).unwrap();
    let (y, mut parked) = (x(), x());
    device.park(&mut parked).unwrap();
    let errors = [
        message(device.download(&parked)),
        message(device.clear(&mut parked)),
        message(device.first_non_finite_row(&parked)),
        message(device.linear(&y, &parked, None)),
        message(device.linear(&parked, &y, None)),
        message(device.matmul(&parked, &y)),
        message(device.add_assign(&mut parked, &y)),
        message(device.add_assign(&mut x(), &parked)),
        message(device.slice_rows(&parked, 0..2)),
        message(device.gather_rows(&parked, &[0])),
        message(device.append_rows(&mut x(), &parked)),
        message(device.append_rows(&mut parked, &y)),
        message(device.squared_norm(&parked)),
    ];
    for (i, error) in errors.iter().enumerate() {
        // The norm asks for float32 first.
        assert!(error.contains("parked in host memory") || error.contains("float32"), "{i}: {error}");
    }
    device.fetch(&mut parked).unwrap();
    assert_eq!(device.download(&parked).unwrap(), whole(4, 4, 1));
}

#[test]
fn the_limit_holds_and_parking_makes_room() {
    let device = device();
    // On a GPU rows of 60 MiB, beside which the blocks of its pool do not count.
    let cols = if on_gpu() { 15 << 20 } else { 256 };
    let bytes = |rows: u64| rows * cols as u64 * 4;
    limit_tensors(&device, bytes(10));
    device.reset_peak();
    let mut a = device.zeros(6, cols).unwrap();
    let error = message(device.zeros(5, cols));
    for part in [bytes(5), bytes(6), bytes(10)] {
        assert!(error.contains(&part.to_string()), "{error}");
    }
    device.park(&mut a).unwrap();
    let b = device.zeros(5, cols).unwrap();
    let error = message(device.fetch(&mut a));
    assert!(error.contains(&bytes(10).to_string()), "{error}");
    assert!(message(device.download(&a)).contains("parked"));
    drop(b);
    device.fetch(&mut a).unwrap();
    assert!(device.download(&a).unwrap() == Matrix::zeros(6, cols));
    assert_eq!(device.peak_bytes(), Some(bytes(6)));
    let error = message(device.limit_memory(bytes(20)));
    assert!(error.contains("before the first tensor") && error.contains(&bytes(6).to_string()), "{error}");
    drop(a);
    device.reset_peak();
    assert_eq!(device.peak_bytes(), Some(0));
    // Larger than any block that was freed, and than what the limit leaves beside those: they are given up for it.
    let whole = device.with_precision(Float::F32).zeros(10, cols).unwrap();
    assert_eq!(device.peak_bytes(), Some(bytes(10)));
    device.synchronize().unwrap();
    let pool = device.pool_peak().unwrap();
    println!("{pool:?}");
    assert_eq!(pool.is_some(), on_gpu());
    if let Some(pool) = pool {
        let order = [bytes(10), pool.used_bytes, pool.reserved_bytes, bytes(10) * 16 / 15];
        assert!(order.is_sorted(), "{order:?}");
    }
    drop(whole);
    // What the pool still holds does not count against another limit.
    limit_tensors(&device, bytes(10));
    drop(device.zeros(10, cols).unwrap());
}

#[test]
fn the_cpu_parks_nothing() {
    let mut x = whole(3, 4, 1);
    Cpu.park(&mut x).unwrap();
    assert_eq!(Cpu.download(&x).unwrap(), whole(3, 4, 1));
    Cpu.fetch(&mut x).unwrap();
    assert_eq!((Cpu.memory_limit(), Cpu.peak_bytes(), Cpu.pool_peak().unwrap()), (None, None, None));
    assert_eq!(Cpu.triangle_bytes(8), 256);
}

/// A few samples in several chunks. Twice as wide as anything else in it, the MLP makes the solve the worst step.
fn settings(out: &Path, solver: SolverSettings, importance: Importance) -> RunSettings {
    RunSettings {
        solver,
        importance,
        samples: 5,
        chunk_tokens: 64,
        ..RunSettings::new(data("tiny-qwen2-vl-narrow"), Some(data("vqa/calib.jsonl")), out.to_owned())
    }
}

/// Chunks of plain text through a model so narrow that they are the worst of all: the predictions at the end, or with chunks
/// some `times` as long a pass over them. The texts lie beside the output.
fn long_chunks(settings: RunSettings, times: usize) -> RunSettings {
    let words = ["a red ring", "two blue squares", "what is the pink digit?", "describe the image."];
    let line = |i: usize| {
        let text: Vec<&str> = (0..times * (25 + i)).map(|j| words[(i + j * j) % 4]).collect();
        serde_json::json!({"text": text.join(" ")}).to_string()
    };
    let calib = settings.out.with_file_name("calib.jsonl");
    std::fs::write(&calib, (0..8).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    RunSettings {
        model: golden("model/rope-parameters-f32"),
        calib: Some(calib),
        samples: 8,
        chunk_tokens: times * 400,
        solver: SolverSettings { group_size: Some(32), ..settings.solver },
        ..settings
    }
}

/// The peak of every stage is what was planned: not more, and not less by more than a tenth.
fn check_plan(report: &RunReport, expected: &MemoryPlan) {
    let plan = &report.memory_plan;
    println!("{}", plan.lines().join("\n"));
    for stage in &plan.stages {
        let measured = stage.measured_bytes.unwrap();
        println!("{}: {measured} of {}, {:.3}", stage.stage, stage.bytes, measured as f64 / stage.bytes as f64);
    }
    assert_eq!((plan.device_bytes, plan.activations), (expected.device_bytes, expected.activations));
    for stage in &plan.stages {
        let measured = stage.measured_bytes.unwrap();
        // The next block's weights may come behind the worst moment.
        let ahead = stage.entries.iter().filter(|entry| entry.name == "weights of the next block");
        let with_all = measured + ahead.map(|entry| entry.bytes).sum::<u64>();
        assert!(measured <= stage.bytes && 10 * with_all >= 9 * stage.bytes, "{measured} of {stage:?}");
    }
    assert_eq!(report.peak_device_bytes, plan.stages.iter().filter_map(|stage| stage.measured_bytes).max());
}

/// A run that keeps all on the device and one that streams its activations from host memory write the same bytes, each given no byte more
/// than its plan asks for. The worst step of the blocks is `step`.
fn check_streaming(step: &str, settings: impl Fn(&Path) -> RunSettings) {
    let work = tempfile::tempdir().unwrap();
    let run = |limit: Option<u64>, expected: Activations| {
        let device = limited(limit);
        let out = work.path().join(format!("{expected:?}"));
        let settings = settings(&out);
        let plan = run::plan(&device, &settings).unwrap();
        assert_eq!(plan.activations, expected);
        assert_eq!(plan.stages[1].step, step);
        check_plan(&run::run(&device, &settings, &mut ()).unwrap(), &plan);
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let plan = |limit: Option<u64>| run::plan(&limited(limit), &settings(&work.path().join("plan"))).unwrap();
    let resident = plan(None);
    assert_eq!((resident.activations, resident.host_bytes), (Activations::Resident, 0));
    let streamed = plan(Some(resident.device_bytes - 1));
    assert!(streamed.device_bytes < resident.device_bytes && streamed.host_bytes > 0, "{streamed:?}");
    let bytes = run(Some(resident.device_bytes), Activations::Resident);
    assert!(run(Some(streamed.device_bytes), Activations::Streamed) == bytes, "other bytes when streamed");
}

#[test]
fn comparisons_of_the_paths_are_streamed_within_their_plan() {
    check_streaming("comparing the paths", |out| {
        long_chunks(settings(out, SolverSettings::default(), Importance::None), 1)
    });
}

#[test]
#[ignore = "slow: whole runs on the emulator"]
fn long_chunks_are_streamed_within_their_plan() {
    check_streaming("importance", |out| long_chunks(settings(out, SolverSettings::default(), Importance::Vlmq), 4));
}

#[test]
#[ignore = "slow: whole runs on the emulator"]
fn gptaq_is_streamed_within_its_plan() {
    check_streaming("solving mlp.down_proj", |out| settings(out, SolverSettings::default(), Importance::Vlmq));
}

#[test]
#[ignore = "slow: whole runs on the emulator"]
fn gptq_is_streamed_within_its_plan() {
    check_streaming("solving mlp.down_proj", |out| {
        let solver = SolverSettings { solver: Solver::Gptq, group_size: Some(32), ..SolverSettings::default() };
        settings(out, solver, Importance::None)
    });
}

#[test]
#[ignore = "slow: whole runs on the emulator"]
fn refits_are_streamed_within_their_plan() {
    check_streaming("solving mlp.down_proj", |out| {
        settings(out, SolverSettings { solver: Solver::Gptq, bits: 2, ..SolverSettings::default() }, Importance::None)
    });
}

/// Checkpoints of every family, their settings of images, and the device's precision.
const FAMILIES: &[(&str, ImageOptions, Float)] = &[
    ("nested-f16-sharded", pixels(12544), Float::F16),
    ("qwen2_5_vl-flat-bf16", pixels(20000), Float::Bf16),
    ("qwen2_5_vl-nested-f16", pixels(20000), Float::F16),
    ("llava-hub-tied-f16", ImageOptions { min_pixels: None, max_pixels: None, image_mode: None }, Float::F16),
    (
        "llava-v5-f32",
        ImageOptions { min_pixels: None, max_pixels: None, image_mode: Some(ImageMode::Anyres) },
        Float::F32,
    ),
    (
        "llava-resaved-f16-sharded",
        ImageOptions { min_pixels: None, max_pixels: None, image_mode: Some(ImageMode::Anyres) },
        Float::F16,
    ),
    ("qwen3_vl-tied-bf16", pixels(8192), Float::Bf16),
    ("qwen3_vl-f16-sharded", pixels(8192), Float::F16),
];

const fn pixels(most: usize) -> ImageOptions {
    ImageOptions { min_pixels: None, max_pixels: Some(most), image_mode: None }
}

#[test]
fn every_familys_tower_holds_what_was_planned() {
    let work = tempfile::tempdir().unwrap();
    for &(name, image_options, precision) in FAMILIES {
        let usual = settings(&work.path().join(name), SolverSettings::default(), Importance::None);
        let settings = RunSettings {
            model: golden("model").join(name),
            calib: Some(golden("model").join(format!("{name}.jsonl"))),
            solver: SolverSettings { solver: Solver::Gptq, group_size: Some(32), ..SolverSettings::default() },
            image_options,
            samples: 3,
            ..usual
        };
        let device = devices::own_device(precision);
        println!("{name}");
        let plan = run::plan(&device, &settings).unwrap();
        assert_eq!(plan.stages[0].stage, Stage::Vision, "{name}");
        let report = run::run(&device, &settings, &mut ()).unwrap();
        let stage = &report.memory_plan.stages[0];
        let measured = stage.measured_bytes.unwrap();
        println!("{}: {measured} of {}, {:.3}", stage.step, stage.bytes, measured as f64 / stage.bytes as f64);
        assert!(measured <= stage.bytes && 10 * measured >= 9 * stage.bytes, "{name}: {measured} of {stage:?}");
        let peak = report.peak_device_bytes.unwrap();
        assert!(peak <= plan.device_bytes, "{name}: {peak} of {:?}", report.memory_plan.stages);
    }
}

#[test]
fn evaluations_hold_what_was_planned() {
    for &(name, image_options, precision) in FAMILIES {
        let (model, questions) = (golden("model").join(name), golden("model").join(format!("{name}.jsonl")));
        let settings = EvaluationSettings {
            reference: Some(model.clone()),
            limit: Some(2),
            max_new_tokens: Some(3),
            image_options,
            ..EvaluationSettings::new(model, questions)
        };
        let device = devices::own_device(precision);
        let [_, against] = plan_comparison(&device, &settings, 4).unwrap();
        let plan = against.device.unwrap();
        device.reset_peak();
        evaluate(&device, &settings, &mut ()).unwrap();
        let measured = device.peak_bytes().unwrap();
        println!("{name}, {}: {measured} of {}, {:.3}", plan.step, plan.bytes, measured as f64 / plan.bytes as f64);
        assert!(measured <= plan.bytes && 10 * measured >= 9 * plan.bytes, "{name}: {measured} of {plan:?}");
    }
}

/// Hears what a run did before it failed.
#[derive(Default)]
struct Heard(Vec<Stage>);

impl Observer for Heard {
    fn stage_started(&mut self, stage: Stage, _: u64) {
        self.0.push(stage);
    }
}

impl RunObserver for Heard {}

#[test]
fn a_plan_that_cannot_work_is_refused_before_any_work() {
    let work = tempfile::tempdir().unwrap();
    let settings = settings(&work.path().join("out"), SolverSettings::default(), Importance::Vlmq);
    let device = device();
    let resident = run::plan(&device, &settings).unwrap();
    limit_tensors(&device, resident.device_bytes - 1);
    let streamed = run::plan(&device, &settings).unwrap();
    limit_tensors(&device, streamed.device_bytes - 1);
    device.reset_peak();
    let mut heard = Heard::default();
    let error = message(run::run(&device, &settings, &mut heard));
    println!("{error}");
    for part in ["does not fit", "MiB", "--max-gpu-memory", "--solver rtn would take"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert_eq!(heard.0, [Stage::Data]);
    assert_eq!(device.peak_bytes(), Some(0));
    assert_eq!(names_in(work.path()), [""; 0]);

    // The same of the program, which is not there where the tests run on a GPU.
    if on_gpu() {
        return;
    }
    let (model, calib, out) = (text(settings.model), text(data("vqa/calib.jsonl")), text(settings.out));
    let flags = ["--samples", "2", "--device", "cuda", "--max-gpu-memory", "2MiB"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlmq-run"));
    command.env("VLMQ_EMULATED_KERNELS", build("vlmq_kernels", "kernels", Variant::Plain));
    command.args(["quantize", &model, "--calib", &calib, "--out", &out]).args(flags);
    let output = command.output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.lines().last().unwrap().contains("does not fit into 2.00 MiB of GPU memory"), "{error}");
    assert_eq!(names_in(work.path()), [""; 0]);
}
