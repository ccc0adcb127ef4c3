//! One of the decoder's blocks.

use super::input::Input;
use super::tail::{Job, Line};
use crate::device::{ModelOps, SolveOps};
use crate::model::decoder::Block;
use crate::progress::{Stage, Stop};
use crate::quantize::block::Activations;
use crate::quantize::block::{BlockOutcome, BlockQuantizer, Chunk, SolvedLayer, round_to_nearest};
use crate::quantize::settings::Solver;
use crate::report::spread::{BlockImportance, shown_blocks};
use crate::report::{BlockReport, RunObserver};
use anyhow::Result;
use std::cell::RefCell;
use std::time::Instant;

/// A block on its way.
pub(super) struct BlockRun<'a, D> {
    pub(super) device: &'a D,
    pub(super) input: &'a Input,
    pub(super) activations: Activations,
    pub(super) stop: &'a Stop,
    pub(super) index: usize,
}

impl<D: ModelOps + SolveOps> BlockRun<'_, D> {
    /// Quantizes the block, whose weights are `float`, gives its layers to `line`, and leaves its outputs in `chunks`.
    pub(super) fn quantize(
        &self,
        float: Block<D::Tensor>,
        chunks: &mut [Chunk<D::Tensor>],
        line: &mut Line<'_, '_>,
        observer: &mut dyn RunObserver,
    ) -> Result<()> {
        let Self { device, input, activations, stop, index } = *self;
        let start = Instant::now();
        let (config, solver, importance) = (&input.config.decoder, &input.solver, input.importance);
        let shared = RefCell::new(&mut *observer);
        let mut finished = |layer: SolvedLayer| {
            line.give(Job::Layer(index, Box::new(layer)))?;
            line.written().iter().for_each(|report| shared.borrow_mut().layer_finished(report));
            Ok(())
        };
        let outcome = match solver.solver {
            Solver::Rtn => {
                round_to_nearest(device, solver, index, &float, &mut finished)?;
                BlockOutcome::default()
            }
            Solver::Gptq | Solver::Gptaq => {
                let quantized = float.duplicate(device)?;
                BlockQuantizer {
                    device,
                    config,
                    settings: solver,
                    importance,
                    importance_power: input.importance_power,
                    refit: input.refit,
                    activations,
                    stop,
                    index,
                    float,
                    quantized,
                }
                .run(
                    chunks,
                    &mut |step| shared.borrow_mut().stage_advanced(Stage::Blocks, index as u64, step),
                    &mut finished,
                )?
            }
        };
        let importance = outcome.factors.map(|factors| {
            let shown = shown_blocks(config.layers).contains(&index).then_some(input.samples.as_slice());
            BlockImportance::of(&factors, chunks.iter().flat_map(|chunk| &chunk.is_vision), shown)
        });
        let seconds = start.elapsed().as_secs_f64();
        let report = BlockReport { block: index, seconds, path_error: outcome.path_error, importance };
        line.give(Job::Block(Box::new(report)))?;
        observer.stage_advanced(Stage::Blocks, index as u64 + 1, "");
        Ok(())
    }
}
