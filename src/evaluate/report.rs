//! What an evaluation found.

use super::presets::Preset;
use serde::Serialize;
use std::collections::BTreeMap;

/// What one sample gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleResult {
    /// The sample's name in the data.
    pub id: String,
    /// The group that it belongs to.
    pub group: Option<String>,
    /// Text of the last user turn, `[image]` where it shows one.
    pub question: String,
    /// The right answers.
    pub expected: Vec<String>,
    /// What the model answered, stripped.
    pub answer: String,
    /// The metric's score, 0 to 1.
    pub score: f64,
    /// Tokens of the right answer, its end-of-turn token included; 0 where the data has no assistant turn.
    pub answer_tokens: usize,
    /// Sum over those of the negative log-likelihood, in nats.
    pub nll: f64,
    /// Sum over those of the divergence `KL(reference ‖ model)`, in nats; `None` without a reference.
    pub kl: Option<f64>,
    /// How many of those tokens are preceded by a place where the reference's likeliest token is the model's as well; `None`
    /// without a reference.
    pub agreeing: Option<usize>,
}

/// One answer in an [`Evaluation`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answer {
    /// The sample's name in the data.
    pub id: String,
    /// What the model answered.
    pub answer: String,
    /// The metric's score, 0 to 1.
    pub score: f64,
    /// The group that it belongs to.
    #[serde(skip)]
    pub group: Option<String>,
    /// Text of the last user turn.
    #[serde(skip)]
    pub question: String,
    /// The right answers.
    #[serde(skip)]
    pub expected: Vec<String>,
}

/// Means over some samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GroupResult {
    /// Samples.
    pub n: usize,
    /// Mean score, 0 to 1.
    pub score: f64,
    /// Answer tokens, which the means below are over.
    pub tokens: usize,
    /// Mean negative log-likelihood per answer token, in nats; `None` without answer tokens.
    pub nll: Option<f64>,
    /// Mean divergence per answer token, in nats; `None` without reference or answer tokens.
    pub kl: Option<f64>,
    /// Agreement with the reference, see [`Evaluation::agreement`].
    pub agreement: Option<f64>,
}

/// What the scores depend on besides model and data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Conditions {
    /// The benchmark; serialised as its name.
    #[serde(serialize_with = "name")]
    pub preset: Option<&'static Preset>,
    /// Smallest area of an image, in pixels; `None` where the model's family has no such limit.
    pub min_pixels: Option<usize>,
    /// Largest area of an image, in pixels.
    pub max_pixels: Option<usize>,
}

impl Conditions {
    /// Conditions of a preset, with the smallest and the largest area of an image.
    pub fn new(preset: Option<&'static Preset>, pixel_limits: Option<[usize; 2]>) -> Self {
        let [min_pixels, max_pixels] = pixel_limits.map_or([None; 2], |limits| limits.map(Some));
        Self { preset, min_pixels, max_pixels }
    }
}

fn name<S: serde::Serializer>(preset: &Option<&'static Preset>, serializer: S) -> Result<S::Ok, S::Error> {
    preset.map(|preset| preset.name).serialize(serializer)
}

/// Scores of a whole data set; serialises to the keys `n`, `score`, `points`, `tokens`, `nll`, `kl`, `agreement`, `preset`,
/// `min_pixels`, `max_pixels`, `groups`, `answers`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Samples.
    pub n: usize,
    /// Mean score over samples, 0 to 1.
    pub score: f64,
    /// The benchmark's own figure where that is a sum of scores (OCRBench).
    pub points: Option<f64>,
    /// Tokens of the right answers, which the means below are over.
    pub tokens: usize,
    /// Mean negative log-likelihood per answer token, in nats; `None` without answer tokens.
    pub nll: Option<f64>,
    /// Mean divergence from the reference per answer token, in nats; `None` without reference or answer tokens.
    pub kl: Option<f64>,
    /// Share of answer tokens, 0 to 1, at which the model's likeliest token is the reference's, all tokens of the right answer
    /// before them given; `None` without reference or answer tokens.
    pub agreement: Option<f64>,
    /// What the scores depend on.
    #[serde(flatten)]
    pub conditions: Conditions,
    /// Results by group; samples without a group count in the total only. A preset may count a sample in a second one.
    pub groups: BTreeMap<String, GroupResult>,
    /// Answers in the data's order.
    pub answers: Vec<Answer>,
}

