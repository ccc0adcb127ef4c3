//! The rows of a data file, JSON Lines or one JSON list, read one after another: neither the file is held nor what no form uses.

use super::checked::{BLOCK_BYTES, Checked, Refused};
use super::forms;
use crate::input::{self, json::Values};
use anyhow::{Context, Result, anyhow};
use serde::de::{self, DeserializeSeed, Deserializer as _, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Deserializer, Map, Value};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// Longest line that is taken out of the file before it is read; others are read as they come, byte by byte, and not held.
const LINE_BYTES: usize = 1 << 20;

/// Where a row stands, counted from 1.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// A line of a file.
    Line(usize),
    /// An entry of a list.
    Entry(usize),
}

impl Place {
    /// The place as messages name it.
    pub(super) fn of(self, path: &Path) -> String {
        match self {
            Self::Line(number) => format!("{}:{number}", path.display()),
            Self::Entry(number) => format!("{}, entry {number}", path.display()),
        }
    }

    /// Number of the line or entry.
    pub(super) fn number(self) -> usize {
        match self {
            Self::Line(number) | Self::Entry(number) => number,
        }
    }
}

/// Makes something of every row, `one` of the row and its place. Of a row's columns only those that [`forms`]
/// know and that it `reads` are as they stand in the file; of others it is kept whether they name an image.
///
/// Errors, naming the file and where it applies the row, where it cannot be read, is no UTF-8 or no JSON, where a row is above
/// [`input::MAX_ROW_BYTES`] or [`input::MAX_ROW_VALUES`], and as `one`.
pub(super) fn read<T>(
    path: &Path,
    reads: &dyn Fn(&str) -> bool,
    one: &dyn Fn(Value, Place) -> Result<T>,
) -> Result<Vec<T>> {
    let rows = Rows { path, reads, one, left: Cell::new(0) };
    match rows.read(None) {
        // Python writes numbers that JSON does not have; few files hold one.
        Err(error) if error.is::<serde_json::Error>() => {
            let found = Cell::new(false);
            let again = rows.read(Some(&found));
            if found.get() { again } else { Err(error) }
        }
        read => read,
    }
}

struct Rows<'a, T> {
    path: &'a Path,
    reads: &'a dyn Fn(&str) -> bool,
    one: &'a dyn Fn(Value, Place) -> Result<T>,
    /// Bytes that the present row may still have.
    left: Cell<u64>,
}

impl<T> Rows<'_, T> {
    /// `non_numbers`: set where there is one; if not given, they are wrong.
    fn read(&self, non_numbers: Option<&Cell<bool>>) -> Result<Vec<T>> {
        let mut reader = self.open(non_numbers)?;
        let mut rows = Vec::new();
        let mut line = Vec::new();
        let mut begun = false;
        for number in 1.. {
            let place = Place::Line(number);
            self.left.set(input::MAX_ROW_BYTES);
            line.clear();
            let length = reader.by_ref().take(LINE_BYTES as u64).read_until(b'\n', &mut line);
            let length = length.map_err(|error| self.cannot_read(error, place))?;
            if length == 0 {
                break;
            }
            let whole = length < LINE_BYTES || line.ends_with(b"\n");
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let text = line.utf8_chunks().next().map_or("", |chunk| chunk.valid());
            if text.trim().is_empty() && whole {
                continue;
            }
            if !begun && text.trim_start().starts_with('[') {
                return self.list(self.open(non_numbers)?);
            }
            begun = true;
            let values = Values::new(input::MAX_ROW_VALUES);
            let row = Row { reads: self.reads, values: &values };
            let read = match whole {
                true => row.alone(&mut Deserializer::from_slice(line)),
                false => {
                    let all = line.chain(Line { reader: &mut reader, ended: false });
                    row.alone(&mut Deserializer::from_reader(BufReader::with_capacity(BLOCK_BYTES, all)))
                }
            };
            let row = read.map_err(|error| match (error.is_io(), values.are_too_few()) {
                (true, _) => self.cannot_read(error.into(), place),
                (_, true) => anyhow::Error::new(error).context(place.of(self.path)),
                _ => anyhow::Error::new(error).context(format!(
                    "{}: not a JSON object; a data file has one on each line, or is one JSON list",
                    place.of(self.path)
                )),
            })?;
            rows.push((self.one)(row, place)?);
        }
        Ok(rows)
    }

    fn list(&self, reader: impl BufRead) -> Result<Vec<T>> {
        let list = List { rows: self, entry: Cell::new(0), error: RefCell::new(None) };
        let mut reader = Deserializer::from_reader(reader);
        let read = reader.deserialize_seq(&list).and_then(|rows| reader.end().map(|()| rows));
        read.map_err(|error| match list.error.take() {
            Some(error) => error,
            None if error.is_io() => self.cannot_read(error.into(), Place::Entry(list.entry.get())),
            None => anyhow::Error::new(error).context(format!("{} is not a JSON list", self.path.display())),
        })
    }

    fn open<'b>(&'b self, non_numbers: Option<&'b Cell<bool>>) -> Result<BufReader<Checked<'b>>> {
        self.left.set(input::MAX_ROW_BYTES);
        let file = input::open(self.path, input::MAX_DATA_BYTES)
            .with_context(|| format!("cannot read the data file {}", self.path.display()))?;
        Ok(BufReader::with_capacity(BLOCK_BYTES, Checked::new(file, &self.left, non_numbers)))
    }

    fn cannot_read(&self, error: io::Error, place: Place) -> anyhow::Error {
        let path = self.path.display();
        match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(Refused::NotText) => anyhow!("{path} is not UTF-8 text"),
            Some(Refused::Row) => {
                anyhow!("{} has more than {} bytes, the limit for one", place.of(self.path), input::MAX_ROW_BYTES)
            }
            None => anyhow::Error::new(error).context(format!("cannot read the data file {path}")),
        }
    }
}

