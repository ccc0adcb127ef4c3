//! What one layer's solve has to say of itself.

use super::Finding;
use serde::{Deserialize, Serialize};

/// What one layer's solve has to say of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SolveReport {
    /// `‖(Ŵ−W)‖²_H / ‖W‖²_H` with the undamped H; in the Frobenius norm where there are no statistics, or none that can be
    /// used. Always finite.
    pub relative_error: f64,
    /// Damping λ that the factorization succeeded with; `None` where there is none.
    pub damp: Option<f64>,
    /// Inputs that no calibration token excites.
    pub dead_inputs: usize,
    /// Calibration tokens behind the statistics.
    pub tokens: usize,
    /// How many tokens of equal weight the statistics rest on, by [`Shares`](super::statistics::Shares); `None` where there are
    /// no statistics, or none that can be used.
    pub effective_tokens: Option<f64>,
    /// Wall-clock seconds of the solve, factorization included where this layer caused it.
    pub seconds: f64,
    /// What a user should know.
    pub findings: Vec<Finding>,
}
