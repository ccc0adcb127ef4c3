//! Token importance from the gradient of the local attention-block loss (paper section 4; "The method in short" of docs/guide.md).
//!
//! With both paths through the block's *float* attention module `Attn(X) = X + o(attention(norm(X)))`, the loss of a
//! sample is `L = ‖Attn(X_F) − Attn(X_U)‖²`, and token n's importance for projection j is the mean over channels of
//! `|∂L / ∂Z_j[n]|`, `Z_j` being the projection's output (bias included) on the quantized path. The backward is written
//! out: `∂L/∂Z_o = 2 (Attn(X_U) − Attn(X_F))`, then through o, the attention, the rotary embedding and, where the family
//! has them, the norms of queries and keys.

use super::settings::ImportancePower;
use crate::device::{AttentionOperands, ModelOps};
use crate::model::config::DecoderConfig;
use crate::model::decoder::{Attended, Block, Layout, Projection};
use crate::parallel::map;
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// One importance factor a token, for each projection of the attention module; all `>= 0`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Factors {
    /// Factors of the tokens for q, k, v and o, in that order.
    pub projections: [Vec<f32>; 4],
}

impl Factors {
    /// Factors of one projection; `None` for the MLP, whose tokens all weigh alike.
    pub fn of(&self, projection: Projection) -> Option<&[f32]> {
        self.projections.get(projection as usize).map(Vec::as_slice)
    }
}

/// A block's inputs of some packed samples on the two paths.
pub struct BlockInputs<'a, T> {
    /// On the float path, `[tokens, hidden]`.
    pub x_float: &'a T,
    /// On the quantized path, of the same shape.
    pub x_quantized: &'a T,
    /// Where the samples' tokens stand.
    pub layout: &'a Layout<T>,
}

/// What becomes the [`Factors`] of some packed samples, on the device.
#[derive(Debug)]
pub struct Magnitudes<T> {
    /// Means over channels of the scaled gradient's absolute values, a token each, `[tokens, 1]`, for q, k, v and o.
    pub projections: [T; 4],
    /// What the gradient was multiplied by: a power of two.
    pub scale: f32,
}

/// Magnitudes of the gradients of the tokens of some packed samples. `block` holds float weights.
pub fn attention_importance<D: ModelOps>(
    device: &D,
    config: &DecoderConfig,
    block: &Block<D::Tensor>,
    inputs: &BlockInputs<'_, D::Tensor>,
) -> Result<Magnitudes<D::Tensor>> {
    let &BlockInputs { x_float, x_quantized, layout } = inputs;
    let float_attention = block.output_input(device, config, x_float, layout)?;
    let float_output = block.linear(Projection::O).apply(device, &float_attention)?;

    let input = block.attention_input(device, config, x_quantized)?;
    let Attended { q, k, v } = block.attended(device, &input, &layout.rotary)?;
    let operands = AttentionOperands { q: &q, k: &k, v: &v, spans: &layout.spans, shape: config.attention };
    let attention = device.attention(&operands)?;
    let output = block.linear(Projection::O).apply(device, &attention)?;

    let gradient = |scale: f32| -> Result<D::Tensor> {
        let mut d_output = device.scaled_difference(&output, &float_output, 2.0 * scale)?;
        device.add_assign(&mut d_output, &device.scaled_difference(x_quantized, x_float, 2.0 * scale)?)?;
        Ok(d_output)
    };
    let scale = loss_scale(device.download(&device.mean_abs_rows(&gradient(1.0)?)?)?.data());
    let d_output = gradient(scale)?;
    let d_attention = device.matmul(&d_output, &block.linear(Projection::O).weight)?;
    let (d_q, d_k, d_v) = device.attention_backward(&operands, &d_attention)?;
    let (d_q, d_k) = block.projection_gradients(device, &input, &layout.rotary, (d_q, d_k))?;
    let magnitudes = |gradient| device.mean_abs_rows(gradient);
    let projections = [magnitudes(&d_q)?, magnitudes(&d_k)?, magnitudes(&d_v)?, magnitudes(&d_output)?];
    Ok(Magnitudes { projections, scale })
}

