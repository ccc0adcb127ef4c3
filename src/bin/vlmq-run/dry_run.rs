//! `vlmq-run quantize --dry-run`.

use crate::args::DryRunFormat;
use crate::{print_json, print_lines, text};
use anyhow::Result;
use vlmq::device::{ModelOps, SolveOps};
use vlmq::progress::Observer;
use vlmq::quantize::pipeline::{self, DryRun, PipelineSettings};

pub(crate) fn run<D: ModelOps + SolveOps>(
    device: &D,
    settings: &PipelineSettings,
    format: DryRunFormat,
    observer: &mut dyn Observer,
) -> Result<()> {
    let plan = pipeline::dry_run(device, settings, observer)?;
    match format {
        DryRunFormat::Text => print_lines(&describe(settings, &plan)),
        DryRunFormat::Json => print_json(&plan),
    }
}

fn describe(settings: &PipelineSettings, plan: &DryRun) -> Vec<String> {
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

    lines.push(String::new());
    let disk = &plan.disk;
    let free = disk.free_bytes.map_or_else(String::new, |free| format!("; {} free", text::bytes(free)));
    lines.push(format!("disk: {}{free}", text::bytes(disk.output_bytes + disk.work_bytes)));
    lines.push(format!("  {} the output {}", text::bytes(disk.output_bytes), settings.out.display()));
    lines.push(format!("  {} to go on after an interruption, while it runs", text::bytes(disk.work_bytes)));

    lines.push(String::new());
    let (time, rates) = (&plan.time, &plan.time.rates);
    lines.push(format!("time, estimated: {}", text::seconds(time.seconds)));
    let row = |name: String, seconds: f64| vec![format!("  {name}"), text::seconds(seconds)];
    let rows: Vec<_> = time.stages.iter().map(|stage| row(stage.stage.to_string(), stage.seconds)).collect();
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
