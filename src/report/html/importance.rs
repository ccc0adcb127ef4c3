//! Histograms of importance by text and vision tokens.

use super::super::{LayerReport, RunReport};
use super::charts::{Axis, Bars, block_labels, legend};
use anyhow::Result;

/// Projections whose tokens are weighed.
const WEIGHED: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// Means by projection, and a histogram for each block; `None` where all tokens counted alike.
pub(super) fn section(report: &RunReport) -> Result<Option<String>> {
    let blocks: Vec<_> = report.blocks.iter().filter_map(|b| Some((b.block, b.importance.as_ref()?))).collect();
    if blocks.is_empty() {
        return Ok(None);
    }
    let mut out = String::from(
        "<p>A token's importance g is the mean of its factors for q, k, v and o, each scaled to a mean square of 1 over all \
         calibration tokens and raised to the layer's power: 1 is a token as it would count without importance. Block 0 and the MLPs weigh tokens alike.</p>\n",
    );
    out += &legend(&["text", "vision"]);
    out += "<h3>Mean of g by projection</h3>\n<div class=\"charts\">\n";
    let axis = Axis::of(weighed(report).flat_map(|(_, [text, vision])| [text, vision]));
    for name in WEIGHED {
        let means: Vec<_> = weighed(report).filter(|(layer, _)| layer.name.ends_with(name)).collect();
        let series = [0, 1].map(|kind| means.iter().map(|(_, mean)| mean[kind]).collect::<Vec<f64>>());
        let labels = block_labels(means.len() + 1).into_iter().filter(|(i, _)| *i > 0.0).map(|(i, l)| (i - 1.0, l));
        let chart = Bars {
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
        };
        out += &chart.figure()?;
    }
    out += "</div>\n<h3>Histogram of g by block</h3>\n\
            <p>Share of the text tokens, and of the vision tokens, in each half octave of g; the outermost bars are what is \
            beyond.</p>\n<div class=\"charts\">\n";
    let shares: Vec<(usize, [Vec<f64>; 2], [u64; 2])> = blocks
        .into_iter()
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
    for (block, series, [text, vision]) in &shares {
        let chart = Bars {
            id: format!("histogram-{block}"),
            title: format!("block {block}: % of tokens by g"),
            description: format!(
                "histogram of the importance of {text} text and {vision} vision tokens in block {block}"
            ),
            series,
            axis: Axis::Linear(highest.max(1.0)),
            labels: labels.clone(),
            height: 220,
        };
        out += &chart.figure()?;
    }
    Ok(Some(out + "</div>\n"))
}

/// The layers that weigh tokens, with the means of g over text and vision tokens.
fn weighed(report: &RunReport) -> impl Iterator<Item = (&LayerReport, [f64; 2])> + Clone {
    report.layers.iter().filter_map(|layer| {
        let spread = layer.importance.as_ref()?;
        Some((layer, [spread.text_mean, spread.vision_mean]))
    })
}
