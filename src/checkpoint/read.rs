//! Reading a checkpoint: config.json and tensors, mapped into memory and converted when they are asked for.

use super::config::{quantization_entry, without_quantization};
use super::convert::{first_non_finite, float_type};
use super::shard::{INDEX, MAX_TENSORS, Shard, weight_files};
use crate::input;
use crate::tensor::Float;
use crate::tensor::Matrix;
use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// An opened checkpoint folder. Nothing but headers is read until a tensor is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Value,
    pub(super) shards: Vec<Shard>,
    /// Tensors in the order of the files.
    names: Vec<String>,
    /// Name → index of its shard.
    shard_of: HashMap<String, usize>,
    /// Whether the tensors are those of a quantized model.
    packed: bool,
}

/// A tensor as the file holds it.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: &'a [usize],
    /// Elements, row-major, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

/// How tensors are named that only quantized layers have.
const PACKED: [&str; 9] = [
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".absmax",
    ".quant_map",
    ".SCB",
];

/// Refuses the weights of an adapter that were not merged into the model's.
fn refuse_unmerged(folder: &Path, names: &[String]) -> Result<()> {
    const PARTS: [&str; 4] = [".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".base_layer."];
    let unmerged = names.iter().find(|name| PARTS.iter().any(|part| name.contains(part)));
    match unmerged {
        None => Ok(()),
        Some(name) => bail!(
            "{} holds {name}: an adapter that is not merged into the weights. Merge it first (peft: merge_and_unload) and save the model.",
            folder.display()
        ),
    }
}

impl Checkpoint {
    /// Opens the folder `folder`: config.json, and `model.safetensors`, or the shards of its index, or every
    /// `*.safetensors`.
    ///
    /// Errors, naming the file and the cause, for: no such folder, no or broken config.json, no weights, a broken header,
    /// offsets that overlap or leave the file, a listed shard that is absent or outside the folder, a listed tensor
    /// that its shard lacks, a tensor in two shards.
    pub fn open(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        let found = std::fs::metadata(folder).with_context(|| {
            format!("cannot open the checkpoint {shown}; give the folder that holds config.json and the weights")
        })?;
        ensure!(found.is_dir(), "{shown} is not a folder; give the folder that holds config.json and the weights");
        let config = read_config(folder)?;
        let (files, listed) = weight_files(folder)?;
        let shards = files.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;

        let mut names = Vec::new();
        let mut shard_of: HashMap<String, usize> = HashMap::new();
        for (index, shard) in shards.iter().enumerate() {
            let keys = shard.header.offset_keys();
            ensure!(
                names.len() + keys.len() <= MAX_TENSORS,
                "{shown} holds more than {MAX_TENSORS} tensors, the limit for a checkpoint"
            );
            for name in keys {
                if let Some(&other) = shard_of.get(&name) {
                    bail!(
                        "tensor {name} is both in {} and in {}. Remove the file that does not belong.",
                        shards[other].path.display(),
                        shard.path.display()
                    );
                }
                shard_of.insert(name.clone(), index);
                names.push(name);
            }
        }
        for (name, file) in &listed {
            let inside = shard_of.get(name).is_some_and(|&shard| shards[shard].path == folder.join(file));
            ensure!(
                inside,
                "{} lists tensor {name} in {file}, which does not hold it. Download both files again.",
                folder.join(INDEX).display()
            );
        }
        refuse_unmerged(folder, &names)?;
        let packed = names.iter().any(|name| {
            let dtype = |name: &String| shards[shard_of[name]].header.info(name).map(|info| info.dtype);
            PACKED.iter().any(|suffix| name.ends_with(suffix))
                || name.ends_with(".weight")
                    && !dtype(name).is_some_and(|dtype| float_type(dtype).is_some() || dtype == Dtype::F64)
        });
        Ok(Self { folder: folder.to_path_buf(), config, shards, names, shard_of, packed })
    }

    /// The folder, as given.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files that hold the tensors.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// config.json, an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of all tensors, in the order in which the files hold them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Whether the checkpoint holds a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// The tensor `name` as it is in the file. Errors when there is none.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let Some(&shard) = self.shard_of.get(name) else {
            bail!(
                "{} has no tensor {name}. Either a weight file is missing, or this is not the family that config.json \
                 claims.",
                self.folder.display()
            );
        };
        let shard = &self.shards[shard];
        let info = shard.header.info(name).expect("a name from this header");
        Ok(StoredTensor { dtype: info.dtype, shape: &info.shape, bytes: shard.bytes(info.data_offsets) })
    }

    /// [`stored_matrix`](Self::stored_matrix) in float32.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(self.stored_matrix(name, rows, cols)?.to_matrix())
    }

    /// What [`matrix`](Self::matrix) finds wrong with a header.
    pub(crate) fn check_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<()> {
        self.float_type_of(name, self.shaped(name, rows, cols)?.dtype).map(drop)
    }

    /// What [`vector`](Self::vector) finds wrong with a header.
    #[cfg(feature = "run")]
    pub(crate) fn check_vector(&self, name: &str, len: usize) -> Result<()> {
        self.float_type_of(name, self.shaped_vector(name, len)?.dtype).map(drop)
    }

    /// The tensor `name` as the file holds it. Errors where it is absent or not of the shape that [`matrix`](Self::matrix) asks.
    pub(crate) fn shaped(&self, name: &str, rows: usize, cols: usize) -> Result<StoredTensor<'_>> {
        let tensor = self.tensor(name)?;
        ensure!(
            tensor.shape.first() == Some(&rows) && tensor.shape[1..].iter().product::<usize>() == cols,
            "tensor {name} in {} has shape {:?}, but config.json asks for [{rows}, {cols}]",
            self.file_of(name),
            tensor.shape
        );
        Ok(tensor)
    }

    /// [`stored_vector`](Self::stored_vector) in float32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Matrix> {
        Ok(self.stored_vector(name, len)?.to_matrix())
    }

    pub(super) fn shaped_vector(&self, name: &str, len: usize) -> Result<StoredTensor<'_>> {
        let tensor = self.tensor(name)?;
        ensure!(
            tensor.shape == [len],
            "tensor {name} in {} has shape {:?}, but config.json asks for [{len}]",
            self.file_of(name),
            tensor.shape
        );
        Ok(tensor)
    }

    /// Lets the system have the pages of a tensor back that were read: they count as this process's memory. They are read
    /// again where they are wanted again.
    pub(crate) fn release(&self, name: &str) {
        if let Some(shard) = self.shard_of.get(name).map(|&shard| &self.shards[shard])
            && let Some(info) = shard.header.info(name)
        {
            shard.release(info.data_offsets);
        }
    }

    /// Refuses a tensor `name` of floats that holds a NaN or an infinity.
    pub(crate) fn check_finite(&self, name: &str) -> Result<()> {
        let tensor = self.tensor(name)?;
        let Some(float) = float_type(tensor.dtype) else { return Ok(()) };
        let Some(index) = first_non_finite(float, tensor.bytes) else { return Ok(()) };
        let size = tensor.bytes.len() / tensor.shape.iter().product::<usize>();
        let value = float.widen(&tensor.bytes[index * size..][..size])[0];
        let cols = tensor.shape.get(1..).map_or(1, |inner| inner.iter().product());
        // One dimension is a row.
        let (row, column) = if tensor.shape.len() < 2 { (0, index) } else { (index / cols, index % cols) };
        bail!(
            "tensor {name} in {} holds {value} at row {row}, column {column}. The checkpoint is broken; get it again.",
            self.file_of(name)
        )
    }

    pub(super) fn float_type_of(&self, name: &str, dtype: Dtype) -> Result<Float> {
        float_type(dtype).with_context(|| {
            format!("tensor {name} in {} is of dtype {dtype:?}; weights must be F16, BF16 or F32", self.file_of(name))
        })
    }

    /// Storage type of the float tensor `name`. Errors when it is absent or not a float.
    pub fn float_type(&self, name: &str) -> Result<Float> {
        self.float_type_of(name, self.tensor(name)?.dtype)
    }

    /// The file that holds the tensor `name`, and its bytes in there. Errors as [`tensor`](Self::tensor) does.
    #[cfg(feature = "run")]
    pub(crate) fn place(&self, name: &str) -> Result<(&Path, std::ops::Range<u64>)> {
        let length = self.tensor(name)?.bytes.len() as u64;
        let shard = &self.shards[self.shard_of[name]];
        let start = shard.start_of(name);
        Ok((&shard.path, start..start + length))
    }

    /// The file that holds `name`, for messages.
    pub(crate) fn file_of(&self, name: &str) -> String {
        self.shard_of.get(name).map_or_else(String::new, |&shard| self.shards[shard].path.display().to_string())
    }

    /// Text metadata of the first weight file (`format: pt` in what transformers writes).
    pub(crate) fn metadata(&self) -> HashMap<String, String> {
        self.shards.first().and_then(|shard| shard.header.metadata().clone()).unwrap_or_default()
    }

    /// The first of `candidates` such that a tensor `{candidate}{probe}` exists: generations of a family differ only
    /// in the prefix of their names. Probe for a norm: a quantized checkpoint has no `.weight` in its linear layers.
    pub fn prefix<'a>(&self, candidates: &[&'a str], probe: &str) -> Result<&'a str> {
        candidates.iter().copied().find(|candidate| self.contains(&format!("{candidate}{probe}"))).with_context(|| {
            let tried: Vec<String> = candidates.iter().map(|candidate| format!("{candidate}{probe}")).collect();
            format!("{} has none of the tensors {}", self.folder.display(), tried.join(", "))
        })
    }

    /// What config.json says of how the linear layers are stored, `None` when they are plain floats.
    pub(super) fn quantization_entry(&self) -> Option<&Value> {
        quantization_entry(&self.config).filter(|_| self.packed)
    }

    /// Whether config.json announces a quantization, known or not, and the tensors are no plain floats.
    pub fn is_quantized(&self) -> bool {
        self.quantization_entry().is_some()
    }

    /// Whether config.json announces a quantization that the tensors do not have: they are plain floats, as a program that dequantized
    /// them leaves behind.
    pub fn has_leftover_quantization(&self) -> bool {
        quantization_entry(&self.config).is_some() && !self.packed
    }

    /// config.json as a copy in another format begins with it: without a leftover of an earlier one.
    pub(crate) fn own_config(&self) -> Cow<'_, Value> {
        match self.has_leftover_quantization() {
            true => Cow::Owned(without_quantization(&self.config)),
            false => Cow::Borrowed(&self.config),
        }
    }

    /// Refuses a checkpoint that is quantized already.
    pub(crate) fn refuse_quantized(&self) -> Result<()> {
        ensure!(
            !self.is_quantized(),
            "{} is already quantized (config.json has a quantization_config). Start from the float checkpoint.",
            self.folder.display()
        );
        Ok(())
    }
}

/// Reads config.json of `folder`.
fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    let text = input::read_beside(folder, "config.json", input::MAX_CONFIG_BYTES)?.with_context(|| {
        format!("cannot read {}; a checkpoint folder holds config.json and *.safetensors", path.display())
    })?;
    let config = input::json::value(&text, input::MAX_CONFIG_VALUES)
        .with_context(|| format!("{} is not valid JSON", path.display()))?;
    ensure!(config.is_object(), "{} is not a JSON object", path.display());
    Ok(config)
}
