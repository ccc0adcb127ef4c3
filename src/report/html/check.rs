//! What both paths predict behind the last block.

use super::super::RunReport;
use super::evaluation::percent;
use super::markup::{Cell, Text, table};
use crate::quantize::settings::Solver;

/// The figures, and what they are to be held against; of a run without them, why there are none.
pub(super) fn section(report: &RunReport) -> Option<String> {
    let Some(check) = &report.check else {
        return Some(match report.provenance.settings.solver.solver == Solver::Rtn {
            true => "<p>Not compared: rounding to nearest runs no samples. An evaluation does.</p>\n".into(),
            false => "<p>Not compared: no sample has text that could be predicted.</p>\n".into(),
        });
    };
    let mut out = format!(
        "<p>How the float path and the quantized path hold {} tokens of {} behind the last block: means over tokens, in \
         nats.</p>\n",
        check.tokens,
        Text(&check.of())
    );
    let number = |value: f64| Cell::Number(format!("{value:.4}"));
    let row = |name: &str, nll: f64, kl: f64, kept: Cell| vec![Cell::Text(name.into()), number(nll), number(kl), kept];
    let none = || Cell::Text("–".into());
    let rows = [
        row("float", check.nll_float, 0.0, Cell::Number(percent(1.0))),
        row("quantized", check.nll_quantized, check.kl, Cell::Number(percent(check.agreement))),
        row("guessing", check.nll_guess, check.kl_guess, none()),
    ];
    let columns = ["", "−ln p of the token", "KL from the float path", "first choices kept"];
    out += &table("Predictions", &columns, &rows);
    Some(out)
}
