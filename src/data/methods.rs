//! What chat templates call of Python, each call paid for before it works.
//!
//! A template's fuel buys instructions and what they make, but a method of a string may make gigabytes, or look through
//! megabytes for nothing, within one instruction. Here the work is counted first, in the engine's own measure: one unit
//! for an instruction or 64 bytes.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::io::{self, Write};

/// Bytes that one unit of fuel pays for.
const BYTES_PER_UNIT: usize = 64;

/// Bytes of an entry of a list, its growth included.
const ENTRY_BYTES: usize = 64;

/// Most digits of a width in `str.format`: lines of 9999 characters.
const MAX_WIDTH_DIGITS: usize = 4;

/// Most spaces of a level of `tojson`; real templates ask for 2 or 4.
const MAX_INDENT: usize = 64;

/// Most bytes that a list or a dictionary may be written in, by itself or by `tojson` before it is indented.
const MAX_WRITTEN_BYTES: usize = 1 << 20;

/// Methods of Python's strings, lists and dictionaries.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    pay(state, args.iter().chain([value]).filter_map(Value::as_str).map(str::len).sum())?;
    match value.as_str() {
        Some(text) => pay_for_text(state, text, method, args)?,
        // Comparing with a list or a dictionary takes as long as those are deep.
        None => {
            if matches!(method, "get" | "count") && !args.iter().take(1).all(is_plain) {
                return Err(invalid(format!("{method} takes a string, a number or none")));
            }
            pay(state, value.len().unwrap_or(0))?;
        }
    }
    unknown_method_callback(state, value, method, args)
}

/// Pays for what a method of a string makes beyond the string's own length. Wrong arguments are the method's to refuse.
fn pay_for_text(state: &State, text: &str, method: &str, args: &[Value]) -> Result<(), Error> {
    let first = args.first().and_then(Value::as_str);
    match (method, first) {
        ("replace", Some(old)) => {
            let new = args.get(1).and_then(Value::as_str).unwrap_or("");
            pay(state, text.matches(old).count().saturating_mul(new.len()))
        }
        ("split", Some(separator)) if !separator.is_empty() => {
            pay(state, text.matches(separator).count() * ENTRY_BYTES)
        }
        ("split" | "splitlines", _) => {
            pay(state, text.split_whitespace().count().max(text.lines().count()) * ENTRY_BYTES)
        }
        // Every character is looked for among these.
        ("strip" | "lstrip" | "rstrip", Some(characters)) => pay(state, text.len().saturating_mul(characters.len())),
        ("startswith" | "endswith", None) => args.iter().try_for_each(|list| strings(state, list, 0)),
        ("join", None) => args.iter().try_for_each(|list| strings(state, list, text.len())),
        ("join", Some(list)) => pay(state, list.len().saturating_mul(text.len() + ENTRY_BYTES)),
        ("format", _) => {
            let digits = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
            if digits > MAX_WIDTH_DIGITS {
                return Err(invalid(format!("format takes numbers of at most {MAX_WIDTH_DIGITS} digits")));
            }
            let fields = text.matches('{').count();
            let longest = args.iter().map(|arg| arg.as_str().map_or(ENTRY_BYTES, str::len)).max().unwrap_or(0);
            if !args.iter().all(is_plain) {
                return Err(invalid("format takes strings and numbers".into()));
            }
            pay(state, fields.saturating_mul(longest + 10usize.pow(MAX_WIDTH_DIGITS as u32)))
        }
        _ => Ok(()),
    }
}

/// Pays for a list of strings, and `between` bytes for each. Errors where one is no string, as in Python.
fn strings(state: &State, list: &Value, between: usize) -> Result<(), Error> {
    for item in list.try_iter()? {
        let text = item.as_str().ok_or_else(|| invalid(format!("expected strings, not {}", item.kind())))?;
        pay(state, text.len() + between + ENTRY_BYTES)?;
    }
    Ok(())
}

fn is_plain(value: &Value) -> bool {
    !matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain | ValueKind::Invalid
    )
}

fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(1 + (bytes / BYTES_PER_UNIT) as u64)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Python's `json.dumps(ensure_ascii=False)`, which transformers puts in place of Jinja's HTML-safe filter.
pub(super) fn tojson(state: &State, value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    if indent > Some(MAX_INDENT) {
        return Err(invalid(format!("tojson indents by at most {MAX_INDENT}")));
    }
    let failed = |error| invalid("tojson cannot write this value".into()).with_source(error);
    // A small list may hold itself many times over: nothing is built before the end is in sight.
    let mut text = Limited(Vec::new());
    serde_json::to_writer(&mut text, &value).map_err(failed)?;
    let mut value: serde_json::Value = serde_json::from_slice(&text.0).map_err(failed)?;
    if sort_keys == Some(true) {
        value.sort_all_objects();
    }
    let mut out = String::new();
    super::json::dump(&value, indent, 0, &mut out);
    pay(state, text.0.len() + out.len())?;
    Ok(out)
}

/// Writes a value where a template shows it. A small list may hold itself many times over, or a word a billion times.
pub(super) fn show(out: &mut Output<'_>, state: &mut State, value: &Value) -> Result<(), Error> {
    if is_plain(value) {
        return escape_formatter(out, state, value);
    }
    let mut text = Limited(Vec::new());
    write!(text, "{value}").map_err(|error| invalid(format!("a list cannot be shown: {error}")))?;
    out.write_str(&String::from_utf8_lossy(&text.0)).map_err(Error::from)
}

/// Bytes up to [`MAX_WRITTEN_BYTES`].
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_WRITTEN_BYTES {
            return Err(io::Error::other(format!("it has more than {MAX_WRITTEN_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
