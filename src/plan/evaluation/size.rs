//! A model's weights in numbers.

use crate::checkpoint::Checkpoint;
use crate::device::{AttentionShape, ModelOps};
use crate::model::decoder::Projection;
use crate::model::families::{self, ModelConfig, VisionLoad};
use crate::model::parts::{Part, largest_of, tensors_of, values_of};
use anyhow::Result;

/// A model's weights, in values.
#[derive(Clone, Debug)]
pub(crate) struct ModelSize {
    pub(crate) config: ModelConfig,
    /// Bytes of all tensors in the file.
    pub(crate) file: u64,
    pub(crate) load: VisionLoad,
    pub(crate) tower: u64,
    pub(crate) block: u64,
    /// The widest linear layer of a block.
    pub(crate) layer: u64,
    /// Bytes of the file's largest tensors of the vision tower, of a block and of the head.
    pub(crate) mapped: [u64; 3],
    /// Bytes of a value of the widest layer beside its float32 while it is unpacked.
    pub(crate) unpacking: f64,
}

impl ModelSize {
    /// By a checkpoint's headers. `bits`: as if its layers were stored so.
    pub(crate) fn of<D: ModelOps>(checkpoint: &Checkpoint, config: &ModelConfig, bits: Option<u32>) -> Result<Self> {
        let decoder = &config.decoder;
        let shapes = Projection::ALL.map(|projection| projection.shape(decoder));
        let values = |(rows, cols): (usize, usize)| (rows * cols) as u64;
        let norms = 2 * decoder.hidden + shapes[..3].iter().map(|shape| shape.0).sum::<usize>();
        let largest = |part| largest_of(checkpoint, config, part);
        let of_head = [Part::Head, Part::Embedding, Part::LastNorm].map(largest).into_iter().max().unwrap_or(0);
        let stored = checkpoint.quantization()?.map(|stored| stored.packing.bits);
        Ok(Self {
            config: config.clone(),
            file: Part::ALL
                .iter()
                .flat_map(|&part| tensors_of(checkpoint, config, part))
                .map(|t| t.bytes.len() as u64)
                .sum(),
            load: families::of::<D>(checkpoint)?.vision_load(checkpoint)?,
            tower: values_of(checkpoint, config, Part::VisionTower) as u64,
            block: shapes.into_iter().map(values).sum::<u64>() + norms as u64,
            layer: shapes.into_iter().map(values).max().unwrap_or(0),
            mapped: [largest(Part::VisionTower), largest(Part::Blocks), of_head],
            // Codes, and the words that they are in.
            unpacking: bits.or(stored).map_or(0.0, |bits| 1.0 + f64::from(bits) / 8.0),
        })
    }

    pub(crate) fn layers(&self) -> u64 {
        self.config.decoder.layers as u64
    }

    pub(crate) fn hidden(&self) -> u64 {
        self.config.decoder.hidden as u64
    }

    pub(crate) fn head(&self) -> u64 {
        self.config.decoder.vocab as u64 * self.hidden()
    }

    /// All that is held where all is.
    pub(crate) fn values(&self) -> u64 {
        self.tower + self.layers() * self.block + self.head() + self.hidden()
    }

    /// Widths of queries and of keys.
    pub(crate) fn widths(&self) -> (u64, u64) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.config.decoder.attention;
        ((heads * head_dim) as u64, (kv_heads * head_dim) as u64)
    }
}
