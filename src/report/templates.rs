//! The templates of the page and of the model card, and how they show what they are given.
//!
//! A template shows text and whole numbers as they are and everything else through a filter; what is lacking it must ask for. So no
//! value of a run can make an error of one: the tests fill every branch of each in.

use crate::progress::{human_bytes, human_seconds, is_unshown};
use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value};
use serde::Serialize;
use std::fmt::{self, Display, Write};
use std::sync::LazyLock;

/// Every template by its name, whose end before `.jinja` says what it makes.
const TEMPLATES: [(&str, &str); 11] = [
    ("card.md.jinja", include_str!("card.md.jinja")),
    ("evaluation.html.jinja", include_str!("html/evaluation.html.jinja")),
    ("findings.html.jinja", include_str!("html/findings.html.jinja")),
    ("importance.html.jinja", include_str!("html/importance.html.jinja")),
    ("layers.html.jinja", include_str!("html/layers.html.jinja")),
    ("macros.html.jinja", include_str!("html/macros.html.jinja")),
    ("page.html.jinja", include_str!("html/page.html.jinja")),
    ("predictions.html.jinja", include_str!("html/predictions.html.jinja")),
    ("resources.html.jinja", include_str!("html/resources.html.jinja")),
    ("samples.html.jinja", include_str!("html/samples.html.jinja")),
    ("settings.html.jinja", include_str!("html/settings.html.jinja")),
];

/// What stands where a number is lacking.
const LACKING: &str = "–";

static ENVIRONMENT: LazyLock<Environment<'static>> =
    LazyLock::new(|| environment().expect("templates of this crate compile, as its tests see"));

fn environment() -> Result<Environment<'static>, Error> {
    let mut all = Environment::new();
    all.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build()?);
    all.set_undefined_behavior(UndefinedBehavior::Strict);
    all.set_formatter(show);
    all.add_filter("bytes", |size: Value| or_lacking(size, human_bytes));
    all.add_filter("seconds", human_seconds);
    all.add_filter("percent", |share: f64| format!("{:.2}%", 100.0 * share));
    all.add_filter("fixed", |value: Value, digits: usize| or_lacking(value, |value: f64| format!("{value:.digits$}")));
    all.add_filter("scientific", |value: f64, digits: usize| format!("{value:.digits$e}"));
    all.add_filter("shortest", |value: Value| or_lacking(value, |value: f64| value.to_string()));
    all.add_filter("plain", plain);
    all.add_filter("code", |name: &str| format!("`{}`", plain(name)));
    for (name, source) in TEMPLATES {
        all.add_template(name, source)?;
    }
    Ok(all)
}

/// The template of this name, filled in with what a view holds.
pub(super) fn render(name: &str, view: impl Serialize) -> Result<String> {
    let render = || ENVIRONMENT.get_template(name)?.render(Value::from(Serde(view)));
    render().with_context(|| format!("cannot fill in {name}"))
}

/// Markup that was made here, which templates show as it is.
pub(super) fn markup(markup: impl Into<String>) -> Value {
    Value::from_safe_string(markup.into())
}

/// Shows a value where a template names it.
fn show(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) if value.is_safe() || *state.auto_escape() == AutoEscape::None => out.write_str(text),
        Some(text) => write!(out, "{}", Text(text)),
        None if value.is_integer() => write!(out, "{value}"),
        None => {
            let kind = value.kind();
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{kind} where text or a whole number is shown"),
            ));
        }
    };
    Ok(written?)
}

/// A number, or what stands for none. An `Option` as a filter's argument would take a name that no view has for one, too.
fn or_lacking<T: TryFrom<Value, Error = Error>>(value: Value, write: impl Fn(T) -> String) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Err(ErrorKind::UndefinedError.into()),
        ValueKind::None => Ok(LACKING.to_owned()),
        _ => T::try_from(value).map(write),
    }
}

/// Text from outside, which no reader takes for markup: not in an element, not in a quoted attribute.
struct Text<'a>(&'a str);

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

/// A name from outside that cannot end a line or a cell of a Markdown table, or begin another kind of text.
fn plain(name: &str) -> String {
    name.chars().map(|letter| if is_unshown(letter) || "`|<>[]".contains(letter) { '_' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    const HOSTILE: &str = "<script>alert(\"1\")</script> & '\0\x1b[31m\u{202e}";

    fn shown(name: &str, source: &str, view: Value) -> Result<String, Error> {
        ENVIRONMENT.render_named_str(name, source, view)
    }

    #[test]
    fn no_text_becomes_markup() {
        let expected = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;\u{fffd}\u{fffd}[31m\u{fffd}";
        let given = || context!(text => HOSTILE, made => markup("<b>"), list => [HOSTILE]);
        for source in [
            "{{ text }}",
            "{% set x = text %}{{ x }}",
            "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(text) }}",
            "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ text }}{% endcall %}",
            "{% for x in list | unique(case_sensitive=true) %}{{ x }}{% endfor %}",
        ] {
            assert_eq!(shown("x.html.jinja", source, given()).unwrap(), expected, "{source}");
        }
        assert_eq!(shown("x.html.jinja", "{{ made }}", given()).unwrap(), "<b>");
        assert_eq!(
            shown("x.md.jinja", "{{ text | code }}", given()).unwrap(),
            "`_script_alert(\"1\")_/script_ & '___31m_`"
        );
    }

    #[test]
    fn numbers_are_written_by_filters() {
        let view =
            || context!(bytes => 1536u64, share => 0.25, none => None::<f64>, small => 0.000_012_345, one => 1.0);
        for (source, expected) in [
            ("{{ bytes }} {{ bytes | bytes }} {{ none | bytes }}", "1536 1.50 KiB –"),
            ("{{ share | percent }} {{ 1 | percent }} {{ share | seconds }}", "25.00% 100.00% 0.25 s"),
            ("{{ share | fixed(3) }} {{ none | fixed(3) }} {{ 0 | fixed(1) }}", "0.250 – 0.0"),
            ("{{ small | scientific(3) }} {{ small | shortest }} {{ one | shortest }}", "1.234e-5 0.000012345 1"),
        ] {
            assert_eq!(shown("x.html.jinja", source, view()).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn what_is_lacking_or_no_text_is_not_shown() {
        let view = || context!(half => 0.5, none => None::<f64>, list => [1], yes => true);
        for source in [
            "{{ other }}",
            "{{ list.other }}",
            "{{ half }}",
            "{{ none }}",
            "{{ list }}",
            "{{ yes }}",
            "{{ other | bytes }}",
            "{{ other | fixed(2) }}",
            "{{ none | percent }}",
            "{% if other %}{% endif %}",
            "{% for x in other %}{% endfor %}",
        ] {
            for name in ["x.html.jinja", "x.md.jinja"] {
                assert!(shown(name, source, view()).is_err(), "{source}");
            }
        }
    }
}
