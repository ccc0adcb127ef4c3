//! A quantized layer's tensors in a file that is read.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::Packing;
use crate::checkpoint::convert::words_from_bytes;
use anyhow::{Result, bail, ensure};
use safetensors::Dtype;

/// A layer whose codes a file holds.
#[derive(Clone, Copy, Debug)]
pub struct StoredLayer<'a> {
    /// The file's checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// The layer's name in there, without the names of its tensors.
    pub module: &'a str,
    /// Output features.
    pub out_features: usize,
    /// Input features.
    pub in_features: usize,
    /// How config.json says that the codes are packed.
    pub packing: Packing,
}

/// A tensor of 32-bit words in a file.
pub(super) struct Words<'a> {
    checkpoint: &'a Checkpoint,
    name: String,
    bytes: &'a [u8],
}

impl Words<'_> {
    pub(super) fn read(self) -> Vec<u32> {
        let words = words_from_bytes(self.bytes);
        self.checkpoint.release(&self.name);
        words
    }
}

impl<'a> StoredLayer<'a> {
    /// The full name of one of its tensors.
    pub(super) fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.module)
    }

    /// The I32 tensor `suffix`, of exactly this shape.
    pub(super) fn words(&self, suffix: &str, shape: &[usize]) -> Result<Words<'a>> {
        let (checkpoint, name) = (self.checkpoint, self.name(suffix));
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

    /// The group of every input column, from the tensor `suffix`.
    pub(super) fn group_index(&self, suffix: &str) -> Result<Vec<u32>> {
        let (_, groups) = self.packing.groups(self.in_features);
        let index = self.words(suffix, &[self.in_features])?.read();
        if let Some(column) = index.iter().position(|&group| group as usize >= groups) {
            let name = self.name(suffix);
            bail!(
                "tensor {name} in {} puts column {column} into group {}, but there are {groups}",
                self.checkpoint.file_of(&name),
                index[column] as i32
            );
        }
        Ok(index)
    }
}