/// The entries of a list.
struct List<'a, 'b, T> {
    rows: &'a Rows<'b, T>,
    entry: Cell<usize>,
    /// What was wrong with an entry, other than its JSON.
    error: RefCell<Option<anyhow::Error>>,
}

impl<'de, T> Visitor<'de> for &List<'_, '_, T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        loop {
            self.entry.set(self.entry.get() + 1);
            let place = Place::Entry(self.entry.get());
            self.rows.left.set(input::MAX_ROW_BYTES);
            let values = Values::new(input::MAX_ROW_VALUES);
            let row = match list.next_element_seed(Row { reads: self.rows.reads, values: &values }) {
                Ok(Some(row)) => row,
                Ok(None) => return Ok(all),
                Err(error) if values.are_too_few() => {
                    self.error.replace(Some(anyhow!("{}: {error}", place.of(self.rows.path))));
                    return Err(error);
                }
                Err(error) => return Err(error),
            };
            match (self.rows.one)(row, place) {
                Ok(one) => all.push(one),
                Err(error) => {
                    self.error.replace(Some(error));
                    return Err(A::Error::custom("an entry is wrong"));
                }
            }
        }
    }
}

/// Reads a row: of an object what [`read`] says, all of anything else, which nobody takes.
#[derive(Clone, Copy)]
struct Row<'a> {
    reads: &'a dyn Fn(&str) -> bool,
    values: &'a Values,
}

