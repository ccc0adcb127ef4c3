//! What stands beside the weights of a checkpoint and goes into a copy as it is.

use super::formats::Format;
use super::own::{self, cannot_write, parent_of};
use crate::input::{self, check_link};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The one sub-folder that belongs to a checkpoint: transformers keeps further chat templates there.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";

/// What stands beside the weights of a checkpoint, by names in order.
#[derive(Debug, Default)]
pub(crate) struct SideFiles {
    /// Goes into a copy as it is.
    pub(crate) kept: Vec<PathBuf>,
    /// Files and sub-folders that are no part of the model: training state, weights of other formats, adapters.
    left: Vec<String>,
}

impl SideFiles {
    /// Side files of the checkpoint in `source`.
    pub(crate) fn of(source: &Path) -> Result<Self> {
        let mut found = Self::default();
        let code = names_code(source);
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            let shown = source.join(&folder);
            let cannot_read = || format!("cannot read the folder {}", shown.display());
            for entry in fs::read_dir(&shown).with_context(cannot_read)? {
                let entry = entry.with_context(cannot_read)?;
                let (path, name) = (entry.path(), folder.join(entry.file_name()));
                let name_text = entry.file_name().to_string_lossy().into_owned();
                if name_text.starts_with('.') {
                    continue;
                }
                // Follows links: download caches keep the files elsewhere. What a stranger's link leads to is not copied.
                let kind = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
                // Not below itself: links may go round in circles.
                if kind.is_dir() && name_text == TEMPLATES && folder == Path::new("") {
                    check_link(&path, source)?;
                    folders.push(name);
                } else if kind.is_dir() {
                    found.left.push(format!("{}/", name.display()));
                } else if !kind.is_file() || is_replaced(&name_text) {
                } else if belongs(&name_text, code) {
                    check_link(&path, source)?;
                    found.kept.push(name);
                } else {
                    found.left.push(name.display().to_string());
                }
            }
        }
        found.kept.sort();
        found.left.sort();
        Ok(found)
    }

    /// Copies what is kept, anew where it is there, and names in one warning what stays behind.
    pub(crate) fn copy(&self, source: &Path, target: &Path) -> Result<()> {
        const SHOWN: usize = 12;
        let Self { kept, left } = self;
        for name in kept {
            let to = target.join(name);
            let folder = parent_of(&to);
            fs::create_dir_all(folder).with_context(|| cannot_write(folder))?;
            copy(&source.join(name), &to)?;
        }
        if !left.is_empty() {
            let more = left.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let shown = left[..left.len().min(SHOWN)].join(", ");
            log::warn!("not copied from {}, as they are no part of a model to load: {shown}{more}", source.display());
        }
        Ok(())
    }
}

/// Whether a file of the source holds weights, or describes them, and so has no place in the copy.
pub(crate) fn is_replaced(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json"))
        || Format::config_files().any(|file| name == file)
        || name == "config.json"
}

/// Whether a file is part of a model beside its weights: tokenizer, processors, templates, generation settings, licence, what people
/// read; with `code`, programs as well.
fn belongs(name: &str, code: bool) -> bool {
    const NAMES: [&str; 9] = [
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.json",
        "tekken.json",
        // ModelScope's.
        "configuration.json",
    ];
    const STARTS: [&str; 6] = ["license", "licence", "notice", "copying", "copyright", "use_policy"];
    let lower = name.to_ascii_lowercase();
    let extension = lower.rsplit_once('.').map_or("", |(_, extension)| extension);
    NAMES.contains(&lower.as_str())
        || lower.starts_with("tokenizer") && ["json", "model", "txt"].contains(&extension)
        || lower.ends_with("processor_config.json")
        || ["jinja", "tiktoken", "spm", "md"].contains(&extension)
        || ["spiece.model", "sentencepiece.bpe.model", "vocab.model"].contains(&lower.as_str())
        || STARTS.iter().any(|start| lower.starts_with(start))
        || code && extension == "py"
}

/// Whether a configuration of the folder names code of the model's own (`auto_map`), whose modules may import each other.
fn names_code(source: &Path) -> bool {
    ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"].into_iter().any(
        |name| {
            let text = input::read(&source.join(name), input::MAX_CONFIG_BYTES).unwrap_or_default();
            // A broken one is told of where it is used.
            input::json::value(&text, input::MAX_CONFIG_VALUES).is_ok_and(|config| !config["auto_map"].is_null())
        },
    )
}

/// Copies contents only: a read-only source must not make a read-only copy.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut copy = own::renew(to)?;
    std::io::copy(&mut source, &mut copy)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
