//! Histograms of importance by text and vision tokens.

use super::super::{LayerReport, RunReport};
use super::charts::{Axis, Bars, Chart, block_labels};
use anyhow::Result;
use serde::Serialize;

/// Projections whose tokens are weighed.
const WEIGHED: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

#[derive(Serialize)]
pub(super) struct ImportanceView {
    /// Means by projection.
    means: Vec<Chart>,
    /// A histogram for each block.
    histograms: Vec<Chart>,
}

/// `None` where all tokens counted alike.
pub(super) fn view(report: &RunReport) -> Result<Option<ImportanceView>> {
    if report.blocks.iter().all(|block| block.importance.is_none()) {
        return Ok(None);
    }
    Ok(Some(ImportanceView { means: means(report)?, histograms: histograms(report)? }))
}

fn means(report: &RunReport) -> Result<Vec<Chart>> {
    let axis = Axis::of(weighed(report).flat_map(|(_, [text, vision])| [text, vision]));
    let chart = |name: &str| {
        let means: Vec<_> = weighed(report).filter(|(layer, _)| layer.name.ends_with(name)).collect();
        let series = [0, 1].map(|kind| means.iter().map(|(_, mean)| mean[kind]).collect::<Vec<f64>>());
        let labels = block_labels(means.len() + 1).into_iter().filter(|(i, _)| *i > 0.0).map(|(i, l)| (i - 1.0, l));
        Bars {
            id: format!("mean-{name}"),
            title: format!("{name}: mean g"),
            description: format!(
                "mean importance of text and of vision tokens for {name} in {} blocks, {}",
                means.len(),
                axis.describe()
            ),
            series: &series,
            axis,
            labels: labels.collect(),
            height: 260,
        }
        .chart()
    };
    WEIGHED.into_iter().map(chart).collect()
}

fn histograms(report: &RunReport) -> Result<Vec<Chart>> {
    let blocks = report.blocks.iter().filter_map(|block| Some((block.block, block.importance.as_ref()?)));
    let shares: Vec<(usize, [Vec<f64>; 2], [u64; 2])> = blocks
        .map(|(block, importance)| {
            let counts = [&importance.text, &importance.vision];
            let totals = counts.map(|counts| counts.iter().sum::<u64>());
            let share = |kind: usize| {
                counts[kind].iter().map(|&n| 100.0 * n as f64 / totals[kind].max(1) as f64).collect::<Vec<f64>>()
            };
            (block, [share(0), share(1)], totals)
        })
        .collect();
    let highest = shares.iter().flat_map(|(_, series, _)| series.iter().flatten()).fold(0.0, |a: f64, &b| a.max(b));
    let labels: Vec<(f64, String)> = report
        .importance_edges
        .iter()
        .enumerate()
        .filter(|(i, _)| i % 6 == 0)
        .map(|(i, edge)| {
            (i as f64 + 0.5, if *edge < 1.0 { format!("1/{:.0}", 1.0 / edge) } else { format!("{edge:.0}") })
        })
        .collect();
    let chart = |(block, series, [text, vision]): &(usize, [Vec<f64>; 2], [u64; 2])| {
        Bars {
            id: format!("histogram-{block}"),
            title: format!("block {block}: % of tokens by g"),
            description: format!(
                "histogram of the importance of {text} text and {vision} vision tokens in block {block}"
            ),
            series,
            axis: Axis::Linear(highest.max(1.0)),
            labels: labels.clone(),
            height: 220,
        }
        .chart()
    };
    shares.iter().map(chart).collect()
}

/// The layers that weigh tokens, with the means of g over text and vision tokens.
fn weighed(report: &RunReport) -> impl Iterator<Item = (&LayerReport, [f64; 2])> + Clone {
    report.layers.iter().filter_map(|layer| {
        let spread = layer.importance.as_ref()?;
        Some((layer, [spread.text_mean, spread.vision_mean]))
    })
}
