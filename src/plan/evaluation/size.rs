//! A model's weights in numbers, as its headers have them.

use crate::checkpoint::Checkpoint;
use crate::model::decoder::Projection;
use crate::model::families::ModelConfig;
use crate::model::parts::{Part, largest_of, tensors_of};
use anyhow::Result;
use std::sync::Arc;

/// A model as its files and headers describe it.
#[derive(Clone)]
pub(crate) struct ModelSize {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) config: ModelConfig,
    /// Bytes of all tensors in the file.
    pub(crate) file: u64,
    /// Values of the widest linear layer of a block.
    pub(crate) layer: u64,
    /// Bytes of the file's largest tensors of the vision tower, of a block and of the head.
    pub(crate) mapped: [u64; 3],
    /// Bytes of a row of the head in the file.
    pub(crate) head_row: u64,
    /// Bytes of a value of the widest layer beside its float32 while it is unpacked.
    pub(crate) unpacking: f64,
}

impl ModelSize {
    /// By a checkpoint's headers. `bits`: as if its layers were stored so. Errors where there is no output head.
    pub(crate) fn of(checkpoint: &Arc<Checkpoint>, config: &ModelConfig, bits: Option<u32>) -> Result<Self> {
        let decoder = &config.decoder;
        let values = |projection: Projection| {
            let (rows, cols) = projection.shape(decoder);
            (rows * cols) as u64
        };
        let largest = |part| largest_of(checkpoint, config, part);
        let of_head = [Part::Head, Part::Embedding, Part::LastNorm].map(largest).into_iter().max().unwrap_or(0);
        let stored = checkpoint.quantization()?.map(|stored| stored.packing.bits);
        let all = Part::ALL.iter().flat_map(|&part| tensors_of(checkpoint, config, part));
        let head = checkpoint.tensor(&config.head_name()?)?.bytes.len() / decoder.vocab;
        Ok(Self {
            checkpoint: Arc::clone(checkpoint),
            config: config.clone(),
            file: all.map(|tensor| tensor.bytes.len() as u64).sum(),
            layer: Projection::ALL.map(values).into_iter().max().unwrap_or(0),
            mapped: [largest(Part::VisionTower), largest(Part::Blocks), of_head],
            head_row: head as u64,
            // Codes, and the words that they are in.
            unpacking: bits.or(stored).map_or(0.0, |bits| 1.0 + f64::from(bits) / 8.0),
        })
    }

    pub(crate) fn layers(&self) -> usize {
        self.config.decoder.layers
    }

    pub(crate) fn hidden(&self) -> u64 {
        self.config.decoder.hidden as u64
    }

    pub(crate) fn vocab(&self) -> u64 {
        self.config.decoder.vocab as u64
    }
}
