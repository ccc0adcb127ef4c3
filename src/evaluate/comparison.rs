//! A float model's answers beside those of its quantized self.

use super::report::{Conditions, Evaluation};
use serde::Serialize;
use std::collections::BTreeMap;

/// Two evaluations of the same data.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Over all samples.
    pub total: ComparedScores,
    /// What the scores depend on.
    #[serde(flatten)]
    pub conditions: Conditions,
    /// Scores by group; samples without a group count in the total only.
    pub groups: BTreeMap<String, ComparedScores>,
    /// Answers in the data's order.
    pub answers: Vec<ComparedAnswer>,
}

/// Means over some samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ComparedScores {
    /// Samples.
    pub n: usize,
    /// Mean score of the float model, 0 to 1.
    pub score_float: f64,
    /// Mean score of the quantized model.
    pub score_quantized: f64,
    /// The float model's mean negative log-likelihood per answer token, in nats; `None` without answer tokens.
    pub nll_float: Option<f64>,
    /// Mean negative log-likelihood of the quantized model.
    pub nll_quantized: Option<f64>,
    /// Mean divergence of the quantized model from the float one per answer token, in nats.
    pub kl: Option<f64>,
    /// Share of answer tokens, 0 to 1, at which both models' likeliest token is the same.
    pub agreement: Option<f64>,
}

/// One question and what both models answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ComparedAnswer {
    /// The sample's name in the data.
    pub id: String,
    /// The group that it belongs to.
    pub group: Option<String>,
    /// Text of the last user turn, `[image]` where it shows one.
    pub question: String,
    /// The right answers.
    pub expected: Vec<String>,
    /// The float model's answer.
    pub answer_float: String,
    /// The quantized model's answer.
    pub answer_quantized: String,
    /// The float answer's score, 0 to 1.
    pub score_float: f64,
    /// The quantized answer's score.
    pub score_quantized: f64,
}

impl ComparedScores {
    /// Scores and likelihoods are the float model's, then the quantized one's; then how far the two are apart.
    fn new(n: usize, score: [f64; 2], nll: [Option<f64>; 2], [kl, agreement]: [Option<f64>; 2]) -> Self {
        let ([score_float, score_quantized], [nll_float, nll_quantized]) = (score, nll);
        Self { n, score_float, score_quantized, nll_float, nll_quantized, kl, agreement }
    }
}

impl Comparison {
    /// Comparison of the evaluations of both models on the same data, the quantized one's with the float model as reference.
    pub fn new(float: &Evaluation, quantized: &Evaluation) -> Self {
        let groups = float.groups.iter().filter_map(|(name, float)| {
            let quantized = quantized.groups.get(name)?;
            let (score, nll) = ([float.score, quantized.score], [float.nll, quantized.nll]);
            let apart = [quantized.kl, quantized.agreement];
            Some((name.clone(), ComparedScores::new(float.n, score, nll, apart)))
        });
        let answers = float.answers.iter().zip(&quantized.answers).map(|(float, quantized)| ComparedAnswer {
            id: float.id.clone(),
            group: float.group.clone(),
            question: float.question.clone(),
            expected: float.expected.clone(),
            answer_float: float.answer.clone(),
            answer_quantized: quantized.answer.clone(),
            score_float: float.score,
            score_quantized: quantized.score,
        });
        Self {
            total: ComparedScores::new(
                float.n,
                [float.score, quantized.score],
                [float.nll, quantized.nll],
                [quantized.kl, quantized.agreement],
            ),
            conditions: quantized.conditions,
            groups: groups.collect(),
            answers: answers.collect(),
        }
    }
}
