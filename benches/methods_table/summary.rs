//! Means over calibration draws, and differences between rows over the same draws.

use super::record::{Figures, Run};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Mean and standard error over draws.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mean {
    mean: f64,
    /// `None` of a single draw.
    error: Option<f64>,
}

impl Mean {
    /// `None` of no values.
    fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let error = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        Some(Self { mean, error })
    }

    /// How many standard errors the mean is from 0.
    fn t(&self) -> Option<f64> {
        self.error.filter(|&error| error > 0.0).map(|error| self.mean / error)
    }
}

/// One row: a run for each draw, or a single one that looks at no data and stands for all.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) runs: Vec<&'a Run>,
}

impl Entry<'_> {
    /// A figure of a group, in every run.
    fn values(&self, group: &str, figure: fn(&Figures) -> Option<f64>) -> Option<Vec<f64>> {
        self.runs.iter().map(|run| run.groups.get(group).and_then(figure)).collect()
    }

    /// KL of this row less that of `first`, draw by draw.
    fn less(&self, first: &Self, group: &str) -> Option<Mean> {
        let [own, others] = [self, first].map(|entry| entry.values(group, |figures| figures.kl));
        let (own, others) = (own?, others?);
        let draws = own.len().max(others.len());
        let at = |values: &[f64], draw: usize| if values.len() == 1 { values[0] } else { values[draw] };
        Mean::of(&(0..draws).map(|draw| at(&own, draw) - at(&others, draw)).collect::<Vec<_>>())
    }
}

/// A Markdown table, every row compared with the first.
pub(crate) fn table(entries: &[Entry]) -> String {
    let runs = || entries.iter().flat_map(|entry| &entry.runs);
    let groups: BTreeSet<&String> = runs().flat_map(|run| run.groups.keys()).collect();
    let mut header = "| method |".to_owned();
    let mut rule = "|---|".to_owned();
    for group in &groups {
        write!(header, " {group}: KL | less the first row | t | same token |").unwrap();
        rule += "---|---|---|---|";
    }
    let mut out = format!("{header}\n{rule}\n");
    for (i, entry) in entries.iter().enumerate() {
        write!(out, "| {} |", entry.name).unwrap();
        for group in &groups {
            let mean = |figure| entry.values(group, figure).and_then(|values| Mean::of(&values));
            let less = (i > 0).then(|| entry.less(&entries[0], group)).flatten();
            let t = less.and_then(|less| less.t()).map_or(String::new(), |t| format!("{t:.1}"));
            let less = less.map_or(String::new(), |less| cell(less, 4, true));
            let kl = mean(|figures| figures.kl).map_or("–".into(), |kl| cell(kl, 4, false));
            let percent = mean(|figures| figures.agreement.map(|share| 100.0 * share));
            let same = percent.map_or("–".into(), |percent| cell(percent, 1, false) + " %");
            write!(out, " {kl} | {less} | {t} | {same} |").unwrap();
        }
        out.push('\n');
    }
    out
}

fn cell(Mean { mean, error }: Mean, digits: usize, signed: bool) -> String {
    let mean = if signed { format!("{mean:+.digits$}").replace('-', "−") } else { format!("{mean:.digits$}") };
    error.map_or(mean.clone(), |error| format!("{mean} ± {error:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(kl: f64) -> Run {
        let figures = Figures { n: 1, tokens: 4, nll: Some(1.0), kl: Some(kl), agreement: Some(0.75) };
        Run {
            key: Default::default(),
            row: String::new(),
            groups: [("image".to_owned(), figures)].into(),
            path_error: None,
            findings: 0,
            seconds: [0.0; 2],
        }
    }

    #[test]
    fn means_have_standard_errors() {
        assert_eq!(Mean::of(&[]), None);
        assert_eq!(Mean::of(&[2.0]), Some(Mean { mean: 2.0, error: None }));
        let found = Mean::of(&[1.0, 2.0, 3.0]).unwrap();
        assert!((found.error.unwrap() - (1f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((found.t().unwrap() - 12f64.sqrt()).abs() < 1e-12);
        assert_eq!(Mean::of(&[1.0, 1.0]).unwrap().t(), None);
    }

    #[test]
    fn rows_are_paired_draw_by_draw() {
        // The draws differ by far more than the rows.
        let [first, second] = [[1.0, 5.0, 3.0], [0.9, 4.8, 2.9]].map(|draws| draws.map(run));
        let alone = [run(10.0)];
        let entry = |name, runs: &'static [Run]| Entry { name, runs: runs.iter().collect() };
        let leak = |runs: &[Run]| -> &'static [Run] { runs.to_vec().leak() };
        let entries = [entry("first", leak(&first)), entry("second", leak(&second)), entry("nearest", leak(&alone))];
        let lines: Vec<String> = table(&entries).lines().map(str::to_owned).collect();
        assert_eq!(lines[2], "| first | 3.0000 ± 1.1547 |  |  | 75.0 ± 0.0 % |");
        assert_eq!(lines[3], "| second | 2.8667 ± 1.1260 | −0.1333 ± 0.0333 | -4.0 | 75.0 ± 0.0 % |");
        assert_eq!(lines[4], "| nearest | 10.0000 | +7.0000 ± 1.1547 | 6.1 | 75.0 % |");
    }
}