/// A power of two that brings the gradient at the module's output, given by its rows' magnitudes, near 1: in float16 what
/// follows from it would vanish below 6e-8 otherwise. Where nothing vanishes the factors are the same to the last bit.
fn loss_scale(magnitudes: &[f32]) -> f32 {
    let largest = magnitudes.iter().copied().fold(0.0f32, f32::max);
    // Beyond, float32 itself ends; a gradient of 0 or without end needs no scale.
    if largest > 0.0 && largest.is_finite() { (-largest.log2().round()).clamp(-100.0, 100.0).exp2() } else { 1.0 }
}

/// Why a projection's factors cannot weigh its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Some are NaN or infinite: the gradient overflows.
    NotFinite {
        /// How many of all.
        count: usize,
        /// Chunk of the first one.
        chunk: usize,
        /// The first such token in that chunk.
        token: usize,
    },
    /// All factors are zero: the paths are equal, or no gradient comes through.
    Zero,
}

/// Scales each projection's factors so that the mean of `g²` over all tokens is 1: the solve is indifferent to a common
/// factor, and numbers stay in range. A projection whose factors are unusable weighs its tokens alike: they become 1,
/// and the reason is returned, in the order q, k, v, o.
pub fn normalise(chunks: &mut [Factors]) -> [Option<Unusable>; 4] {
    std::array::from_fn(|projection| {
        let tokens: usize = chunks.iter().map(|chunk| chunk.projections[projection].len()).sum();
        let factors = || chunks.iter().flat_map(|chunk| &chunk.projections[projection]);
        // Largest first: squares of factors near 1e-30 vanish in float32, their ratios do not.
        let largest = factors().copied().fold(0.0f32, f32::max);
        let sum: f64 = factors().map(|&g| (f64::from(g) / f64::from(largest)).powi(2)).sum();
        let scale = (tokens as f64 / sum).sqrt() / f64::from(largest);
        let unusable = if largest == 0.0 && factors().all(|&g| g == 0.0) {
            Some(Unusable::Zero)
        } else {
            not_finite(chunks, projection)
        };
        for g in chunks.iter_mut().flat_map(|chunk| &mut chunk.projections[projection]) {
            *g = if unusable.is_none() { (f64::from(*g) * scale) as f32 } else { 1.0 };
        }
        unusable
    })
}

/// Tokens of equal weight that H of a layer with so many inputs should rest on, an input, where
/// [`ImportancePower::Auto`] decides.
const TOKENS_PER_INPUT: f64 = 16.0;

/// Raises each projection's normalised factors to a power and normalises them again: their order stays, their distances
/// shrink. `inputs` are the projections' input features; the powers come back, both in the order q, k, v, o.
///
/// [`ImportancePower::Auto`] takes the largest power, at most 1, that leaves each input 16 effective tokens
/// `(Σg²)² / Σg⁴`, or half of all tokens that count, where there are not twice as many: raising tokens together lowers the
/// noise of H, but without bound it would undo the weighting. What it counts is known before the layers' inputs are, unlike
/// [`Shares`](super::statistics::Shares), in which tokens of large inputs count for more. The power is a multiple of 1/1024,
/// and 1/1024 at least.
pub fn temper(chunks: &mut [Factors], power: ImportancePower, inputs: [usize; 4]) -> [f64; 4] {
    std::array::from_fn(|projection| {
        let power = match power {
            ImportancePower::Fixed(power) => power,
            ImportancePower::Auto => even_enough(chunks, projection, inputs[projection]),
        };
        if power < 1.0 {
            let tokens: usize = chunks.iter().map(|chunk| chunk.projections[projection].len()).sum();
            let raise = |g: f32| if g > 0.0 { f64::from(g).powf(power) } else { 0.0 };
            let sum: f64 =
                chunks.iter().flat_map(|chunk| &chunk.projections[projection]).map(|&g| raise(g).powi(2)).sum();
            let scale = (tokens as f64 / sum).sqrt();
            let factors = chunks.iter_mut().flat_map(|chunk| &mut chunk.projections[projection]);
            factors.for_each(|g| *g = (raise(*g) * scale) as f32);
        }
        power
    })
}

