//! The files this crate writes, and what each asks of a layer.

pub mod compressed_tensors;
pub mod dequantized;
pub mod gptq;
mod loaders;

#[cfg(feature = "run")]
pub(crate) use loaders::shell;
pub use loaders::{FamilySupport, Loader};

use super::config::GptqVersion;
use super::convert::words_from_bytes;
use super::read::Checkpoint;
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::tensor::Float;
use anyhow::{Result, bail, ensure};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a quantized checkpoint is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
pub enum Format {
    /// compressed-tensors `pack-quantized`.
    CompressedTensors,
    /// GPTQ, as AutoGPTQ packs it.
    Gptq(GptqVersion),
    /// Plain weights, rounded to the checkpoint's dtype: loads anywhere, saves nothing.
    Dequantized,
}

/// A linear layer to be quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Its name in the file, without `.weight`.
    pub module: String,
    /// Output features.
    pub out_features: usize,
    /// Input features.
    pub in_features: usize,
}

/// A tensor that will be in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(module: &str, suffix: &str, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: format!("{module}.{suffix}"), dtype, shape: shape.into() }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl From<Format> for &'static str {
    fn from(format: Format) -> Self {
        format.name()
    }
}

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| format!("no format {name:?}; there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::CompressedTensors, Self::Gptq(GptqVersion::V1), Self::Gptq(GptqVersion::V2), Self::Dequantized];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq(version) => version.name(),
            Self::Dequantized => "dequantized",
        }
    }

    /// The version of GPTQ files that most programs read rightly: 1 where all zeros are the middle, as programs look for it and none
    /// reads them; 2 otherwise, as the kernels of vLLM and SGLang take what is stored for the zero.
    pub fn gptq(symmetric: bool) -> Self {
        Self::Gptq(if symmetric { GptqVersion::V1 } else { GptqVersion::V2 })
    }

    /// Storage type of scales in this format, for a checkpoint whose weights are of type `weights`.
    pub fn scale_type(self, weights: Float) -> Float {
        match self {
            Self::Gptq(_) => Float::F16,
            Self::CompressedTensors | Self::Dequantized => weights,
        }
    }

    /// Smallest zero that survives the format: GPTQ version 1 stores `zero − 1` in an unsigned field.
    pub fn smallest_zero(self) -> u8 {
        match self {
            Self::Gptq(version) => version.stored_less(),
            Self::CompressedTensors | Self::Dequantized => 0,
        }
    }

    /// Refuses layers and layout that the format cannot hold, naming the layers and the sizes that work.
    pub fn check(self, linears: &[LinearSpec], layout: &CodeLayout) -> Result<()> {
        layout.validate()?;
        ensure!(!linears.is_empty(), "there is no layer to quantize");
        ensure!(
            layout.smallest_zero >= self.smallest_zero(),
            "the solver may return zeros of {}, but {} files start at {}",
            layout.smallest_zero,
            self.name(),
            self.smallest_zero()
        );
        if let Some(group) = layout.group_size {
            let misfits = layers(linears, |linear| linear.in_features % group != 0);
            if !misfits.is_empty() {
                let sizes: Vec<String> = [8, 16, 32, 64, 128, 256, 512, 1024]
                    .into_iter()
                    .filter(|size| linears.iter().all(|linear| linear.in_features % size == 0))
                    .map(|size| size.to_string())
                    .chain(["none".to_owned()])
                    .collect();
                bail!(
                    "the group size {group} does not divide the input features of {misfits}; group sizes that fit all \
                     layers: {}",
                    sizes.join(", ")
                );
            }
        }
        match self {
            Self::Gptq(_) => {
                ensure!(
                    layout.scale_type == Float::F16,
                    "gptq files hold scales of type F16, but the solver rounds them to {:?}",
                    layout.scale_type
                );
                let misfits = layers(linears, |linear| linear.in_features % 32 != 0 || linear.out_features % 32 != 0);
                ensure!(
                    misfits.is_empty(),
                    "gptq files need input and output features in multiples of 32, which {misfits} do not have; use \
                     the format compressed-tensors"
                );
            }
            Self::CompressedTensors | Self::Dequantized => {}
        }
        Ok(())
    }

    /// The tensors that take the place of `{module}.weight`, in the order of [`encode`](Self::encode).
    pub fn specs(self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
        match self {
            Self::CompressedTensors => compressed_tensors::specs(linear, layout),
            Self::Gptq(_) => gptq::specs(linear, layout),
            Self::Dequantized => dequantized::specs(linear, layout),
        }
    }

    /// Bytes of the tensors of [`specs`](Self::specs), in the same order.
    ///
    /// Errors, naming the layer, when `quantized` is not what `linear` and `layout` announced, or when a scale or a
    /// zero does not fit its field.
    pub fn encode(self, linear: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
        check_layer(linear, layout, quantized)?;
        Ok(match self {
            Self::CompressedTensors => compressed_tensors::encode(layout, quantized),
            Self::Gptq(version) => gptq::encode(&linear.module, layout, quantized, version)?,
            Self::Dequantized => dequantized::encode(layout, quantized)?,
        })
    }

    /// What goes into config.json as `quantization_config`; `None` for plain weights.
    ///
    /// `quantized` are the layers that are, `others` the names on disk of all other modules with a matrix as weight.
    pub fn quantization_config(
        self,
        quantized: &[LinearSpec],
        others: &[String],
        layout: &CodeLayout,
    ) -> Option<Value> {
        match self {
            Self::CompressedTensors => Some(compressed_tensors::config(&left_alone(quantized, others), layout)),
            Self::Gptq(version) => Some(gptq::config(quantized, &left_alone(quantized, others), layout, version)),
            Self::Dequantized => None,
        }
    }
}

