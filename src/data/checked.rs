//! The bytes of a data file, checked as they are read.

use std::cell::Cell;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};

/// Bytes that are read at once.
pub(super) const BLOCK_BYTES: usize = 64 << 10;

/// Why a file is not read any further.
#[derive(Debug)]
pub(super) enum Refused {
    /// Bytes that are not UTF-8.
    NotText,
    /// A row has more bytes than it may.
    Row,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotText => "it is not UTF-8 text",
            Self::Row => "a row is too long",
        })
    }
}

impl Error for Refused {}

/// A file's bytes as long as they are UTF-8 and a row has not too many, without a byte order mark.
pub(super) struct Checked<'a> {
    file: File,
    left: &'a Cell<u64>,
    /// Turns numbers that JSON does not have into null.
    non_numbers: Option<NonNumbers<'a>>,
    /// What was read; its beginning is a character or word whose end was not.
    block: Vec<u8>,
    kept: usize,
    /// What is to be handed on.
    ready: Vec<u8>,
    handed: usize,
    begun: bool,
}

impl<'a> Checked<'a> {
    /// `left`: how many bytes may still be read, set anew for each row. `non_numbers`: set where there is one; if not given, they stay.
    pub(super) fn new(file: File, left: &'a Cell<u64>, non_numbers: Option<&'a Cell<bool>>) -> Self {
        let non_numbers = non_numbers.map(|found| NonNumbers { found, quoted: false, escaped: false });
        let block = vec![0; BLOCK_BYTES];
        Self { file, left, non_numbers, block, kept: 0, ready: Vec::new(), handed: 0, begun: false }
    }

    fn fill(&mut self) -> io::Result<()> {
        self.ready.clear();
        self.handed = 0;
        let mut ended = false;
        while self.ready.is_empty() && !ended {
            let length = self.file.read(&mut self.block[self.kept..])?;
            ended = length == 0;
            let left = self.left.get().checked_sub(length as u64);
            self.left.set(left.ok_or_else(|| io::Error::other(Refused::Row))?);
            let bytes = &self.block[..self.kept + length];
            let text = match std::str::from_utf8(bytes) {
                Err(error) if ended || error.error_len().is_some() => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, Refused::NotText));
                }
                Err(error) => &bytes[..error.valid_up_to()],
                Ok(_) => bytes,
            };
            let mark =
                if self.begun { 0 } else { text.len() - text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).len() };
            self.begun |= !text.is_empty();
            let taken = match &mut self.non_numbers {
                None => {
                    self.ready.extend_from_slice(&text[mark..]);
                    text.len()
                }
                Some(non_numbers) => mark + non_numbers.replace(&text[mark..], ended, &mut self.ready),
            };
            let rest = taken..bytes.len();
            self.kept = rest.len();
            self.block.copy_within(rest, 0);
        }
        Ok(())
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.handed == self.ready.len() {
            self.fill()?;
        }
        let length = buffer.len().min(self.ready.len() - self.handed);
        buffer[..length].copy_from_slice(&self.ready[self.handed..][..length]);
        self.handed += length;
        Ok(length)
    }
}

/// Finds what Python writes for numbers that JSON does not have.
struct NonNumbers<'a> {
    found: &'a Cell<bool>,
    quoted: bool,
    escaped: bool,
}

impl NonNumbers<'_> {
    /// Writes `text` to `out`, such numbers outside of strings as null, and returns how much of it: a beginning of one at the end of
    /// what is there is left unless the text has `ended`.
    fn replace(&mut self, text: &[u8], ended: bool, out: &mut Vec<u8>) -> usize {
        const WORDS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
        let mut at = 0;
        while let Some(&byte) = text.get(at) {
            let rest = &text[at..];
            if !self.quoted && matches!(byte, b'N' | b'-' | b'I') {
                if let Some(word) = WORDS.iter().find(|word| rest.starts_with(word)) {
                    self.found.set(true);
                    out.extend_from_slice(b"null");
                    at += word.len();
                    continue;
                }
                if !ended && WORDS.iter().any(|word| word.starts_with(rest)) {
                    return at;
                }
            }
            // What is escaped ends no string.
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.quoted = !self.quoted,
                _ => {}
            }
            out.push(byte);
            at += 1;
        }
        at
    }
}
