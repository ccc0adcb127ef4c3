//! What a user may choose about the solver, and the names those choices have on the command line and in reports.

pub use crate::codes::Order;
pub use crate::device::Grid;

use crate::codes::CodeLayout;
use crate::tensor::Float;
use anyhow::{Result, bail, ensure};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// How codes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// Round to nearest: no statistics at all. The floor that everything is compared with.
    Rtn,
    /// Second-order error propagation towards the layer's output on the quantized path (arXiv 2210.17323).
    Gptq,
    /// Second-order error propagation towards the float path's output (arXiv 2504.02692).
    Gptaq,
}

/// How calibration tokens are weighted in the statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Importance {
    /// All tokens weigh alike.
    None,
    /// Tokens weigh by the gradient of the local attention-block loss (arXiv 2508.03351, section 4).
    Vlmq,
}

/// Whether scales are refitted once a layer has its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Refit {
    /// Scales stay as the solve had them.
    None,
    /// Scales of the layers that write to the residual stream, `o_proj` and `down_proj`, are refitted: each output channel's by one factor, so
    /// that it adds as much as the quantized path lacks.
    Residual,
}

impl Refit {
    /// What did best on the test bed (benches/testbed/RESULTS.md) at the solver's width: a refit at 2 bits. Above, it brings nothing and
    /// costs a pass. Rounding to nearest runs no samples, so it has nothing to refit by.
    pub fn usual(solver: &SolverSettings) -> Self {
        match solver.solver {
            Solver::Gptq | Solver::Gptaq if solver.bits == 2 => Self::Residual,
            Solver::Gptq | Solver::Gptaq | Solver::Rtn => Self::None,
        }
    }
}

/// The power that importance factors are raised to before they weigh tokens: below 1 it brings them closer together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ImportancePower {
    /// This one, above 0 and at most 1.
    Fixed(f64),
    /// For each layer the largest one with which H rests on enough tokens ([`temper`](super::importance::temper)).
    Auto,
}

impl ImportancePower {
    /// The paper's rule: factors as they are.
    pub const PAPER: Self = Self::Fixed(1.0);
}

impl Default for ImportancePower {
    /// What did best on the test bed (benches/testbed/RESULTS.md).
    fn default() -> Self {
        Self::Fixed(0.5)
    }
}

impl FromStr for ImportancePower {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.parse::<f64>() {
            _ if text == "auto" => Ok(Self::Auto),
            Ok(power) if power > 0.0 && power <= 1.0 => Ok(Self::Fixed(power)),
            _ => Err("must be above 0 and at most 1, or `auto`".into()),
        }
    }
}

impl fmt::Display for ImportancePower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(power) => power.fmt(f),
            Self::Auto => f.pad("auto"),
        }
    }
}

impl Serialize for ImportancePower {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Fixed(power) => serializer.serialize_f64(*power),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for ImportancePower {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "importance_power must be a number or `auto`")]
        enum Written {
            Number(f64),
            Word(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(power) => power.to_string(),
            Written::Word(word) => word,
        };
        text.parse().map_err(|what| D::Error::custom(format!("importance_power {what}")))
    }
}

/// The weights that the GPTAQ term carries from one block of columns to the later ones.
///
/// The derivation has the weights just before rounding; the reference implementation, by overwriting them in place, the
/// rounded ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CrossTerm {
    /// The weights just before rounding, as derived.
    Unquantized,
    /// The rounded weights, as in the reference implementation.
    Quantized,
}

/// Settings of one layer's solve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SolverSettings {
    /// How codes are found.
    pub solver: Solver,
    /// Width of a code, one of [`WIDTHS`](crate::device::WIDTHS).
    pub bits: u32,
    /// Input columns that share a scale and a zero, per row; `None`: the whole row.
    pub group_size: Option<usize>,
    /// Zero fixed at the middle of the grid.
    pub symmetric: bool,
    /// How a group's range becomes its grid.
    pub grid: Grid,
    /// Order of the columns.
    pub order: Order,
    /// Damping λ, relative to the mean of H's diagonal.
    pub damp: f64,
    /// Strength α of the GPTAQ term.
    pub alpha: f64,
    /// Weights that the GPTAQ term carries on, see [`CrossTerm`].
    pub cross_term: CrossTerm,
    /// Storage type of scales.
    pub scale_type: Float,
    /// Smallest zero that the file format can hold: 1 for GPTQ v1, which stores `zero − 1`; else 0.
    pub smallest_zero: u8,
}

impl Default for SolverSettings {
    fn default() -> Self {
        Self {
            solver: Solver::Gptaq,
            bits: 3,
            group_size: Some(128),
            symmetric: false,
            grid: Grid::Loss,
            order: Order::ActGroup,
            damp: 0.01,
            alpha: 0.25,
            cross_term: CrossTerm::Unquantized,
            scale_type: Float::Bf16,
            smallest_zero: 0,
        }
    }
}

impl SolverSettings {
    /// Largest code, `2^bits − 1`.
    pub fn largest_code(&self) -> u8 {
        self.layout().largest_code()
    }

    /// Columns of a group in a layer of `in_features` columns.
    pub fn group_columns(&self, in_features: usize) -> usize {
        self.layout().group_columns(in_features)
    }

    /// Whether columns leave their groups, so that a layer must say which column is in which. Round-to-nearest has no order.
    pub fn has_group_index(&self) -> bool {
        match self.solver {
            Solver::Rtn => false,
            Solver::Gptq | Solver::Gptaq => self.order.leaves_groups() && self.group_size.is_some(),
        }
    }

    /// What a file has to know of layers that are solved so.
    pub fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: self.bits,
            group_size: self.group_size,
            symmetric: self.symmetric,
            group_index: self.has_group_index(),
            scale_type: self.scale_type,
            smallest_zero: self.smallest_zero,
            order: self.order,
            damp: self.damp,
            grid: self.grid,
        }
    }

    /// Refuses settings that no solve can honour.
    pub fn validate(&self) -> Result<()> {
        self.layout().validate()?;
        ensure!(self.damp > 0.0 && self.damp <= 1.0, "damp must be above 0 and at most 1, not {}", self.damp);
        if !(0.0..=1.0).contains(&self.alpha) {
            bail!("alpha must be from 0 to 1, not {}", self.alpha);
        }
        Ok(())
    }
}
