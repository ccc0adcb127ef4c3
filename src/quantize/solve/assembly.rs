//! A layer's codes, put together from blocks of columns in processing order.

use crate::codes::QuantizedLinear;
use crate::device::{BlockCodes, GroupGrid};
use crate::quantize::settings::SolverSettings;
use rayon::prelude::*;

/// Puts blocks of codes back to where their columns came from.
pub(super) struct Assembly<'a> {
    pub(super) linear: QuantizedLinear,
    order: &'a [u32],
    group: usize,
    /// Place of each processed group in the result.
    group_places: Vec<usize>,
}

impl<'a> Assembly<'a> {
    pub(super) fn new(rows: usize, group: usize, order: &'a [u32], settings: &SolverSettings) -> Self {
        let features = order.len();
        let groups = features / group;
        let (mut group_index, mut group_places) = (None, (0..groups).collect());
        if settings.has_group_index() {
            // Columns leave their groups: groups are numbered as they form and the layer carries an index.
            let mut index = vec![0; features];
            order.iter().enumerate().for_each(|(place, &column)| index[column as usize] = (place / group) as u32);
            group_index = Some(index);
        } else {
            group_places = order.chunks(group).map(|columns| columns[0] as usize / group).collect::<Vec<_>>();
        }
        let linear = QuantizedLinear {
            out_features: rows,
            in_features: features,
            bits: settings.bits,
            group_columns: group,
            symmetric: settings.symmetric,
            codes: vec![0; rows * features],
            scales: vec![0.0; rows * groups],
            zeros: vec![0; rows * groups],
            group_index,
        };
        Self { linear, order, group, group_places }
    }

    pub(super) fn place(&mut self, columns: &std::ops::Range<usize>, block: &BlockCodes) {
        let (features, groups) = (self.linear.in_features, self.group_places.len());
        let width = columns.len();
        let GroupGrid { scales, zeros } = &block.grid;
        let brought = scales.len() / self.linear.out_features;
        let places = &self.group_places[columns.start / self.group..][..brought];
        let order = &self.order[columns.clone()];
        // Columns that were near each other are found without looking at where a row ends.
        let near = Near::of(order, features);
        let linear = &mut self.linear;
        linear
            .codes
            .par_chunks_mut(features)
            .zip(linear.scales.par_chunks_mut(groups))
            .zip(linear.zeros.par_chunks_mut(groups))
            .enumerate()
            .for_each(|(row, ((codes, row_scales), row_zeros))| {
                let from = &block.codes[row * width..][..width];
                match &near {
                    Some(near) => near.place(from, codes),
                    None => from.iter().zip(order).for_each(|(&code, &column)| codes[column as usize] = code),
                }
                for (i, &place) in places.iter().enumerate() {
                    row_scales[place] = scales[row * brought + i];
                    row_zeros[place] = zeros[row * brought + i];
                }
            });
    }
}

/// Columns of a block that come from so few that lie side by side.
struct Near {
    /// The first of those.
    first: usize,
    /// Places among them.
    places: Vec<u8>,
}

/// Columns that a byte tells apart.
const WINDOW: usize = 1 << u8::BITS;

impl Near {
    /// The columns of `order`, of so many in all, if they are near each other.
    fn of(order: &[u32], features: usize) -> Option<Self> {
        let first = (*order.iter().min()? as usize).min(features.checked_sub(WINDOW)?);
        let places = order.iter().map(|&column| u8::try_from(column as usize - first).ok()).collect::<Option<_>>()?;
        Some(Self { first, places })
    }

    /// Puts codes in their places in a row.
    fn place(&self, from: &[u8], row: &mut [u8]) {
        let window = row[self.first..].first_chunk_mut::<WINDOW>().expect("as many columns are behind the first");
        from.iter().zip(&self.places).for_each(|(&code, &place)| window[usize::from(place)] = code);
    }
}
