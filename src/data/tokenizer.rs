//! tokenizer.json: which parts of one are taken, and text to tokens and back within bounds.
//!
//! The crate that reads the file ends a search that backtracks too long where it stands, and the rest of the text becomes
//! other tokens without a word. The regular expressions are therefore run here, where that is an error.

use super::bounded::bounded;
use super::patches::read_json;
use super::splitter::{Splitter, stop_if_over};
use crate::input::{self, MAX_TOKENIZER_BYTES, read_beside};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::cell::Cell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokenizers::{
    AddedToken, DecoderWrapper, Encoding, Model, ModelWrapper, NormalizedString, NormalizerWrapper, OffsetType,
    PostProcessorWrapper, PreTokenizer, Token, TokenizerBuilder, TokenizerImpl,
};

/// Most bytes of a regular expression; published ones have up to 500.
const MAX_PATTERN_BYTES: usize = 4096;

/// Most steps in a sequence of normalizers, pre-tokenizers or decoders; published tokenizers have up to 4.
const MAX_STEPS: usize = 16;

/// Most bytes of a token: published tokenizers' longest are runs of white space, of 512 at most. As many as an answer may have tokens
/// make 256 MiB of text.
const MAX_TOKEN_BYTES: usize = 4096;

/// Most bytes of all added tokens; those of Gemma 3 have 100 kB. What they are found with takes some 12 times as many.
const MAX_ADDED_BYTES: usize = 4 << 20;

/// Most bytes of a piece that byte-pair encoding is given, a word; it takes some 150 bytes for each.
const MAX_PIECE_BYTES: usize = 2 << 20;

/// Most time that a text may take on a processor, besides [`TIME_OF_A_BYTE`].
const TIME_OF_A_TEXT: Duration = Duration::from_secs(1);

/// Published tokenizers take 1 to 1.5 µs of it for each byte of a text.
const TIME_OF_A_BYTE: Duration = Duration::from_micros(8);

/// Most time that it may take to build a tokenizer, as [`TIME_OF_A_BYTE`] of its file, and this.
const TIME_OF_A_FILE: Duration = Duration::from_secs(5);

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
    bounded: Arc<Bounded>,
    path: PathBuf,
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
        let most = TIME_OF_A_FILE + TIME_OF_A_BYTE * bytes.len() as u32;
        let (mut read, splitter) = bounded(most, move || build(&bytes)).with_context(unreadable)?;
        add_further(&mut read, folder)?;
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
        Ok(Self { bounded: Arc::new(bounded), path })
    }

    /// Tokens of a text with their places in it, in bytes. Errors, naming the file, where a search takes too many steps or all of it
    /// too much time, and on a text of more than `most` tokens or with a word of more than [`MAX_PIECE_BYTES`].
    pub(super) fn encode(&self, text: &str, most: usize) -> Result<Encoding> {
        let (bounded, owned) = (Arc::clone(&self.bounded), text.to_owned());
        let time = TIME_OF_A_TEXT + TIME_OF_A_BYTE * text.len() as u32;
        let encoding = self::bounded(time, move || encode(&bounded, &owned, most));
        encoding
            .with_context(|| format!("the tokenizer in {} fails on {} bytes of text", self.path.display(), text.len()))
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

/// The tokenizer of a tokenizer.json, and apart from it what cuts text. Errors on parts that are not taken.
fn build(bytes: &[u8]) -> Result<(tokenizers::Tokenizer, Option<Splitter>)> {
    let mut all = input::json::value(bytes, input::MAX_TOKENIZER_VALUES)?;
    check(&all)?;
    // Read here: the crate would build every regular expression once more, without a bound.
    let part = all.get_mut("pre_tokenizer").map(Value::take).filter(|part| !part.is_null());
    let splitter = part.map(Splitter::new).transpose()?;
    // From text, which the crate has a function for; of a generic one all parts of a tokenizer would be compiled here once more. Not from
    // the file's own text, where a key that stands twice could count otherwise: a place in this text says nothing to anybody.
    let tokenizer = all.to_string().parse().map_err(|error| {
        let error = format!("{error}");
        anyhow!("{}", error.rsplit_once(" at line ").map_or(error.as_str(), |(what, _)| what))
    });
    Ok((tokenizer?, splitter))
}

/// As [`TokenizerImpl::encode`], but no further than to `most` tokens, or until nobody waits for it.
fn encode(bounded: &Bounded, text: &str, most: usize) -> Result<Encoding> {
    let failed = |error| anyhow!("{error}");
    let mut pieces = bounded.get_added_vocabulary().extract_and_normalize(bounded.get_normalizer(), text);
    if let Some(splitter) = bounded.get_pre_tokenizer() {
        splitter.pre_tokenize(&mut pieces).map_err(failed)?;
    }
    let count = Cell::new(0);
    let tokens = |piece: &NormalizedString| -> tokenizers::Result<Vec<Token>> {
        let piece = piece.get();
        if piece.len() > MAX_PIECE_BYTES {
            return Err(format!("a word has {} bytes; the limit is {MAX_PIECE_BYTES}", piece.len()).into());
        }
        let tokens = bounded.get_model().tokenize(piece)?;
        count.set(count.get() + tokens.len());
        if count.get() > most {
            return Err(format!("there are more than {most} tokens, the limit").into());
        }
        stop_if_over()?;
        Ok(tokens)
    };
    pieces.tokenize(tokens).map_err(failed)?;
    let encoding = pieces.into_encoding(None, 0, OffsetType::Byte).map_err(failed)?;
    bounded.post_process(encoding, None, false).map_err(failed)
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
    let mut known: HashSet<String> = tokenizer.get_added_vocabulary().get_vocab().keys().cloned().collect();
    let all = numbered.into_iter().map(|(number, token)| (Some(number), token)).chain(named);
    let new: Vec<(Option<u32>, AddedToken)> =
        all.filter(|(_, token)| !token.content.is_empty() && known.insert(token.content.clone())).collect();
    let beside = || format!("the tokens of {} beside tokenizer.json", folder.display());
    check_added(new.iter().map(|(_, token)| token.content.as_str())).with_context(beside)?;
    // At once: each call builds anew what all of them are found with.
    let tokens = new.iter().map(|(_, token)| token.clone());
    tokenizer.add_tokens(tokens).map_err(|error| anyhow!("{error}")).with_context(beside)?;
    for (number, AddedToken { content: text, .. }) in new {
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

/// Refuses tokens that are longer than any is, and added ones that take too much to find.
fn check_added<'a>(tokens: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut bytes = 0;
    for token in tokens {
        check_length(token)?;
        bytes += token.len();
    }
    ensure!(bytes <= MAX_ADDED_BYTES, "its added tokens have {bytes} bytes; the limit is {MAX_ADDED_BYTES}");
    Ok(())
}

fn check_length(token: &str) -> Result<()> {
    ensure!(token.len() <= MAX_TOKEN_BYTES, "a token has {} bytes; the limit is {MAX_TOKEN_BYTES}", token.len());
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
    let added = all.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    check_added(added.filter_map(|token| token.get("content")?.as_str()))?;
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
    vocab.keys().try_for_each(|token| check_length(token))?;
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
