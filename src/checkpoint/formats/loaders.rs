//! Which programs load a file that was just written, as of November 2026, and how; and why a server does not.
//!
//! The rows are those of each loader's own code. Measured by tests/interop: transformers with compressed-tensors, and with optimum and
//! gptqmodel (2, 3, 4 and 8 bits, symmetric or not, with and without `desc_act`). Of the servers: vLLM 0.33 chooses Marlin or Machete
//! for 4 and 8 bits and Humming's kernels for the rest; SGLang 0.5.23 has Marlin, and Humming where it is asked for. A
//! combination that is not known to load is left out.

use super::Format;
use crate::checkpoint::config::GptqVersion;
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

/// What programs do with the files of a model family, whatever their format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilySupport {
    /// transformers answers from a compressed-tensors file only where the weights are dequantized as they are loaded.
    pub must_dequantize: bool,
    /// SGLang has no class for the model.
    pub unknown_to_sglang: bool,
}

/// What a server does with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// Takes it, under this name, with these options.
    With(&'static str, &'static str),
    /// Does not, for a reason that another choice mends.
    Not(&'static str),
}

use Served::{Not, With};

const HUMMING: &str = " --quantization humming";
const INDEX: &str = "refuses files with a g_idx; --order act-group writes none";
const NARROW: &str = "has no kernel for groups of less than 16 columns";
const VERSION_1: &str = "takes what GPTQ version 1 stores, the zero less 1, for the zero: every weight comes out a step off; --gptq-version 2 stores zeros as they are";
const ROWS: &str = "has no kernel for whole rows in this file; --group-size 128 or --format compressed-tensors has one";

impl Format {
    /// The loaders that take exactly the file written with these layout to `folder`, and how.
    pub fn loaders(self, layout: &CodeLayout, family: FamilySupport, folder: &Path) -> Vec<Loader> {
        let python = folder.display().to_string();
        let folder = shell(&python);
        let transformers =
            |arguments: &str| format!("AutoModelForImageTextToText.from_pretrained({python:?}{arguments})");

        let mut loaders = vec![Loader { name: "vlmq", command: format!("vlmq-run eval {folder} DATA") }];
        let mut add = |name, command| loaders.push(Loader { name, command });
        match self {
            Self::Dequantized => add("transformers", transformers("")),
            // compressed-tensors 0.20 refuses to read one.
            Self::CompressedTensors if layout.group_index => {}
            Self::CompressedTensors if layout.symmetric && !family.must_dequantize => {
                add("transformers + compressed-tensors", transformers(""));
            }
            Self::CompressedTensors => {
                let arguments = ", quantization_config=CompressedTensorsConfig(dequantize=True)";
                add("transformers + compressed-tensors", transformers(arguments));
            }
            Self::Gptq(_) => {
                // Sizes of gptqmodel's plain kernel. At 4 bits it chooses one for a CPU that fails with some of them.
                let choice = format!(", quantization_config=GPTQConfig(bits={}, backend=\"torch\")", layout.bits);
                let arguments = match (layout.bits, layout.group_size) {
                    (4, None | Some(16 | 512 | 1024)) => Some(choice.as_str()),
                    (_, None | Some(16 | 32 | 64 | 128 | 256 | 512 | 1024)) => Some(""),
                    _ => None,
                };
                if let Some(arguments) = arguments {
                    add("transformers + optimum + gptqmodel", transformers(arguments));
                }
            }
        }
        if let With(name, options) = self.in_vllm(layout) {
            add(name, format!("vllm serve {folder}{options}"));
        }
        if let (With(name, options), false) = (self.in_sglang(layout), family.unknown_to_sglang) {
            add(name, format!("python -m sglang.launch_server --model-path {folder}{options}"));
        }
        loaders
    }

    /// The servers that another choice of layout would let load the file, each with what keeps it out.
    pub fn shut_out(self, layout: &CodeLayout, family: FamilySupport) -> Vec<String> {
        let mut servers = vec![("vLLM", self.in_vllm(layout))];
        if !family.unknown_to_sglang {
            servers.push(("SGLang", self.in_sglang(layout)));
        }
        let reason = |(server, served)| match served {
            Not(reason) => Some(format!("{server} {reason}")),
            With(..) => None,
        };
        servers.into_iter().filter_map(reason).collect()
    }

    fn in_vllm(self, layout: &CodeLayout) -> Served {
        let wide = matches!(layout.bits, 4 | 8);
        match self {
            Self::Dequantized => With("vLLM", ""),
            // Since 0.30.
            _ if layout.group_index => Not(INDEX),
            _ if layout.group_size.is_some_and(|size| size < 16) => Not(NARROW),
            Self::CompressedTensors if wide || layout.symmetric => With("vLLM", ""),
            Self::CompressedTensors => With("vLLM 0.31 or newer", ""),
            Self::Gptq(GptqVersion::V1) if layout.symmetric && wide && marlin_group(layout) => With("vLLM", ""),
            Self::Gptq(GptqVersion::V1) if !layout.symmetric => Not(VERSION_1),
            Self::Gptq(_) if layout.group_size.is_none() => Not(ROWS),
            Self::Gptq(_) => With("vLLM with Humming kernels", HUMMING),
        }
    }

    fn in_sglang(self, layout: &CodeLayout) -> Served {
        const HUMMING_NAME: &str = "SGLang 0.5.18 or newer with Humming kernels";
        let marlin = matches!(layout.bits, 4 | 8) && marlin_group(layout);
        match self {
            Self::Dequantized => With("SGLang", ""),
            // Whether its kernel has zeros of 8 bits is not known.
            Self::CompressedTensors if marlin && (layout.bits == 4 || layout.symmetric) => With("SGLang", ""),
            Self::Gptq(GptqVersion::V1) if marlin && layout.symmetric => With("SGLang", ""),
            _ if layout.group_index => Not(INDEX),
            _ if layout.group_size.is_some_and(|size| size < 16) => Not(NARROW),
            Self::Gptq(GptqVersion::V1) if !layout.symmetric => Not(VERSION_1),
            _ if layout.group_size.is_none() => {
                Not("has no kernel for whole rows in this file; --group-size 128 has one")
            }
            _ => With(HUMMING_NAME, HUMMING),
        }
    }
}

/// Whether Marlin is built for these groups.
fn marlin_group(layout: &CodeLayout) -> bool {
    matches!(layout.group_size, None | Some(32 | 64 | 128))
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
