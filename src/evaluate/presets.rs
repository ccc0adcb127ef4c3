//! The benchmarks of the VLMQ paper (section 5.1) as LMMs-Eval 0.7.3 runs them: how a question is put, how long the answer
//! may be, and how it is scored.
//!
//! A data file for a preset holds one question a line under the column names of LMMs-Eval's data sets, with the image as
//! `image` or `images` (docs/benchmarks.md). [`Preset::prepare`] makes a plain question of such a line. A preset only
//! words the user's turn, images first; the system's turn is the chat template's business.

use super::metrics::{Metric, strip};
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// One line of a data file.
type Row = Map<String, Value>;

/// One benchmark.
#[derive(Debug)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// Names of LMMs-Eval's tasks, which are taken as well; the figures are those of the first.
    pub tasks: &'static [&'static str],
    /// Split of the data set that is asked.
    pub split: &'static str,
    /// Most tokens of an answer, where neither line nor flag says (`generation_kwargs` of the task).
    pub max_new_tokens: usize,
    /// How an answer is scored, where the line does not say.
    pub metric: Metric,
    /// Where LMMs-Eval ends an answer (`until` of the task). Of its model classes only that of Qwen2-VL heeds it:
    /// see [`Self::kept`].
    pub stop: &'static str,
    /// Words the question.
    text: fn(&Row) -> Result<String>,
    /// Makes a line's answers out of what the data set has.
    answers: fn(&Row) -> Result<Vec<String>>,
    /// The group of a line that names none.
    group: fn(&Row) -> Result<Option<String>>,
    /// The group that a group is a part of.
    parent: fn(&str) -> Option<&str>,
    /// Whether the benchmark's own figure is the sum of scores, not their mean.
    sums: bool,
}

/// Ends of answers: where a task says nothing, and where it does.
const BLANK_LINE: &str = "\n\n";
const OLD_TURN: &str = "ASSISTANT:";

const ONE_WORD: &str = "\nAnswer the question with a single word.";
const SHORT: &str = "\nAnswer the question using a single word or phrase.";
const LETTER: &str = "\nAnswer with the option's letter from the given choices directly.";
const SELECT: &str = "Select the best answer to the above multiple-choice question based on the image. Respond with only the \
                      letter (A, B, C, D, or E) of the correct option.\nThe best answer is: ";
const SELECT_CN: &str =
    "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： ";

/// What most benchmarks have in common.
const PLAIN: Preset = Preset {
    name: "",
    tasks: &[],
    split: "test",
    max_new_tokens: 16,
    metric: Metric::Exact,
    stop: BLANK_LINE,
    text: |row| text(row, "question").map(str::to_owned),
    answers,
    group: |_| Ok(None),
    parent: |_| None,
    sums: false,
};

/// All benchmarks, by name.
pub static PRESETS: [Preset; 8] = [
    // tasks/chartqa
    Preset {
        name: "chartqa",
        tasks: &["chartqa"],
        metric: Metric::Relaxed,
        text: |row| Ok(format!("{}{ONE_WORD}", text(row, "question")?)),
        group: chartqa_group,
        ..PLAIN
    },
    // tasks/docvqa
    Preset {
        name: "docvqa",
        tasks: &["docvqa_val"],
        split: "validation",
        max_new_tokens: 32,
        metric: Metric::Anls,
        text: |row| Ok(format!("{}{SHORT}", text(row, "question")?)),
        ..PLAIN
    },
    // tasks/mme_realworld; the score over all questions alike, whatever their group
    Preset {
        name: "mme-realworld",
        tasks: &["mmerealworld"],
        text: |row| realworld(row, "The choices are listed below:", SELECT),
        ..REALWORLD
    },
    Preset {
        name: "mme-realworld-cn",
        tasks: &["mmerealworld_cn"],
        text: |row| realworld(row, "选项如下所示:", SELECT_CN),
        ..REALWORLD
    },
    // tasks/ocrbench; `prepare` gives HME100k's formulas their own metric
    Preset {
        name: "ocrbench",
        tasks: &["ocrbench"],
        max_new_tokens: 128,
        metric: Metric::Substring,
        text: |row| Ok(strip(text(row, "question")?).to_owned()),
        group: |row| group_column(row, "question_type").map(|kind| Some(kind.to_owned())),
        parent: ocrbench_parent,
        sums: true,
        ..PLAIN
    },
    // tasks/scienceqa; `scienceqa_img` asks only the questions with an image
    Preset {
        name: "scienceqa",
        tasks: &["scienceqa", "scienceqa_img", "scienceqa_full"],
        text: scienceqa,
        answers: |row| letters(row, options(row)?.len()),
        ..PLAIN
    },
    // tasks/seedbench_2_plus
    Preset {
        name: "seedbench-2-plus",
        tasks: &["seedbench_2_plus"],
        metric: Metric::FirstLetter,
        stop: OLD_TURN,
        text: seedbench,
        answers: |row| letters(row, 4),
        group: |row| group_column(row, "question_image_type").map(|kind| Some(capitalized(kind))),
        ..PLAIN
    },
    // tasks/textvqa; the task sets no limit. 128 tokens are those of the classes for Qwen2-VL and Qwen2.5-VL
    // (LLaVA-OneVision's are 1024), and no annotator's answer is a tenth as long.
    Preset {
        name: "textvqa",
        tasks: &["textvqa_val"],
        split: "validation",
        max_new_tokens: 128,
        metric: Metric::Vqa,
        stop: OLD_TURN,
        text: |row| Ok(format!("{}{SHORT}", capitalized(text(row, "question")?))),
        ..PLAIN
    },
];