impl Evaluation {
    /// Sums up `samples`, kept in their order, which no preset shaped.
    pub fn new(samples: Vec<SampleResult>) -> Self {
        Self::under(Conditions::default(), samples)
    }

    /// Sums up `samples`, kept in their order.
    pub fn under(conditions: Conditions, samples: Vec<SampleResult>) -> Self {
        let mut members: BTreeMap<String, Vec<&SampleResult>> = BTreeMap::new();
        for sample in &samples {
            if let Some(group) = &sample.group {
                let groups = conditions.preset.map_or_else(|| [group.clone()].into(), |preset| preset.groups(group));
                for group in groups {
                    members.entry(group).or_default().push(sample);
                }
            }
        }
        let groups = members.into_iter().map(|(name, members)| (name, means(&members))).collect();
        let GroupResult { n, score, tokens, nll, kl, agreement } = means(&samples.iter().collect::<Vec<_>>());
        let points = conditions.preset.and_then(|preset| preset.points(samples.iter().map(|sample| sample.score)));
        let answers =
            samples.into_iter().map(|SampleResult { id, answer, score, group, question, expected, .. }| Answer {
                id,
                answer,
                score,
                group,
                question,
                expected,
            });
        Self { n, score, points, tokens, nll, kl, agreement, conditions, groups, answers: answers.collect() }
    }
}

fn means(samples: &[&SampleResult]) -> GroupResult {
    let n = samples.len();
    let tokens: usize = samples.iter().map(|sample| sample.answer_tokens).sum();
    let per_token = |sum: f64| (tokens > 0).then(|| sum / tokens as f64);
    let score = samples.iter().map(|sample| sample.score).sum::<f64>() / n.max(1) as f64;
    let nll = per_token(samples.iter().map(|sample| sample.nll).sum());
    let kl = samples.iter().map(|sample| sample.kl).sum::<Option<f64>>().and_then(per_token);
    let agreement = samples.iter().map(|sample| sample.agreeing).sum::<Option<usize>>();
    let agreement = agreement.and_then(|tokens| per_token(tokens as f64));
    GroupResult { n, score, tokens, nll, kl, agreement }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(group: Option<&str>, score: f64, answer_tokens: usize, nll: f64, kl: Option<f64>) -> SampleResult {
        let (id, group) = ("s".to_owned(), group.map(str::to_owned));
        // The first token of each answer is the reference's likeliest.
        let agreeing = kl.map(|_| answer_tokens.min(1));
        let answer = "yes".into();
        SampleResult { id, group, answer, score, answer_tokens, nll, kl, agreeing, ..SampleResult::default() }
    }

    #[test]
    fn scores_are_per_sample_and_likelihoods_per_token() {
        let a = sample(Some("x"), 1.0, 1, 0.5, Some(0.25));
        let b = sample(Some("x"), 0.0, 3, 3.5, Some(0.75));
        let c = sample(None, 1.0, 4, 4.0, Some(3.0));
        let evaluation = Evaluation::new(vec![a, b, c]);
        let (nll, kl, agreement) = (Some(1.0), Some(0.25), Some(0.5));
        assert_eq!(evaluation.groups["x"], GroupResult { n: 2, score: 0.5, tokens: 4, nll, kl, agreement });
        assert_eq!((evaluation.n, evaluation.score), (3, 2.0 / 3.0));
        assert_eq!((evaluation.tokens, evaluation.nll, evaluation.kl), (8, Some(1.0), Some(0.5)));
        assert_eq!(evaluation.agreement, Some(3.0 / 8.0));
    }

    #[test]
    fn json_has_the_agreed_keys() {
        let value = serde_json::to_value(Evaluation::new(vec![sample(Some("x"), 1.0, 2, 1.0, None)])).unwrap();
        let expected = serde_json::json!({
            "n": 1, "score": 1.0, "points": null, "tokens": 2, "nll": 0.5, "kl": null, "agreement": null,
            "preset": null, "min_pixels": null, "max_pixels": null,
            "groups": {"x": {"n": 1, "score": 1.0, "tokens": 2, "nll": 0.5, "kl": null, "agreement": null}},
            "answers": [{"id": "s", "answer": "yes", "score": 1.0}],
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn no_answer_tokens_means_no_likelihood() {
        let evaluation = Evaluation::new(vec![sample(None, 1.0, 0, 0.0, Some(0.0))]);
        assert_eq!((evaluation.nll, evaluation.kl, evaluation.agreement), (None, None, None));
        assert!(evaluation.groups.is_empty());
    }
}
