//! Chat templates: the Jinja in a checkpoint that turns messages into text, rendered as transformers renders it.

use super::bounded::{TakesTooLong, bounded};
use super::conversation::{Message, Part};
use super::methods;
use super::patches::read_json;
use crate::input;
use anyhow::{Context, Result, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::json;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Work one rendering may do, one unit per instruction or 64 bytes: a real conversation needs some hundreds. Bounds a
/// hostile template's time to a second and what it holds to 64 MB.
const FUEL: u64 = 1_000_000;

/// Most bytes one rendering may give, and most of plain text: more than a sample has tokens for.
pub(super) const MAX_BYTES: usize = 8 << 20;

/// Most time that compiling it or one rendering may take on a processor: real templates need milliseconds. Fuel counts what a
/// template asks for, not how often a list is walked through that holds itself many times over; text made of one was seen to grow
/// by 0.6 GB a second.
const MAX_TIME: Duration = Duration::from_secs(1);

const NAME: &str = "chat template";

/// ChatML as Qwen2 was trained on it, and LLaVA-OneVision behind its images. `image` stands for one.
const CHATML: &str = "\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}\
{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}\
{% for part in message.content %}{{ image if part.type == 'image' else part.text }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The template that turns conversations into text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum TemplateChoice {
    /// The checkpoint's own.
    #[default]
    Checkpoint,
    /// ChatML with line breaks and the system prompt "You are a helpful assistant.".
    Chatml,
    /// One in a file.
    File(PathBuf),
}

impl FromStr for TemplateChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.to_owned().into())
    }
}

impl From<String> for TemplateChoice {
    fn from(text: String) -> Self {
        match text.as_str() {
            "checkpoint" => Self::Checkpoint,
            "chatml" => Self::Chatml,
            _ => Self::File(text.into()),
        }
    }
}

impl Serialize for TemplateChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Checkpoint => serializer.serialize_str("checkpoint"),
            Self::Chatml => serializer.serialize_str("chatml"),
            Self::File(path) => path.serialize(serializer),
        }
    }
}

