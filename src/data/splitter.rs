//! How a tokenizer cuts text before it looks pieces up, within bounds.

use super::bounded::is_over;
use anyhow::{Context, Result, bail};
use fancy_regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::pre_tokenizers::whitespace::{Whitespace, WhitespaceSplit};
use tokenizers::{Offsets, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior};

/// Steps back that one search of a tokenizer's regular expression may take. Those of published tokenizers go back once for
/// each character of a run of white space. Steps forward and what looks ahead are not counted: time bounds those.
const MAX_BACKTRACKS: usize = 100_000;

/// Most bytes of a part of a regular expression once it is compiled; those of published ones have some 100,000.
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// Most matches and gaps between them in a piece of text: twice as many as a sample may have tokens, of which each of either kind
/// is one at least, unless those of one kind are left out.
const MAX_PIECES: usize = 2 << 20;

/// Cuts text before it is looked up, as the file's `pre_tokenizer` says.
pub(super) enum Splitter {
    Split {
        pattern: Box<Searched>,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    Sequence(Vec<Self>),
    /// Splitters without a regular expression of the file's.
    Plain(PreTokenizerWrapper),
}

impl Splitter {
    /// Reads a `pre_tokenizer`. Errors where it cannot be read, naming the pattern where it is that.
    pub(super) fn new(mut part: Value) -> Result<Self> {
        #[derive(Deserialize)]
        struct Split {
            pattern: SplitPattern,
            behavior: SplitDelimiterBehavior,
            invert: bool,
        }
        match part.get("type").and_then(Value::as_str) {
            Some("Split") => {
                let split: Split = serde_json::from_value(part).context("a `pre_tokenizer` cannot be read")?;
                let pattern = match split.pattern {
                    SplitPattern::String(text) => fancy_regex::escape(&text).into_owned(),
                    SplitPattern::Regex(pattern) => pattern,
                };
                let mut builder = RegexBuilder::new(&pattern);
                builder.backtrack_limit(MAX_BACKTRACKS).delegate_size_limit(MAX_COMPILED_BYTES);
                let built = builder.build().with_context(|| format!("the pattern {pattern:?} cannot be read"))?;
                Ok(Self::Split { pattern: Box::new(Searched(built)), behavior: split.behavior, invert: split.invert })
            }
            Some("Sequence") => {
                let steps = part.get_mut("pretokenizers").map(Value::take);
                let Some(Value::Array(steps)) = steps else { bail!("the sequence of `pre_tokenizer` has no list") };
                Ok(Self::Sequence(steps.into_iter().map(Self::new).collect::<Result<_>>()?))
            }
            // By its own type: the reader of all types brings those along that are not taken, 100,000 lines of compiled code.
            Some("ByteLevel") => Self::plain::<ByteLevel>(part),
            Some("Digits") => Self::plain::<Digits>(part),
            Some("Punctuation") => Self::plain::<Punctuation>(part),
            Some("Whitespace") => Self::plain::<Whitespace>(part),
            Some("WhitespaceSplit") => Self::plain::<WhitespaceSplit>(part),
            _ => bail!("the `pre_tokenizer` {part} is of no type that is taken"),
        }
    }

    fn plain<T: DeserializeOwned + Into<PreTokenizerWrapper>>(part: Value) -> Result<Self> {
        let plain: T = serde_json::from_value(part).context("a `pre_tokenizer` cannot be read")?;
        Ok(Self::Plain(plain.into()))
    }
}

impl PreTokenizer for Splitter {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        match self {
            Self::Split { pattern, behavior, invert } => text.split(|_, piece| match invert {
                true => piece.split(Invert(&**pattern), *behavior),
                false => piece.split(&**pattern, *behavior),
            }),
            Self::Sequence(steps) => steps.iter().try_for_each(|step| step.pre_tokenize(text)),
            Self::Plain(plain) => plain.pre_tokenize(text),
        }
    }
}

/// A regular expression whose search ends where it takes too many steps, or once nobody waits for it.
pub(super) struct Searched(Regex);

impl Pattern for &Searched {
    fn find_matches(&self, inside: &str) -> tokenizers::Result<Vec<(Offsets, bool)>> {
        let mut found = Vec::new();
        let mut end = 0;
        for search in self.0.find_iter(inside) {
            let (start, next) = search.map(|found| (found.start(), found.end()))?;
            if end != start {
                found.push(((end, start), false));
            }
            found.push(((start, next), true));
            end = next;
            if found.len() > MAX_PIECES {
                return Err(format!("there are more than {MAX_PIECES} words, the limit").into());
            }
            stop_if_over()?;
        }
        if end != inside.len() || inside.is_empty() {
            found.push(((end, inside.len()), false));
        }
        Ok(found)
    }
}

/// Errors once nobody waits for what this thread does.
pub(super) fn stop_if_over() -> tokenizers::Result<()> {
    if is_over() { Err("nobody waits for it any longer".into()) } else { Ok(()) }
}
