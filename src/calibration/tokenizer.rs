//! tokenizer.json: which parts of one are taken, and text to tokens and back within bounds.
//!
//! The crate that reads the file ends a search that backtracks too long where it stands, and the rest of the text becomes
//! other tokens without a word. The regular expressions are therefore run here, where that is an error.

use super::patches::read_json;
use crate::input::{MAX_TOKENIZER_BYTES, read_beside};
use anyhow::{Context, Result, anyhow, bail, ensure};
use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;
use std::path::Path;
use tokenizers::pattern::Invert;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{
    AddedToken, DecoderWrapper, Encoding, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, SplitDelimiterBehavior, TokenizerBuilder, TokenizerImpl,
};

/// Steps back that one search of a tokenizer's regular expression may take. Those of published tokenizers go back once for
/// each character of a run of white space; with this, text is searched in a time that grows with its length alone.
const MAX_BACKTRACKS: usize = 100_000;

/// Most bytes of a regular expression; published ones have up to 500.
const MAX_PATTERN_BYTES: usize = 4096;

/// Most steps in a sequence of normalizers, pre-tokenizers or decoders; published tokenizers have up to 4.
const MAX_STEPS: usize = 16;

/// The parts of a tokenizer.json that are taken, by the key they stand under. What is left out repeats or replaces text
/// without a bound, draws lots, or reads tables of which nothing is checked.
const KNOWN: [(&str, &[&str]); 4] = [
    ("normalizer", &["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Sequence"]),
    ("pre_tokenizer", &["Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"]),
    ("post_processor", &["ByteLevel", "TemplateProcessing", "Sequence"]),
    ("decoder", &["ByteLevel", "ByteFallback", "Fuse", "Sequence"]),
];

type Bounded = TokenizerImpl<ModelWrapper, NormalizerWrapper, Splitter, PostProcessorWrapper, DecoderWrapper>;

/// A checkpoint's tokenizer.
pub(super) struct Tokenizer {
    bounded: Bounded,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder.
    ///
    /// Truncation and padding that earlier tools left in it are ignored. Errors, naming the file, when it is missing or
    /// broken, and on parts that are not taken.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = read_beside(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)?
            .with_context(|| format!("cannot read {}; copy it from the original checkpoint", path.display()))?;
        let unreadable = || format!("{} is not a tokenizer this program can read", path.display());
        let all: Value = serde_json::from_slice(&bytes).with_context(unreadable)?;
        check(&all).with_context(unreadable)?;
        // Not from the text once more, where a key that stands twice could count otherwise.
        let mut read: tokenizers::Tokenizer = serde_json::from_value(all).with_context(unreadable)?;
        add_further(&mut read, folder)?;
        let splitter = read.get_pre_tokenizer().map(Splitter::new).transpose().with_context(unreadable)?;
        let bounded = TokenizerBuilder::new()
            .with_model(read.get_model().clone())
            .with_normalizer(read.get_normalizer().cloned())
            .with_pre_tokenizer(splitter)
            .with_post_processor(read.get_post_processor().cloned())
            .with_decoder(read.get_decoder().cloned())
            .with_added_vocabulary(read.get_added_vocabulary().clone())
            .build()
            .map_err(|error| anyhow!("{error}"))
            .with_context(unreadable)?;
        Ok(Self { bounded })
    }

    /// Tokens of a text with their places in it, in bytes. Errors where a search takes too many steps.
    pub(super) fn encode(&self, text: &str) -> Result<Encoding> {
        self.bounded.encode(text, false).map_err(|error| anyhow!("the tokenizer fails: {error}"))
    }

    /// Text of tokens, with special ones or without; numbers that are no token's are left out.
    pub(super) fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        self.bounded.decode(tokens, skip_special).map_err(|error| anyhow!("cannot turn tokens into text: {error}"))
    }

    /// The text of one token, `None` where there is none of this number.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.bounded.id_to_token(id)
    }

    /// The number of a token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.bounded.token_to_id(token)
    }
}