/// MME-RealWorld in either language.
const REALWORLD: Preset = Preset {
    split: "train",
    metric: Metric::Choice,
    answers: |row| letters(row, 5),
    group: realworld_group,
    parent: |group| group.split_once('/').map(|(task, _)| task),
    ..PLAIN
};

impl PartialEq for Preset {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Preset {
    /// The preset of a name, ours or LMMs-Eval's.
    ///
    /// # Errors
    /// Lists the known ones.
    pub fn named(name: &str) -> Result<&'static Self> {
        let found = PRESETS.iter().find(|preset| preset.name == name || preset.tasks.contains(&name));
        found.with_context(|| {
            let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
            format!("unknown preset `{name}`; known: {}", known.join(", "))
        })
    }

    /// Whether a preset looks at a line's column, besides those that stand in the forms of data.
    pub fn reads(column: &str) -> bool {
        let choice = column.strip_prefix("choice_").is_some_and(|letter| matches!(letter.as_bytes(), [b'A'..=b'Z']));
        choice || COLUMNS.contains(&column) || OPTIONS.contains(&column)
    }

    /// Makes a question with answers, metric and group out of a line with the data set's columns.
    ///
    /// `metric`, `group`, `max_new_tokens` and images of the line stay as they are.
    ///
    /// # Errors
    /// Names the column that is missing or has another type; the caller adds file and line.
    pub fn prepare(&self, row: Value) -> Result<Value> {
        // What is no object at all is refused by whoever reads its form.
        let Value::Object(mut row) = row else { return Ok(row) };
        self.fill(&mut row).with_context(|| format!("preset `{}`", self.name))?;
        Ok(Value::Object(row))
    }

    fn fill(&self, row: &mut Row) -> Result<()> {
        for key in ["messages", "conversations", "text"] {
            ensure!(
                present(row, key).is_none(),
                "`{key}` is given, but the preset words the question itself: write `question`, or evaluate without it"
            );
        }
        // LMMs-Eval's class for Qwen2-VL takes the marker out of every question.
        let question = (self.text)(row)?.replace("<image>", "");
        let answers = (self.answers)(row)?;
        if present(row, "group").is_none() {
            row.insert("group".into(), (self.group)(row)?.into());
        }
        if present(row, "metric").is_none() {
            let formula = self.metric == Metric::Substring && text(row, "dataset")? == "HME100k";
            let metric = if formula { Metric::Formula } else { self.metric };
            row.insert("metric".into(), metric.name().into());
        }
        row.insert("question".into(), question.into());
        row.insert("answers".into(), answers.into());
        Ok(())
    }

    /// The part of an answer that LMMs-Eval scores. `stops`: whether its class for the model's family ends answers at
    /// [`Self::stop`]; those for most take them whole.
    pub fn kept<'a>(&self, stops: bool, answer: &'a str) -> &'a str {
        if stops { answer.split_once(self.stop).map_or(answer, |(kept, _)| kept) } else { answer }
    }

    /// `group` and those that it is a part of: a task of MME-RealWorld, OCRBench's text recognition.
    pub fn groups(&self, group: &str) -> BTreeSet<String> {
        [Some(group), (self.parent)(group)].into_iter().flatten().map(str::to_owned).collect()
    }

    /// The benchmark's own figure where that is the number of right answers: OCRBench's final score, of 1000 on the whole
    /// benchmark.
    pub fn points(&self, scores: impl Iterator<Item = f64>) -> Option<f64> {
        self.sums.then(|| scores.sum())
    }
}

fn chartqa_group(row: &Row) -> Result<Option<String>> {
    let human = group_column(row, "type")? == "human_test";
    Ok(Some(if human { "human" } else { "augmented" }.to_owned()))
}

fn realworld(row: &Row, before: &str, after: &str) -> Result<String> {
    let question = text(row, "question")?;
    Ok(format!("{question} {before}\n{}\n{after}", options(row)?.join("\n")))
}

/// Task and subtask.
fn realworld_group(row: &Row) -> Result<Option<String>> {
    let category = group_column(row, "category")?;
    let task = if category.to_lowercase().contains("perception") { "Perception" } else { "Reasoning" };
    let subtask = category.rsplit('/').next().unwrap_or_default();
    Ok(Some(format!("{task}/{subtask}")))
}

