//! Numbers and tables as people read them.

use serde::Serialize;
use std::fmt::Write;
use vlmq::progress::is_unshown;
pub(crate) use vlmq::progress::{human_bytes as bytes, human_seconds as seconds};

/// A line as it goes to stdout or stderr. Names and answers from strangers' files may hold what a terminal takes for commands:
/// one letter stands for each, so that columns stay columns.
pub(crate) fn shown(line: &str) -> String {
    line.chars().map(|letter| if is_unshown(letter) { char::REPLACEMENT_CHARACTER } else { letter }).collect()
}

/// A message as it goes there, in one line. Causes from libraries may span several; whoever reads our stderr counts on one.
pub(crate) fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    shown(&lines.collect::<Vec<_>>().join(" "))
}

/// JSON as people and programs read it, with nothing in it that [`shown`] would replace but line breaks between values.
pub(crate) fn json(value: &impl Serialize) -> serde_json::Result<String> {
    let mut text = String::new();
    for letter in serde_json::to_string_pretty(value)?.chars() {
        match letter {
            // All of these have four digits, and stand in strings alone.
            letter if is_unshown(letter) && letter != '\n' => {
                write!(text, "\\u{:04x}", u32::from(letter)).expect("a string takes it all");
            }
            letter => text.push(letter),
        }
    }
    Ok(text)
}

/// Reads a number of bytes: a whole number, or one with a unit such as `8GiB`, `1.5GiB` or `500MB`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 10] = [
        ("", 1),
        ("B", 1),
        ("KB", 1000),
        ("MB", 1000 * 1000),
        ("GB", 1000 * 1000 * 1000),
        ("TB", 1000 * 1000 * 1000 * 1000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
    ];
    // No GPU has less than a mebibyte, or more than a tebibyte or two.
    const SENSIBLE: std::ops::RangeInclusive<u64> = 1 << 20..=16 << 40;
    let wrong = || format!("must be a number of bytes, or one with a unit: {}", "8GiB, 500MiB, 24GB");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start());
    let (_, unit) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(wrong)?;
    let bytes = match number.parse::<u64>() {
        Ok(number) => number.checked_mul(*unit),
        // A fraction of a unit, exact enough below 2^53 bytes.
        Err(_) if *unit > 1 => number.parse::<f64>().ok().map(|number| (number * *unit as f64) as u64),
        Err(_) => None,
    };
    match bytes {
        Some(bytes) if SENSIBLE.contains(&bytes) => Ok(bytes),
        Some(_) => Err("must be from 1MiB to 16TiB".into()),
        None => Err(wrong()),
    }
}

/// A number that a run may lack.
pub(crate) fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.4}"))
}

/// Lines of columns: the first flush left, the others flush right.
pub(crate) fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| rows.iter().filter_map(|row| row.get(column)).map(|cell: &String| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bars show sizes as indicatif writes them: all others look alike.
    #[test]
    fn bytes_are_written_as_bars_write_them() {
        let steps = (0..64).flat_map(|power| (0..8).map(move |eighth| (1u64 << power) / 8 * eighth + (1 << power)));
        for size in steps.flat_map(|size| [size - 1, size, size + 1]).chain([0, 999_994, 999_995, u64::MAX]) {
            assert_eq!(bytes(size), indicatif::HumanBytes(size).to_string());
        }
    }

    #[test]
    fn sizes() {
        let cases = [
            ("8GiB", 8 << 30),
            ("500MiB", 500 << 20),
            ("24GB", 24_000_000_000),
            ("24 gb", 24_000_000_000),
            ("1.5GiB", 3 << 29),
            ("2097152", 2 << 20),
            ("2097152B", 2 << 20),
            ("4096KiB", 4 << 20),
            ("16TiB", 16 << 40),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        for wrong in
            ["", "GiB", "8Gi", "8G", "8GiBs", "-8GiB", "1.5", "1.2.3GiB", ".", ".GiB", "1e9", "nan", "∞GiB", "8 G iB"]
        {
            assert!(parse_bytes(wrong).unwrap_err().contains("8GiB"), "{wrong}");
        }
        for absurd in ["0", "1", "0GiB", "0.1KiB", "17TiB", "18446744073709551615", "99999999.5TiB"] {
            assert!(parse_bytes(absurd).unwrap_err().contains("from 1MiB"), "{absurd}");
        }
        assert!(parse_bytes("18446744073709551615GiB").is_err());
        assert!(parse_bytes("99999999999999999999999").is_err());
    }

    #[test]
    fn what_a_terminal_would_obey_is_replaced() {
        let hostile = "\u{1b}[31mred\u{9b}2J\r\u{202e}x\u{2028}y";
        assert_eq!(shown(hostile), "\u{fffd}[31mred\u{fffd}2J\u{fffd}\u{fffd}x\u{fffd}y");
        assert_eq!(one_line(" a\n\n  b\u{7} "), "a b\u{fffd}");
    }

    #[test]
    fn json_is_safe_and_says_the_same() {
        let value = serde_json::json!({"\u{1b}k\u{7f}": ["\u{9b}\u{202e}\u{2029}é\n", 1.5], "b": {}});
        let text = json(&value).unwrap();
        assert!(text.contains("\\u007f") && text.contains(r#""\u009b\u202e\u2029é\n""#), "{text}");
        assert!(!text.chars().any(|letter| letter != '\n' && is_unshown(letter)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["group".to_owned(), "n".to_owned()], vec!["é".to_owned(), "100".to_owned()], vec!["x".to_owned()]];
        assert_eq!(table(&rows), ["group    n", "é      100", "x"]);
        assert!(table(&[]).is_empty());
    }
}
