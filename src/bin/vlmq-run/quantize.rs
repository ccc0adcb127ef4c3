//! `vlmq-run quantize`.

use crate::args::QuantizeArgs;
use crate::progress::Screen;
use crate::{dry_run, eval, print_lines, text};
use anyhow::Result;
use vlmq::device::{ModelOps, SolveOps};
use vlmq::evaluate::{self, Evaluation};
use vlmq::quantize::pipeline::{self, PipelineSettings};
use vlmq::quantize::report::RunReport;

pub(crate) fn run<D: ModelOps + SolveOps>(device: &D, args: &QuantizeArgs, screen: &Screen) -> Result<()> {
    let settings = args.settings();
    let mut observer = screen.observer(settings.solver.damp);
    if let Some(format) = args.dry_run {
        if let Some(data) = args.eval.clone() {
            evaluate::check::<D>(&args.evaluation_before(data))?;
        }
        return dry_run::run(device, &settings, format, &mut observer);
    }
    let evaluate = |settings| evaluate::run(device, &settings, &mut screen.observer(f64::INFINITY));
    let before = args.eval.clone().map(|data| evaluate(args.evaluation_before(data))).transpose()?;
    let report = pipeline::run(device, &settings, &mut observer)?;
    print_lines(&summary(&settings, &report))?;
    if let (Some(before), Some(data)) = (before, args.eval.clone()) {
        let after = evaluate(args.evaluation_after(data))?;
        print_lines(&comparison(&before, &after))?;
    }
    Ok(())
}

/// The end of a run in a few lines.
fn summary(settings: &PipelineSettings, report: &RunReport) -> Vec<String> {
    let mut lines = vec![format!("wrote {} ({})", settings.out.display(), report.format)];
    let mut say = |name: &str, value: String| lines.push(format!("  {name:<12} {value}"));

    let bits =
        report.bits_per_weight().map_or_else(String::new, |bits| format!(", {bits:.2} bits per quantized weight"));
    say("size", format!("{} -> {}{bits}", text::bytes(report.bytes_before), text::bytes(report.bytes_after)));

    if let (Some(mean), Some(worst)) = (report.mean_relative_error(), report.worst_layer()) {
        let worst_error = worst.solve.relative_error;
        say("rel. error", format!("mean {mean:.3e}, worst {worst_error:.3e} in {}", worst.name));
    }
    let asked = settings.solver.damp;
    let raised = report.layers.iter().filter(|layer| layer.solve.damp.is_some_and(|damp| damp > asked)).count();
    if raised > 0 {
        say("damping", format!("raised above {asked} in {raised} of {} layers", report.layers.len()));
    }
    let calibration = &report.calibration;
    say(
        "calibration",
        format!(
            "{} samples, {} left out as too long; {} vision and {} text tokens",
            calibration.used, calibration.too_long, calibration.vision_tokens, calibration.text_tokens
        ),
    );
    let stages: Vec<String> =
        report.stages.iter().map(|stage| format!("{} {}", stage.stage, text::seconds(stage.seconds))).collect();
    let stages = if stages.is_empty() { String::new() } else { format!(" ({})", stages.join(", ")) };
    say("time", format!("{}{stages}", text::seconds(report.seconds)));
    if let Some(peak) = report.peak_memory_bytes {
        say("peak memory", text::bytes(peak));
    }
    if let Some(peak) = report.peak_device_bytes {
        say("GPU memory", format!("{}, {} planned", text::bytes(peak), text::bytes(report.memory_plan.device_bytes)));
    }
    if !report.loaders.is_empty() {
        lines.push("loads with".into());
        for loader in &report.loaders {
            lines.push(format!("  {}", loader.name));
            lines.extend(loader.command.lines().map(|line| format!("    {line}")));
        }
    }
    lines
}

