//! The paper's benchmarks against LMMs-Eval's own functions (tests/golden/make_presets.py), and through the program.

use crate::support::golden::RANDOM;
use crate::support::program::{Bench, IMAGE, read_json, stderr, succeed, vlmq_run};
use crate::support::{golden, message};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::data::dataset::{self, Conversation, Part};
use vlmq::device::cpu::Cpu;
use vlmq::evaluate::presets::{PRESETS, Preset};
use vlmq::evaluate::{Conditions, Evaluation, SampleResult};
use vlmq::model::families;

/// What the harness says about one preset's file.
#[derive(Deserialize)]
struct Expected {
    task: String,
    split: String,
    max_new_tokens: Option<usize>,
    stop: String,
    prompts: Vec<String>,
    predictions: Vec<String>,
    scores: Vec<f64>,
    overall: f64,
    groups: BTreeMap<String, f64>,
    points: Option<f64>,
}

fn expected() -> BTreeMap<String, Expected> {
    serde_json::from_value(read_json(golden("presets/expected.json"))).unwrap()
}

fn file(preset: &Preset) -> std::path::PathBuf {
    golden("presets").join(format!("{}.jsonl", preset.name))
}

fn read(preset: &'static Preset, path: &Path) -> anyhow::Result<Vec<Conversation>> {
    dataset::read_with(path, None, &Preset::reads, &|row| preset.prepare(row))
}

fn named(name: &str) -> &'static Preset {
    Preset::named(name).unwrap()
}

#[test]
fn questions_are_worded_as_the_harness_words_them() {
    let expected = expected();
    assert_eq!(expected.len(), PRESETS.len());
    for preset in &PRESETS {
        let expected = &expected[preset.name];
        let read = read(preset, &file(preset)).unwrap();
        assert_eq!(read.len(), expected.prompts.len(), "{}", preset.name);
        for (index, (conversation, prompt)) in read.iter().zip(&expected.prompts).enumerate() {
            let content = &conversation.question()[0].content;
            // One of ScienceQA's questions has no image.
            let images = usize::from((preset.name, index) != ("scienceqa", 1));
            assert_eq!(content.len(), 1 + images, "{} {index}", preset.name);
            assert!(content[..images].iter().all(|part| matches!(part, Part::Image(_))), "{} {index}", preset.name);
            assert_eq!(content[images], Part::Text(prompt.clone()), "{} {index}", preset.name);
            assert_eq!(conversation.question().len(), 1);
            assert_eq!(conversation.max_new_tokens, None, "the preset's limit comes after the flag");
        }
        assert_eq!((preset.tasks[0], preset.split), (expected.task.as_str(), expected.split.as_str()));
        assert_eq!(preset.stop, expected.stop, "{}", preset.name);
        // TextVQA's task has no limit: the model's class says.
        assert_eq!(preset.max_new_tokens, expected.max_new_tokens.unwrap_or(128), "{}", preset.name);
    }
}

#[test]
fn scores_and_groups_are_the_harness_s() {
    let expected = expected();
    for preset in &PRESETS {
        let expected = &expected[preset.name];
        let read = read(preset, &file(preset)).unwrap();
        let samples = read.iter().zip(&expected.predictions).map(|(conversation, prediction)| {
            let metric = conversation.metric.unwrap();
            let turn = conversation.answer();
            let answers = metric.right_answers(turn.as_deref(), &conversation.answers);
            metric.check_answers(&answers).unwrap();
            SampleResult {
                id: conversation.id.clone(),
                group: conversation.group.clone(),
                score: metric.score(prediction, &answers),
                answer: prediction.clone(),
                answer_tokens: 1,
                nll: 0.5,
                ..SampleResult::default()
            }
        });
        let evaluation = Evaluation::under(Conditions::new(Some(preset), Some([4, 9])), samples.collect());
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12;
        for (answer, score) in evaluation.answers.iter().zip(&expected.scores) {
            assert!(close(answer.score, *score), "{} {}: {} for {score}", preset.name, answer.id, answer.score);
        }
        assert!(close(evaluation.score, expected.overall), "{}: {}", preset.name, evaluation.score);
        assert_eq!(evaluation.points, expected.points, "{}", preset.name);
        let names = |map: &BTreeMap<String, _>| map.keys().cloned().collect::<Vec<_>>();
        let groups: BTreeMap<String, f64> =
            evaluation.groups.iter().map(|(n, group)| (n.clone(), group.score)).collect();
        assert_eq!(names(&groups), names(&expected.groups), "{}", preset.name);
        for (name, score) in &groups {
            assert!(close(*score, expected.groups[name]), "{} {name}: {score}", preset.name);
        }
    }
}

