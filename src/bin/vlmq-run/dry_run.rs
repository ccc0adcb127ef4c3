//! `vlmq-run quantize --dry-run`.

use crate::args::DryRunFormat;
use crate::{print_json, print_lines, text};
use anyhow::Result;
use serde::Serialize;
use vlmq::plan::evaluation::EvaluationPlan;
use vlmq::progress::Observer;
use vlmq::run::{self, DryRun, RunSettings, Runs};

/// What a run would take, with the evaluations of `--eval` behind it.
#[derive(Serialize)]
struct Planned {
    #[serde(flatten)]
    run: DryRun,
    /// Evaluations of the float model, and of the quantized one against it.
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluations: Option<[PlannedEvaluation; 2]>,
}

#[derive(Serialize)]
struct PlannedEvaluation {
    /// Seconds, estimated.
    seconds: f64,
    #[serde(flatten)]
    plan: EvaluationPlan,
}

pub(crate) fn run<D: Runs>(
    device: &D,
    settings: &RunSettings,
    evaluations: Option<[EvaluationPlan; 2]>,
    format: DryRunFormat,
    observer: &mut dyn Observer,
) -> Result<()> {
    let run = run::dry_run(device, settings, observer)?;
    let rates = run.time.rates;
    let timed = |plan: EvaluationPlan| PlannedEvaluation { seconds: plan.load.seconds(&rates), plan };
    let planned = Planned { run, evaluations: evaluations.map(|plans| plans.map(timed)) };
    match format {
        DryRunFormat::Text => print_lines(&describe(settings, &planned)),
        DryRunFormat::Json => print_json(&planned),
    }
}

fn describe(settings: &RunSettings, planned: &Planned) -> Vec<String> {
    let plan = &planned.run;
    let calibration = &plan.calibration;
    let mut lines = vec![format!(
        "{} ({}) on {}: all inputs are good; nothing was written",
        settings.model.display(),
        plan.family,
        plan.device
    )];
    lines.push(format!(
        "calibration: {}; {} vision and {} text tokens",
        calibration.samples(),
        calibration.vision_tokens,
        calibration.text_tokens
    ));
    lines.push(String::new());
    lines.extend(plan.memory.lines());
    // The second is the first and more.
    if let Some([_, evaluation]) = &planned.evaluations {
        lines.push(format!("and behind it, to evaluate both models on {} samples:", evaluation.plan.samples));
        lines.extend(evaluation.plan.lines());
    }

    lines.push(String::new());
    let disk = &plan.disk;
    let free = disk.free_bytes.map_or_else(String::new, |free| format!("; {} free", text::bytes(free)));
    lines.push(format!("disk: {}{free}", text::bytes(disk.output_bytes + disk.work_bytes)));
    lines.push(format!("  {} the output {}", text::bytes(disk.output_bytes), settings.out.display()));
    lines.push(format!("  {} to go on after an interruption, while it runs", text::bytes(disk.work_bytes)));

    lines.push(String::new());
    let (time, rates) = (&plan.time, &plan.time.rates);
    let row = |name: String, seconds: f64| vec![format!("  {name}"), text::seconds(seconds)];
    let mut rows: Vec<_> = time.stages.iter().map(|stage| row(stage.stage.to_string(), stage.seconds)).collect();
    let mut seconds = time.seconds;
    for (evaluation, name) in planned.evaluations.iter().flatten().zip(["float", "quantized"]) {
        rows.push(row(format!("evaluating the {name} model"), evaluation.seconds));
        seconds += evaluation.seconds;
    }
    lines.push(format!("time, estimated: {}", text::seconds(seconds)));
    lines.extend(text::table(&rows));
    lines.push(format!(
        "  at the GFLOP/s measured here: {:.1} in products, {:.1} in attention, {:.1} in statistics, {:.1} in factorizations; \
         files as fast as they are checked",
        rates.products / 1e9,
        rates.attention / 1e9,
        rates.statistics / 1e9,
        rates.factors / 1e9
    ));
    lines
}