/// Adds the tokens that stand beside tokenizer.json and not in it, as transformers does: those of `added_tokens_decoder` in
/// tokenizer_config.json, or else of added_tokens.json, by their numbers, then special ones that only have a name. Errors where a
/// token would get another number than it is given.
fn add_further(tokenizer: &mut tokenizers::Tokenizer, folder: &Path) -> Result<()> {
    let config = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
    let special = read_json(folder, "special_tokens_map.json")?.unwrap_or_default();
    let mut numbered: Vec<(u32, AddedToken)> = match config.get("added_tokens_decoder").and_then(Value::as_object) {
        Some(tokens) => {
            let token = |(number, token): (&String, &Value)| Some((number.parse().ok()?, added(token)?));
            tokens.iter().filter_map(token).collect()
        }
        None => {
            let tokens = read_json(folder, "added_tokens.json")?.unwrap_or_default();
            let token = |(text, number): (&String, &Value)| {
                Some((u32::try_from(number.as_u64()?).ok()?, AddedToken::from(text.as_str(), false)))
            };
            tokens.as_object().into_iter().flatten().filter_map(token).collect()
        }
    };
    numbered.sort_by_key(|(number, _)| *number);
    let named = [&config, &special].into_iter().flat_map(|file| {
        let fields = file.as_object().into_iter().flatten();
        fields.flat_map(|(key, value)| match (key.as_str(), value) {
            ("additional_special_tokens" | "extra_special_tokens", Value::Array(all)) => all.iter().collect(),
            ("extra_special_tokens", Value::Object(all)) => all.values().collect(),
            (key, token) if key.ends_with("_token") => vec![token],
            _ => Vec::new(),
        })
    });
    let named = named.filter_map(added).map(|token| (None, AddedToken { special: true, normalized: false, ..token }));
    let all: Vec<(Option<u32>, AddedToken)> =
        numbered.into_iter().map(|(number, token)| (Some(number), token)).chain(named).collect();
    for (number, token) in all {
        if token.content.is_empty() || tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content) {
            continue;
        }
        let text = token.content.clone();
        match token.special {
            true => tokenizer.add_special_tokens([token]),
            false => tokenizer.add_tokens([token]),
        }
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("{}: the token {text:?} beside tokenizer.json", folder.display()))?;
        let given = tokenizer.token_to_id(&text);
        ensure!(
            number.is_none() || given == number,
            "{}: the token {text:?}, which stands beside tokenizer.json and not in it, is to be number {}, but the next free one is {}; \
             save the tokenizer anew",
            folder.display(),
            number.unwrap_or_default(),
            given.unwrap_or_default()
        );
    }
    Ok(())
}

/// A token as configurations write one: a string, or an object of its properties.
fn added(token: &Value) -> Option<AddedToken> {
    match token {
        Value::String(text) => Some(AddedToken::from(text.as_str(), false)),
        token => {
            let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
            let plain = AddedToken::from(token.get("content")?.as_str()?, flag("special"));
            let normalized = token.get("normalized").and_then(Value::as_bool).unwrap_or(plain.normalized);
            Some(AddedToken {
                single_word: flag("single_word"),
                lstrip: flag("lstrip"),
                rstrip: flag("rstrip"),
                normalized,
                ..plain
            })
        }
    }
}