#[test]
fn names_and_those_of_the_harness() {
    for preset in &PRESETS {
        assert_eq!(named(preset.name), preset);
        for task in preset.tasks {
            assert_eq!(named(task), preset);
        }
    }
    let error = message(Preset::named("vqav2"));
    for preset in &PRESETS {
        assert!(error.contains("`vqav2`") && error.contains(preset.name), "{error}");
    }
}

#[test]
fn what_a_line_says_stays() {
    let row = json!({"question": "q", "answer": "a", "metric": "exact", "group": "mine", "max_new_tokens": 3});
    for name in ["chartqa", "docvqa", "ocrbench"] {
        let prepared = named(name).prepare(row.clone()).unwrap();
        for key in ["metric", "group", "max_new_tokens"] {
            assert_eq!(prepared[key], row[key], "{name} {key}");
        }
        assert_eq!(prepared["answers"], json!(["a"]));
    }
    // Options under any of their names, the answer as letter or number.
    let options = json!(["x", "y"]);
    for (name, answer) in [("options", json!("B")), ("choices", json!(1)), ("multi-choice options", json!(["B"]))] {
        let prepared = named("scienceqa").prepare(json!({"question": "q", name: options, "answer": answer})).unwrap();
        assert_eq!(prepared["answers"], json!(["B"]));
        assert!(prepared["question"].as_str().unwrap().starts_with("q\nA. x\nB. y\nAnswer with"));
    }
    // A group of MME-RealWorld that is no task's counts once.
    assert_eq!(named("mme-realworld").groups("mine").len(), 1);
    assert_eq!(named("mme-realworld").groups("Perception/Monitoring").len(), 2);
}

#[test]
fn only_qwen2_vl_s_answers_end_early() {
    let (chartqa, textvqa) = (named("chartqa"), named("textvqa"));
    assert_eq!(chartqa.kept(true, "12\n\nbecause"), "12");
    assert_eq!(chartqa.kept(true, "\n\n12"), "");
    assert_eq!(chartqa.kept(true, "12\nASSISTANT: 13"), "12\nASSISTANT: 13");
    assert_eq!(textvqa.kept(true, "12\n\n ASSISTANT: 13"), "12\n\n ");
    assert_eq!(chartqa.kept(false, "12\n\nbecause"), "12\n\nbecause");
    for name in RANDOM {
        let checkpoint = Checkpoint::open(&golden("model").join(name)).unwrap();
        let family = families::of::<Cpu>(&checkpoint).unwrap();
        assert_eq!(family.answers_stop(), family.model_type() == "qwen2_vl", "{name}");
    }
}

