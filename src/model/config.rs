//! Reading config.json: sections, needed keys, and what every family's decoder has in common.

use super::rope::RopeAxes;
use crate::checkpoint::Checkpoint;
use crate::device::{Activation, AttentionShape};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Largest number a config.json may give: no tensor has a longer side, and products of two still fit 64 bits.
const LARGEST: u64 = 1 << 31;

/// One object of config.json, which knows its file and its own name for errors.
#[derive(Clone, Debug)]
pub struct Section<'a> {
    file: PathBuf,
    name: String,
    values: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub fn root(checkpoint: &'a Checkpoint) -> Result<Self> {
        let file = checkpoint.folder().join("config.json");
        let values = checkpoint.config().as_object().with_context(|| format!("{}: not an object", file.display()))?;
        Ok(Self { file, name: String::new(), values })
    }

    /// The file and a key of it, for errors.
    pub fn at(&self, key: &str) -> String {
        format!("{}: {}{key}", self.file.display(), self.name)
    }

    /// The object under `key`, if there is one.
    pub fn section(&self, key: &str) -> Result<Option<Self>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(values)) => {
                Ok(Some(Self { file: self.file.clone(), name: format!("{}{key}.", self.name), values }))
            }
            Some(_) => bail!("{} is not an object", self.at(key)),
        }
    }

    /// The value under `key`; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn needed(&self, key: &str) -> Result<&'a Value> {
        self.get(key).with_context(|| format!("{} is missing; get the original config.json again", self.at(key)))
    }

    fn wrong(&self, key: &str, expected: &str) -> String {
        // A value may be a long list; its beginning tells which it is.
        let value: String = self.values[key].to_string().chars().take(60).collect();
        format!("{} is {value}, not {expected}", self.at(key))
    }

    /// A needed positive count.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.needed(key)?.as_u64().filter(|n| (1..=LARGEST).contains(n));
        Ok(value.with_context(|| self.wrong(key, "a whole number from 1 to 2^31"))? as usize)
    }

    /// A positive count, or the model class's default where the file leaves it out.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_some() { self.count(key) } else { Ok(default) }
    }

    /// A needed positive real number.
    pub fn positive(&self, key: &str) -> Result<f64> {
        let value = self.needed(key)?.as_f64().filter(|&x| x as f32 > 0.0 && (x as f32).is_finite());
        value.with_context(|| self.wrong(key, "a positive number that float32 can hold"))
    }

    /// A needed token id.
    pub fn token(&self, key: &str) -> Result<u32> {
        let value = self.needed(key)?.as_u64().and_then(|id| u32::try_from(id).ok());
        value.with_context(|| self.wrong(key, "a token id"))
    }

    /// A flag, or `default` where the file leaves it out.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| value.as_bool().with_context(|| self.wrong(key, "true or false")))
    }

    /// A needed string.
    pub fn text(&self, key: &str) -> Result<&'a str> {
        self.needed(key)?.as_str().with_context(|| self.wrong(key, "a string"))
    }

    /// A needed list of counts.
    pub fn counts(&self, key: &str) -> Result<Vec<usize>> {
        let list = self.needed(key)?.as_array().with_context(|| self.wrong(key, "a list"))?;
        list.iter()
            .map(|value| {
                let count = value.as_u64().filter(|&count| count <= LARGEST);
                Ok(count.with_context(|| self.wrong(key, "a list of whole numbers up to 2^31"))? as usize)
            })
            .collect()
    }

    /// The nonlinearity under `key`, or `default` where the file leaves it out.
    pub fn activation_or(&self, key: &str, default: Activation) -> Result<Activation> {
        if self.get(key).is_none() {
            return Ok(default);
        }
        Ok(match self.text(key)? {
            "silu" | "swish" => Activation::Silu,
            "gelu" => Activation::Gelu,
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            "quick_gelu" => Activation::QuickGelu,
            other => {
                bail!("{} is {other:?}; known are silu, gelu, gelu_pytorch_tanh, quick_gelu", self.at(key))
            }
        })
    }
}

/// Shape of a decoder-only language model: what all families share.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of decoder blocks.
    pub layers: usize,
    /// Heads of the attention modules.
    pub attention: AttentionShape,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Nonlinearity of the gate.
    pub activation: Activation,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether the output head is the embedding itself.
    pub tied: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether every head's queries and keys are normalised before the rotation.
    pub qk_norm: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The position that each of the `head_dim / 2` frequencies turns with.
    pub rope_axes: RopeAxes,
}

impl DecoderConfig {
    /// Reads the keys that all families share. `root` is the whole file, which the tie flag may stand in, `text` the
    /// section of the language model; q, k and v have a bias and no norm, and positions one axis, until the family says
    /// otherwise.
    ///
    /// Errors where a key is missing or wrong, heads do not fit, sliding windows are on, or the rotary embedding is of a
    /// kind that changes frequencies.
    pub fn read(root: &Section<'_>, text: &Section<'_>) -> Result<Self> {
        Self::with_norm_eps(root, text, text.positive("rms_norm_eps")?)
    }

