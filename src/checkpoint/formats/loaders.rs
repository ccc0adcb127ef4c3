//! Which programs load a file that was just written, as of autumn 2026, and how.
//!
//! The rows are those of each loader's own code. Measured by tests/interop on a CPU: transformers 5.23 with
//! compressed-tensors 0.20, and with optimum 2.3 and gptqmodel 7.7 (2, 3, 4 and 8 bits, symmetric or not, with and without
//! `desc_act`). From their sources: vLLM with Marlin kernels for 4 and 8 bits and Humming for 2 and 3, SGLang. A combination
//! that is not known to load is left out.

use super::Format;
use crate::quantize::settings::SolverSettings;
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
    /// The loaders that take exactly the file written with these settings to `folder`, and how. `must_dequantize`: whether
    /// transformers runs the model from compressed-tensors files only with its weights dequantized.
    pub fn loaders(self, settings: &SolverSettings, must_dequantize: bool, folder: &Path) -> Vec<Loader> {
        let python = folder.display().to_string();
        let folder = shell(&python);
        let wide = matches!(settings.bits, 4 | 8);
        // Marlin and the kernels beside it are built for these groups only.
        let common_group = matches!(settings.group_size, None | Some(32 | 64 | 128));
        let index = settings.has_group_index();
        let transformers =
            |arguments: &str| format!("AutoModelForImageTextToText.from_pretrained({python:?}{arguments})");
        let vllm = |options: &str| format!("vllm serve {folder}{options}");
        let sglang = |options: &str| format!("python -m sglang.launch_server --model-path {folder}{options}");

        let mut loaders = vec![Loader { name: "vlmq", command: format!("vlmq-run eval {folder} DATA") }];
        let mut add = |name, command| loaders.push(Loader { name, command });
        match self {
            Self::Dequantized => {
                add("transformers", transformers(""));
                add("vLLM", vllm(""));
                add("SGLang", sglang(""));
            }
            Self::CompressedTensors if index => {
                if wide && common_group {
                    add("vLLM", vllm(""));
                }
            }
            Self::CompressedTensors => {
                if settings.symmetric && !must_dequantize {
                    add("transformers + compressed-tensors", transformers(""));
                } else {
                    let arguments = ", quantization_config=CompressedTensorsConfig(dequantize=True)";
                    add("transformers + compressed-tensors", transformers(arguments));
                }
                if common_group && (wide || settings.symmetric) {
                    add("vLLM", vllm(""));
                }
                if common_group && wide {
                    add("SGLang", sglang(""));
                }
            }
            Self::Gptq => {
                // Sizes of gptqmodel's plain kernel. At 4 bits it chooses one for a CPU that fails with some of them.
                let choice = format!(", quantization_config=GPTQConfig(bits={}, backend=\"torch\")", settings.bits);
                let arguments = match (settings.bits, settings.group_size) {
                    (4, None | Some(16 | 512 | 1024)) => Some(choice.as_str()),
                    (_, None | Some(16 | 32 | 64 | 128 | 256 | 512 | 1024)) => Some(""),
                    _ => None,
                };
                if let Some(arguments) = arguments {
                    add("transformers + optimum + gptqmodel", transformers(arguments));
                }
                if common_group && wide && settings.symmetric {
                    add("vLLM", vllm(""));
                } else if common_group && !index {
                    add("vLLM with Humming kernels", vllm(" --quantization humming"));
                }
                if common_group && (!index || wide) {
                    add("SGLang", sglang(" --dtype float16"));
                }
            }
        }
        loaders
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
