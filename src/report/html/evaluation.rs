//! What the float and the quantized model answer.

use super::super::RunReport;
use super::markup::{Cell, details, or_dash, table};
use crate::evaluate::ComparedAnswer;
use crate::evaluate::ComparedScores;

/// Answers shown that differ, and that do not; report.json has all. 23,000 questions would make a page of 10 MB.
const DIFFERING: usize = 1000;
const ALIKE: usize = 200;

/// A score as people read it.
pub(super) fn percent(score: f64) -> String {
    format!("{:.2}%", 100.0 * score)
}

/// Scores by group, then the answers, differing ones first; `None` where nothing was asked.
pub(super) fn section(report: &RunReport) -> Option<String> {
    let compared = report.evaluation.as_ref()?;
    let row = |name: &str, scores: &ComparedScores| {
        let number = |value: Option<f64>| Cell::Number(or_dash(value, |value| format!("{value:.4}")));
        vec![
            Cell::Text(name.to_owned()),
            Cell::Number(scores.n.to_string()),
            Cell::Number(percent(scores.score_float)),
            Cell::Number(percent(scores.score_quantized)),
            number(scores.nll_float),
            number(scores.nll_quantized),
            number(scores.kl),
        ]
    };
    let mut rows: Vec<Vec<Cell>> = compared.groups.iter().map(|(name, scores)| row(name, scores)).collect();
    rows.push(row("total", &compared.total));
    let columns = ["group", "n", "float", "quantized", "nll float", "nll quantized", "kl"];
    let mut out = String::from(
        "<p>nll: mean negative log-likelihood of the right answer per token; kl: mean divergence from the float model; both \
         in nats.</p>\n",
    );
    out += &table("Scores by group", &columns, &rows);

    let (alike, differing): (Vec<_>, Vec<_>) =
        compared.answers.iter().partition(|answer| answer.answer_float == answer.answer_quantized);
    // Where the score changed first; the sort keeps the data's order otherwise.
    let mut differing = differing;
    differing.sort_by_key(|answer| answer.score_float == answer.score_quantized);
    let worse = differing.iter().filter(|a| a.score_quantized < a.score_float).count();
    let better = differing.iter().filter(|a| a.score_quantized > a.score_float).count();
    out += &format!(
        "<p id=\"differing\">{} of {} answers differ; {worse} score less after quantization, {better} more.</p>\n",
        differing.len(),
        compared.answers.len()
    );
    if !differing.is_empty() {
        out += &answers("Answers that differ", &differing, DIFFERING);
    }
    if !alike.is_empty() {
        out += &details(&format!("{} answers that do not differ", alike.len()), &answers("Answers", &alike, ALIKE));
    }
    Some(out)
}

fn answers(caption: &str, answers: &[&ComparedAnswer], most: usize) -> String {
    let rows: Vec<Vec<Cell>> = answers
        .iter()
        .take(most)
        .map(|answer| {
            let mut expected: Vec<&str> = Vec::new();
            answer.expected.iter().for_each(|right| {
                if !expected.contains(&right.as_str()) {
                    expected.push(right);
                }
            });
            vec![
                Cell::Code(answer.id.clone()),
                Cell::Text(answer.group.clone().unwrap_or_default()),
                Cell::Text(answer.question.clone()),
                Cell::Text(expected.join(" | ")),
                Cell::Text(answer.answer_float.clone()),
                Cell::Number(format!("{:.2}", answer.score_float)),
                Cell::Text(answer.answer_quantized.clone()),
                Cell::Number(format!("{:.2}", answer.score_quantized)),
            ]
        })
        .collect();
    let caption = match answers.len() > most {
        true => format!("{caption}: the first {most} of {}; report.json has all", answers.len()),
        false => caption.to_owned(),
    };
    let columns = ["id", "group", "question", "expected", "float", "score", "quantized", "score"];
    table(&caption, &columns, &rows)
}