impl Row<'_> {
    /// The only value there is.
    fn alone<'de, R: serde_json::de::Read<'de>>(self, reader: &mut Deserializer<R>) -> serde_json::Result<Value> {
        let row = self.deserialize(&mut *reader)?;
        reader.end()?;
        Ok(row)
    }
}

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.values.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.values.expecting(f)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.values.visit_unit()
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.values.visit_bool(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.values.visit_i64(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.values.visit_u64(value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        self.values.visit_f64(value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.values.visit_str(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Value, A::Error> {
        self.values.visit_seq(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut row = Map::new();
        while let Some(key) = object.next_key::<String>()? {
            let value = if forms::COLUMNS.contains(&key.as_str()) || (self.reads)(&key) {
                object.next_value_seed(self.values)?
            } else {
                self.values.take()?;
                forms::unused(object.next_value_seed(NamesImage { in_list: false })?)
            };
            row.insert(key, value);
        }
        Ok(Value::Object(row))
    }
}

/// Whether a value names an image, as a string or as a list of such.
struct NamesImage {
    in_list: bool,
}

impl<'de> DeserializeSeed<'de> for NamesImage {
    type Value = bool;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NamesImage {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(forms::names_image(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let (mut any, mut all) = (false, !self.in_list);
        // What follows a value that names none is not looked at.
        while all && let Some(one) = list.next_element_seed(Self { in_list: true })? {
            (any, all) = (true, one);
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(any && all)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<bool, A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(false)
    }
}

/// What is left of a line, its end taken but not handed on.
struct Line<R> {
    reader: R,
    ended: bool,
}

impl<R: BufRead> Read for Line<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let there = self.reader.fill_buf()?;
        let there = &there[..there.len().min(buffer.len())];
        let end = there.iter().position(|&byte| byte == b'\n');
        let length = end.unwrap_or(there.len());
        buffer[..length].copy_from_slice(&there[..length]);
        self.ended = end.is_some();
        self.reader.consume(length + usize::from(self.ended));
        // Nothing in front of the line's end is its end as well.
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(content: &[u8]) -> Result<Vec<(usize, Value)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        read(file.path(), &|column| column == "kept", &|row, place| Ok((place.number(), row)))
    }

    #[test]
    fn blocks_and_long_lines_make_no_difference() {
        // Characters of two, three and four bytes, and words, at every place of a block's end.
        let text = "é中😀\\\" NaN \\\\";
        for shift in 0..20 {
            let pad = "x".repeat(BLOCK_BYTES - shift);
            let row =
                format!("{{\"text\":\"{pad}{text}\",\"kept\":[NaN,-Infinity,-1,Infinity,{{\"a\":\"{pad}\"}}, NaN]}}");
            let expected =
                json!({"text": format!("{pad}é中😀\" NaN \\"), "kept": [null, null, -1, null, {"a": pad}, null]});
            let read = rows(format!("\u{feff}[{row},\r\n\n{row}\n]\n").as_bytes()).unwrap();
            assert!(read == [(1, expected.clone()), (2, expected.clone())], "{shift}");
            let long = format!("{{\"text\":\"{}\"}}", "a".repeat(LINE_BYTES + shift));
            let read = rows(format!("\n{row}\r\n{long}\n \n{long}").as_bytes()).unwrap();
            let long = json!({"text": "a".repeat(LINE_BYTES + shift)});
            assert!(read == [(2, expected), (3, long.clone()), (5, long)], "{shift}");
        }
    }

    #[test]
    fn of_other_columns_it_is_kept_whether_they_name_an_image() {
        let row = br#"{"kept": {"a": [1]}, "text": 1, "x": {"a": "a.png"}, "i": "a.png", "l": ["a.png", "b.jpg"], "m": ["a.png", 1],
            "n": [["a.png"]], "e": [], "d": "data:image/png;base64,AA", "s": "a b.png"}"#.map(|byte| if byte == b'\n' { b' ' } else { byte });
        let image = "data:image/";
        let expected = json!({"kept": {"a": [1]}, "text": 1, "x": null, "i": image, "l": image, "m": null, "n": null, "e": null,
            "d": image, "s": null});
        let [(1, read)] = &rows(&row).unwrap()[..] else { panic!("one row") };
        assert_eq!(read, &expected);
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(read), keys(&expected));
    }

    #[test]
    fn errors_name_the_place() {
        let long = "a".repeat(LINE_BYTES);
        for (content, says) in [
            (format!("{{\"text\":\"{long}\"\n"), ":1: not a JSON object"),
            (format!("{{\"text\":\"{long}\"}} 7\n"), ":1: not a JSON object"),
            ("7\n[7".to_owned(), ":2: not a JSON object"),
            ("[7, 8".to_owned(), "is not a JSON list: EOF while parsing a list at line 1 column 5"),
            ("[7]\n[8]".to_owned(), "is not a JSON list: trailing characters at line 2 column 1"),
            (format!("[7, {{\"kept\": [{}0]}}]", "0,".repeat(input::MAX_ROW_VALUES)), ", entry 2: it holds more than"),
            (format!("7\n{{{}\"\":0}}", "\"\":0,".repeat(input::MAX_ROW_VALUES)), ":2: it holds more than"),
        ] {
            let error = format!("{:#}", rows(content.as_bytes()).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
        for bytes in [b"[\"\xff\"]".as_slice(), b"7\n\"\xe4\xb8", b"\xff\xfe["] {
            let error = format!("{:#}", rows(bytes).unwrap_err());
            assert!(error.ends_with("is not UTF-8 text"), "{error}");
        }
    }
}
