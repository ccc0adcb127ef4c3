//! Which programs load a file that was just written, as of November 2026, and how; and why a server does not.
//!
//! Each format has its rows of the table: those of each loader's own code. Measured by tests/interop: transformers with
//! compressed-tensors, and with optimum and gptqmodel (2, 3, 4 and 8 bits, symmetric or not, with and without `desc_act`). Of the
//! servers: vLLM 0.33 chooses Marlin or Machete for 4 and 8 bits and Humming's kernels for the rest; SGLang 0.5.23 has Marlin, and
//! Humming where it is asked for. A combination that is not known to load is left out.

use super::file_format::Format;
use super::served::Served::{Not, With};
use super::served::{FamilySupport, InTransformers};
use crate::codes::CodeLayout;
use serde::Serialize;
use std::path::Path;

/// A program that loads the file, and what to type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loader {
    /// The program, with the packages that it needs.
    pub name: &'static str,
    /// A shell command, or a line of Python for libraries.
    pub command: String,
}

impl Format {
    /// The loaders that take exactly the file written with this layout to `folder`, and how.
    pub fn loaders(self, layout: &CodeLayout, family: FamilySupport, folder: &Path) -> Vec<Loader> {
        let python = folder.display().to_string();
        let folder = shell(&python);
        let mut loaders = vec![Loader { name: "vlmq", command: format!("vlmq-run eval {folder} DATA") }];
        let mut add = |name, command| loaders.push(Loader { name, command });
        if let Some(InTransformers { name, arguments }) = self.0.in_transformers(layout, family) {
            add(name, format!("AutoModelForImageTextToText.from_pretrained({python:?}{arguments})"));
        }
        if let With(name, options) = self.0.in_vllm(layout) {
            add(name, format!("vllm serve {folder}{options}"));
        }
        if let (With(name, options), false) = (self.0.in_sglang(layout), family.unknown_to_sglang) {
            add(name, format!("python -m sglang.launch_server --model-path {folder}{options}"));
        }
        loaders
    }

    /// The servers that another choice of settings would let load the file, each with what keeps it out.
    pub fn shut_out(self, layout: &CodeLayout, family: FamilySupport) -> Vec<String> {
        let mut servers = vec![("vLLM", self.0.in_vllm(layout))];
        if !family.unknown_to_sglang {
            servers.push(("SGLang", self.0.in_sglang(layout)));
        }
        let reason = |(server, served)| match served {
            Not(reason) => Some(format!("{server} {reason}")),
            With(..) => None,
        };
        servers.into_iter().filter_map(reason).collect()
    }
}

/// A word for a shell, in quotes where it must.
pub(crate) fn shell(word: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "._/-+=:@,~".contains(letter);
    match word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::shell;

    #[test]
    fn words_are_quoted_where_a_shell_would_split_them() {
        assert_eq!(shell("../out/w-3_a.b"), "../out/w-3_a.b");
        assert_eq!(shell("my  modèle"), "'my  modèle'");
        assert_eq!(shell("it's $HOME"), r"'it'\''s $HOME'");
    }
}