/// See [`ImportancePower::Auto`]: by bisection, as fewer tokens count the higher the power.
fn even_enough(chunks: &[Factors], projection: usize, inputs: usize) -> f64 {
    const STEPS: u32 = 1024;
    // Chunk by chunk, so that threads do not change the order of a sum.
    let logs: Vec<Vec<f64>> = map(chunks.len(), |i| {
        chunks[i].projections[projection].iter().filter(|&&g| g > 0.0).map(|&g| f64::from(g).ln()).collect()
    });
    let count: usize = logs.iter().map(Vec::len).sum();
    let enough = (TOKENS_PER_INPUT * inputs as f64).min(count as f64 / 2.0);
    let largest = logs.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let is_even = |steps: u32| {
        let power = f64::from(steps) / f64::from(STEPS);
        let sums = map(logs.len(), |i| {
            let squares = logs[i].iter().map(|log| (2.0 * power * (log - largest)).exp());
            squares.fold((0.0, 0.0), |(sum, fourth), square| (sum + square, fourth + square * square))
        });
        let (sum, fourth) = sums.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d));
        sum * sum >= enough * fourth
    };
    let (mut low, mut high) = (0, STEPS);
    if is_even(high) {
        return 1.0;
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if is_even(middle) { low = middle } else { high = middle }
    }
    f64::from(low.max(1)) / f64::from(STEPS)
}

fn not_finite(chunks: &[Factors], projection: usize) -> Option<Unusable> {
    let mut places = chunks.iter().enumerate().flat_map(|(chunk, factors)| {
        let factors = factors.projections[projection].iter().enumerate();
        factors.filter(|(_, g)| !g.is_finite()).map(move |(token, _)| (chunk, token))
    });
    let (chunk, token) = places.next()?;
    Some(Unusable::NotFinite { count: 1 + places.count(), chunk, token })
}

/// Spread of a layer's importance factors g, raised to their power, over the calibration tokens, scaled so that the mean of g² is 1 (paper
/// section 4). All alike is 1 everywhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImportanceSpread {
    /// Mean of g over vision tokens.
    pub vision_mean: f64,
    /// Mean of g over text tokens.
    pub text_mean: f64,
    /// Largest g.
    pub largest: f64,
    /// The power: 1 where g is what the gradient says.
    pub power: f64,
}

