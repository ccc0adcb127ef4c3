//! What the host alone costs in a run: `cargo bench --bench host`.
//!
//! Whole runs on a device that computes nothing: images and tokens are prepared, every weight is read from its file, codes (all zero) come
//! back, are packed, written and checksummed, and the state is saved. On one that takes no time for it, what is left is the host; on one
//! that sleeps as long as a GPU is expected to compute, what is left above that is what the host does not do beside it. The model has Qwen2.5-VL-7B's width and blocks, its weights are holes in their file (wide_checkpoint.rs); the small images
//! are enlarged to some 490 tokens.

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "wide_checkpoint.rs"]
mod wide_checkpoint;

#[allow(unreachable_pub)]
#[path = "../tests/support/process.rs"]
mod process;

use anyhow::Result;
use clap::Parser;
use process::{peak_kib, processor_time};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vlmq::device::counting::Counting;
use vlmq::model::families::ImageOptions;
use vlmq::plan::ByKind;
use vlmq::progress::{Observer, Stage, StageTime};
use vlmq::report::RunObserver;
use vlmq::run::{self, RunSettings};
use vlmq::tensor::Float;

/// What to run.
#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 3584)]
    hidden: usize,
    #[arg(long, default_value_t = 18944)]
    intermediate: usize,
    #[arg(long, default_value_t = 28)]
    heads: usize,
    #[arg(long, default_value_t = 4)]
    kv_heads: usize,
    #[arg(long, default_value_t = 28)]
    blocks: usize,
    #[arg(long, default_value_t = 512)]
    samples: usize,
    /// Seconds between two saves of the state.
    #[arg(long, default_value_t = RunSettings::default().save_every)]
    save_every: u64,
    /// Where model and output go for the time of the run.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    scratch: PathBuf,
    /// What cargo says to a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Wall and processor time of the stages.
#[derive(Default)]
struct Stages {
    times: Vec<(Stage, Duration, Duration)>,
    since: Option<(Instant, Duration)>,
}

impl Observer for Stages {
    fn stage_started(&mut self, _: Stage, _: u64) {
        self.since = Some((Instant::now(), processor_time()));
    }

    fn stage_finished(&mut self, time: &StageTime) {
        if let Some((wall, processor)) = self.since.take() {
            self.times.push((time.stage, wall.elapsed(), processor_time() - processor));
        }
    }
}

impl RunObserver for Stages {}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = tempfile::tempdir_in(&arguments.scratch)?;
    let at = |name: &str| scratch.path().join(name);
    let wide = |name: &str, value: usize| [format!("--{name}"), value.to_string()];
    let sizes = [
        wide("hidden", arguments.hidden),
        wide("intermediate", arguments.intermediate),
        wide("heads", arguments.heads),
        wide("kv-heads", arguments.kv_heads),
        wide("blocks", arguments.blocks),
    ];
    let model = at("model");
    let said = ["wide_checkpoint".to_owned(), model.display().to_string(), "--sparse".to_owned()];
    let said = said.into_iter().chain(sizes.into_iter().flatten());
    wide_checkpoint::write(&wide_checkpoint::Arguments::parse_from(said))?;
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vqa");
    let conversations = ["calib.jsonl", "eval.jsonl"].map(|name| fs::read_to_string(data.join(name)));
    fs::write(at("samples.jsonl"), conversations.into_iter().collect::<std::io::Result<String>>()?)?;

    // Patches of 28 x 28 pixels are a token.
    let pixels = |tokens: usize| Some(tokens * 28 * 28);
    let settings = RunSettings {
        samples: arguments.samples,
        save_every: arguments.save_every,
        image_root: Some(data),
        image_options: ImageOptions { min_pixels: pixels(470), max_pixels: pixels(520), ..ImageOptions::default() },
        ..RunSettings::new(model, Some(at("samples.jsonl")), at("out"))
    };
    run(&arguments, "no time", &Counting::plain(Float::Bf16).running(), &settings)?;
    run(&arguments, "its time", &Counting::plain(Float::Bf16).running().paced(PREDICTED), &settings)
}

/// What an H200 is expected to do in a second; nothing of it was measured. Products stand for those of activations by weights; the
/// solver's, in float32, take longer.
const PREDICTED: ByKind = ByKind {
    products: 690e12,
    attention: 150e12,
    statistics: 125e12,
    factors: 50e12,
    codes: 10e9,
    values: 500e9,
    checked: f64::INFINITY,
};

/// Runs on a device, and prints what it took.
fn run(arguments: &Arguments, takes: &str, device: &Counting, settings: &RunSettings) -> Result<()> {
    let (wall, processor) = (Instant::now(), processor_time());
    let mut stages = Stages::default();
    let report = run::run(device, settings, &mut stages)?;
    let (wall, processor) = (wall.elapsed(), processor_time() - processor);
    println!("\nA device that takes {takes}:\n\n| stage | wall, s | processor, s |\n|---|---|---|");
    let row = |name: &str, wall: Duration, processor: Duration| {
        println!("| {name} | {:.1} | {:.1} |", wall.as_secs_f64(), processor.as_secs_f64());
    };
    let mut rest = (wall, processor);
    for (stage, wall, processor) in stages.times {
        row(stage.describe().0, wall, processor);
        rest = (rest.0.saturating_sub(wall), rest.1.saturating_sub(processor));
    }
    row("between and behind them", rest.0, rest.1);
    row("all", wall, processor);
    let counts = &report.calibration;
    println!(
        "\n{} samples, {} tokens, {} blocks, saved every {} s; peak memory {} MiB",
        counts.used,
        counts.vision_tokens + counts.text_tokens,
        arguments.blocks,
        arguments.save_every,
        peak_kib() / 1024
    );
    let (busy, waits) = (device.busy_seconds(), device.waits());
    if busy > 0.0 {
        println!(
            "the device's own time, at predicted rates: {busy:.1} s; the run is {:.2} of it",
            wall.as_secs_f64() / busy
        );
    }
    let counted: Vec<String> = waits.iter().map(|(what, count)| format!("{what} {count}")).collect();
    println!("the host waited for the device {} times: {}", waits.values().sum::<u64>(), counted.join(", "));
    fs::remove_dir_all(&settings.out)?;
    Ok(())
}