/// Refuses what is not taken, before any of it is built.
fn check(all: &Value) -> Result<()> {
    let all = all.as_object().context("it is not a JSON object")?;
    for (key, known) in KNOWN {
        if let Some(part) = all.get(key).filter(|part| !part.is_null()) {
            check_part(part, key, known)?;
        }
    }
    let model = all.get("model").context("it has no `model`")?;
    let kind = model.get("type").and_then(Value::as_str).context("`model` has no `type`")?;
    ensure!(kind == "BPE", "`model` is of type {kind:?}; known is BPE");
    // The known tokenizers work on bytes and mark no word's middle or end; a mark longer than a token is no token's.
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if let Some(mark) = model.get(key).filter(|mark| !mark.is_null() && mark.as_str() != Some("")) {
            bail!("`model` has {key} {mark}; known is none");
        }
    }
    // Drawn anew each time, the same text would have other tokens.
    if let Some(dropout) = model.get("dropout").filter(|dropout| !dropout.is_null() && dropout.as_f64() != Some(0.0)) {
        bail!("`model` has a `dropout` of {dropout}; take it out");
    }
    check_merges(model)
}

/// Refuses a merge of two tokens whose result is none: the crate makes room for the longest token, not for such a one.
fn check_merges(model: &Value) -> Result<()> {
    let vocab = model.get("vocab").and_then(Value::as_object).context("`model` has no `vocab`")?;
    let merges = model.get("merges").and_then(Value::as_array).context("`model` has no `merges`")?;
    for merge in merges {
        let pair: Vec<&str> = match merge {
            Value::String(both) => both.split(' ').collect(),
            Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        // What is no pair, or of no tokens, is refused by who reads it.
        let [first, second] = pair[..] else { continue };
        ensure!(
            vocab.contains_key(&format!("{first}{second}")),
            "`model` merges {first:?} and {second:?}, which make no token of its `vocab`"
        );
    }
    Ok(())
}

fn check_part(part: &Value, key: &str, known: &[&str]) -> Result<()> {
    let kind = part.get("type").and_then(Value::as_str).with_context(|| format!("`{key}` has no `type`"))?;
    ensure!(known.contains(&kind), "`{key}` is of type {kind:?}; known are {}", known.join(", "));
    let pattern = part.get("pattern").and_then(|pattern| pattern.get("Regex")?.as_str()).unwrap_or("");
    ensure!(
        pattern.len() <= MAX_PATTERN_BYTES,
        "a pattern of `{key}` has {} bytes; the limit is {MAX_PATTERN_BYTES}",
        pattern.len()
    );
    if kind != "Sequence" {
        return Ok(());
    }
    let list = ["normalizers", "pretokenizers", "processors", "decoders"].iter().find_map(|list| part.get(*list));
    let steps = list.and_then(Value::as_array).with_context(|| format!("the sequence of `{key}` has no list"))?;
    ensure!(steps.len() <= MAX_STEPS, "`{key}` has {} steps; the limit is {MAX_STEPS}", steps.len());
    let plain: Vec<&str> = known.iter().copied().filter(|kind| *kind != "Sequence").collect();
    steps.iter().try_for_each(|step| check_part(step, key, &plain))
}

/// Cuts text before it is looked up, as the file's `pre_tokenizer` says.
enum Splitter {
    Split {
        pattern: Box<Regex>,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    Sequence(Vec<Self>),
    /// Those without a regular expression of the file's.
    Plain(PreTokenizerWrapper),
}

impl Splitter {
    fn new(part: &PreTokenizerWrapper) -> Result<Self> {
        Ok(match part {
            PreTokenizerWrapper::Split(split) => {
                let pattern = match &split.pattern {
                    SplitPattern::String(text) => fancy_regex::escape(text).into_owned(),
                    SplitPattern::Regex(pattern) => pattern.clone(),
                };
                let built = RegexBuilder::new(&pattern).backtrack_limit(MAX_BACKTRACKS).build();
                let built = built.with_context(|| format!("the pattern {pattern:?} cannot be read"))?;
                Self::Split { pattern: Box::new(built), behavior: split.behavior, invert: split.invert }
            }
            PreTokenizerWrapper::Sequence(sequence) => {
                Self::Sequence(sequence.as_ref().iter().map(Self::new).collect::<Result<_>>()?)
            }
            plain => Self::Plain(plain.clone()),
        })
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
