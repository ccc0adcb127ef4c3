//! `vlmq-run quantize`.

use crate::args::QuantizeArgs;
use crate::progress::Screen;
use crate::signals::Signals;
use crate::{dry_run, eval, print_lines, text};
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use vlmq::evaluate::{ComparedScores, Comparison};
use vlmq::progress::Stop;
use vlmq::quantize::FindingKind;
use vlmq::quantize::settings::Solver;
use vlmq::report::split;
use vlmq::report::{LayerReport, RunReport};
use vlmq::run::{self, RunSettings, Runs};

pub(crate) fn run<D: Runs>(device: &D, args: &QuantizeArgs, screen: &Screen, signals: &Signals) -> Result<()> {
    let settings = args.settings();
    // What is wrong with the questions should not show after hours of quantizing.
    let asked = args.eval.clone().map(|data| args.evaluation_before(data));
    let evaluations =
        asked.map(|asked| run::evaluation::plan_comparison(device, &asked, settings.solver.bits)).transpose()?;
    if let Some(format) = args.dry_run {
        return dry_run::run(device, &settings, evaluations, format, &mut screen.observer(Stop::default()));
    }
    let mut report = signals.wait_for(|stop| run::run(device, &settings, &mut screen.observer(stop)))?;
    print_lines(&summary(&settings, &report)).with_context(|| format!("{} is finished", settings.out.display()))?;
    if let Some(data) = args.eval.clone() {
        let compared = compare(device, args, data, screen).with_context(|| {
            format!("{} is finished, but not evaluated; `vlmq-run eval` can do that", settings.out.display())
        })?;
        print_lines(&comparison(&compared))?;
        report.evaluation = Some(compared);
        report.replace_in(&settings.out)?;
    }
    Ok(())
}

/// The float model's answers and those of the finished one.
fn compare<D: Runs>(device: &D, args: &QuantizeArgs, data: PathBuf, screen: &Screen) -> Result<Comparison> {
    let evaluate = |settings| run::evaluation::evaluate(device, &settings, &mut screen.observer(Stop::default()));
    let float = evaluate(args.evaluation_before(data.clone()))?;
    let quantized = evaluate(args.evaluation_after(data))?;
    Ok(Comparison::new(&float, &quantized))
}

