//! Text, numbers and tables as markup. The page is XML as well as HTML: every element is closed, every attribute quoted.

use crate::progress::is_unshown;
use std::fmt::{self, Display, Write};

/// Text from outside, which no reader takes for markup: not in an element, not in a quoted attribute.
pub(super) struct Text<'a>(pub(super) &'a str);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            '\t' | '\n' | '\r' => f.write_char(c),
            // Neither HTML nor XML can say some of them at all; others turn the order of what stands around them.
            c if is_unshown(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => f.write_char(char::REPLACEMENT_CHARACTER),
            _ => f.write_char(c),
        })
    }
}

/// A cell of a table.
pub(super) enum Cell {
    /// Text from outside or from here.
    Text(String),
    /// A number, flush right.
    Number(String),
    /// A name, a path, a checksum.
    Code(String),
    /// Bars of the charts' colours, one below the other, by their share of the full width; `None` leaves one out.
    Bars([Option<f64>; 2]),
}

impl Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "<td>{}</td>", Text(text)),
            Self::Number(text) => write!(f, "<td class=\"number\">{}</td>", Text(text)),
            Self::Code(text) => write!(f, "<td><code>{}</code></td>", Text(text)),
            Self::Bars(shares) => {
                f.write_str("<td class=\"track\">")?;
                for (series, share) in shares.iter().enumerate().filter_map(|(i, share)| Some((i, (*share)?))) {
                    let percent = 100.0 * share.clamp(0.0, 1.0);
                    write!(f, "<span class=\"bar series-{series}\" style=\"width:{percent:.2}%\"></span>")?;
                }
                f.write_str("</td>")
            }
        }
    }
}

/// Rows beyond which a table scrolls in itself.
const LONG: usize = 60;

/// A table that scrolls where it is too wide for the page. `columns` are its heads; a head is flush right above numbers.
pub(super) fn table(caption: &str, columns: &[&str], rows: &[Vec<Cell>]) -> String {
    let caption = Text(caption);
    let long = if rows.len() > LONG { " long" } else { "" };
    let mut out = format!(
        "<div class=\"scroll{long}\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\"><table><caption>{caption}</caption><thead><tr>"
    );
    for (i, column) in columns.iter().enumerate() {
        let right = rows.first().is_some_and(|row| matches!(row.get(i), Some(Cell::Number(_))));
        let class = if right { " class=\"number\"" } else { "" };
        out += &format!("<th scope=\"col\"{class}>{}</th>", Text(column));
    }
    out += "</tr></thead><tbody>";
    for row in rows {
        out += "<tr>";
        row.iter().for_each(|cell| out += &cell.to_string());
        out += "</tr>\n";
    }
    out + "</tbody></table></div>\n"
}

/// Something that opens on demand.
pub(super) fn details(summary: &str, content: &str) -> String {
    format!("<details><summary>{}</summary>\n{content}</details>\n", Text(summary))
}

/// A part of the page.
pub(super) fn section(id: &str, title: &str, content: &str) -> String {
    format!(
        "<section id=\"{id}\" aria-labelledby=\"{id}-title\">\n<h2 id=\"{id}-title\">{}</h2>\n{content}</section>\n",
        Text(title)
    )
}

/// An error, as everywhere in the program.
pub(super) fn error(value: f64) -> String {
    format!("{value:.3e}")
}

/// A number that may be lacking.
pub(super) fn or_dash<T>(value: Option<T>, write: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_markup() {
        let hostile = "<script>alert(\"1\")</script> & '\0\x1b[31m\u{202e}";
        let expected = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;\u{fffd}\u{fffd}[31m\u{fffd}";
        assert_eq!(Text(hostile).to_string(), expected);
        let made = table(hostile, &[hostile], &[vec![Cell::Text(hostile.into())], vec![Cell::Code(hostile.into())]]);
        assert!(!made.contains("<script"), "{made}");
        assert!(!details(hostile, "").contains("<script"));
    }
}
