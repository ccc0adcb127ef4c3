//! The forms a line of data may have, told apart by their keys: chat `messages`, ShareGPT and LLaVA `conversations`, a
//! `question` with `answers`, plain `text`.

use super::conversation::{Conversation, Message, Part};
use super::metric::Metric;
use super::source::{ImageSource, shown};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

type Object = Map<String, Value>;

/// Most tokens that a line may ask an answer to have: more than any of the models is recommended to write (40,960). A model
/// that never ends its answer is asked for all of them.
const MAX_NEW_TOKENS: u64 = 1 << 16;

/// Said of every way to ask for one.
pub(super) const NO_VIDEO: &str = "videos are not supported; write single frames as images, or leave the line out";

/// The columns that are read here. Others are asked only whether they name an image.
pub(super) const COLUMNS: [&str; 15] = [
    "id",
    "video",
    "videos",
    "metric",
    "max_new_tokens",
    "messages",
    "conversations",
    "question",
    "text",
    "system",
    "group",
    "image",
    "images",
    "answer",
    "answers",
];

/// What stands in a line for a column that is not read.
pub(super) fn unused(names_image: bool) -> Value {
    if names_image { AN_IMAGE.into() } else { Value::Null }
}

/// What all images' `data:` URIs begin with.
const AN_IMAGE: &str = "data:image/";

/// Reads one line. `id` is used when the line has none. Errors do not name the line: the caller does.
pub(super) fn conversation(value: &Value, root: &Arc<Path>, origin: &str, id: String) -> Result<Conversation> {
    let row = value.as_object().with_context(|| format!("expected a JSON object, found {}", kind(value)))?;
    let id = match present(row, "id") {
        None => id,
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        Some(other) => bail!("`id` must be a string or a number, not {}", kind(other)),
    };
    for key in ["video", "videos"] {
        ensure!(present(row, key).is_none(), "`{key}`: {NO_VIDEO}");
    }
    let metric = string(row, "metric")?;
    let metric = metric.map(|name| {
        let known = || Metric::ALL.map(Metric::name).join(", ");
        name.parse::<Metric>().map_err(|_| anyhow!("unknown `metric` {}; known: {}", shown(&name), known()))
    });
    let max_new_tokens = present(row, "max_new_tokens").map(|value| {
        let count = value.as_u64().filter(|count| (1..=MAX_NEW_TOKENS).contains(count));
        count
            .with_context(|| format!("`max_new_tokens` must be a positive integer up to {MAX_NEW_TOKENS}, not {value}"))
    });
    let answers = answers(row)?;
    let mut text = None;
    let mut messages = if let Some(messages) = present(row, "messages") {
        chat(messages, root, row)?
    } else if let Some(turns) = present(row, "conversations") {
        sharegpt(turns, images(row, root)?)?
    } else if present(row, "question").is_some() {
        question(row, images(row, root)?, &answers)?
    } else if let Some(plain) = string(row, "text")? {
        ensure!(images(row, root)?.is_empty(), "plain `text` takes no images; write `messages` with image parts");
        ensure!(!plain.is_empty(), "`text` is empty");
        text = Some(plain);
        Vec::new()
    } else {
        let keys: Vec<_> = row.keys().map(String::as_str).collect();
        bail!("none of `messages`, `conversations`, `question`, `text` among the keys: {}", keys.join(", "));
    };
    if let Some(system) = string(row, "system")?.filter(|system| !system.is_empty()) {
        ensure!(text.is_none(), "plain `text` takes no `system`; write `messages`");
        match messages.first().filter(|message| message.role == "system") {
            None => messages.insert(0, plain_turn("system", system)),
            Some(first) => ensure!(
                *first == plain_turn("system", system),
                "there are both a `system` column and another turn of the system; keep one"
            ),
        }
    }
    refuse_unseen(row, &messages)?;
    Ok(Conversation {
        id,
        group: string(row, "group")?,
        messages,
        text,
        metric: metric.transpose()?,
        answers,
        max_new_tokens: max_new_tokens.transpose()?.map(|count| count as usize),
        origin: origin.to_string(),
    })
}

/// A turn that is one string.
fn plain_turn(role: &str, text: String) -> Message {
    Message { role: role.to_owned(), content: vec![Part::Text(text)], plain: true }
}

