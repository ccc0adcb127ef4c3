//! What the float and the quantized model answer.

use super::super::RunReport;
use crate::evaluate::{ComparedAnswer, ComparedScores};
use serde::Serialize;
use std::collections::BTreeMap;

/// Answers shown that differ, and that do not; report.json has all. 23,000 questions would make a page of 10 MB.
const DIFFERING: usize = 1000;
const ALIKE: usize = 200;

#[derive(Serialize)]
pub(super) struct EvaluationView<'a> {
    groups: &'a BTreeMap<String, ComparedScores>,
    total: &'a ComparedScores,
    differing: Answers<'a>,
    alike: Answers<'a>,
    /// Answers that score less, and more, after quantization.
    worse: usize,
    better: usize,
}

/// The first of so many answers.
#[derive(Serialize)]
struct Answers<'a> {
    count: usize,
    shown: Vec<&'a ComparedAnswer>,
}

impl<'a> Answers<'a> {
    fn of(answers: &[&'a ComparedAnswer], most: usize) -> Self {
        Self { count: answers.len(), shown: answers.iter().copied().take(most).collect() }
    }
}

/// Scores by group, then the answers, differing ones first; `None` where nothing was asked.
pub(super) fn view(report: &RunReport) -> Option<EvaluationView<'_>> {
    let compared = report.evaluation.as_ref()?;
    let (alike, mut differing): (Vec<_>, Vec<_>) =
        compared.answers.iter().partition(|answer| answer.answer_float == answer.answer_quantized);
    // Where the score changed first; the sort keeps the data's order otherwise.
    differing.sort_by_key(|answer| answer.score_float == answer.score_quantized);
    Some(EvaluationView {
        groups: &compared.groups,
        total: &compared.total,
        worse: differing.iter().filter(|answer| answer.score_quantized < answer.score_float).count(),
        better: differing.iter().filter(|answer| answer.score_quantized > answer.score_float).count(),
        differing: Answers::of(&differing, DIFFERING),
        alike: Answers::of(&alike, ALIKE),
    })
}
