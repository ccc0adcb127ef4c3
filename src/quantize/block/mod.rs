//! One decoder block: importance, statistics and solves of its seven layers, then both paths advance through it.
//!
//! Sets are quantized in the order {q, k, v} → {o} → {gate, up} → {down}. A set's `U` is computed with every set before
//! it already quantized; `F` never meets a quantized weight. Inputs of a set are computed again for every pass and never
//! kept, so memory holds the two residual streams, the block and one layer's statistics; [`plan`](super::plan) counts it.

mod checks;
mod refit;

use super::Finding;
use super::importance::{Factors, attention_importance, normalise, temper};
use super::layer::{QuantizedLinear, SolveReport};
use super::plan::Activations;
use super::report::ImportanceSpread;
use super::settings::{Importance, ImportancePower, Refit, Solver, SolverSettings};
use super::solve;
use super::statistics::Statistics;
use crate::device::{Device, ModelOps, SolveOps};
use crate::heap;
use crate::model::config::DecoderConfig;
use crate::model::decoder::{Block, Layout, Projection};
use crate::progress::Stop;
use anyhow::{Context, Result, bail};
pub use checks::NotFinite;
use checks::{Distance, without_importance};
use std::time::Instant;

/// Some calibration samples, packed, on their way through the decoder.
pub struct Chunk<T> {
    /// Rotary tables and sequence bounds.
    pub layout: Layout<T>,
    /// Residual stream of the quantized path, `[tokens, hidden]`.
    pub x_quantized: T,
    /// Residual stream of the float path; `None` where neither a setting nor [`check`](super::check) needs it.
    pub x_float: Option<T>,
    /// Whether its tokens go into no statistics; such chunks stand behind all others.
    pub held_out: bool,
    /// Which tokens stand for image patches.
    pub is_vision: Vec<bool>,
    /// Ids of the samples, in the order of the spans.
    pub samples: Vec<String>,
}

impl<T> Chunk<T> {
    /// What a pass looks at: the streams, without the float path's where it does not, and the features that it adds behind
    /// block `level`, if it does.
    fn tensors(&mut self, with_float: bool, level: Option<usize>) -> impl Iterator<Item = &mut T> {
        let rotary = [&mut self.layout.rotary.cos, &mut self.layout.rotary.sin];
        let levels = self.layout.deepstack.iter_mut().flat_map(|deepstack| &mut deepstack.levels).enumerate();
        let level = levels.filter(move |(i, _)| Some(*i) == level).map(|(_, features)| features);
        [&mut self.x_quantized]
            .into_iter()
            .chain(self.x_float.as_mut().filter(|_| with_float))
            .chain(rotary)
            .chain(level)
    }

    /// Moves the chunk out of device memory until a pass comes to it.
    pub fn park<D: Device<Tensor = T>>(&mut self, device: &D) -> Result<()> {
        let mut levels = self.layout.deepstack.iter_mut().flat_map(|deepstack| &mut deepstack.levels);
        levels.try_for_each(|features| device.park(features))?;
        self.tensors(true, None).try_for_each(|tensor| device.park(tensor))
    }
}

/// The chunks that go into statistics.
fn calibrated<T>(chunks: &mut [Chunk<T>]) -> &mut [Chunk<T>] {
    let count = chunks.iter().take_while(|chunk| !chunk.held_out).count();
    &mut chunks[..count]
}

/// One pass over chunks, in order. Streamed ones are parked before and after; the next is fetched while one is worked on.
struct Pass<'a, D> {
    device: &'a D,
    activations: Activations,
    stop: &'a Stop,
    /// Whether the pass looks at the float path.
    with_float: bool,
    /// The block that the pass leaves, if it does.
    leaves: Option<usize>,
}

impl<D: Device> Pass<'_, D> {
    fn run(
        &self,
        chunks: &mut [Chunk<D::Tensor>],
        mut visit: impl FnMut(usize, &mut Chunk<D::Tensor>) -> Result<()>,
    ) -> Result<()> {
        let fetch = |chunk: &mut Chunk<D::Tensor>| match self.activations {
            Activations::Streamed => {
                chunk.tensors(self.with_float, self.leaves).try_for_each(|tensor| self.device.fetch(tensor))
            }
            Activations::Resident => Ok(()),
        };
        chunks.first_mut().map(fetch).transpose()?;
        for i in 0..chunks.len() {
            self.stop.check()?;
            chunks.get_mut(i + 1).map(fetch).transpose()?;
            visit(i, &mut chunks[i])?;
            if self.activations == Activations::Streamed {
                chunks[i].park(self.device)?;
            }
        }
        heap::trim();
        Ok(())
    }
}

