//! What samples that go through a model together, and their images in a vision tower, take.

use super::{Costs, F32, tables};
use crate::data::sequence::Sequence;
use crate::device::{AttentionShape, Work};
use crate::model::families::VisionLoad;

/// Samples that go through a block together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkSize {
    /// Tokens of the samples.
    pub tokens: usize,
    /// Tokens that stand for image features.
    pub image_tokens: usize,
    /// Tokens of the longest of them.
    pub longest: usize,
    /// Products of their lengths by themselves, summed.
    pub pairs: usize,
    /// Patches of their images that the vision tower encodes together.
    pub patches: usize,
    /// Patches of all their images.
    pub all_patches: usize,
    /// Patches of the largest image, or crop of one.
    pub longest_image: usize,
    /// Features of an image's tiles that are put together before they are reduced, at most.
    pub joined: usize,
    /// Features that are put together, and what a first reduction makes of them, at most.
    pub reducing: usize,
    /// Products of the numbers of patches of images, or crops, by themselves, summed.
    pub patch_pairs: usize,
    /// Whether both paths are run for the samples whatever the method, as some of their tokens are predicted behind the last block.
    pub checked: bool,
}

impl ChunkSize {
    /// Size of some samples, whose images a tower of such sizes encodes.
    pub fn of(sequences: &[&Sequence], load: &VisionLoad, image_token: u32) -> Self {
        let crops = || {
            let images = sequences.iter().flat_map(|s| &s.images);
            images.flat_map(|image| image.crops().iter().map(|_| image.grid_height * image.grid_width))
        };
        let tiles = || sequences.iter().flat_map(|s| &s.images).filter_map(|image| image.tiles.as_ref());
        let lengths = || sequences.iter().map(|s| s.tokens.len());
        let image_tokens = sequences.iter().flat_map(|s| &s.tokens).filter(|&&token| token == image_token).count();
        Self {
            tokens: lengths().sum(),
            longest: lengths().max().unwrap_or(0),
            pairs: lengths().map(|length| length * length).sum(),
            all_patches: crops().sum(),
            longest_image: crops().max().unwrap_or(0),
            joined: tiles().map(|tiles| tiles.kept.joined()).max().unwrap_or(0),
            reducing: tiles().map(|tiles| tiles.kept.reducing()).max().unwrap_or(0),
            patch_pairs: crops().map(|patches| patches * patches).sum(),
            image_tokens,
            patches: crops().take(load.crops.unwrap_or(usize::MAX)).sum(),
            checked: false,
        }
    }
}

/// Bytes that encoding a chunk's images holds at once beside the tower, its `features` among them.
pub(crate) fn encoding(costs: &Costs<'_>, chunk: &ChunkSize, load: &VisionLoad, features: u64) -> u64 {
    let patches = chunk.patches as u64;
    let rotary = F32 * patches * load.rotary as u64;
    let encoding = tower(costs, chunk, load) + rotary + tables(patches);
    // Tiles that are reduced: beside the crops of them, and once more behind the tower, with its last output.
    let rows = |rows: usize| costs.stored((rows * load.projected) as u64);
    let encoding = rows(chunk.joined) + encoding;
    features + encoding.max(rows(chunk.reducing + chunk.patches))
}

/// What the tower holds of a chunk at once, with the work space of attention or of the widest product, or a bias on its way.
fn tower(costs: &Costs<'_>, chunk: &ChunkSize, load: &VisionLoad) -> u64 {
    let head_dim = load.rotary.max(1);
    let heads = load.width / head_dim;
    let shape = AttentionShape { heads, kv_heads: heads, head_dim, causal: false };
    let longest = if load.windowed == load.depth { load.window } else { chunk.longest_image };
    let attention = Work::Attention { tokens: chunk.patches, longest, shape };
    let outputs = load.inner.max(load.width).max(load.projected);
    let product = costs.workspace(Work::Linear { inner: load.inner.max(4 * load.width), outputs });
    let held = |values: usize| costs.stored((chunk.patches * values) as u64);
    let computing = held(load.per_patch()) + costs.workspace(attention).max(product);
    let bias = costs.workspace(Work::Bias { rows: chunk.patches, outputs });
    computing.max(held(load.per_biased_patch()) + bias)
}
