//! The files this crate writes, and what each asks of a layer: one file each, and one list of all.

mod compressed_tensors;
mod dequantized;
mod file_format;
mod gptq;
mod left_alone;
mod loaders;
mod served;
mod specs;
mod stored;

pub use file_format::{CodeFormat, FileFormat, Format, QuantMethod, Quantization};
pub use gptq::GptqVersion;
pub use loaders::Loader;
#[cfg(feature = "run")]
pub(crate) use loaders::shell;
pub use served::{FamilySupport, InTransformers, Served};
pub use specs::{LinearSpec, TensorSpec};
pub use stored::StoredLayer;

use self::compressed_tensors::CompressedTensors;
use self::dequantized::Dequantized;
use self::left_alone::left_alone;
use self::specs::misfits;
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::tensor::Float;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

impl Format {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::COMPRESSED_TENSORS, Self::GPTQ_V1, Self::GPTQ_V2, Self::DEQUANTIZED];

    /// compressed-tensors `pack-quantized`.
    pub const COMPRESSED_TENSORS: Self = Self(&CompressedTensors);
    /// GPTQ, as AutoGPTQ packs it.
    pub const GPTQ_V1: Self = Self::gptq_of(GptqVersion::V1);
    /// GPTQ with zeros as they are.
    pub const GPTQ_V2: Self = Self::gptq_of(GptqVersion::V2);
    /// Plain weights, rounded to the checkpoint's dtype: loads anywhere, saves nothing.
    pub const DEQUANTIZED: Self = Self(&Dequantized);

    /// Storage type of scales in this format, for a checkpoint whose weights are of type `weights`.
    pub fn scale_type(self, weights: Float) -> Float {
        self.0.scale_type(weights)
    }

    /// Smallest zero that survives the format.
    pub fn smallest_zero(self) -> u8 {
        self.0.smallest_zero()
    }

    /// What the format has that stores codes; `None` for plain weights.
    pub fn codes(self) -> Option<&'static dyn CodeFormat> {
        self.0.codes()
    }

    /// Refuses layers and layouts that the format cannot hold, naming the layers and the sizes that work.
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
            let misfits = misfits(linears, |linear| linear.in_features % group != 0);
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
        self.0.check(linears, layout)
    }

    /// The tensors that take the place of `{module}.weight`, in the order of [`encode`](Self::encode).
    pub fn specs(self, linear: &LinearSpec, layout: &CodeLayout) -> Vec<TensorSpec> {
        self.0.specs(linear, layout)
    }

    /// Bytes of the tensors of [`specs`](Self::specs), in the same order.
    ///
    /// Errors, naming the layer, when `quantized` is not what `linear` and `layout` announced, or when a scale or a
    /// zero does not fit its field.
    pub fn encode(self, linear: &LinearSpec, layout: &CodeLayout, quantized: &QuantizedLinear) -> Result<Vec<Vec<u8>>> {
        check_layer(linear, layout, quantized)?;
        self.0.encode(linear, layout, quantized)
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
        self.codes().map(|codes| codes.config(quantized, &left_alone(quantized, others), layout))
    }

    /// The files that formats put beside config.json, see [`CodeFormat::config_file`].
    pub(crate) fn config_files() -> impl Iterator<Item = &'static str> {
        Self::ALL.into_iter().filter_map(|format| format.codes()?.config_file())
    }
}

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| format!("no format {name:?}; there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl Quantization {
    /// Reads an entry of config.json. Errors, naming what is not supported, for every method, width or strategy that is not read here.
    pub(crate) fn parse(entry: &Value) -> Result<Self> {
        let Some(method) = entry["quant_method"].as_str() else {
            bail!("quantization_config has no quant_method; start from the float checkpoint");
        };
        let formats = || Format::ALL.into_iter().filter_map(Format::codes);
        let format = formats().find(|codes| codes.method().name == method).with_context(|| {
            let mut known: Vec<&str> = formats().map(|codes| codes.method().told).collect();
            known.dedup();
            format!(
                "weights quantized with {method:?} are not read; known are {}. Start from the float checkpoint.",
                known.join(" and ")
            )
        })?;
        format.announced(entry)
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
        "{module} was quantized with other settings than the file was planned for"
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
    // Without a way out inside, the loops run on vectors.
    let most = |codes: &[u8]| codes.iter().fold(0, |most: u8, &code| most.max(code));
    ensure!(
        most(&quantized.codes) <= largest && most(&quantized.zeros) <= largest,
        "{module} has a code or zero above {largest}"
    );
    if layout.symmetric {
        let middle = 1u8 << (layout.bits - 1);
        ensure!(quantized.zeros.iter().all(|&zero| zero == middle), "{module} is symmetric with a zero off the middle");
    }
    Ok(())
}
