//! What went wrong with the numbers of a layer, or of the whole model, and what was done about it.
//!
//! A layer's finding costs its own layer some accuracy, at most down to that of rounding to nearest. What would spoil all layers
//! behind it is an error instead, which names the sample or the weight: weights and activations that are not finite.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// The damped Hessian was not positive definite; the damping was raised.
    DampingRaised,
    /// The Hessian rests on fewer tokens than there are inputs: too few were given, or few of them carry all weight. It is
    /// mostly noise, or has no inverse at all, and the solve hangs on the damping.
    FewTokens,
    /// No calibration token excites any input, or more than a tenth of the inputs are dead.
    DeadInputs,
    /// The statistics overflow, or are not positive definite whatever the damping.
    StatisticsUnusable,
    /// Importance factors that are not finite, or all zero behind block 0.
    ImportanceUnusable,
    /// Scales stand at the smallest value of their storage type: the weights of their groups are smaller than it can tell.
    ScalesTooSmall,
    /// The solve came out far worse than rounding to nearest, or half of the layer's output is lost.
    ErrorExploded,
    /// A finding of the whole model: the quantized path no longer predicts what the float path does.
    ModelDestroyed,
}

/// Share of a layer's inputs that may be dead without a finding. A norm with some zero weights makes a few inputs dead for
/// good, and zero weights serve those as well as any; more than a tenth tells of calibration data that does not reach
/// the layer.
pub(super) const DEAD_SHARE: f64 = 0.1;

impl FindingKind {
    /// What a user can do so that it is not found again.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::DampingRaised => "raise --damp, or calibrate with more samples",
            Self::FewTokens => "calibrate with more samples (--samples, --calib), or lower --importance-power",
            Self::DeadInputs => "check the checkpoint's norms, and calibrate with more, or other, samples",
            Self::StatisticsUnusable => "check the checkpoint's weights and the calibration samples",
            Self::ImportanceUnusable => "check the checkpoint's weights, or use --importance none",
            Self::ScalesTooSmall => "use --format compressed-tensors, whose scales are of the checkpoint's own type",
            Self::ErrorExploded => {
                "raise --damp or --bits, lower --alpha or --group-size, or calibrate with more samples"
            }
            Self::ModelDestroyed => {
                "raise --bits, try another --grid, lower --group-size, or calibrate with more, or other, samples"
            }
        }
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DampingRaised => "damping raised",
            Self::FewTokens => "few tokens",
            Self::DeadInputs => "dead inputs",
            Self::StatisticsUnusable => "statistics unusable",
            Self::ImportanceUnusable => "importance unusable",
            Self::ScalesTooSmall => "scales too small",
            Self::ErrorExploded => "error exploded",
            Self::ModelDestroyed => "model destroyed",
        })
    }
}

/// Something that a user should know of a layer's numbers, or of the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Kind of the finding.
    pub kind: FindingKind,
    /// What was found, with the figures.
    pub found: String,
    /// What was done about it.
    pub done: String,
}

impl Finding {
    pub(crate) fn new(kind: FindingKind, found: impl Into<String>, done: impl Into<String>) -> Self {
        Self { kind, found: found.into(), done: done.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.found, self.done)
    }
}
