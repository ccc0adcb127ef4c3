//! Work of a run's stages, and how long it takes.

use crate::device::ByKind;
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
