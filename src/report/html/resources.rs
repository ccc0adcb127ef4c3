//! Where time and memory went: time by stage and block, and memory as it was planned and measured.

use super::super::RunReport;
use super::charts::{Axis, Bars, Chart, block_labels};
use crate::plan::{Entry, StagePlan};
use crate::progress::human_seconds;
use anyhow::Result;
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct ResourcesView<'a> {
    seconds: f64,
    stages: Vec<StageView>,
    /// A chart of the blocks' times, if there are any.
    blocks: Vec<Chart>,
    /// The process's memory, and the device's where that is another.
    memories: Vec<MemoryView<'a>>,
}

#[derive(Serialize)]
struct StageView {
    name: String,
    seconds: f64,
    share: f64,
}

#[derive(Serialize)]
struct MemoryView<'a> {
    caption: &'static str,
    rows: usize,
    sums: Vec<SumView<'a>>,
}

/// A stage's sum and what it is made of, or the most of all stages.
#[derive(Serialize)]
struct SumView<'a> {
    name: String,
    planned: Option<u64>,
    measured: Option<u64>,
    /// Both, as shares of the largest sum.
    shares: [Option<f64>; 2],
    parts: &'a [Entry],
}

pub(super) fn view(report: &RunReport) -> Result<ResourcesView<'_>> {
    let total: f64 = report.stages.iter().map(|stage| stage.seconds).sum();
    let share = |seconds: f64| if total > 0.0 { seconds / total } else { 0.0 };
    let stages = report.stages.iter().map(|stage| StageView {
        name: stage.stage.to_string(),
        seconds: stage.seconds,
        share: share(stage.seconds),
    });
    let (plan, host) = (&report.memory_plan, &report.memory_plan.host);
    let mut memories = vec![memory(
        "Memory of the process: planned before the start, and measured",
        &host.stages,
        "most that the process holds, mapped files included",
        [Some(host.bytes), host.measured_bytes.or(report.peak_memory_bytes)],
    )];
    if !plan.device_is_host {
        let most = [Some(plan.device_bytes), report.peak_device_bytes];
        memories.push(memory("Memory of the GPU: planned, and measured", &plan.stages, "most at once", most));
    }
    Ok(ResourcesView {
        seconds: report.seconds,
        stages: stages.collect(),
        blocks: blocks(report)?.into_iter().collect(),
        memories,
    })
}

fn blocks(report: &RunReport) -> Result<Option<Chart>> {
    let seconds: Vec<f64> = report.blocks.iter().map(|block| block.seconds).collect();
    if seconds.is_empty() {
        return Ok(None);
    }
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
    chart.chart().map(Some)
}

/// Planned and measured bytes of all stages, then the most of all, under its name.
fn memory<'a>(caption: &'static str, stages: &'a [StagePlan], name: &str, most: [Option<u64>; 2]) -> MemoryView<'a> {
    let sizes = stages.iter().flat_map(|stage| [Some(stage.bytes), stage.measured_bytes]);
    let largest = sizes.chain(most).flatten().max().unwrap_or(0).max(1) as f64;
    let sum = |name: String, sizes: [Option<u64>; 2], parts: &'a [Entry]| {
        let [planned, measured] = sizes;
        let shares = sizes.map(|size| size.map(|bytes| bytes as f64 / largest));
        SumView { name, planned, measured, shares, parts }
    };
    let of_stage = |stage: &'a StagePlan| {
        let name = format!("{}, at {}", stage.stage, stage.step);
        sum(name, [Some(stage.bytes), stage.measured_bytes], &stage.entries)
    };
    let sums: Vec<SumView<'a>> = stages.iter().map(of_stage).chain([sum(name.to_owned(), most, &[])]).collect();
    MemoryView { caption, rows: sums.iter().map(|sum| 1 + sum.parts.len()).sum(), sums }
}