/// A checkpoint's chat template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: serde_json::Map<String, serde_json::Value>,
    file: String,
    forms: [(&'static str, Forms); 3],
}

/// How a template takes the content of a role's turns. Both as far as is known.
#[derive(Clone, Copy, Debug)]
struct Forms {
    /// Whether contents that are a string are taken.
    strings: bool,
    /// Whether contents that are a list of parts are taken.
    lists: bool,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template.json`, else `chat_template` of `tokenizer_config.json`; of a list
    /// of templates the one named `default`.
    ///
    /// Errors when there is none, when it is not valid Jinja, and when it takes no list of content parts (then it is not
    /// one of a vision-language model).
    pub fn load(folder: &Path) -> Result<Self> {
        let config = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let jinja = input::read_beside(folder, "chat_template.jinja", input::MAX_TEMPLATE_BYTES)?;
        let (path, source) = if let Some(bytes) = jinja {
            let path = folder.join("chat_template.jinja");
            let source = utf8(bytes, &path)?;
            (path, source)
        } else {
            let (path, holder) = match read_json(folder, "chat_template.json")? {
                Some(holder) => (folder.join("chat_template.json"), holder),
                None => (folder.join("tokenizer_config.json"), config.clone()),
            };
            let source = named_default(&holder).with_context(|| {
                format!(
                    "no chat template: neither chat_template.jinja, nor a `chat_template` in {}; \
                     copy it from the original checkpoint",
                    path.display()
                )
            })?;
            (path, source)
        };
        Self::probed(&source, special_tokens(&config), path.display().to_string())
    }

    /// Reads the template in a file, for the tokenizer of a checkpoint folder. Errors as [`load`](Self::load).
    pub fn from_file(path: &Path, folder: &Path) -> Result<Self> {
        let config = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let name = path.display().to_string();
        let source = input::read(path, input::MAX_TEMPLATE_BYTES)
            .with_context(|| format!("--chat-template {name}: cannot be read; it is neither checkpoint nor chatml"))?;
        let source = utf8(source, path)?;
        Self::probed(&source, special_tokens(&config), name)
    }

    /// As [`new`](Self::new), its way with strings and lists found out. Errors for one of plain strings alone.
    fn probed(source: &str, special_tokens: serde_json::Map<String, serde_json::Value>, file: String) -> Result<Self> {
        let mut template = Self::new(source, special_tokens, file)?;
        template.probe()?;
        Ok(template)
    }

    /// ChatML; `image` is the text that stands for an image.
    pub fn chatml(image: &str) -> Result<Self> {
        let variables = serde_json::Map::from_iter([("image".to_owned(), image.into())]);
        Self::probed(CHATML, variables, "ChatML".into())
    }

    /// Compiles `source`. `special_tokens` (such as `bos_token`) are variables of the template, `file` names it in errors.
    ///
    /// There is no other template to include, import or extend, and no way to a file.
    pub fn new(source: &str, special_tokens: serde_json::Map<String, serde_json::Value>, file: String) -> Result<Self> {
        ensure!(
            source.len() as u64 <= input::MAX_TEMPLATE_BYTES,
            "the chat template in {file} has {} bytes; the limit is {}",
            source.len(),
            input::MAX_TEMPLATE_BYTES
        );
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        // Of macros and loops; no real template nests this deep.
        environment.set_recursion_limit(100);
        environment.set_formatter(methods::show);
        environment.set_unknown_method_callback(methods::call);
        environment.add_filter("tojson", methods::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", super::clock::strftime_now);
        let source = without_generation(source);
        let environment = bounded(MAX_TIME, move || {
            environment.add_template_owned(NAME, source).map_err(|error| located(&error))?;
            Ok(environment)
        });
        let environment =
            environment.with_context(|| format!("{file} is not a chat template this program can read"))?;
        let both = Forms { strings: true, lists: true };
        let forms = ["system", "user", "assistant"].map(|role| (role, both));
        Ok(Self { environment: Arc::new(environment), special_tokens, file, forms })
    }

    /// The text of a conversation, with the beginning of the assistant's next turn when `add_generation_prompt`.
    ///
    /// Texts are passed as the data has them, a string or a list of parts, unless the template takes the other form alone: one that
    /// walks through parts shows nothing of a string, one that adds strings shows a list as program text. Errors when the template
    /// raises one, and when it runs too long or gives too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_as(messages, add_generation_prompt, &self.forms)
    }

    fn render_as(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        forms: &[(&'static str, Forms)],
    ) -> Result<String> {
        let mut context = self.special_tokens.clone();
        let message = |message: &Message| {
            let known = forms.iter().find(|(role, _)| *role == message.role);
            seen(message, known.map_or(Forms { strings: true, lists: true }, |&(_, forms)| forms))
        };
        context.insert("messages".into(), messages.iter().map(message).collect());
        context.insert("tools".into(), serde_json::Value::Null);
        context.insert("documents".into(), serde_json::Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let environment = Arc::clone(&self.environment);
        let text = bounded(MAX_TIME, move || {
            environment.get_template(NAME)?.render(Value::from(Serde(&context))).map_err(|error| match error.kind() {
                ErrorKind::OutOfFuel => anyhow::anyhow!("it does not come to an end (stopped after {FUEL} steps)"),
                _ => located(&error),
            })
        });
        let text = text.with_context(|| format!("the chat template in {} fails", self.file))?;
        ensure!(
            text.len() <= MAX_BYTES,
            "the chat template in {} gives {} bytes of text; the limit is {MAX_BYTES}",
            self.file,
            text.len()
        );
        Ok(text)
    }

    /// Finds out, role by role, whether the template shows a string and a list of one text as that text. Where it renders neither, both
    /// stay: it may insist on turns that are not here, and the conversations themselves will tell.
    fn probe(&mut self) -> Result<()> {
        const STRINGS: Forms = Forms { strings: true, lists: false };
        const LISTS: Forms = Forms { strings: false, lists: true };
        let said = |role: &str| format!("vlmq-probe-{role}");
        for (newest, roles) in [
            ("user", &["user"][..]),
            ("assistant", &["user", "assistant"]),
            ("system", &["system", "user", "assistant"]),
        ] {
            let turn =
                |role: &&str| Message { role: (*role).to_owned(), content: vec![Part::Text(said(role))], plain: true };
            let messages: Vec<Message> = roles.iter().map(turn).collect();
            let shown = [STRINGS, LISTS].map(|asked| {
                let forms = self.forms.map(|(role, known)| match role {
                    _ if role == newest => (role, asked),
                    _ => (role, if known.lists { LISTS } else { STRINGS }),
                });
                match self.render_as(&messages, false, &forms) {
                    Ok(text) => Ok(Some(shown_alone(&text, &said(newest)))),
                    Err(error) if error.is::<TakesTooLong>() => Err(error),
                    Err(_) => Ok(None),
                }
            });
            let [strings, lists] = shown;
            let shown = [strings?, lists?];
            let [strings, lists] = shown.map(|shown| shown == Some(true));
            if let Some((_, forms)) = self.forms.iter_mut().find(|(role, _)| *role == newest)
                && (strings || lists)
            {
                *forms = Forms { strings, lists };
            }
            if newest == "user" {
                // Nothing of it can be asked any further.
                if shown == [None, None] {
                    return Ok(());
                }
                ensure!(
                    lists,
                    "the chat template in {} takes only plain strings, not content parts; \
                     put the vision-language model's own chat_template.jinja there",
                    self.file
                );
            }
        }
        Ok(())
    }
}

/// Whether `text` stands in a rendered conversation as itself, not inside a list that was shown as program text.
fn shown_alone(rendered: &str, text: &str) -> bool {
    let Some(at) = rendered.find(text) else { return false };
    let around = |end: &str| end.starts_with(['\'', '"']);
    let before = rendered[..at].chars().next_back();
    !(around(&rendered[at + text.len()..]) && before.is_some_and(|quote| quote == '\'' || quote == '"'))
}

fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

/// A message as templates see it. Of an image they ask only whether there is one.
fn seen(message: &Message, forms: Forms) -> serde_json::Value {
    let texts: Option<Vec<&str>> = message.content.iter().map(Part::text).collect();
    let as_string = texts.filter(|_| forms.strings && (message.plain || !forms.lists));
    if let Some(texts) = as_string {
        return json!({"role": message.role, "content": texts.concat()});
    }
    let parts = message.content.iter().map(|part| match part {
        Part::Text(text) => json!({"type": "text", "text": text}),
        Part::Image(_) => json!({"type": "image"}),
    });
    json!({"role": message.role, "content": parts.collect::<Vec<_>>()})
}

/// `chat_template` of a JSON file: a string, or a list of `{name, template}`.
fn named_default(holder: &serde_json::Value) -> Option<String> {
    match holder.get("chat_template")? {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(all) => {
            let default = all.iter().find(|one| one.get("name").is_some_and(|name| name == "default"))?;
            default.get("template")?.as_str().map(str::to_string)
        }
        _ => None,
    }
}

/// The variables `bos_token`, `eos_token` and so on; older files wrap the string in an object.
fn special_tokens(config: &serde_json::Value) -> serde_json::Map<String, serde_json::Value> {
    let entries = config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
    let tokens = entries.filter_map(|(key, value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((key.clone(), text.into()))
    });
    tokens.collect()
}

/// Turns transformers' `{% generation %}` blocks, which mark the answer and render as their body, into blocks of plain
/// Jinja, so that they keep their effect on white space.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(2 + close + 2);
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The template's error with its line, without the source excerpt that spans many lines.
fn located(error: &Error) -> anyhow::Error {
    let detail = error.detail().map(str::to_string).unwrap_or_else(|| error.kind().to_string());
    match error.line() {
        Some(line) => anyhow::anyhow!("line {line}: {detail}"),
        None => anyhow::anyhow!("{detail}"),
    }
}
