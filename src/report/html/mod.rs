//! `report.html`: the report as one page that needs nothing but itself.
//!
//! No script, no reference to anything outside; the page's own policy forbids both, whatever the data says. It is drawn from the
//! [`RunReport`] alone, so that report.json has every figure of it.

mod charts;
mod check;
mod evaluation;
mod importance;
mod layers;
mod markup;
mod resources;
mod samples;

use super::{RunReport, RunSettings};
use crate::progress::{human_bytes, human_seconds};
use anyhow::Result;
use markup::{Cell, Text, details, error, section, table};
use serde_json::{Value, json};

/// Colours, sizes, and what a narrow screen, a dark one and paper change.
const STYLE: &str = include_str!("style.css");

/// The page.
pub(super) fn page(report: &RunReport) -> Result<String> {
    let title = format!("{}: quantization report", report.provenance.base_model());
    let parts: Vec<(&str, &str, String)> = [
        ("findings", "Findings", layers::findings(report)),
        ("predictions", "Predictions of the finished model", check::section(report)),
        ("layers", "Error and damping by layer", layers::charts(report)?),
        ("resources", "Time and memory", resources::section(report)?),
        ("importance", "Importance of text and vision tokens", importance::section(report)?),
        ("samples", "Importance over the pictures", samples::section(report)?),
        ("evaluation", "Float against quantized answers", evaluation::section(report)),
        ("settings", "Settings and checksums", settings(report)),
    ]
    .into_iter()
    .filter_map(|(id, title, content)| Some((id, title, content?)))
    .collect();

    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
         base-uri 'none'; form-action 'none'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{title}</title>\n<style>\n{STYLE}{heat}</style>\n</head>\n\
         <body>\n<header>\n<h1>{name}</h1>\n<p>{line}</p>\n{figures}<nav aria-label=\"Contents\"><ul>",
        title = Text(&title),
        heat = samples::heat_style(),
        name = Text(&report.provenance.base_model()),
        line = Text(&summary(report)),
        figures = key_figures(report),
    );
    parts.iter().for_each(|(id, title, _)| out += &format!("<li><a href=\"#{id}\">{}</a></li>", Text(title)));
    out += "</ul></nav>\n</header>\n<main>\n";
    parts.iter().for_each(|(id, title, content)| out += &section(id, title, content));
    out += &format!(
        "</main>\n<footer><p>Made by vlmq {}. The same figures, to the last digit, are in report.json beside this page.</p>\
         </footer>\n</body>\n</html>\n",
        Text(&report.provenance.vlmq_version)
    );
    Ok(out)
}

/// What was done, in a line.
fn summary(report: &RunReport) -> String {
    let RunSettings { solver, importance, .. } = &report.provenance.settings;
    let group = solver.group_size.map_or_else(|| "one scale a row".to_owned(), |size| format!("groups of {size}"));
    let (bits, [name, importance]) = (solver.bits, [json!(solver.solver), json!(importance)]);
    let [name, importance] = [&name, &importance].map(|name| name.as_str().unwrap_or_default());
    let (family, format, device) = (&report.family, &report.format, &report.device);
    format!("{family} · {bits} bits, {group} · solver {name} · importance {importance} · {format} · on {device}")
}

/// The figures that one looks for first, with the names under which a test finds them.
fn key_figures(report: &RunReport) -> String {
    let mut figures: Vec<(&str, &str, String)> = Vec::new();
    if let (Some(mean), Some(worst)) = (report.mean_relative_error(), report.worst_layer()) {
        figures.push(("mean-error", "mean relative error", error(mean)));
        figures.push(("worst-error", "worst layer's", error(worst.solve.relative_error)));
    }
    if let Some(check) = &report.check {
        figures.push(("kl", "KL from the float model", format!("{:.4}", check.kl)));
        figures.push(("kept", "first choices kept", evaluation::percent(check.agreement)));
    }
    if let Some((layer, tokens)) = report.fewest_tokens() {
        figures.push((
            "fewest-tokens",
            "effective tokens an input, at least",
            format!("{:.2}", tokens / layer.cols as f64),
        ));
    }
    let found = report.layers.iter().filter(|layer| !layer.solve.findings.is_empty()).count();
    figures.push(("findings-count", "layers with findings", format!("{found} of {}", report.layers.len())));
    figures.push((
        "size",
        "size",
        format!("{} → {}", human_bytes(report.bytes_before), human_bytes(report.bytes_after)),
    ));
    if let Some(bits) = report.bits_per_weight() {
        figures.push(("bits", "bits per quantized weight", format!("{bits:.2}")));
    }
    if let Some(compared) = &report.evaluation {
        let percent = evaluation::percent;
        let total = &compared.total;
        figures.push((
            "score",
            "score, float → quantized",
            format!("{} → {}", percent(total.score_float), percent(total.score_quantized)),
        ));
    }
    figures.push(("seconds", "time", human_seconds(report.seconds)));
    if let Some(peak) = report.peak_memory_bytes {
        figures.push(("peak-memory", "peak memory", human_bytes(peak)));
    }
    let entry = |(id, name, value): &(&str, &str, String)| {
        format!("<div><dt>{}</dt><dd id=\"figure-{id}\">{}</dd></div>\n", Text(name), Text(value))
    };
    format!("<dl class=\"figures\">\n{}</dl>\n", figures.iter().map(entry).collect::<String>())
}

/// Everything that the run was told and what it read.
fn settings(report: &RunReport) -> Option<String> {
    let provenance = serde_json::to_value(&report.provenance).ok()?;
    let mut rows = Vec::new();
    flatten(&provenance["settings"], "", &mut rows);
    let mut out = table("Settings as they took effect", &["setting", "value"], &rows);
    let mut about = Vec::new();
    for (key, value) in
        provenance.as_object()?.iter().filter(|(key, _)| !["settings", "inputs"].contains(&key.as_str()))
    {
        flatten(value, key, &mut about);
    }
    let counts = &report.calibration;
    let counted = [
        ("samples used", counts.used),
        ("samples left out as too long", counts.too_long),
        ("samples left out for a bad image", counts.bad_images),
        ("vision tokens", counts.vision_tokens),
        ("text tokens", counts.text_tokens),
    ];
    about.extend(counted.map(|(name, count)| vec![Cell::Text(name.into()), Cell::Code(count.to_string())]));
    out += &table("Program, model and calibration data", &["what", "value"], &about);
    let mut sums = Vec::new();
    flatten(&provenance["inputs"], "", &mut sums);
    out += &table("SHA-256 of what was read", &["input", "checksum"], &sums);
    let loaders: Vec<Vec<Cell>> = report
        .loaders
        .iter()
        .map(|loader| vec![Cell::Text(loader.name.to_string()), Cell::Code(loader.command.clone())])
        .collect();
    if !loaders.is_empty() {
        out += &details(
            "How to load the result",
            &table("Loaders of exactly this file", &["loader", "command"], &loaders),
        );
    }
    Some(out)
}

/// Rows for everything inside a JSON value, keys joined by points.
fn flatten(value: &Value, name: &str, rows: &mut Vec<Vec<Cell>>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                // Names of files have points of their own: below the first level they stand alone.
                flatten(value, &if name.is_empty() { key.clone() } else { format!("{name} · {key}") }, rows);
            }
        }
        Value::Null => rows.push(vec![Cell::Text(name.into()), Cell::Text("–".into())]),
        Value::String(text) => rows.push(vec![Cell::Text(name.into()), Cell::Code(text.clone())]),
        other => rows.push(vec![Cell::Text(name.into()), Cell::Code(other.to_string())]),
    }
}
