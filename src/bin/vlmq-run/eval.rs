//! `vlmq-run eval`.

use crate::args::EvalArgs;
use crate::json_file::write_json;
use crate::progress::Screen;
use crate::{print_lines, text};
use anyhow::Result;
use vlmq::evaluate::Evaluation;
use vlmq::progress::Stop;
use vlmq::run::Runs;
use vlmq::run::evaluation::evaluate;

pub(crate) fn run<D: Runs>(device: &D, args: &EvalArgs, screen: &Screen) -> Result<()> {
    let evaluation = evaluate(device, &args.settings(), &mut screen.observer(Stop::default()))?;
    if let Some(path) = &args.json {
        write_json(path, &evaluation)?;
    }
    print_lines(&scores(&evaluation))
}

/// A score between 0 and 1 as people quote it.
pub(crate) fn percent(score: f64) -> String {
    format!("{:.2}%", 100.0 * score)
}

fn scores(evaluation: &Evaluation) -> Vec<String> {
    let row = |name: &str, n: usize, score, nll, kl| {
        vec![name.to_owned(), n.to_string(), percent(score), text::optional(nll), text::optional(kl)]
    };
    let mut rows = vec![["", "n", "score", "nll", "kl"].map(str::to_owned).to_vec()];
    rows.extend(evaluation.groups.iter().map(|(name, group)| row(name, group.n, group.score, group.nll, group.kl)));
    rows.push(row("total", evaluation.n, evaluation.score, evaluation.nll, evaluation.kl));
    let mut lines = text::table(&rows);
    let conditions = &evaluation.conditions;
    if let (Some(preset), Some(points)) = (conditions.preset, evaluation.points) {
        lines.push(format!("{}: {points} points of {}", preset.name, evaluation.n));
    }
    if let (Some(min), Some(max)) = (conditions.min_pixels, conditions.max_pixels) {
        lines.push(format!("images of {min} to {max} pixels"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::evaluate::SampleResult;

    fn evaluation() -> Evaluation {
        let sample = |group: &str, score, kl| SampleResult {
            id: "s".into(),
            group: Some(group.into()),
            answer: "5".into(),
            score,
            answer_tokens: 1,
            nll: 0.25,
            kl,
            ..SampleResult::default()
        };
        Evaluation::new(vec![sample("count", 1.0, None), sample("read", 0.0, None)])
    }

    #[test]
    fn scores_by_group_and_in_total() {
        let expected = "       n    score     nll  kl
count  1  100.00%  0.2500   -
read   1    0.00%  0.2500   -
total  2   50.00%  0.2500   -";
        assert_eq!(scores(&evaluation()).join("\n"), expected);
    }
}
