//! JSON as Python's `json.dumps` writes it: a space after every comma and colon.

use serde_json::Value;
use std::fmt::Write;

/// Appends `value` to `out`. With `indent`, one item a line at `indent` spaces a level; `level` is the present one.
pub(super) fn dump(value: &Value, indent: Option<usize>, level: usize, out: &mut String) {
    let (open, close, count) = match value {
        Value::Array(items) => ('[', ']', items.len()),
        Value::Object(items) => ('{', '}', items.len()),
        scalar => {
            // Writing to a String cannot fail, and serde_json's scalars are Python's.
            let _ = write!(out, "{scalar}");
            return;
        }
    };
    let new_line = |out: &mut String, level: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    };
    let separator = |out: &mut String, index: usize| {
        if index > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        new_line(out, level + 1);
    };
    out.push(open);
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                separator(out, index);
                dump(item, indent, level + 1, out);
            }
        }
        Value::Object(items) => {
            for (index, (key, item)) in items.iter().enumerate() {
                separator(out, index);
                let _ = write!(out, "{}: ", Value::from(key.as_str()));
                dump(item, indent, level + 1, out);
            }
        }
        _ => {}
    }
    if count > 0 {
        new_line(out, level);
    }
    out.push(close);
}