/// Both evaluations, total and by group.
fn comparison(before: &Evaluation, after: &Evaluation) -> Vec<String> {
    let header = ["", "n", "float", "quantized", "nll float", "nll quantized", "kl"].map(str::to_owned).to_vec();
    let mut rows = vec![header];
    let groups = before.groups.iter().filter_map(|(name, float)| Some((name, float, after.groups.get(name)?)));
    for (name, float, quantized) in groups {
        rows.push(vec![
            name.clone(),
            float.n.to_string(),
            eval::percent(float.score),
            eval::percent(quantized.score),
            text::optional(float.nll),
            text::optional(quantized.nll),
            text::optional(quantized.kl),
        ]);
    }
    rows.push(vec![
        "total".into(),
        before.n.to_string(),
        eval::percent(before.score),
        eval::percent(after.score),
        text::optional(before.nll),
        text::optional(after.nll),
        text::optional(after.kl),
    ]);
    text::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use vlmq::checkpoint::formats::Loader;
    use vlmq::evaluate::SampleResult;
    use vlmq::progress::{Stage, StageTime};
    use vlmq::quantize::SolveReport;
    use vlmq::quantize::plan::MemoryPlan;
    use vlmq::quantize::report::{CalibrationCounts, LayerReport};

    fn settings() -> PipelineSettings {
        let line = ["vlmq-run", "quantize", "m", "--calib", "c", "--out", "o"];
        match crate::args::Cli::parse_from(line).command {
            crate::args::Command::Quantize(args) => args.settings(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn summaries_say_what_matters() {
        let solve = SolveReport {
            relative_error: 0.02,
            damp: Some(0.04),
            dead_inputs: 0,
            tokens: 9,
            seconds: 0.1,
            findings: Vec::new(),
        };
        let layer = LayerReport {
            name: "model.layers.0.mlp.down_proj".into(),
            block: 0,
            rows: 10,
            cols: 8,
            bits: 3,
            group_columns: 8,
            solve,
            importance: None,
        };
        let report = RunReport {
            family: "a_family".into(),
            format: "gptq".into(),
            device: "cpu".into(),
            calibration: CalibrationCounts { used: 5, too_long: 1, vision_tokens: 320, text_tokens: 80 },
            layers: vec![layer],
            stages: vec![StageTime { stage: Stage::Blocks, seconds: 1.0 }],
            seconds: 2.0,
            peak_memory_bytes: Some(3 << 20),
            memory_plan: MemoryPlan { device_bytes: 5 << 20, ..MemoryPlan::default() },
            peak_device_bytes: Some(4 << 20),
            bytes_before: 2 << 20,
            bytes_after: 1 << 20,
            quantized_bytes: 35,
            loaders: vec![Loader { name: "vLLM", command: "vllm serve o".into() }],
            ..RunReport::default()
        };
        let expected = "\
wrote o (gptq)
  size         2.00 MiB -> 1.00 MiB, 3.50 bits per quantized weight
  rel. error   mean 2.000e-2, worst 2.000e-2 in model.layers.0.mlp.down_proj
  damping      raised above 0.01 in 1 of 1 layers
  calibration  5 samples, 1 left out as too long; 320 vision and 80 text tokens
  time         2.00 s (quantizing 1.00 s)
  peak memory  3.00 MiB
  GPU memory   4.00 MiB, 5.00 MiB planned
loads with
  vLLM
    vllm serve o";
        assert_eq!(summary(&settings(), &report).join("\n"), expected);
    }

    #[test]
    fn both_scores_stand_in_one_line() {
        let sample = |score: f64, kl| SampleResult {
            id: "s".into(),
            group: Some("count".into()),
            answer: "5".into(),
            score,
            answer_tokens: 2,
            nll: 1.0,
            kl,
        };
        let lines =
            comparison(&Evaluation::new(vec![sample(1.0, None)]), &Evaluation::new(vec![sample(0.0, Some(0.5))]));
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("       n    float  quantized"), "{}", lines[0]);
        let total: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(total, ["total", "1", "100.00%", "0.00%", "0.5000", "0.5000", "0.2500"]);
    }
}