impl ImportanceSpread {
    /// The spread of `projection`'s factors, raised to `powers`, over tokens of which `is_vision` tells chunk by chunk.
    pub(super) fn of<'a>(
        factors: &[Factors],
        projection: Projection,
        powers: [f64; 4],
        is_vision: impl Iterator<Item = &'a [bool]> + Clone,
    ) -> Self {
        let tokens = || {
            let weighted = factors.iter().zip(is_vision.clone());
            weighted.flat_map(|(factors, is_vision)| factors.of(projection).into_iter().flatten().zip(is_vision))
        };
        let mean = |vision: bool| {
            let (sum, count) = tokens()
                .filter(|&(_, &is_vision)| is_vision == vision)
                .fold((0.0, 0usize), |(sum, count), (&g, _)| (sum + f64::from(g), count + 1));
            if count == 0 { 0.0 } else { sum / count as f64 }
        };
        let largest = tokens().map(|(&g, _)| f64::from(g)).fold(0.0, f64::max);
        // Layers without factors of their own have power 1.
        let power = powers.get(projection as usize).copied().unwrap_or(1.0);
        Self { vision_mean: mean(true), text_mean: mean(false), largest, power }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(values: &[f32]) -> Factors {
        Factors { projections: std::array::from_fn(|_| values.to_vec()) }
    }

    #[test]
    fn mean_square_is_one_whatever_the_range() {
        for scale in [1.0, 1e-30, 1e30] {
            let mut chunks = [chunk(&[1.0 * scale, 0.0]), chunk(&[3.0 * scale])];
            assert_eq!(normalise(&mut chunks), [None; 4]);
            let squares: f32 = chunks.iter().flat_map(|c| &c.projections[2]).map(|g| g * g).sum();
            assert!((squares / 3.0 - 1.0).abs() < 1e-6);
            assert!((chunks[1].projections[2][0] / chunks[0].projections[2][0] - 3.0).abs() < 1e-6);
        }
    }

    /// Tokens of which every tenth has a hundred times the others' factor, in two chunks of different length.
    fn uneven(tokens: usize) -> [Factors; 2] {
        let g: Vec<f32> = (0..tokens).map(|i| if i % 10 == 0 { 100.0 } else { 1.0 }).collect();
        let mut chunks = [chunk(&g[..tokens / 3]), chunk(&g[tokens / 3..])];
        assert_eq!(normalise(&mut chunks), [None; 4]);
        chunks
    }

    fn effective(chunks: &[Factors], projection: usize) -> f64 {
        let sum = |power| {
            chunks.iter().flat_map(|c| &c.projections[projection]).map(|&g| f64::from(g).powi(power)).sum::<f64>()
        };
        sum(2).powi(2) / sum(4)
    }

    #[test]
    fn powers_bring_factors_together() {
        let before = uneven(1000);
        let mut chunks = before.clone();
        assert_eq!(temper(&mut chunks, ImportancePower::PAPER, [1; 4]), [1.0; 4]);
        assert_eq!(chunks, before);
        assert_eq!(temper(&mut chunks, ImportancePower::Fixed(0.5), [1; 4]), [0.5; 4]);
        let g = |i: usize| chunks[0].projections[3][i];
        assert!((g(0) / g(1) - 10.0).abs() < 1e-4, "{} {}", g(0), g(1));
        let squares: f32 = chunks.iter().flat_map(|c| &c.projections[3]).map(|g| g * g).sum();
        assert!((squares / 1000.0 - 1.0).abs() < 1e-5, "{squares}");
        // Tokens that do not count never will.
        let mut chunks = [chunk(&[0.0, 1.0, 3.0])];
        normalise(&mut chunks);
        temper(&mut chunks, ImportancePower::Fixed(0.25), [1; 4]);
        assert_eq!(chunks[0].projections[1][0], 0.0);
    }

    #[test]
    fn the_power_leaves_each_input_its_tokens() {
        // 100 of 1000 tokens count as they are: enough for 6 inputs, and for all that ask no more.
        let mut chunks = uneven(1000);
        let powers = temper(&mut chunks, ImportancePower::Auto, [6, 16, 24, 10_000]);
        assert_eq!(powers[0], 1.0);
        assert!(powers.is_sorted_by(|a, b| a > b), "{powers:?}");
        for (projection, enough) in [(1, 256.0), (2, 384.0), (3, 500.0)] {
            let found = effective(&chunks, projection);
            assert!((enough..1.01 * enough).contains(&found), "{projection}: {found} for {enough}");
        }
        let mut alike = [chunk(&[1.0; 7])];
        assert_eq!(temper(&mut alike, ImportancePower::Auto, [10_000; 4]), [1.0; 4]);
        assert_eq!(alike[0], chunk(&[1.0; 7]));
    }

    #[test]
    fn the_loss_is_scaled_by_powers_of_two() {
        for (largest, scale) in [(1.0, 1.0), (3e-4, 4096.0), (1000.0, 1.0 / 1024.0), (0.0, 1.0), (f32::INFINITY, 1.0)] {
            assert_eq!(loss_scale(&[0.0, largest]), scale, "{largest}");
        }
        assert_eq!(loss_scale(&[1e-45]), 100f32.exp2());
    }

    #[test]
    fn no_gradient_at_all_weighs_alike() {
        let mut chunks = [chunk(&[0.0, 0.0])];
        assert_eq!(normalise(&mut chunks), [Some(Unusable::Zero); 4]);
        assert_eq!(chunks[0], chunk(&[1.0, 1.0]));
    }

    #[test]
    fn a_gradient_that_overflows_weighs_alike_and_others_stay() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut chunks = [chunk(&[2.0, 2.0]), chunk(&[2.0, 2.0, 2.0])];
            chunks[1].projections[1][2] = bad;
            chunks[1].projections[3].fill(bad);
            let found = normalise(&mut chunks);
            assert_eq!(found[1], Some(Unusable::NotFinite { count: 1, chunk: 1, token: 2 }));
            assert_eq!(found[3], Some(Unusable::NotFinite { count: 3, chunk: 1, token: 0 }));
            assert_eq!((found[0], found[2]), (None, None));
            assert_eq!(chunks[1], chunk(&[1.0, 1.0, 1.0]));
        }
    }
}
