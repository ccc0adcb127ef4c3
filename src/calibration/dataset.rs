//! Files of conversations: JSON Lines, or one JSON list.

use super::forms;
pub use super::source::ImageSource;
use crate::input;
use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Names of the metrics a line may ask for; `vlmq-run eval` has one of each.
pub const METRICS: [&str; 8] = ["exact", "relaxed", "anls", "vqa", "substring", "formula", "choice", "first_letter"];

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// `id` of the line, else the file's name and the line's number.
    pub id: String,
    /// What the line counts under in evaluation; free text.
    pub group: Option<String>,
    /// The turns; empty when the line is plain `text`.
    pub messages: Vec<Message>,
    /// Plain text, which no template surrounds; then there are no messages.
    pub text: Option<String>,
    /// One of [`METRICS`].
    pub metric: Option<String>,
    /// Answers that count as right besides the last assistant turn.
    pub answers: Vec<String>,
    /// Most tokens to decode in evaluation.
    pub max_new_tokens: Option<usize>,
    /// Where the line stands, for messages: `file:line`, or `file, entry n` in a JSON list.
    pub origin: String,
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What the turn says and shows, in order.
    pub content: Vec<Part>,
    /// Whether the line has it as one string, not as a list of parts.
    pub plain: bool,
}

/// One piece of a turn.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Some text.
    Text(String),
    /// An image.
    Image(ImageSource),
}

impl Part {
    /// The text, where it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Image(_) => None,
        }
    }
}

impl Conversation {
    /// Text of the last turn where it is the assistant's: what the model should answer.
    pub fn answer(&self) -> Option<String> {
        let last = self.messages.last().filter(|message| message.role == "assistant")?;
        Some(last.content.iter().filter_map(Part::text).collect())
    }

    /// The turns before the answer.
    pub fn question(&self) -> &[Message] {
        match self.messages.split_last() {
            Some((last, rest)) if last.role == "assistant" => rest,
            _ => &self.messages,
        }
    }
}

/// Reads all conversations of a file, whichever of the forms in README each line has.
///
/// A relative image path counts from `image_root`, or from the file's folder when there is none, and every path must lead
/// below it. Images are not read yet. Errors name the file and line; a file without conversations is an error too.
pub fn read(path: &Path, image_root: Option<&Path>) -> Result<Vec<Conversation>> {
    read_with(path, image_root, &|row| Ok(row))
}

/// As [`read`], every line changed by `prepare` before its form is looked at. Its errors get the file and line, too.
pub fn read_with(
    path: &Path,
    image_root: Option<&Path>,
    prepare: &dyn Fn(Value) -> Result<Value>,
) -> Result<Vec<Conversation>> {
    let bytes = input::read(path, input::MAX_DATA_BYTES)
        .with_context(|| format!("cannot read the data file {}", path.display()))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let text = std::str::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
    if let Some(root) = image_root {
        ensure!(root.is_dir(), "the image root {} is not a folder", root.display());
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let root: Arc<Path> = image_root.unwrap_or(folder).into();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let one = |value: Value, origin: String, id: String| {
        prepare(value).and_then(|value| forms::conversation(&value, &root, &origin, id)).with_context(|| origin.clone())
    };
    let mut conversations = Vec::new();
    if text.trim_start().starts_with('[') {
        let rows: Vec<Value> = parse(text).with_context(|| format!("{} is not a JSON list", path.display()))?;
        for (index, row) in rows.into_iter().enumerate() {
            let entry = index + 1;
            conversations.push(one(row, format!("{}, entry {entry}", path.display()), format!("{name}:{entry}"))?);
        }
    } else {
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let number = index + 1;
            let origin = format!("{}:{number}", path.display());
            let value: Value = parse(line).with_context(|| {
                format!("{origin}: not a JSON object; a data file has one on each line, or is one JSON list")
            })?;
            conversations.push(one(value, origin, format!("{name}:{number}"))?);
        }
    }
    if conversations.is_empty() {
        bail!("{} holds no conversations", path.display());
    }
    Ok(conversations)
}

/// Reads JSON, and what Python writes for numbers that JSON does not have (`NaN`, `Infinity`) as null.
fn parse<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    serde_json::from_str(text).or_else(|error| match without_non_numbers(text) {
        Some(text) => serde_json::from_str(&text),
        None => Err(error),
    })
}

/// `text` with such numbers outside of strings as null; `None` where it has none.
fn without_non_numbers(text: &str) -> Option<String> {
    const WORDS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let (mut out, mut rest, mut found) = (String::with_capacity(text.len()), text, false);
    let mut quoted = false;
    while let Some(first) = rest.chars().next() {
        let word = WORDS.iter().find(|word| !quoted && rest.starts_with(**word));
        let length = match (word, first) {
            (Some(word), _) => {
                found = true;
                out.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
            // What is escaped ends no string.
            (None, '\\') => first.len_utf8() + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                quoted = !quoted;
                1
            }
            (None, other) => other.len_utf8(),
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    found.then_some(out)
}

/// The first `samples` conversations (all when `None` or when there are fewer) in a shuffled order that depends on
/// `seed` alone.
pub fn select(mut conversations: Vec<Conversation>, samples: Option<usize>, seed: u64) -> Vec<Conversation> {
    fastrand::Rng::with_seed(seed).shuffle(&mut conversations);
    conversations.truncate(samples.unwrap_or(usize::MAX));
    conversations
}
