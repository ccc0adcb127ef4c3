//! `report.html`: the report as one page that needs nothing but itself.
//!
//! No script, no reference to anything outside; the page's own policy forbids both, whatever the data says. It is drawn from the
//! [`RunReport`] alone, so that report.json has every figure of it. What stands where is said by the page's template and one for
//! each section; beside each is the view that it is filled in with.

mod charts;
mod evaluation;
mod importance;
mod layers;
mod resources;
mod samples;
mod settings;

use super::check::ModelCheck;
use super::templates::{markup, render};
use super::{RunReport, RunSettings};
use crate::evaluate::ComparedScores;
use crate::quantize::Finding;
use crate::quantize::settings::{Importance, Solver, SolverSettings};
use anyhow::Result;
use minijinja::Value;
use samples::ScaleStep;
use serde::Serialize;

/// Colours, sizes, and what a narrow screen, a dark one and paper change.
const STYLE: &str = include_str!("style.css");

#[derive(Serialize)]
struct PageView<'a> {
    style: Value,
    /// The colours of importance.
    scale: Vec<ScaleStep>,
    name: String,
    family: &'a str,
    solver: &'a SolverSettings,
    importance: Importance,
    format: &'a str,
    device: &'a str,
    mean_error: Option<f64>,
    worst_error: Option<f64>,
    check: Option<&'a ModelCheck>,
    /// The fewest effective tokens an input.
    fewest_tokens: Option<f64>,
    layers: usize,
    /// Layers with findings.
    layers_found: usize,
    bytes_before: u64,
    bytes_after: u64,
    bits_per_weight: Option<f64>,
    scores: Option<&'a ComparedScores>,
    seconds: f64,
    peak_memory: Option<u64>,
    vlmq_version: &'a str,
    sections: Vec<Section>,
}

#[derive(Serialize)]
struct Section {
    id: &'static str,
    title: &'static str,
    content: Value,
}

/// The page.
pub(super) fn page(report: &RunReport) -> Result<String> {
    let RunSettings { solver, importance, .. } = &report.provenance.settings;
    render(
        "page.html.jinja",
        PageView {
            style: markup(STYLE),
            scale: samples::scale_steps(),
            name: report.provenance.base_model(),
            family: &report.family,
            solver,
            importance: *importance,
            format: &report.format,
            device: &report.device,
            mean_error: report.mean_relative_error(),
            worst_error: report.worst_layer().map(|worst| worst.solve.relative_error),
            check: report.check.as_ref(),
            fewest_tokens: report.fewest_tokens().map(|(layer, tokens)| tokens / layer.cols as f64),
            layers: report.layers.len(),
            layers_found: report.layers.iter().filter(|layer| !layer.solve.findings.is_empty()).count(),
            bytes_before: report.bytes_before,
            bytes_after: report.bytes_after,
            bits_per_weight: report.bits_per_weight(),
            scores: report.evaluation.as_ref().map(|compared| &compared.total),
            seconds: report.seconds,
            peak_memory: report.peak_memory_bytes,
            vlmq_version: &report.provenance.vlmq_version,
            sections: sections(report)?,
        },
    )
}

/// The parts of the page that the run has something to say in.
fn sections(report: &RunReport) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    let mut add = |id, title, content: String| sections.push(Section { id, title, content: markup(content) });
    add("findings", "Findings", render("findings.html.jinja", FindingsView::of(report))?);
    let predictions = render("predictions.html.jinja", PredictionsView::of(report))?;
    add("predictions", "Predictions of the finished model", predictions);
    if let Some(view) = layers::view(report)? {
        add("layers", "Error and damping by layer", render("layers.html.jinja", view)?);
    }
    add("resources", "Time and memory", render("resources.html.jinja", resources::view(report)?)?);
    if let Some(view) = importance::view(report)? {
        add("importance", "Importance of text and vision tokens", render("importance.html.jinja", view)?);
    }
    if let Some(view) = samples::view(report)? {
        add("samples", "Importance over the pictures", render("samples.html.jinja", view)?);
    }
    if let Some(view) = evaluation::view(report) {
        add("evaluation", "Float against quantized answers", render("evaluation.html.jinja", view)?);
    }
    add("settings", "Settings and checksums", render("settings.html.jinja", settings::view(report)?)?);
    Ok(sections)
}

/// What was found of the whole model and layer by layer.
#[derive(Serialize)]
struct FindingsView<'a> {
    findings: Vec<FindingView<'a>>,
}

#[derive(Serialize)]
struct FindingView<'a> {
    /// `None`: the whole model.
    layer: Option<&'a str>,
    kind: String,
    found: &'a str,
    done: &'a str,
    remedy: &'static str,
}

impl<'a> FindingsView<'a> {
    fn of(report: &'a RunReport) -> Self {
        let view = |layer, Finding { kind, found, done }: &'a Finding| FindingView {
            layer,
            kind: kind.to_string(),
            found,
            done,
            remedy: kind.remedy(),
        };
        let model = report.check.iter().flat_map(|check| &check.findings).map(|finding| view(None, finding));
        let of_layer = |layer: &'a super::LayerReport| {
            layer.solve.findings.iter().map(move |finding| view(Some(layer.name.as_str()), finding))
        };
        Self { findings: model.chain(report.layers.iter().flat_map(of_layer)).collect() }
    }
}

/// What both paths predict behind the last block, and what it is to be held against.
#[derive(Serialize)]
struct PredictionsView<'a> {
    check: Option<&'a ModelCheck>,
    /// The samples that the tokens are of.
    samples: Option<String>,
    only_rounded: bool,
}

impl<'a> PredictionsView<'a> {
    fn of(report: &'a RunReport) -> Self {
        let check = report.check.as_ref();
        let only_rounded = report.provenance.settings.solver.solver == Solver::Rtn;
        Self { check, samples: check.map(ModelCheck::of), only_rounded }
    }
}