/// Names the layers that `wrong` holds for, with their sizes; many are cut to the first few.
fn layers(linears: &[LinearSpec], wrong: impl Fn(&LinearSpec) -> bool) -> String {
    const SHOWN: usize = 8;
    let found: Vec<String> = linears
        .iter()
        .filter(|linear| wrong(linear))
        .map(|l| format!("{} ({} x {})", l.module, l.out_features, l.in_features))
        .collect();
    match found.len() {
        0..=SHOWN => found.join(", "),
        many => format!("{} and {} more", found[..SHOWN].join(", "), many - SHOWN),
    }
}

fn check_layer(linear: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<()> {
    let module = &linear.module;
    ensure!(
        (quantized.out_features, quantized.in_features) == (linear.out_features, linear.in_features),
        "{module} was announced as {} x {}, but quantized as {} x {}",
        linear.out_features,
        linear.in_features,
        quantized.out_features,
        quantized.in_features
    );
    ensure!(
        quantized.bits == layout.bits
            && quantized.symmetric == layout.symmetric
            && quantized.group_columns == layout.group_columns(linear.in_features)
            && quantized.group_index.is_some() == layout.group_index,
        "{module} was quantized with other layout than the file was planned for"
    );
    let grid = linear.out_features * quantized.groups();
    ensure!(
        quantized.codes.len() == linear.out_features * linear.in_features
            && quantized.scales.len() == grid
            && quantized.zeros.len() == grid
            && quantized.group_index.as_ref().is_none_or(|index| index.len() == linear.in_features),
        "{module} has the wrong number of codes, scales, zeros or group indices"
    );
    if let Some(scale) = quantized.scales.iter().find(|&&scale| layout.scale_type.round(scale) != scale) {
        bail!("{module} has the scale {scale}, which {:?} cannot hold", layout.scale_type);
    }
    // An infinite or NaN scale: too large for its type, or out of a broken solve.
    ensure!(
        quantized.scales.iter().all(|scale| scale.is_finite()),
        "{module} has a scale that is not finite in {:?}; its weights are too large for this format",
        layout.scale_type
    );
    let largest = layout.largest_code();
    ensure!(
        quantized.codes.iter().chain(&quantized.zeros).all(|&code| code <= largest),
        "{module} has a code or zero above {largest}"
    );
    if layout.symmetric {
        let middle = 1u8 << (layout.bits - 1);
        ensure!(quantized.zeros.iter().all(|&zero| zero == middle), "{module} is symmetric with a zero off the middle");
    }
    Ok(())
}

/// Regular expressions, matched from the start of a module's name, for all linear layers that are not quantized.
///
/// Loaders rename modules (`visual.…` becomes `model.visual.…`), so each is matched by the part of its name that tells it
/// from the quantized ones: a whole branch when no quantized layer is in a branch of that name, else its full path below
/// what all quantized layers share. `lm_head` is always in: a tied one has no tensor, yet is a linear layer to loaders.
fn left_alone(quantized: &[LinearSpec], others: &[String]) -> Vec<String> {
    let paths: Vec<Vec<&str>> = quantized.iter().map(|linear| linear.module.split('.').collect()).collect();
    // A block's number stays with the word before it.
    let numbered = |path: &[&str]| path.iter().position(|part| part.parse::<usize>().is_ok()).unwrap_or(path.len());
    let shared = paths.first().map_or(0, |first| {
        let block = numbered(first).saturating_sub(1);
        (0..block).take_while(|&i| paths.iter().all(|path| path.get(i) == Some(&first[i]))).count()
    });
    let mut patterns = vec![r"(.*\.)?lm_head$".to_owned()];
    for other in others {
        let path: Vec<&str> = other.split('.').collect();
        let branch = path.iter().find(|part| !paths.iter().any(|path| path.contains(part)));
        let pattern = match branch {
            // Embeddings are not linear layers; naming them would only lengthen the list.
            Some(part) if part.starts_with("embed_") => continue,
            Some(part) if Some(part) == path.last() => format!(r"(.*\.)?{}$", escape(part)),
            Some(part) => format!(r"(.*\.)?{}\..*", escape(part)),
            None => {
                let common = path.iter().zip(&paths[0][..shared]).take_while(|(a, b)| a == b).count();
                format!(r"(.*\.)?{}$", escape(&path[common..].join(".")))
            }
        };
        if !patterns.contains(&pattern) {
            patterns.push(pattern);
        }
    }
    patterns
}

/// Escapes what regular expressions would take as syntax in a module's name.
fn escape(name: &str) -> String {
    name.replace('.', r"\.")
}

/// A tensor of 32-bit words in a file.
struct Words<'a> {
    checkpoint: &'a Checkpoint,
    name: String,
    bytes: &'a [u8],
}