    /// As [`read`](Self::read), with the epsilon of the norms given.
    pub fn with_norm_eps(root: &Section<'_>, text: &Section<'_>, norm_eps: f64) -> Result<Self> {
        let hidden = text.count("hidden_size")?;
        let heads = text.count("num_attention_heads")?;
        let kv_heads = text.count_or("num_key_value_heads", heads)?;
        let head_dim = text.count_or("head_dim", hidden / heads)?;
        ensure!(
            heads.is_multiple_of(kv_heads) && head_dim > 0 && head_dim.is_multiple_of(2),
            "{}: {heads} attention heads of width {head_dim} do not share {kv_heads} key/value heads evenly",
            text.at("num_attention_heads")
        );
        let family = root.text("model_type")?;
        if text.flag_or("use_sliding_window", false)? {
            bail!("{} is true; sliding-window attention is not supported for {family}", text.at("use_sliding_window"));
        }
        if let Some(layers) = text.get("layer_types") {
            let kinds = layers.as_array().with_context(|| text.wrong("layer_types", "a list"))?;
            if let Some(kind) = kinds.iter().find(|kind| kind.as_str() != Some("full_attention")) {
                bail!("{} has {kind}, not supported for {family}; known is full_attention", text.at("layer_types"));
            }
        }
        for key in ["num_experts", "num_local_experts"] {
            if text.get(key).is_some() && text.count(key)? > 1 {
                bail!("{} is {}; mixtures of experts are not supported for {family}", text.at(key), text.count(key)?);
            }
        }
        let rope = rope_section(text)?;
        for key in ["rope_type", "type"] {
            let Some(rope) = rope.as_ref().filter(|rope| rope.get(key).is_some()) else { continue };
            if !matches!(rope.text(key)?, "mrope" | "default") {
                bail!(
                    "{} is {:?}, not supported for {family}; known are mrope, default",
                    rope.at(key),
                    rope.text(key)?
                );
            }
        }
        let rope_theta = match rope.filter(|rope| rope.get("rope_theta").is_some()) {
            Some(rope) => rope.positive("rope_theta")?,
            None => text.positive("rope_theta")?,
        };
        // The flag may stand at the root or in text_config; either one ties the head to the embedding.
        let tied = root.flag_or("tie_word_embeddings", false)? || text.flag_or("tie_word_embeddings", false)?;
        Ok(Self {
            hidden,
            intermediate: text.count("intermediate_size")?,
            layers: text.count("num_hidden_layers")?,
            attention: AttentionShape { heads, kv_heads, head_dim, causal: true },
            norm_eps: norm_eps as f32,
            activation: text.activation_or("hidden_act", Activation::Silu)?,
            vocab: text.count("vocab_size")?,
            tied,
            qkv_bias: true,
            qk_norm: false,
            rope_theta,
            rope_axes: RopeAxes::Text,
        })
    }
}

/// transformers 5 keeps base and sections of the rotary embedding together in `rope_parameters`, older ones apart; none
/// where it is left out.
pub fn rope_section<'a>(text: &Section<'a>) -> Result<Option<Section<'a>>> {
    match text.section("rope_parameters")? {
        Some(rope) => Ok(Some(rope)),
        None => text.section("rope_scaling"),
    }
}

/// `mrope_section`: how many of the `head_dim / 2` frequencies turn with each of the three positions.
pub fn mrope_sections(text: &Section<'_>, head_dim: usize) -> Result<[usize; 3]> {
    let Some(rope) = rope_section(text)? else {
        bail!("{} (or rope_parameters) with mrope_section is missing", text.at("rope_scaling"))
    };
    let Ok(sections) = <[usize; 3]>::try_from(rope.counts("mrope_section")?) else {
        bail!("{} needs three numbers (temporal, height, width)", rope.at("mrope_section"));
    };
    ensure!(
        sections.iter().sum::<usize>() == head_dim / 2,
        "{} {sections:?} does not add up to half the head width {head_dim}",
        rope.at("mrope_section")
    );
    Ok(sections)
}

/// Where a checkpoint keeps the decoder's tensors: on-disk names differ between generations, and output keeps them.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderNames {
    /// Prefix of `layers.N.` and `norm.weight`, such as `model.` or `model.language_model.`.
    pub prefix: String,
    /// Name of the output head's weight, when it is not tied.
    pub head: String,
}

impl DecoderNames {
    /// Finds the decoder under one of `places` (prefix, and the head's name that goes with it), and checks that its last
    /// block is there too. `layers` names the key of config.json that gives their number.
    pub fn find(checkpoint: &Checkpoint, places: &[(&str, &str)], (layers, count): (String, usize)) -> Result<Self> {
        let norm = |block: usize| format!("layers.{block}.input_layernorm.weight");
        let prefixes: Vec<&str> = places.iter().map(|&(prefix, _)| prefix).collect();
        let prefix = checkpoint.prefix(&prefixes, &norm(0))?;
        let head = places.iter().find(|place| place.0 == prefix).map_or("lm_head.weight", |place| place.1);
        // A wild number of layers must not become a list of as many.
        let last = format!("{prefix}{}", norm(count - 1));
        ensure!(
            checkpoint.contains(&last),
            "{layers} is {count}, but there is no tensor {last}; weights and config.json do not belong together, or a \
             file is missing"
        );
        let next = format!("{prefix}{}", norm(count));
        ensure!(
            !checkpoint.contains(&next),
            "{layers} is {count}, but there is a tensor {next}; weights and config.json do not belong together"
        );
        Ok(Self { prefix: prefix.into(), head: head.into() })
    }
}
