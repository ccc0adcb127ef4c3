//! Where time and memory went.

use super::super::RunReport;
use super::charts::{Axis, Bars, block_labels, legend};
use super::markup::{Cell, or_dash, table};
use crate::plan::StagePlan;
use crate::progress::{human_bytes, human_seconds};
use anyhow::Result;

/// Time by stage and block, and memory as it was planned and measured.
pub(super) fn section(report: &RunReport) -> Result<Option<String>> {
    let mut out = format!("<div class=\"beside\">\n<div>{}</div>\n<div class=\"charts\">", stages(report));
    if !report.blocks.is_empty() {
        let seconds: Vec<f64> = report.blocks.iter().map(|block| block.seconds).collect();
        let longest = seconds.iter().copied().fold(0.0, f64::max);
        let chart = Bars {
            id: "block-seconds".into(),
            title: "Seconds by block".into(),
            description: format!("{} blocks; the longest took {}", seconds.len(), human_seconds(longest)),
            labels: block_labels(seconds.len()),
            series: &[seconds],
            axis: Axis::Linear(longest.max(1e-3) * 1.05),
            height: 260,
        };
        out += &chart.figure()?;
    }
    out += "</div>\n</div>\n";
    out += &memory(report);
    Ok(Some(out))
}

fn stages(report: &RunReport) -> String {
    let total: f64 = report.stages.iter().map(|stage| stage.seconds).sum();
    let row = |(name, seconds): (String, f64)| {
        let share = if total > 0.0 { seconds / total } else { 0.0 };
        vec![Cell::Text(name), Cell::Number(human_seconds(seconds)), Cell::Bars([Some(share), None])]
    };
    let rows: Vec<_> = report.stages.iter().map(|stage| row((stage.stage.to_string(), stage.seconds))).collect();
    table(&format!("Time by stage: {} in all", human_seconds(report.seconds)), &["stage", "time", ""], &rows)
}

/// The process's memory, and the device's where that is another.
fn memory(report: &RunReport) -> String {
    let plan = &report.memory_plan;
    let host = &plan.host;
    let mut out = legend(&["planned", "measured"]);
    let name = "most that the process holds, mapped files included";
    out += &stage_table(
        "Memory of the process: planned before the start, and measured",
        &host.stages,
        name,
        [Some(host.bytes), host.measured_bytes.or(report.peak_memory_bytes)],
    );
    if !plan.device_is_host {
        let most = [Some(plan.device_bytes), report.peak_device_bytes];
        out += &stage_table("Memory of the GPU: planned, and measured", &plan.stages, "most at once", most);
    }
    out
}

/// Planned and measured bytes of all stages, then the most of all.
fn stage_table(caption: &str, stages: &[StagePlan], name: &str, most: [Option<u64>; 2]) -> String {
    let sizes = stages.iter().flat_map(|stage| [Some(stage.bytes), stage.measured_bytes]);
    let largest = sizes.chain(most).flatten().max().unwrap_or(0);
    let mut rows: Vec<Vec<Cell>> = stages.iter().flat_map(|stage| stage_rows(stage, largest)).collect();
    rows.push(sum_row(name.to_owned(), most, largest));
    table(caption, &["stage, at its worst step", "planned", "measured", ""], &rows)
}

/// Planned and measured bytes with bars, of which the longest is `largest` bytes.
fn sum_row(name: String, sizes: [Option<u64>; 2], largest: u64) -> Vec<Cell> {
    let share = |bytes: u64| bytes as f64 / largest.max(1) as f64;
    let [planned, measured] = sizes.map(|size| Cell::Number(or_dash(size, human_bytes)));
    vec![Cell::Text(name), planned, measured, Cell::Bars(sizes.map(|size| size.map(share)))]
}

/// A stage's sum, and what it is made of.
fn stage_rows(stage: &StagePlan, largest: u64) -> Vec<Vec<Cell>> {
    let name = format!("{}, at {}", stage.stage, stage.step);
    let sum = sum_row(name, [Some(stage.bytes), stage.measured_bytes], largest);
    let part = |name: &str, size: u64| {
        let name = Cell::Text(format!("\u{2003}{name}"));
        vec![name, Cell::Number(human_bytes(size)), Cell::Text(String::new()), Cell::Text(String::new())]
    };
    let parts = stage.entries.iter().map(|entry| part(&entry.name, entry.bytes));
    [sum].into_iter().chain(parts).collect()
}