/// Whether any part of the method looks at the float path.
pub fn needs_float_path(settings: &SolverSettings, importance: Importance, refit: Refit) -> bool {
    settings.solver == Solver::Gptaq || importance == Importance::Vlmq || refit == Refit::Residual
}

/// A set of layers that read the same input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LayerSet {
    Attention,
    Output,
    Mlp,
    Down,
}

impl LayerSet {
    const ALL: [Self; 4] = [Self::Attention, Self::Output, Self::Mlp, Self::Down];

    fn projections(self) -> &'static [Projection] {
        match self {
            Self::Attention => &[Projection::Q, Projection::K, Projection::V],
            Self::Output => &[Projection::O],
            Self::Mlp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    /// The output projection that ends the attention module or the MLP with this set, if it does.
    fn residual(self) -> Option<Projection> {
        match self {
            Self::Output => Some(Projection::O),
            Self::Down => Some(Projection::Down),
            Self::Attention | Self::Mlp => None,
        }
    }

    /// The set's input, from the residual stream.
    fn input<D: ModelOps>(
        self,
        device: &D,
        config: &DecoderConfig,
        block: &Block<D::Tensor>,
        x: &D::Tensor,
        layout: &Layout<D::Tensor>,
    ) -> Result<D::Tensor> {
        match self {
            Self::Attention => block.attention_input(device, config, x),
            Self::Output => block.output_input(device, config, x, layout),
            Self::Mlp => block.mlp_input(device, config, x),
            Self::Down => block.down_input(device, config, x),
        }
    }
}

/// A layer that has its codes.
pub struct SolvedLayer {
    /// Which.
    pub projection: Projection,
    /// Codes, scales, zeros.
    pub linear: QuantizedLinear,
    /// How the solve went.
    pub report: SolveReport,
    /// Spread of the importance factors; `None` where all tokens counted alike.
    pub importance: Option<ImportanceSpread>,
}

/// What a block has to say beside its layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockOutcome {
    /// How far the quantized path's residual stream is from the float path's behind the block: the mean over calibration tokens of
    /// `Σ|x_quantized − x_float| / Σ|x_float|`, those without a float path left out. `None` where there is none, or where it
    /// overflows.
    pub path_error: Option<f64>,
    /// Normalised importance factors of all tokens, chunk by chunk; `None` where all counted alike.
    pub factors: Option<Vec<Factors>>,
}

/// Quantizes one block and advances both paths through it.
pub struct BlockQuantizer<'a, D: ModelOps + SolveOps> {
    /// Where everything is computed.
    pub device: &'a D,
    /// Shape of the decoder.
    pub config: &'a DecoderConfig,
    /// The solver's settings.
    pub settings: &'a SolverSettings,
    /// How tokens are weighted.
    pub importance: Importance,
    /// The power of their factors.
    pub importance_power: ImportancePower,
    /// Whether scales are refitted.
    pub refit: Refit,
    /// Where the chunks are between passes.
    pub activations: Activations,
    /// Ends the work between chunks and layers.
    pub stop: &'a Stop,
    /// Number of the block, from 0.
    pub index: usize,
    /// The block with its float weights.
    pub float: Block<D::Tensor>,
    /// The same block; its weights are replaced as layers are solved.
    pub quantized: Block<D::Tensor>,
}

