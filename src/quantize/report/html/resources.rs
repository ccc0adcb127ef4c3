//! Where time and memory went.

use super::super::RunReport;
use super::charts::{Axis, Bars, block_labels};
use super::markup::{Cell, Text, or_dash, table};
use crate::progress::human_seconds;
use anyhow::Result;
use indicatif::HumanBytes;

/// Time by stage and block, and memory as it was planned and measured.
pub(super) fn section(report: &RunReport) -> Result<Option<String>> {
    let mut out = format!("<div class=\"beside\">\n<div>{}</div>\n<div class=\"charts\">", stages(report));
    if !report.blocks.is_empty() {
        let seconds: Vec<f64> = report.blocks.iter().map(|block| block.seconds).collect();
        let axis = Axis::Linear(seconds.iter().fold(0.0, |a: f64, &b| a.max(b)).max(1e-3) * 1.05);
        let longest = seconds.iter().fold(0.0, |a: f64, &b| a.max(b));
        let chart = Bars {
            id: "block-seconds".into(),
            title: "Seconds by block".into(),
            description: format!("{} blocks; the longest took {}", seconds.len(), human_seconds(longest)),
            labels: block_labels(seconds.len()),
            series: &[seconds],
            axis,
            height: 260,
        };
        out += &chart.figure()?;
    }
    out += "</div>\n</div>\n";
    out += &memory(report);
    Ok(Some(out))
}

/// Bars that belong to rows of a table: `share` of the full width, 0 to 1.
fn bar(share: f64, series: usize) -> String {
    format!("<span class=\"bar series-{series}\" style=\"width:{:.2}%\"></span>", 100.0 * share.clamp(0.0, 1.0))
}

fn stages(report: &RunReport) -> String {
    let total: f64 = report.stages.iter().map(|stage| stage.seconds).sum();
    let rows = report.stages.iter().map(|stage| {
        let share = if total > 0.0 { stage.seconds / total } else { 0.0 };
        let (name, time) = (stage.stage.to_string(), human_seconds(stage.seconds));
        format!(
            "<tr><td>{}</td><td class=\"number\">{}</td><td class=\"track\">{}</td></tr>\n",
            Text(&name),
            Text(&time),
            bar(share, 0)
        )
    });
    format!(
        "<table class=\"bars\"><caption>Time by stage: {} in all</caption><tbody>{}</tbody></table>",
        Text(&human_seconds(report.seconds)),
        rows.collect::<String>()
    )
}

fn memory(report: &RunReport) -> String {
    let plan = &report.memory_plan;
    let bytes = |bytes: u64| HumanBytes(bytes).to_string();
    let mut rows = Vec::new();
    for stage in &plan.stages {
        rows.push(vec![
            Cell::Text(format!("{}, at {}", stage.stage, stage.step)),
            Cell::Number(bytes(stage.bytes)),
            Cell::Number(or_dash(stage.measured_bytes, bytes)),
        ]);
        for entry in &stage.entries {
            rows.push(vec![
                Cell::Text(format!("\u{2003}{}", entry.name)),
                Cell::Number(bytes(entry.bytes)),
                Cell::Text(String::new()),
            ]);
        }
    }
    let process = or_dash(report.peak_memory_bytes, bytes);
    let device = or_dash(report.peak_device_bytes, bytes);
    rows.push(vec![
        Cell::Text("most device memory".into()),
        Cell::Number(bytes(plan.device_bytes)),
        Cell::Number(device),
    ]);
    rows.push(vec![
        Cell::Text("most that the process held, mapped files included".into()),
        Cell::Number("–".into()),
        Cell::Number(process),
    ]);
    table("Memory: planned before the start, and measured", &["stage", "planned", "measured"], &rows)
}
