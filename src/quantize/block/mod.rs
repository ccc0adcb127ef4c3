//! One decoder block: importance, statistics and solves of its seven layers, then both paths advance through it.
//!
//! Sets are quantized in the order {q, k, v} → {o} → {gate, up} → {down}. A set's `U` is computed with every set before
//! it already quantized; `F` never meets a quantized weight. Inputs of a set are computed again for every pass and never
//! kept, so memory holds the two residual streams, the block and one layer's statistics; `plan` counts it.

mod checks;
mod chunk;
mod embed;
mod gathered;
pub mod labels;
mod quantizer;
mod refit;
mod set;

pub use checks::NotFinite;
pub use chunk::{Activations, Chunk, rows_of_paths};
pub use embed::embedded;
pub use quantizer::{BlockOutcome, BlockQuantizer, SolvedLayer};

use super::Finding;
use super::importance::{BlockInputs, Factors, ImportanceSpread, attention_importance, normalise, temper};
use super::settings::{Importance, Refit, Solver, SolverSettings};
use super::solve;
use super::statistics::Statistics;
use crate::device::{ModelOps, SolveOps};
use crate::heap;
use crate::model::decoder::{Block, Projection};
use anyhow::{Context, Result, bail};
use checks::{Behind, Distance, Path, without_importance};
use chunk::calibrated;
use gathered::{Gathered, Importances};
use quantizer::place_of;
use set::LayerSet;
use std::time::Instant;

/// Whether any part of the method looks at the float path.
pub fn needs_float_path(settings: &SolverSettings, importance: Importance, refit: Refit) -> bool {
    settings.solver == Solver::Gptaq || importance == Importance::Vlmq || refit == Refit::Residual
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
                let importance = factors.map(|factors| {
                    let is_vision = chunks.iter().map(|chunk| chunk.is_vision.as_slice());
                    ImportanceSpread::of(factors, projections[0], powers, is_vision)
                });
                let solved = self.solve_layers(projections, prepared, importance)?;
                for mut layer in solved {
                    if let Some((_, finding)) = unusable.iter().find(|(of, _)| *of == layer.projection) {
                        layer.report.findings.insert(0, finding.clone());
                        layer.importance = None;
                    }
                    self.replace_weight(&layer)?;
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
        let mut importances = Importances::default();
        self.pass(true, None).run(calibrated(chunks), |_, chunk| {
            let Some(x_float) = &chunk.x_float else { bail!("importance needs the float path") };
            let inputs = BlockInputs { x_float, x_quantized: &chunk.x_quantized, layout: &chunk.layout };
            importances.add(self.device, attention_importance(self.device, self.config, &self.float, &inputs)?)
        })?;
        let mut factors = importances.take(self.device)?;
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
        let label = self.device.label(labels::STATISTICS);
        let mut statistics = Statistics::new(self.device, in_features, with_cross)?;
        drop(label);
        let with_float = with_cross || set.residual().is_some();
        let visited = if set.residual().is_some() { &mut *chunks } else { calibrated(chunks) };
        let mut sizes = Gathered::default();
        self.pass(with_float, set.residual()).run(visited, |i, chunk| {
            let f = match &chunk.x_float {
                Some(x) if with_float => Some(self.input(set, &self.float, x, &chunk.layout)?),
                _ => None,
            };
            if !chunk.held_out {
                let u = self.input(set, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
                let g = factors.and_then(|factors| factors[i].of(projection));
                statistics.accumulate(self.device, &u, f.as_ref().filter(|_| with_cross), g)?;
            }
            if let (Some(residual), Some(f), Some(x_float)) = (set.residual(), &f, &mut chunk.x_float) {
                self.float.add_output(self.device, x_float, residual, f)?;
                self.leave(&chunk.layout, x_float, residual)?;
                sizes.add(self.device, self.device.mean_abs_rows(x_float)?)?;
            }
            Ok(())
        })?;
        if let Some(residual) = set.residual() {
            self.check_finite(chunks, sizes.take(self.device)?, Behind { residual, path: Path::Float })?;
        }
        // What the pass left free is not what a factorization takes.
        heap::trim();
        let label = self.device.label(labels::FACTORS);
        let prepared =
            solve::prepare(self.device, &statistics, self.settings).with_context(|| self.place(projection))?;
        drop(label);
        heap::trim();
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
        let _label = self.device.label(labels::SOLVER);
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

    /// Gives the quantized path a layer's weights as its codes have them.
    fn replace_weight(&mut self, layer: &SolvedLayer) -> Result<()> {
        let _label = self.device.label(labels::WEIGHTS);
        let weight = self.device.dequantize(&layer.linear.weight())?;
        self.quantized.set_weight(layer.projection, weight);
        Ok(())
    }

    /// Adds the output of the attention module or the MLP to the quantized path's residual stream; behind the block, tells
    /// how far it is from the float path's, see [`BlockOutcome::path_error`].
    fn advance(&self, set: LayerSet, residual: Projection, chunks: &mut [Chunk<D::Tensor>]) -> Result<Option<f64>> {
        let ends = residual == Projection::Down;
        let (mut sizes, mut distance) = (Gathered::default(), Distance::default());
        self.pass(ends, Some(residual)).run(chunks, |_, chunk| {
            let u = self.input(set, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
            self.quantized.add_output(self.device, &mut chunk.x_quantized, residual, &u)?;
            self.leave(&chunk.layout, &mut chunk.x_quantized, residual)?;
            sizes.add(self.device, self.device.mean_abs_rows(&chunk.x_quantized)?)?;
            if let Some(x_float) = chunk.x_float.as_ref().filter(|_| ends && !chunk.held_out) {
                distance.add(self.device, &chunk.x_quantized, x_float)?;
            }
            Ok(())
        })?;
        self.check_finite(chunks, sizes.take(self.device)?, Behind { residual, path: Path::Quantized })?;
        distance.mean(self.device)
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
        let (linear, report) =
            solve::round_to_nearest(&weight, settings).with_context(|| place_of(projection, index))?;
        drop(weight);
        heap::trim();
        finished(SolvedLayer { projection, linear, report, importance: None })?;
    }
    Ok(())
}

/// Factored statistics, for all layers that share them.
struct Shared<T> {
    prepared: solve::Prepared<T>,
    /// For the errors' reference, `‖W‖²_H`.
    hessian: T,
    seconds: f64,
}
