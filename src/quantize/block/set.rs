//! The sets of layers that read the same input, in the order in which they are quantized.

use crate::model::decoder::Projection;

/// A set of layers that read the same input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerSet {
    Attention,
    Output,
    Mlp,
    Down,
}

impl LayerSet {
    pub(super) const ALL: [Self; 4] = [Self::Attention, Self::Output, Self::Mlp, Self::Down];

    pub(super) fn projections(self) -> &'static [Projection] {
        match self {
            Self::Attention => &[Projection::Q, Projection::K, Projection::V],
            Self::Output => &[Projection::O],
            Self::Mlp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    /// The output projection that ends the attention module or the MLP with this set, if it does.
    pub(super) fn residual(self) -> Option<Projection> {
        match self {
            Self::Output => Some(Projection::O),
            Self::Down => Some(Projection::Down),
            Self::Attention | Self::Mlp => None,
        }
    }
}