/// Refuses a line that means to show an image in a way that is not known: it would calibrate without, and nobody would notice.
fn refuse_unseen(row: &Object, messages: &[Message]) -> Result<()> {
    let mut parts = messages.iter().flat_map(|message| &message.content);
    let texts = parts.clone().filter_map(Part::text);
    for text in texts.clone() {
        if let Some((name, _)) = text.split_once("<img>").and_then(|(_, rest)| rest.split_once("</img>")) {
            bail!("a text names an image as <img>{}</img>; write it as an image part", shown(name));
        }
    }
    if messages.is_empty() || parts.any(|part| matches!(part, Part::Image(_))) {
        return Ok(());
    }
    ensure!(
        texts.clone().all(|text| !text.contains(MARKER)),
        "a text has the marker {MARKER}, but the line has no image; give it as `image` or `images`, or take the marker out"
    );
    let of_images = |value: &Value| match value {
        Value::String(text) => names_image(text),
        Value::Array(all) => !all.is_empty() && all.iter().all(|one| one.as_str().is_some_and(names_image)),
        _ => false,
    };
    if let Some((key, _)) = row.iter().find(|(_, value)| of_images(value)) {
        bail!(
            "`{key}` names an image, but nothing shows it; images are taken from `image` or `images`, or from parts of `messages`"
        );
    }
    Ok(())
}

/// Whether a string looks like an image's path or URI.
pub(super) fn names_image(text: &str) -> bool {
    const ENDINGS: [&str; 10] = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "heic", "avif"];
    let ending = text.rsplit_once('.').map_or("", |(_, ending)| ending).to_ascii_lowercase();
    !text.contains(char::is_whitespace) && ENDINGS.contains(&ending.as_str()) || text.starts_with(AN_IMAGE)
}

/// `{"messages": [{"role": .., "content": "text" or [parts]}]}`, or with `images` of the line that `<image>` in the texts stands for.
fn chat(messages: &Value, root: &Arc<Path>, row: &Object) -> Result<Vec<Message>> {
    let turns = list(messages, "messages")?;
    ensure!(!turns.is_empty(), "`messages` is empty");
    let mut read = Vec::with_capacity(turns.len());
    for turn in turns {
        let turn = turn.as_object().with_context(|| format!("a message must be an object, not {}", kind(turn)))?;
        let role = string(turn, "role")?.context("a message has no `role`")?;
        ensure!(
            matches!(role.as_str(), "system" | "user" | "assistant"),
            "unknown `role` {}; known: system, user, assistant",
            shown(&role)
        );
        let content = match present(turn, "content") {
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(Value::Array(parts)) => parts.iter().map(|value| part(value, root)).collect::<Result<_>>()?,
            Some(other) => bail!("`content` must be a string or a list of parts, not {}", kind(other)),
            None => bail!("a message of role {role:?} has no `content`"),
        };
        let plain = turn["content"].is_string();
        read.push(Message { role, content, plain });
    }
    let parts = || read.iter().flat_map(|message| &message.content);
    if parts().any(|part| matches!(part, Part::Image(_))) {
        return Ok(read);
    }
    let images = images(row, root)?;
    if images.is_empty() {
        return Ok(read);
    }
    let markers: usize = parts().filter_map(Part::text).map(|text| text.matches(MARKER).count()).sum();
    // Such a line would otherwise calibrate without its image, and nobody would notice.
    ensure!(
        markers == images.len(),
        "{} images stand beside `messages` that have no image part and {markers} {MARKER} markers; put {{\"type\": \"image\", \
         \"image\": ..}} in a message, or a marker for each image",
        images.len()
    );
    let mut images = images.into_iter();
    for message in &mut read {
        let texts = std::mem::take(&mut message.content);
        message.content = texts.iter().filter_map(Part::text).flat_map(|text| place(text, &mut images)).collect();
        message.plain &= message.content.iter().all(|part| part.text().is_some());
    }
    Ok(read)
}

/// One part of a message's content.
fn part(value: &Value, root: &Arc<Path>) -> Result<Part> {
    let object = value.as_object().with_context(|| format!("a content part must be an object, not {}", kind(value)))?;
    let name = string(object, "type")?.context("a content part has no `type`")?;
    match name.as_str() {
        "text" => Ok(Part::Text(string(object, "text")?.context("a text part has no `text`")?)),
        "image" => {
            let keys = ["image", "path", "url"];
            let found = keys.iter().filter(|key| present(object, key).is_some()).collect::<Vec<_>>();
            let [key] = found[..] else {
                bail!("an image part needs exactly one of `image`, `path`, `url`; it has {}", found.len());
            };
            source(&object[*key], key, root)
        }
        "image_url" => {
            let wrapped = present(object, "image_url").context("an image_url part has no `image_url`")?;
            let url = match wrapped {
                Value::Object(inner) => present(inner, "url").context("`image_url` has no `url`")?,
                plain => plain,
            };
            source(url, "url", root)
        }
        "video" | "video_url" => bail!("a part of `type` {name:?}: {NO_VIDEO}"),
        other => bail!("unknown part `type` {}; known: text, image, image_url", shown(other)),
    }
}

/// An image part from the string in `value`.
fn source(value: &Value, key: &str, root: &Arc<Path>) -> Result<Part> {
    let written = value.as_str().with_context(|| format!("`{key}` must be a string, not {}", kind(value)))?;
    Ok(Part::Image(ImageSource::parse(written, root)?))
}

