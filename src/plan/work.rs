//! Work of a run's stages, and how long it takes.

use crate::device::ByKind;
use crate::model::families::VisionLoad;
use crate::plan::ChunkSize;
use crate::progress::Stage;
use serde::Serialize;

/// Work by kind.
pub type Load = ByKind;

/// Work a second by kind, all threads together.
pub type Rates = ByKind;

/// A stage and what it is expected to take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageEstimate {
    /// The stage.
    pub stage: Stage,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// The work.
    pub load: Load,
}

impl Load {
    /// A vision tower of `weights` values on the images of some chunks.
    pub(crate) fn of_vision(load: &VisionLoad, weights: usize, chunks: &[ChunkSize]) -> Self {
        let sum = |of: fn(&ChunkSize) -> usize| chunks.iter().map(of).sum::<usize>() as f64;
        let patches = sum(|chunk| chunk.all_patches);
        let (depth, windowed, width) = (load.depth as f64, load.windowed as f64, load.width as f64);
        let pairs = (depth - windowed) * sum(|chunk| chunk.patch_pairs) + windowed * patches * load.window as f64;
        let inner = load.inner as f64 * if load.gated { 5.0 } else { 4.0 };
        // Where patches are merged, what is behind that runs on the merged ones, wider in proportion: the same product.
        Self {
            products: 2.0 * patches * weights as f64,
            attention: 4.0 * pairs * width,
            values: patches * (depth * (7.0 * width + inner) + 2.0 * load.patch as f64) + weights as f64,
            ..Self::default()
        }
    }
}
