//! The rules by which answers are scored, as data files name them. How each scores stands in [`evaluate`](crate::evaluate::metrics).

use anyhow::{Error, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A rule that compares a model's answer with the right ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Equal to an answer, upper and lower case alike; `B. some text` counts as the letter `B`. ScienceQA's rule, which
    /// is plain equality for every answer that is not a single letter.
    #[default]
    Exact,
    /// Numbers within 5 % of an answer's number (`12%` is 0.12), anything else as equality. ChartQA's rule.
    Relaxed,
    /// One minus the normalised Levenshtein distance to the nearest answer, 0 below one half. DocVQA's rule.
    Anls,
    /// Agreement with several annotators after the VQA challenge's normalisation. TextVQA's rule, made for ten answers:
    /// each is left out once and `min(1, matches among the others / 3)` averaged, so a single answer can only score 0.
    Vqa,
    /// An answer occurs in the prediction, case and full-width forms alike. OCRBench's rule.
    Substring,
    /// An answer occurs in the prediction, spaces and line breaks left out, case kept. OCRBench's rule for the formulas
    /// of HME100k.
    Formula,
    /// The first of the letters A to E in the prediction is the answer. MME-RealWorld's rule.
    Choice,
    /// The prediction's first character is the answer, upper and lower case alike. SEED-Bench-2-Plus's rule.
    #[serde(rename = "first_letter")]
    FirstLetter,
}

impl Metric {
    /// Every metric, in the order in which help texts list them.
    pub const ALL: [Self; 8] = [
        Self::Exact,
        Self::Relaxed,
        Self::Anls,
        Self::Vqa,
        Self::Substring,
        Self::Formula,
        Self::Choice,
        Self::FirstLetter,
    ];

    /// The name in data files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Relaxed => "relaxed",
            Self::Anls => "anls",
            Self::Vqa => "vqa",
            Self::Substring => "substring",
            Self::Formula => "formula",
            Self::Choice => "choice",
            Self::FirstLetter => "first_letter",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Metric {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            anyhow!("unknown metric `{text}`; known: {known}")
        })
    }
}