impl<D: ModelOps + SolveOps> BlockQuantizer<'_, D> {
    /// Solves all seven layers, handing each to `finished` as soon as it has its codes, and leaves the outputs of the
    /// block in `chunks`. `progress` is told what is under way.
    pub fn run(
        &mut self,
        chunks: &mut [Chunk<D::Tensor>],
        progress: &mut dyn FnMut(&str),
        finished: &mut dyn FnMut(SolvedLayer) -> Result<()>,
    ) -> Result<BlockOutcome> {
        let (all_factors, powers, unusable) = self.factors(chunks, progress)?;
        let mut outcome = BlockOutcome::default();
        for set in LayerSet::ALL {
            // q, k and v weigh tokens differently: one pass and one pair of matrices each, one after the other.
            let factors = all_factors.as_deref().filter(|_| matches!(set, LayerSet::Attention | LayerSet::Output));
            let at_once = if factors.is_some() { 1 } else { set.projections().len() };
            for projections in set.projections().chunks(at_once) {
                progress(&format!("block {}: {}", self.index, projections[0].module()));
                let prepared = self.prepare(set, projections[0], chunks, factors)?;
                let importance = factors.map(|factors| spread(factors, projections[0], powers, chunks));
                let solved = self.solve_layers(projections, prepared, importance)?;
                for mut layer in solved {
                    if let Some((_, finding)) = unusable.iter().find(|(of, _)| *of == layer.projection) {
                        layer.report.findings.insert(0, finding.clone());
                        layer.importance = None;
                    }
                    let weight = self.device.dequantize(&layer.linear.weight())?;
                    self.quantized.set_weight(layer.projection, weight);
                    if self.refit == Refit::Residual && set.residual().is_some() {
                        self.refit_scales(set, &mut layer, chunks)?;
                    }
                    finished(layer)?;
                }
            }
            if let Some(residual) = set.residual() {
                outcome.path_error = self.advance(set, residual, chunks)?;
            }
        }
        outcome.factors = all_factors;
        Ok(outcome)
    }

    /// A pass over the chunks that ends with `residual` added, if with any.
    fn pass(&self, with_float: bool, residual: Option<Projection>) -> Pass<'_, D> {
        let leaves = residual.filter(|&residual| residual == Projection::Down).map(|_| self.index);
        Pass { device: self.device, activations: self.activations, stop: self.stop, with_float, leaves }
    }

    /// Normalised importance factors of all tokens, chunk by chunk, raised to the powers that come with them, and the
    /// projections that have no use for theirs. In block 0 the paths are equal, the loss vanishes and all tokens weigh alike.
    #[allow(clippy::type_complexity)]
    fn factors(
        &self,
        chunks: &mut [Chunk<D::Tensor>],
        progress: &mut dyn FnMut(&str),
    ) -> Result<(Option<Vec<Factors>>, [f64; 4], Vec<(Projection, Finding)>)> {
        if self.importance == Importance::None || self.index == 0 {
            return Ok((None, [1.0; 4], Vec::new()));
        }
        progress(&format!("block {}: importance", self.index));
        let mut factors = Vec::with_capacity(chunks.len());
        self.pass(true, None).run(calibrated(chunks), |_, chunk| {
            let Some(x_float) = &chunk.x_float else { bail!("importance needs the float path") };
            let (x_quantized, layout) = (&chunk.x_quantized, &chunk.layout);
            factors.push(attention_importance(self.device, self.config, &self.float, x_float, x_quantized, layout)?);
            Ok(())
        })?;
        let unusable = normalise(&mut factors);
        let weighed = [Projection::Q, Projection::K, Projection::V, Projection::O];
        let inputs = weighed.map(|projection| projection.shape(self.config).1);
        let powers = temper(&mut factors, self.importance_power, inputs);
        let weighted = weighed.into_iter().zip(unusable);
        let findings = weighted.filter_map(|(projection, why)| Some((projection, without_importance(why?, chunks))));
        let findings = findings.collect();
        Ok((Some(factors), powers, findings))
    }

    /// Accumulates and factors the statistics of layers that read the same input with the same weights. On the last set
    /// of the attention module or the MLP the float path, which waits for no solve, advances in the same pass.
    fn prepare(
        &self,
        set: LayerSet,
        projection: Projection,
        chunks: &mut [Chunk<D::Tensor>],
        factors: Option<&[Factors]>,
    ) -> Result<Shared<D::Tensor>> {
        let start = Instant::now();
        let with_cross = self.settings.solver == Solver::Gptaq;
        let (_, in_features) = projection.shape(self.config);
        let mut statistics = Statistics::new(self.device, in_features, with_cross)?;
        let with_float = with_cross || set.residual().is_some();
        let visited = if set.residual().is_some() { &mut *chunks } else { calibrated(chunks) };
        self.pass(with_float, set.residual()).run(visited, |i, chunk| {
            let f = match &chunk.x_float {
                Some(x) if with_float => Some(set.input(self.device, self.config, &self.float, x, &chunk.layout)?),
                _ => None,
            };
            if !chunk.held_out {
                let u = set.input(self.device, self.config, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
                let g = factors.and_then(|factors| factors[i].of(projection));
                statistics.accumulate(self.device, &u, f.as_ref().filter(|_| with_cross), g)?;
            }
            if let (Some(residual), Some(f), Some(x_float)) = (set.residual(), &f, &mut chunk.x_float) {
                self.float.add_output(self.device, x_float, residual, f)?;
                self.leave(&chunk.layout, x_float, residual)?;
                self.check_finite(x_float, &chunk.layout, &chunk.samples, residual, "float")?;
            }
            Ok(())
        })?;
        let prepared =
            solve::prepare(self.device, &statistics, self.settings).with_context(|| self.place(projection))?;
        if prepared.damp().is_none() {
            self.check_inputs(set, projection, chunks)?;
        }
        Ok(Shared { prepared, hessian: statistics.hessian, seconds: start.elapsed().as_secs_f64() })
    }

    /// Solves layers that share their statistics. The first one's seconds include the shared work.
    fn solve_layers(
        &self,
        projections: &[Projection],
        shared: Shared<D::Tensor>,
        importance: Option<ImportanceSpread>,
    ) -> Result<Vec<SolvedLayer>> {
        let mut shared_seconds = shared.seconds;
        projections
            .iter()
            .map(|&projection| {
                self.stop.check()?;
                let start = Instant::now();
                let weight = &self.float.linear(projection).weight;
                let (linear, mut report) =
                    solve::solve_layer(self.device, &shared.prepared, &shared.hessian, weight, self.settings)
                        .with_context(|| self.place(projection))?;
                report.seconds = start.elapsed().as_secs_f64() + std::mem::take(&mut shared_seconds);
                Ok(SolvedLayer { projection, linear, report, importance: importance.clone() })
            })
            .collect()
    }

    /// Adds the output of the attention module or the MLP to the quantized path's residual stream; behind the block, tells
    /// how far it is from the float path's, see [`BlockOutcome::path_error`].
    fn advance(&self, set: LayerSet, residual: Projection, chunks: &mut [Chunk<D::Tensor>]) -> Result<Option<f64>> {
        let ends = residual == Projection::Down;
        let mut distance = Distance::default();
        self.pass(ends, Some(residual)).run(chunks, |_, chunk| {
            let u = set.input(self.device, self.config, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
            self.quantized.add_output(self.device, &mut chunk.x_quantized, residual, &u)?;
            self.leave(&chunk.layout, &mut chunk.x_quantized, residual)?;
            self.check_finite(&chunk.x_quantized, &chunk.layout, &chunk.samples, residual, "quantized")?;
            if let Some(x_float) = chunk.x_float.as_ref().filter(|_| ends && !chunk.held_out) {
                distance.add(self.device, &chunk.x_quantized, x_float)?;
            }
            Ok(())
        })?;
        Ok(distance.mean())
    }

    /// What a path meets at the end of the block.
    fn leave(&self, layout: &Layout<D::Tensor>, x: &mut D::Tensor, residual: Projection) -> Result<()> {
        match residual {
            Projection::Down => layout.add_deepstack(self.device, x, self.index),
            _ => Ok(()),
        }
    }

    fn place(&self, projection: Projection) -> String {
        place(projection, self.index)
    }
}

/// Rounds all layers of a block to the nearest codes: no path runs, only the float weights are read.
pub fn round_to_nearest<D: ModelOps>(
    device: &D,
    settings: &SolverSettings,
    index: usize,
    float: &Block<D::Tensor>,
    finished: &mut dyn FnMut(SolvedLayer) -> Result<()>,
) -> Result<()> {
    for projection in Projection::ALL {
        let weight = device.download(&float.linear(projection).weight)?;
        let (linear, report) = solve::round_to_nearest(&weight, settings).with_context(|| place(projection, index))?;
        drop(weight);
        heap::trim();
        finished(SolvedLayer { projection, linear, report, importance: None })?;
    }
    Ok(())
}

/// A layer's name in errors.
fn place(projection: Projection, index: usize) -> String {
    format!("cannot quantize {} of block {index}", projection.module())
}

/// Factored statistics, for all layers that share them.
struct Shared<T> {
    prepared: solve::Prepared<T>,
    /// For the errors' reference, `‖W‖²_H`.
    hessian: T,
    seconds: f64,
}

fn spread<T>(factors: &[Factors], projection: Projection, powers: [f64; 4], chunks: &[Chunk<T>]) -> ImportanceSpread {
    let tokens = || {
        let weighted = factors.iter().zip(chunks);
        weighted.flat_map(|(factors, chunk)| factors.of(projection).into_iter().flatten().zip(&chunk.is_vision))
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
    ImportanceSpread { vision_mean: mean(true), text_mean: mean(false), largest, power }
}