/// The line's `image` (a string or a list) or `images`, in order.
fn images(row: &Object, root: &Arc<Path>) -> Result<Vec<Part>> {
    let (key, value) = match (present(row, "image"), present(row, "images")) {
        (None, None) => return Ok(Vec::new()),
        (Some(value), None) => ("image", value),
        (None, Some(value)) => ("images", value),
        (Some(_), Some(_)) => bail!("both `image` and `images` are given; keep one"),
    };
    match value {
        Value::Array(all) => all.iter().map(|one| source(one, key, root)).collect(),
        one => Ok(vec![source(one, key, root)?]),
    }
}

/// `{"image": .., "conversations": [{"from": "human", "value": "<image>\n.."}, {"from": "gpt", "value": ".."}]}`.
fn sharegpt(turns: &Value, images: Vec<Part>) -> Result<Vec<Message>> {
    let turns = list(turns, "conversations")?;
    ensure!(!turns.is_empty(), "`conversations` is empty");
    let mut read: Vec<(&str, String)> = Vec::with_capacity(turns.len());
    for turn in turns {
        let turn = turn.as_object().with_context(|| format!("a turn must be an object, not {}", kind(turn)))?;
        let from = string(turn, "from")?.context("a turn has no `from`")?;
        let role = match from.as_str() {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            other => bail!("unknown `from` {}; known: human, user, gpt, assistant, system", shown(other)),
        };
        read.push((role, string(turn, "value")?.context("a turn has no `value`")?));
    }
    let markers: usize = read.iter().map(|(_, text)| text.matches(MARKER).count()).sum();
    ensure!(
        markers == images.len() || markers == 0,
        "{markers} {MARKER} markers but {} images; they must agree",
        images.len()
    );
    let mut images = images.into_iter();
    let mut unmarked = markers == 0;
    let mut messages = Vec::with_capacity(read.len());
    for (role, text) in read {
        let mut content = Vec::new();
        if unmarked && role == "user" {
            content.extend(images.by_ref());
            unmarked = false;
        }
        content.extend(place(&text, &mut images));
        let plain = content.iter().all(|part| matches!(part, Part::Text(_)));
        messages.push(Message { role: role.to_string(), content, plain });
    }
    ensure!(images.next().is_none(), "an image is given but there is no turn of the user to show it in");
    Ok(messages)
}

/// Stands where an image goes in ShareGPT and LLaVA text.
const MARKER: &str = "<image>";

/// Splits text at its markers and puts the next image in place of each. Line breaks around a marker belong to it. A
/// single marker at the end counts as one at the beginning: LLaVA's training code moves it there.
fn place(text: &str, images: &mut impl Iterator<Item = Part>) -> Vec<Part> {
    let mut pieces: Vec<&str> = text.split(MARKER).collect();
    if pieces.len() == 1 {
        return vec![Part::Text(text.to_string())];
    }
    if pieces.len() == 2 && pieces[1].trim().is_empty() {
        pieces.swap(0, 1);
    }
    let mut content = Vec::new();
    for (index, piece) in pieces.into_iter().enumerate() {
        if index > 0 {
            content.extend(images.next());
        }
        let piece = piece.trim();
        if !piece.is_empty() {
            content.push(Part::Text(piece.to_string()));
        }
    }
    content
}

/// `{"image" or "images": .., "question": .., "answers": [..]}`: images first, then the question; the first answer is
/// the assistant's turn.
fn question(row: &Object, images: Vec<Part>, answers: &[String]) -> Result<Vec<Message>> {
    let asked = string(row, "question")?.context("no `question`")?;
    let mut content = images;
    content.push(Part::Text(asked));
    let mut messages = vec![Message { role: "user".into(), plain: content.len() == 1, content }];
    if let Some(answer) = answers.first() {
        messages.push(Message { role: "assistant".into(), content: vec![Part::Text(answer.clone())], plain: true });
    }
    Ok(messages)
}

/// `answers`, a list of strings, or `answer`, one.
fn answers(row: &Object) -> Result<Vec<String>> {
    let Some(value) = present(row, "answers") else {
        return Ok(string(row, "answer")?.into_iter().collect());
    };
    let all = list(value, "answers")?.iter().map(|one| {
        one.as_str().map(str::to_string).with_context(|| format!("`answers` must hold strings, not {}", kind(one)))
    });
    all.collect()
}

/// The value under `key`; null counts as absent.
fn present<'a>(object: &'a Object, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// The string under `key`, if there is one; an error when something else is.
fn string(object: &Object, key: &str) -> Result<Option<String>> {
    match present(object, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => bail!("`{key}` must be a string, not {}", kind(other)),
    }
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value.as_array().with_context(|| format!("`{key}` must be a list, not {}", kind(value)))
}

/// JSON's word for a value.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