/// The end of a run in a few lines.
fn summary(settings: &RunSettings, report: &RunReport) -> Vec<String> {
    let mut lines = vec![format!("wrote {} ({})", settings.out.display(), report.format)];
    let mut say = |name: &str, value: String| lines.push(format!("  {name:<12} {value}"));

    let bits =
        report.bits_per_weight().map_or_else(String::new, |bits| format!(", {bits:.2} bits per quantized weight"));
    say("size", format!("{} -> {}{bits}", text::bytes(report.bytes_before), text::bytes(report.bytes_after)));

    if let (Some(mean), Some(worst)) = (report.mean_relative_error(), report.worst_layer()) {
        let worst_error = worst.solve.relative_error;
        say("rel. error", format!("mean {mean:.3e}, worst {worst_error:.3e} in {}", worst.name));
    }
    if let Some((layer, tokens)) = report.fewest_tokens() {
        let each = tokens / layer.cols as f64;
        say(
            "tokens",
            format!("{each:.2} effective an input or more ({tokens:.1} for {} in {})", layer.cols, layer.name),
        );
    }
    if let Some(path_error) = report.blocks.last().and_then(|block| block.path_error) {
        say("path error", format!("{path_error:.3e} behind the last block"));
    }
    match &report.check {
        Some(check) => {
            say("predictions", check.line());
            check
                .findings
                .iter()
                .for_each(|finding| say("DESTROYED", format!("{}; {}", finding.found, finding.kind.remedy())));
        }
        None if settings.solver.solver == Solver::Rtn => {
            say("predictions", "not compared: rounding to nearest runs no samples; `vlmq-run eval` does".into());
        }
        None => say("predictions", "not compared: no sample has text, or the model no output head".into()),
    }
    if let Some(findings) = findings(&report.layers) {
        say("findings", findings);
    }
    let calibration = &report.calibration;
    say(
        "calibration",
        format!(
            "{}; {} vision and {} text tokens",
            calibration.samples(),
            calibration.vision_tokens,
            calibration.text_tokens
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
        let pool = report.device_pool.map(|pool| format!(", {} held by its pool", text::bytes(pool.reserved_bytes)));
        let planned = text::bytes(report.memory_plan.device_bytes);
        say("GPU memory", format!("{}, {planned} planned{}", text::bytes(peak), pool.unwrap_or_default()));
    }
    say("parallelism", format!("tensors over {}", split::told(report.largest_split)));
    if !report.loaders.is_empty() {
        lines.push("loads with".into());
        for loader in &report.loaders {
            lines.push(format!("  {}", loader.name));
            lines.push(format!("    {}", loader.command));
        }
    }
    lines.extend(report.shut_out.iter().map(|reason| format!("not served: {reason}")));
    lines
}

/// How many layers had something to say, and what; `None` where none had.
fn findings(layers: &[LayerReport]) -> Option<String> {
    let mut kinds: BTreeMap<FindingKind, usize> = BTreeMap::new();
    for layer in layers {
        // A kind may be found twice of a layer.
        let found: BTreeSet<FindingKind> = layer.solve.findings.iter().map(|finding| finding.kind).collect();
        found.into_iter().for_each(|kind| *kinds.entry(kind).or_default() += 1);
    }
    let with = layers.iter().filter(|layer| !layer.solve.findings.is_empty()).count();
    let kinds: Vec<String> = kinds.iter().map(|(kind, count)| format!("{kind} in {count}")).collect();
    (with > 0).then(|| format!("{with} of {} layers: {}", layers.len(), kinds.join(", ")))
}

/// Both evaluations, by group and in total.
fn comparison(compared: &Comparison) -> Vec<String> {
    let header = ["", "n", "float", "quantized", "nll float", "nll quantized", "kl"].map(str::to_owned).to_vec();
    let row = |(name, scores): (&str, &ComparedScores)| {
        vec![
            name.to_owned(),
            scores.n.to_string(),
            eval::percent(scores.score_float),
            eval::percent(scores.score_quantized),
            text::optional(scores.nll_float),
            text::optional(scores.nll_quantized),
            text::optional(scores.kl),
        ]
    };
    let groups = compared.groups.iter().map(|(name, scores)| (name.as_str(), scores));
    let rows = groups.chain([("total", &compared.total)]).map(row);
    text::table(&[header].into_iter().chain(rows).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use vlmq::checkpoint::formats::Loader;
    use vlmq::device::PoolPeak;
    use vlmq::evaluate::{Evaluation, SampleResult};
    use vlmq::plan::MemoryPlan;
    use vlmq::progress::{Stage, StageTime};
    use vlmq::quantize::{Finding, SolveReport};
    use vlmq::report::check::ModelCheck;
    use vlmq::report::{BlockReport, CalibrationCounts};

    fn settings() -> RunSettings {
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
            tokens: 9,
            effective_tokens: Some(6.0),
            findings: [FindingKind::DampingRaised, FindingKind::FewTokens, FindingKind::DampingRaised]
                .map(|kind| Finding { kind, found: "this".into(), done: "that".into() })
                .into(),
            ..SolveReport::default()
        };
        let name = "model.layers.0.mlp.down_proj".into();
        let layer = LayerReport { name, rows: 10, cols: 8, bits: 3, solve, ..LayerReport::default() };
        let found = Finding { kind: FindingKind::ModelDestroyed, found: "this".into(), done: "that".into() };
        let check = ModelCheck {
            tokens: 80,
            held_out: 16,
            nll_float: 2.0,
            nll_quantized: 9.5,
            kl: 7.0,
            agreement: 0.125,
            findings: vec![found],
            ..ModelCheck::default()
        };
        let report = RunReport {
            family: "a_family".into(),
            format: "gptq".into(),
            device: "cpu".into(),
            calibration: CalibrationCounts { used: 5, too_long: 1, bad_images: 2, vision_tokens: 320, text_tokens: 80 },
            layers: vec![layer],
            check: Some(check),
            blocks: vec![BlockReport { block: 0, seconds: 1.0, path_error: Some(0.05), importance: None }],
            stages: vec![StageTime { stage: Stage::Blocks, seconds: 1.0 }],
            seconds: 2.0,
            peak_memory_bytes: Some(3 << 20),
            memory_plan: MemoryPlan { device_bytes: 5 << 20, ..MemoryPlan::default() },
            peak_device_bytes: Some(4 << 20),
            device_pool: Some(PoolPeak { reserved_bytes: 6 << 20, used_bytes: 5 << 20 }),
            bytes_before: 2 << 20,
            bytes_after: 1 << 20,
            quantized_bytes: 35,
            loaders: vec![Loader { name: "vLLM", command: "vllm serve o".into() }],
            shut_out: vec!["SGLang is closed; open it".into()],
            largest_split: 4,
            ..RunReport::default()
        };
        let expected = "\
wrote o (gptq)
  size         2.00 MiB -> 1.00 MiB, 3.50 bits per quantized weight
  rel. error   mean 2.000e-2, worst 2.000e-2 in model.layers.0.mlp.down_proj
  tokens       0.75 effective an input or more (6.0 for 8 in model.layers.0.mlp.down_proj)
  path error   5.000e-2 behind the last block
  predictions  nll 2.0000 float, 9.5000 quantized; KL 7.0000; 12.5% of first choices kept (80 tokens of 16 samples held out)
  DESTROYED    this; raise --bits, try another --grid, lower --group-size, or calibrate with more, or other, samples
  findings     1 of 1 layers: damping raised in 1, few tokens in 1
  calibration  5 samples, 1 left out as too long, 2 for a bad image; 320 vision and 80 text tokens
  time         2.00 s (quantizing 1.00 s)
  peak memory  3.00 MiB
  GPU memory   4.00 MiB, 5.00 MiB planned, 6.00 MiB held by its pool
  parallelism  tensors over up to 4 GPUs
loads with
  vLLM
    vllm serve o
not served: SGLang is closed; open it";
        assert_eq!(summary(&settings(), &report).join("\n"), expected);
        let without = summary(&settings(), &RunReport { check: None, ..report });
        assert!(without.join("\n").contains("predictions  not compared: no sample has text, or"), "{without:?}");
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
            ..SampleResult::default()
        };
        let [float, quantized] =
            [sample(1.0, None), sample(0.0, Some(0.5))].map(|sample| Evaluation::new(vec![sample]));
        let lines = comparison(&Comparison::new(&float, &quantized));
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("       n    float  quantized"), "{}", lines[0]);
        let total: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(total, ["total", "1", "100.00%", "0.00%", "0.5000", "0.5000", "0.2500"]);
    }
}
