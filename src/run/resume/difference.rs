//! What two runs do not have in common, in words.

use serde_json::Value;
use std::collections::BTreeMap;

/// What does not change a byte of the weights: where things lie (their contents have checksums), and when to give up.
const ASIDE: [&str; 6] =
    ["model", "settings.model", "settings.calib", "settings.image_root", "settings.out", "settings.strict"];

/// More differences than these are counted.
const SHOWN: usize = 12;

/// Every setting and input in which two runs differ.
pub(super) fn all(then: &Value, now: &Value) -> Vec<String> {
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    flatten(String::new(), then, &mut before);
    flatten(String::new(), now, &mut after);
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    let differ = |name: &&String| before.get(*name) != after.get(*name) && !ASIDE.contains(&name.as_str());
    let mut lines: Vec<String> = names
        .into_iter()
        .filter(differ)
        .map(|name| describe(name, before.get(name).copied(), after.get(name).copied()))
        .collect();
    if lines.len() > SHOWN {
        let more = lines.split_off(SHOWN).len();
        lines.push(format!("{more} more"));
    }
    lines
}

/// Leaves of a tree by their paths.
fn flatten<'a>(path: String, value: &'a Value, leaves: &mut BTreeMap<String, &'a Value>) {
    match value {
        // Names of files hold dots, but nobody takes these paths apart again.
        Value::Object(fields) if !fields.is_empty() => {
            let dot = if path.is_empty() { "" } else { "." };
            fields.iter().for_each(|(name, value)| flatten(format!("{path}{dot}{name}"), value, leaves));
        }
        _ => {
            leaves.insert(path, value);
        }
    }
}

fn describe(name: &str, then: Option<&Value>, now: Option<&Value>) -> String {
    if let Some(input) = name.strip_prefix("inputs.") {
        let (what, verb) = match input {
            "calibration" => ("the calibration file".to_owned(), "has"),
            "held_out" => ("the samples held out".to_owned(), "have"),
            "samples" => ("the samples as the model takes them".to_owned(), "have"),
            file => (format!("{} of the model", file.strip_prefix("model.").unwrap_or(file)), "has"),
        };
        return match (then, now) {
            (None, _) => format!("{what} was not there then"),
            (_, None) => format!("{what} is not there now"),
            _ => format!("{what} {verb} changed"),
        };
    }
    let show = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    let name = ["settings.", "libraries."].iter().find_map(|group| name.strip_prefix(group)).unwrap_or(name);
    format!("{}: {} then, {} now", name.strip_prefix("solver.").unwrap_or(name), show(then), show(now))
}

#[cfg(test)]
mod tests {
    use super::all;
    use serde_json::json;

    #[test]
    fn differences_are_named_field_by_field() {
        let then = json!({"vlmq_version": "1", "device": "cpu", "libraries": {"cuBLAS": "13.0.2"}, "model": "a", "settings": {"model": "a", "seed": 1,
            "solver": {"bits": 3, "group_size": null}}, "inputs": {"model": {"x.json": "1", "y.json": "2"}, "calibration": "3"}});
        assert_eq!(all(&then, &then), [""; 0]);
        let mut now = then.clone();
        now["model"] = "b".into();
        now["settings"]["model"] = "b".into();
        assert_eq!(all(&then, &now), [""; 0]);
        now["vlmq_version"] = "2".into();
        now["libraries"] = json!({"cuBLAS": "13.1.2"});
        now["settings"]["solver"] = json!({"bits": 4, "group_size": 128});
        now["inputs"] = json!({"model": {"x.json": "0", "z.json": "2"}, "calibration": "4"});
        let expected = [
            "the calibration file has changed",
            "x.json of the model has changed",
            "y.json of the model is not there now",
            "z.json of the model was not there then",
            "cuBLAS: 13.0.2 then, 13.1.2 now",
            "bits: 3 then, 4 now",
            "group_size: none then, 128 now",
            "vlmq_version: 1 then, 2 now",
        ];
        assert_eq!(all(&then, &now), expected);
    }
}