#[test]
fn a_line_that_lacks_something_is_an_error_with_its_place() {
    let cases: &[(&str, Value, &[&str])] = &[
        ("chartqa", json!({"answer": "a", "type": "human_test"}), &["`question` is missing"]),
        ("chartqa", json!({"question": "q", "answer": "a"}), &["`type` is missing", "`group`"]),
        ("chartqa", json!({"question": "q", "type": "human_test"}), &["`answers` is missing"]),
        ("chartqa", json!({"question": "q", "type": 3, "answer": "a"}), &["`type` must be a string, not 3"]),
        ("docvqa", json!({"question": ["q"], "answers": ["a"]}), &["`question` must be a string"]),
        ("docvqa", json!({"question": "q", "answers": []}), &["`answers` is empty"]),
        ("docvqa", json!({"question": "q", "answers": [1]}), &["`answers` must be a string or a list of strings"]),
        ("docvqa", json!({"messages": [], "question": "q", "answers": ["a"]}), &["`messages` is given"]),
        ("docvqa", json!({"text": "q"}), &["`text` is given"]),
        ("mme-realworld", json!({"question": "q", "answer": "A", "group": "g"}), &["options are missing"]),
        ("mme-realworld", json!({"question": "q", "options": ["(A) a"], "answer": "A"}), &["`category` is missing"]),
        (
            "mme-realworld-cn",
            json!({"question": "q", "options": ["(A) a"], "answer": "F"}),
            &["\"F\"", "none of the 5"],
        ),
        ("ocrbench", json!({"question": "q", "answer": "a", "group": "g"}), &["`dataset` is missing"]),
        ("ocrbench", json!({"question": "q", "answer": "a", "dataset": "d"}), &["`question_type` is missing"]),
        ("scienceqa", json!({"question": "q", "answer": 0}), &["options are missing", "`choices`", "`choice_A`"]),
        ("scienceqa", json!({"question": "q", "choices": ["a", "b"], "answer": 2}), &["`answer` 2", "none of the 2"]),
        ("scienceqa", json!({"question": "q", "choices": ["a", "b"], "answer": -1}), &["`answer` -1"]),
        ("scienceqa", json!({"question": "q", "choices": ["a", "b"], "answer": "a b"}), &["\"a b\"", "none of the 2"]),
        ("scienceqa", json!({"question": "q", "choices": [], "answer": 0}), &["`choices` holds 0"]),
        ("scienceqa", json!({"question": "q", "choices": "ab", "answer": 0}), &["`choices` must be a list of strings"]),
        ("scienceqa", json!({"question": "q", "choices": ["a"], "hint": 1, "answer": 0}), &["`hint` must be a string"]),
        ("seedbench-2-plus", json!({"question": "q", "choice_A": "a", "answer": "A"}), &["4 options", "1 are given"]),
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("questions.jsonl");
    for (name, row, says) in cases {
        std::fs::write(&path, format!("\n{row}\n")).unwrap();
        let error = message(read(named(name), &path));
        for part in says.iter().chain(&[format!("{}:2", path.display()).as_str(), *name].map(|part| part)) {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
    std::fs::write(&path, "\"question\"").unwrap();
    let error = message(read(named("docvqa"), &path));
    assert!(error.contains("questions.jsonl:1: expected a JSON object, found a string"), "{error}");
}

/// The file of a preset, every image replaced by one that exists.
fn with_images(bench: &Bench, preset: &Preset) {
    let lines = std::fs::read_to_string(file(preset)).unwrap();
    let lines: Vec<String> = lines
        .lines()
        .map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            if row.get("image").is_some() {
                row["image"] = IMAGE.into();
            }
            row.to_string()
        })
        .collect();
    bench.write_data(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn every_benchmark_through_the_program() {
    let bench = Bench::new("flat-tied-bf16");
    let scores = bench.outputs().join("scores.json");
    for preset in &PRESETS {
        with_images(&bench, preset);
        let limits = ["--max-new-tokens", "2", "--min-pixels", "784", "--max-pixels", "6272"];
        let shown = succeed(&bench.eval(&[&["--preset", preset.tasks[0], "--quiet"][..], &limits].concat()));
        assert!(shown.ends_with("images of 784 to 6272 pixels\n"), "{shown}");
        let json = read_json(&scores);
        let expected = &expected()[preset.name];
        assert_eq!(json["preset"], preset.name);
        assert_eq!((&json["min_pixels"], &json["max_pixels"]), (&784.into(), &6272.into()));
        assert_eq!(json["n"], expected.prompts.len());
        let groups: Vec<&String> = json["groups"].as_object().unwrap().keys().collect();
        assert_eq!(groups, expected.groups.keys().collect::<Vec<_>>(), "{}", preset.name);
        assert!(json["nll"].is_number(), "{}", preset.name);
        assert_eq!(json["points"].is_number(), preset.name == "ocrbench");
        assert_eq!(shown.contains("points of"), preset.name == "ocrbench", "{shown}");
    }
}

#[test]
fn line_before_flag_before_preset() {
    let bench = Bench::new("flat-tied-bf16");
    let row = json!({"image": IMAGE, "question": "what?", "answer": "x", "type": "human_test"});
    let mut short = row.clone();
    short["max_new_tokens"] = 1.into();
    bench.write_data(&[&row.to_string(), &short.to_string()]);
    let lengths = |extra: &[&str]| -> Vec<usize> {
        succeed(&bench.eval(&[&["--preset", "chartqa", "--quiet"], extra].concat()));
        let answers = read_json(bench.outputs().join("scores.json"))["answers"].clone();
        answers.as_array().unwrap().iter().map(|answer| answer["answer"].as_str().unwrap().len()).collect()
    };
    let (preset, flag) = (lengths(&[]), lengths(&["--max-new-tokens", "4"]));
    assert_eq!(preset[1], flag[1], "the line's own limit holds either way");
    assert!(flag[1] < flag[0] && flag[0] < preset[0], "{flag:?} {preset:?}");
}

#[test]
fn unknown_presets_and_faulty_lines_end_the_program() {
    let bench = Bench::new("flat-tied-bf16");
    let output = vlmq_run(&bench.eval(&["--preset", "vqav2"]));
    assert_eq!(output.status.code(), Some(2));
    let help = succeed(&["eval", "--help"]);
    for preset in &PRESETS {
        assert!(stderr(&output).contains(preset.name), "{}", stderr(&output));
        assert!(help.contains(preset.name), "{help}");
    }
    bench
        .write_data(&[r#"{"question": "q", "choices": ["a", "b"], "answer": 0}"#, r#"{"question": "q", "answer": 0}"#]);
    bench.refused(&bench.eval(&["--preset", "scienceqa"]), &["data.jsonl:2", "scienceqa", "options are missing"]);
}
