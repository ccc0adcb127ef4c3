//! Conversations, as the lines of a data file have them.

use super::metric::Metric;
use super::source::ImageSource;

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
    /// The rule that scores answers in evaluation.
    pub metric: Option<Metric>,
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
