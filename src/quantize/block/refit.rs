//! Scales of the layers that write to the residual stream, refitted to what the stream lacks.

use super::chunk::{Chunk, calibrated};
use super::labels;
use super::quantizer::{BlockQuantizer, SolvedLayer};
use super::set::LayerSet;
use crate::codes::QuantizedLinear;
use crate::device::{GridRule, ModelOps, SolveOps};
use crate::parallel::each_chunk;
use crate::quantize::solve::rule_of;
use crate::quantize::statistics::Statistics;
use anyhow::{Context, Result};

/// How far a channel's scales are moved at most, either way: what little a channel has to say may agree with what is lacking by
/// chance.
const FURTHEST: f64 = 1.25;

impl<D: ModelOps + SolveOps> BlockQuantizer<'_, D> {
    /// Multiplies the scales of `layer`, the one layer of `set`, which writes to the residual stream and whose weights the quantized
    /// path has already, by one factor an output channel:
    ///
    /// `c = Σ y·(x_float − x_quantized) / Σ y²` over the calibration tokens, which minimizes `Σ (x_float − x_quantized − c·y)²`,
    ///
    /// y the layer's outputs on the quantized path, `x_float` the float path's stream behind the layer and `x_quantized` the quantized
    /// path's before it; image features that are added behind the block are left out of both. All tokens weigh alike.
    ///
    /// What a solve finds by least squares falls short of the float outputs, along these, and does so again in the next block; layer by
    /// layer nothing shows it. Factors are kept within `4/5 … 5/4`; a channel without outputs keeps its scales, and so does one whose
    /// scales would leave their storage type. The layer's report stays that of its solve.
    pub(super) fn refit_scales(
        &mut self,
        set: LayerSet,
        layer: &mut SolvedLayer,
        chunks: &mut [Chunk<D::Tensor>],
    ) -> Result<()> {
        // Σ y² and Σ y·(x_float − x_quantized) are the diagonals of H and C of inputs y here and y + x_float − x_quantized there.
        let label = self.device.label(labels::REFIT);
        let mut sums = Statistics::new(self.device, layer.linear.out_features, true)?;
        drop(label);
        let weight = &self.quantized.linear(layer.projection).weight;
        self.pass(true, None).run(calibrated(chunks), |_, chunk| {
            let x_float = chunk.x_float.as_ref().context("scales are refitted without a float path")?;
            let u = self.input(set, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
            // These layers have no bias.
            let y = self.device.linear(&u, weight, None)?;
            drop(u);
            // The float path has left the block; what it met there is not for the layer to make up.
            let mut too_much = self.device.scaled_difference(&chunk.x_quantized, x_float, 1.0)?;
            self.leave(&chunk.layout, &mut too_much, layer.projection)?;
            let wanted = self.device.scaled_difference(&y, &too_much, 1.0)?;
            drop(too_much);
            sums.accumulate(self.device, &y, Some(&wanted), None)
        })?;
        let cross = sums.cross.as_ref().context("statistics without a cross term")?;
        let (own, lacking) = (self.device.diagonal(&sums.hessian)?, self.device.diagonal(cross)?);
        multiply_scales(&mut layer.linear, &rule_of(self.settings), &own, &lacking);
        self.replace_weight(layer)
    }
}

/// Multiplies each row's scales by `lacking / own`, see [`BlockQuantizer::refit_scales`].
fn multiply_scales(linear: &mut QuantizedLinear, rule: &GridRule, own: &[f32], lacking: &[f32]) {
    let groups = linear.scales.len() / linear.out_features;
    each_chunk(&mut linear.scales, groups, |row, scales| {
        let factor = f64::from(lacking[row]) / f64::from(own[row]);
        if !factor.is_finite() {
            return;
        }
        let factor = factor.clamp(1.0 / FURTHEST, FURTHEST);
        let fitted: Vec<f32> = scales.iter().map(|&s| rule.stored((f64::from(s) * factor) as f32)).collect();
        if fitted.iter().all(|scale| scale.is_finite()) {
            scales.copy_from_slice(&fitted);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Grid;
    use crate::tensor::Float;

    fn rule(scale_type: Float) -> GridRule {
        GridRule { bits: 3, symmetric: false, grid: Grid::Loss, scale_type, smallest_zero: 0 }
    }

    fn layer(scales: &[f32]) -> QuantizedLinear {
        QuantizedLinear {
            out_features: scales.len() / 2,
            in_features: 16,
            bits: 3,
            group_columns: 8,
            symmetric: false,
            codes: vec![0; 8 * scales.len()],
            scales: scales.to_vec(),
            zeros: vec![0; scales.len()],
            group_index: None,
        }
    }

    #[test]
    fn rows_get_factors_of_their_own_within_bounds() {
        let mut linear = layer(&[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
        multiply_scales(&mut linear, &rule(Float::F32), &[2.0, 2.0, 2.0, 0.0], &[2.2, 20.0, -1.0, 0.0]);
        let tenth = (2.2f32 as f64 / 2.0) as f32;
        assert_eq!(linear.scales, [tenth, 2.0 * tenth, 1.25, 2.5, 0.8, 1.6, 1.0, 2.0]);
    }

    #[test]
    fn scales_are_rounded_to_their_type_and_stay_in_it() {
        let smallest = Float::F16.smallest();
        let mut linear = layer(&[1.0, 60000.0, smallest, 1.0]);
        multiply_scales(&mut linear, &rule(Float::F16), &[1.0, 1.0], &[1.2, 0.4]);
        assert_eq!(linear.scales, [1.0, 60000.0, smallest, Float::F16.round(0.8)]);
    }
}
