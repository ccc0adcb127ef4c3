//! What a file has to know of how layers were quantized.

use crate::device::{Grid, WIDTHS, told_widths};
use crate::tensor::Float;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The order in which columns are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Left to right.
    None,
    /// Columns by falling `H_ii` inside their group, whole groups by their largest `H_ii`: the file needs no `g_idx`.
    ActGroup,
    /// All columns by falling `H_ii`; groups form in that order, so the file needs `g_idx`.
    Act,
}

impl Order {
    /// Whether columns leave the groups that they stand in.
    pub fn leaves_groups(self) -> bool {
        match self {
            Self::None | Self::ActGroup => false,
            Self::Act => true,
        }
    }
}

/// How the codes of a checkpoint's layers are laid out, and what its configuration tells of where they come from.
#[derive(Clone, Debug, PartialEq)]
pub struct CodeLayout {
    /// Width of a code, one of [`WIDTHS`].
    pub bits: u32,
    /// Input columns that share a scale and a zero, per row; `None`: the whole row.
    pub group_size: Option<usize>,
    /// Whether every zero is fixed at the middle of the grid.
    pub symmetric: bool,
    /// Whether columns leave their groups, so that a layer must say which column is in which.
    pub group_index: bool,
    /// Storage type of scales.
    pub scale_type: Float,
    /// Smallest zero that a layer may have.
    pub smallest_zero: u8,
    /// Order in which columns were asked to be quantized; rounding to nearest has none and does not look.
    pub order: Order,
    /// Damping of the solve.
    pub damp: f64,
    /// How a group's range became its grid.
    pub grid: Grid,
}

impl CodeLayout {
    /// Largest code, `2^bits − 1`.
    pub fn largest_code(&self) -> u8 {
        ((1u32 << self.bits) - 1) as u8
    }

    /// Columns of a group in a layer of `in_features` columns.
    pub fn group_columns(&self, in_features: usize) -> usize {
        self.group_size.unwrap_or(in_features)
    }

    /// Refuses widths and groups that no file can hold.
    pub fn validate(&self) -> Result<()> {
        ensure!(WIDTHS.contains(&self.bits), "bits must be {}, not {}", told_widths("or"), self.bits);
        if let Some(group) = self.group_size {
            ensure!(group >= 8 && group % 8 == 0, "group size must be a positive multiple of 8, not {group}");
        }
        Ok(())
    }
}
