//! Metrics against the scores of LMMs-Eval's own functions (tests/golden/make_metrics.py).

use std::collections::HashMap;
use std::path::Path;
use vlmq::evaluate::metrics::Metric;

#[test]
fn scores_equal_the_harness() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics.json");
    let text = std::fs::read_to_string(path).unwrap();
    let cases: Vec<(Metric, String, Vec<String>, f64)> = serde_json::from_str(&text).unwrap();
    let mut seen = HashMap::new();
    let mut wrong = Vec::new();
    for (metric, prediction, answers, expected) in cases {
        let score = metric.score(&prediction, &answers);
        if (score - expected).abs() > 1e-12 {
            wrong.push(format!("{metric}: {prediction:?} against {answers:?} is {score}, not {expected}"));
        }
        *seen.entry(metric).or_insert(0) += 1;
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(seen.len(), Metric::ALL.len());
    assert!(seen.values().all(|&cases| cases >= 100), "{seen:?}");
}

#[test]
fn names_read_back() {
    for metric in Metric::ALL {
        assert_eq!(metric.name().parse::<Metric>().unwrap(), metric);
        assert_eq!(serde_json::to_value(metric).unwrap(), metric.to_string());
    }
    assert_eq!(Metric::default(), Metric::Exact);
    let error = "bleu".parse::<Metric>().unwrap_err().to_string();
    assert!(
        error.contains("bleu") && error.contains("exact, relaxed, anls, vqa, substring, formula, choice, first_letter"),
        "{error}"
    );
}

#[test]
fn answers_that_cannot_score_are_refused() {
    for metric in Metric::ALL {
        assert!(metric.check_answers::<&str>(&[]).is_err());
        assert_eq!(metric.check_answers(&["yes"]).is_err(), metric == Metric::Vqa);
        assert!(metric.check_answers(&["yes", "no"]).is_ok());
        assert_eq!(metric.score::<&str>("yes", &[]), 0.0);
    }
}

#[test]
fn the_assistant_turn_is_no_annotator() {
    let listed = ["yes".to_owned(), "no".to_owned()];
    assert_eq!(Metric::Exact.right_answers(Some("ja"), &listed), ["ja", "yes", "no"]);
    assert_eq!(Metric::Exact.right_answers(None, &listed), ["yes", "no"]);
    assert_eq!(Metric::Vqa.right_answers(Some("ja"), &listed), ["yes", "no"]);
    assert_eq!(Metric::Vqa.right_answers(Some("ja"), &[]), ["ja"]);
}