impl Words<'_> {
    fn read(self) -> Vec<u32> {
        let words = words_from_bytes(self.bytes);
        self.checkpoint.release(&self.name);
        words
    }
}

/// The I32 tensor `{module}.{suffix}`, of exactly this shape.
fn words_of<'a>(checkpoint: &'a Checkpoint, module: &str, suffix: &str, shape: &[usize]) -> Result<Words<'a>> {
    let name = format!("{module}.{suffix}");
    let tensor = checkpoint.tensor(&name)?;
    ensure!(
        tensor.dtype == Dtype::I32 && tensor.shape == shape,
        "tensor {name} in {} is {:?} of shape {:?}, but config.json asks for I32 of {shape:?}",
        checkpoint.file_of(&name),
        tensor.dtype,
        tensor.shape
    );
    Ok(Words { checkpoint, name, bytes: tensor.bytes })
}

/// The group of every input column from `{module}.{suffix}`.
fn group_index(checkpoint: &Checkpoint, module: &str, suffix: &str, inputs: usize, groups: usize) -> Result<Vec<u32>> {
    let index = words_of(checkpoint, module, suffix, &[inputs])?.read();
    if let Some(column) = index.iter().position(|&group| group as usize >= groups) {
        let name = format!("{module}.{suffix}");
        bail!(
            "tensor {name} in {} puts column {column} into group {}, but there are {groups}",
            checkpoint.file_of(&name),
            index[column] as i32
        );
    }
    Ok(index)
}
