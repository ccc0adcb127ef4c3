//! What the host alone costs in a run: `cargo bench --bench host`.
//!
//! A whole run on a device that computes nothing: images and tokens are prepared, every weight is read from its file, codes (all zero) come
//! back, are packed, written and checksummed, and the state is saved behind every block. A device that computes has at least these seconds
//! to wait for, where nothing of them is done beside it. The model is two blocks of Qwen2-VL-2B's width with random weights
//! (wide_checkpoint.rs).

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "wide_checkpoint.rs"]
mod wide_checkpoint;

use clap::Parser;
use criterion::{Criterion, criterion_group, criterion_main};
use std::path::Path;
use std::time::Duration;
use vlmq::device::counting::Counting;
use vlmq::progress::StageTime;
use vlmq::run::{self, RunSettings};
use vlmq::tensor::Float;

/// Blocks of the model.
const BLOCKS: usize = 2;

fn benches(c: &mut Criterion) {
    let work = tempfile::tempdir().unwrap();
    let model = work.path().join("model");
    let arguments = ["wide_checkpoint", model.to_str().unwrap(), "--blocks", &BLOCKS.to_string()];
    wide_checkpoint::write(&wide_checkpoint::Arguments::parse_from(arguments)).unwrap();
    let calib = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vqa/calib.jsonl");
    let mut group = c.benchmark_group("host");
    group.sample_size(10).measurement_time(Duration::from_secs(30));
    let mut runs = 0;
    let mut stages = Vec::new();
    group.bench_function("whole_run_without_a_device", |b| {
        b.iter_with_large_drop(|| {
            runs += 1;
            let out = work.path().join(format!("out-{runs}"));
            let settings =
                RunSettings { samples: 64, ..RunSettings::new(model.clone(), Some(calib.clone()), out.clone()) };
            let report = run::run(&Counting::plain(Float::Bf16).running(), &settings, &mut ()).unwrap();
            stages = report.stages;
            // Out of the way before the disk is full.
            std::fs::remove_dir_all(out).unwrap();
        })
    });
    group.finish();
    for StageTime { stage, seconds } in stages {
        println!("{stage}: {seconds:.2} s");
    }
}

criterion_group!(all, benches);
criterion_main!(all);
