//! A layer's codes, put together from blocks of columns in processing order.

use crate::codes::QuantizedLinear;
use crate::device::BlockCodes;
use crate::quantize::settings::SolverSettings;
use rayon::prelude::*;
use std::ops::Range;

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

    /// Puts all blocks, each with the columns that it stands for in processing order, in their places: row by row, so that what is written
    /// lies behind each other.
    pub(super) fn place(&mut self, blocks: &[(Range<usize>, BlockCodes)]) {
        let Self { linear, order, group, group_places } = self;
        let (features, groups) = (linear.in_features, group_places.len());
        let placed: Vec<Placed<'_>> = blocks
            .iter()
            .map(|(columns, codes)| {
                let order = &order[columns.clone()];
                let brought = codes.grid.scales.len() / linear.out_features;
                let groups = &group_places[columns.start / *group..][..brought];
                Placed { order, near: Near::of(order, features), groups, codes }
            })
            .collect();
        linear
            .codes
            .par_chunks_mut(features)
            .zip(linear.scales.par_chunks_mut(groups))
            .zip(linear.zeros.par_chunks_mut(groups))
            .enumerate()
            .for_each(|(row, ((codes, scales), zeros))| {
                for block in &placed {
                    block.place(row, codes, scales, zeros);
                }
            });
    }
}

/// A block and where it goes.
struct Placed<'a> {
    /// Original columns.
    order: &'a [u32],
    near: Option<Near>,
    /// Places of the groups that it brings.
    groups: &'a [usize],
    codes: &'a BlockCodes,
}

impl Placed<'_> {
    fn place(&self, row: usize, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let Self { order, near, groups, codes: block } = self;
        let from = &block.codes[row * order.len()..][..order.len()];
        match near {
            Some(near) => near.place(from, codes),
            None => from.iter().zip(*order).for_each(|(&code, &column)| codes[column as usize] = code),
        }
        for (i, &place) in groups.iter().enumerate() {
            scales[place] = block.grid.scales[row * groups.len() + i];
            zeros[place] = block.grid.zeros[row * groups.len() + i];
        }
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
