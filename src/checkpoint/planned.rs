//! What a quantized copy of a checkpoint is to hold, from headers alone.

use super::formats::{Format, LinearSpec, TensorSpec};
use super::read::Checkpoint;
use crate::codes::CodeLayout;
use anyhow::{Result, ensure};
use std::collections::{HashMap, HashSet};

/// What a quantized copy is made of: a float checkpoint, and how which of its layers are to be stored.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedCopy<'a> {
    /// The float checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// The layers that are quantized.
    pub linears: &'a [LinearSpec],
    /// How they are stored.
    pub format: Format,
    /// How their codes are laid out.
    pub layout: &'a CodeLayout,
}

/// What a quantized copy is to hold.
#[derive(Debug)]
pub(crate) struct Planned {
    /// The layers, by name.
    pub(super) linears: HashMap<String, LinearSpec>,
    /// All tensors, in the order of the files; those of a layer together.
    pub(crate) tensors: Vec<Vec<TensorSpec>>,
}

impl Planned {
    /// The plan of a copy. Errors, as [`Writer::create`](super::Writer::create) does, about checkpoint, layers and layout of codes.
    pub(crate) fn of(copy: &QuantizedCopy<'_>) -> Result<Self> {
        copy.checkpoint.refuse_quantized()?;
        copy.format.check(copy.linears, copy.layout)?;
        let linears = check_linears(copy.checkpoint, copy.linears)?;
        let tensors = planned_tensors(copy, &linears)?;
        Ok(Self { linears, tensors })
    }
}

fn check_linears(checkpoint: &Checkpoint, quantized: &[LinearSpec]) -> Result<HashMap<String, LinearSpec>> {
    let mut linears = HashMap::new();
    for linear in quantized {
        let name = format!("{}.weight", linear.module);
        let shape = checkpoint.tensor(&name)?.shape;
        ensure!(
            shape == [linear.out_features, linear.in_features],
            "tensor {name} in {} has shape {shape:?}, but config.json asks for [{}, {}]",
            checkpoint.file_of(&name),
            linear.out_features,
            linear.in_features
        );
        // Layers of one checkpoint may be stored in different types; what comes of them has one.
        checkpoint.float_type(&name)?;
        ensure!(
            linears.insert(linear.module.clone(), linear.clone()).is_none(),
            "the layer {} is announced twice",
            linear.module
        );
    }
    Ok(linears)
}

/// Tensors of the new checkpoint: those that keep their precision, in the order of the old one, then those of the layers, in theirs, in
/// which they are usually done.
fn planned_tensors(copy: &QuantizedCopy<'_>, linears: &HashMap<String, LinearSpec>) -> Result<Vec<Vec<TensorSpec>>> {
    let &QuantizedCopy { checkpoint, format, layout, .. } = copy;
    let mut tensors = Vec::new();
    let is_kept = |name: &&str| name.strip_suffix(".weight").is_none_or(|module| !linears.contains_key(module));
    for name in checkpoint.names().filter(is_kept) {
        let tensor = checkpoint.tensor(name)?;
        tensors.push(vec![TensorSpec { name: name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.to_vec() }]);
    }
    tensors.extend(copy.linears.iter().map(|linear| format.specs(linear, layout)));
    let mut names = HashSet::new();
    for tensor in tensors.iter().flatten() {
        ensure!(
            names.insert(&tensor.name),
            "{} has a tensor {} already, though its config.json announces no quantization",
            checkpoint.folder().display(),
            tensor.name
        );
    }
    Ok(tensors)
}
