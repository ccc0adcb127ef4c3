//! Plans of evaluations, against evaluations.

use crate::support::{data, golden};
use std::path::{Path, PathBuf};
use vlmq::device::Device;
use vlmq::device::counting::Counting;
use vlmq::model::language_model::Residency;
use vlmq::plan::evaluation::EvaluationPlan;
use vlmq::run::evaluation::{EvaluationSettings, evaluate, plan_comparison};
use vlmq::tensor::Float;

/// Plans of the model alone and against itself.
fn plans(device: &Counting, settings: &EvaluationSettings) -> [EvaluationPlan; 2] {
    plan_comparison(device, settings, 4).unwrap()
}

fn device_bytes(plan: &EvaluationPlan) -> u64 {
    plan.device.as_ref().unwrap().bytes
}

/// Whole evaluations on a device that counts hold what was planned: not more, and not less by more than a tenth.
#[test]
fn evaluations_that_only_count_hold_what_was_planned() {
    let of_golden = |name: &str| (golden("model").join(name), golden("model").join(format!("{name}.jsonl")));
    let models: Vec<(PathBuf, PathBuf)> = ["tiny-qwen2-vl", "tiny-qwen2-vl-narrow"]
        .map(|name| (data(name), data("vqa/eval.jsonl")))
        .into_iter()
        .chain(["flat-tied-bf16", "qwen2_5_vl-flat-bf16", "llava-hub-tied-f16", "qwen3_vl-tied-bf16"].map(of_golden))
        .collect();
    let mut steps = Vec::new();
    for (model, questions) in &models {
        for (decode, longest) in [(true, 300), (true, 2), (false, 2)] {
            let alone = EvaluationSettings {
                limit: Some(20),
                decode,
                max_new_tokens: Some(longest),
                ..EvaluationSettings::new(model.clone(), questions.clone())
            };
            let against = EvaluationSettings { reference: Some(model.clone()), ..alone.clone() };
            let fresh = || Counting::plain(Float::Bf16);
            for (settings, plan) in [&alone, &against].into_iter().zip(plans(&fresh(), &alone)) {
                assert_eq!(plan.weights, Residency::Resident);
                steps.push(check(fresh(), settings, &plan));
            }
        }
    }
    steps.sort_unstable();
    steps.dedup();
    assert_eq!(steps, ["a block", "encoding images"]);
}

/// The same where weights do not stay on the device.
#[test]
fn streamed_evaluations_hold_what_was_planned() {
    let (model, questions) = (data("tiny-qwen2-vl"), data("vqa/eval.jsonl"));
    let settings = EvaluationSettings {
        limit: Some(20),
        max_new_tokens: Some(2),
        reference: Some(model.clone()),
        ..EvaluationSettings::new(model, questions)
    };
    let resident = &plans(&Counting::plain(Float::Bf16), &settings)[1];
    let limited = || Counting::plain(Float::Bf16).limited(device_bytes(resident) * 3 / 4);
    let streamed = &plans(&limited(), &settings)[1];
    assert!(device_bytes(streamed) < device_bytes(resident));
    assert_eq!(streamed.weights, Residency::Streamed { held: 0 });
    check(limited(), &settings, streamed);
}

/// Evaluates on `device`, and returns the step that takes most.
fn check(device: Counting, settings: &EvaluationSettings, plan: &EvaluationPlan) -> String {
    let device = device.running();
    evaluate(&device, settings, &mut ()).unwrap();
    let (peak, planned, step) = (device.peak(), device_bytes(plan), &plan.device.as_ref().unwrap().step);
    let name = Path::new(&settings.model).file_name().unwrap().display();
    println!("{name}, {step}: {} of {planned}, {:.3}", peak.bytes, peak.bytes as f64 / planned as f64);
    assert!(peak.bytes <= planned && 10 * peak.bytes >= 9 * planned, "{name}: {peak:?} of {plan:?}");
    assert_eq!(device.alive(), 0, "{name}");
    assert_eq!(device.peak_bytes(), Some(peak.bytes));
    step.clone()
}