/// Six of the ten kinds of question are text recognition; the seventh by that name, of formulas, is not.
fn ocrbench_parent(kind: &str) -> Option<&str> {
    let text = kind.ends_with("Recognition") && kind != "Handwritten Mathematical Expression Recognition";
    text.then_some("Text Recognition")
}

fn scienceqa(row: &Row) -> Result<String> {
    let context = match optional_text(row, "hint")? {
        None | Some("") => String::new(),
        Some(hint) => format!("Context: {hint}\n"),
    };
    Ok(format!("{context}{}\n{}{LETTER}", text(row, "question")?, lettered(&options(row)?)))
}

fn seedbench(row: &Row) -> Result<String> {
    let options = options(row)?;
    ensure!(options.len() == 4, "4 options are needed, {} are given", options.len());
    // The harness takes an option that names a file for an image, and shows none.
    let shown: Vec<&str> =
        options.into_iter().map(|text| if text.contains("jpg") || text.contains("png") { "" } else { text }).collect();
    Ok(format!("{}\n{}{LETTER}", text(row, "question")?, lettered(&shown)))
}

fn lettered(options: &[&str]) -> String {
    let lines: Vec<String> = ('A'..).zip(options).map(|(letter, option)| format!("{letter}. {option}")).collect();
    lines.join("\n")
}

/// Columns of single data sets.
const COLUMNS: [&str; 6] = ["dataset", "hint", "type", "category", "question_type", "question_image_type"];

/// Names that data sets give to a list of options.
const OPTIONS: [&str; 3] = ["options", "choices", "multi-choice options"];

/// The options, from a list or from `choice_A` and on.
fn options(row: &Row) -> Result<Vec<&str>> {
    if let Some((name, value)) = OPTIONS.iter().find_map(|name| Some((name, present(row, name)?))) {
        let texts = value.as_array().and_then(|all| all.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        let texts = texts.with_context(|| format!("`{name}` must be a list of strings, not {value}"))?;
        ensure!(!texts.is_empty() && texts.len() <= 26, "`{name}` holds {} options, not 1 to 26", texts.len());
        return Ok(texts);
    }
    let found = ('A'..='Z').map(|letter| optional_text(row, &format!("choice_{letter}")));
    let found: Vec<&str> = found.map_while(Result::transpose).collect::<Result<_>>()?;
    ensure!(
        !found.is_empty(),
        "the options are missing: write a list as one of `{}`, or `choice_A` and on",
        OPTIONS.join("`, `")
    );
    Ok(found)
}

/// The strings of `answers` or `answer`.
fn answers(row: &Row) -> Result<Vec<String>> {
    let found = ["answers", "answer"].into_iter().find_map(|name| Some((name, present(row, name)?)));
    let (name, value) = found.context("`answers` is missing")?;
    let all = match value {
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(all) => all.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let all = all.with_context(|| format!("`{name}` must be a string or a list of strings, not {value}"))?;
    ensure!(!all.is_empty(), "`{name}` is empty");
    Ok(all)
}

/// The letter of the right one of `count` options; ScienceQA counts them from 0.
fn letters(row: &Row, count: usize) -> Result<Vec<String>> {
    let letter = |index: usize| ('A'..='Z').take(count).nth(index);
    if let Some(Value::Number(index)) = present(row, "answer") {
        let found = index.as_u64().and_then(|index| letter(index as usize));
        let found = found.with_context(|| format!("`answer` {index} is the number of none of the {count} options"))?;
        return Ok(vec![found.to_string()]);
    }
    let answers = answers(row)?;
    for answer in &answers {
        let known = (0..count).filter_map(letter).any(|letter| strip(answer).eq_ignore_ascii_case(&letter.to_string()));
        ensure!(known, "the answer {answer:?} is the letter of none of the {count} options");
    }
    Ok(answers)
}

/// The value under `key`; null counts as absent.
fn present<'a>(row: &'a Row, key: &str) -> Option<&'a Value> {
    row.get(key).filter(|value| !value.is_null())
}

fn optional_text<'a>(row: &'a Row, key: &str) -> Result<Option<&'a str>> {
    let value = present(row, key);
    value.map(|value| value.as_str().with_context(|| format!("`{key}` must be a string, not {value}"))).transpose()
}

fn text<'a>(row: &'a Row, key: &str) -> Result<&'a str> {
    optional_text(row, key)?.with_context(|| format!("`{key}` is missing"))
}

fn group_column<'a>(row: &'a Row, key: &str) -> Result<&'a str> {
    optional_text(row, key)?.with_context(|| format!("`{key}` is missing; write it, or the name of a `group`"))
}

/// The first letter large and all others small, as Python's `capitalize` does (but for the few letters of Unicode whose
/// title case is not their upper case, such as ǆ).
fn capitalized(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let lower = text.to_lowercase();
    let rest = &lower[first.to_lowercase().map(char::len_utf8).sum::<usize>()..];
    let mut upper = first.to_uppercase();
    let large = upper.next().into_iter();
    large.chain(upper.flat_map(char::to_lowercase)).chain(rest.chars()).collect()
}
