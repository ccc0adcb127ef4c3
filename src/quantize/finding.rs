//! What went wrong with the numbers of a layer, and what was done about it.

use serde::{Deserialize, Serialize};

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// The damped Hessian was not positive definite; the damping was raised.
    DampingRaised,
}

/// Something that a user should know of a layer's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which kind.
    pub kind: FindingKind,
    /// What was found, with the figures.
    pub found: String,
    /// What was done about it.
    pub done: String,
}
