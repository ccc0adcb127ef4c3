//! The decoder's blocks, one after the other.

use super::findings;
use super::input::Input;
use crate::checkpoint::weight_error;
use crate::checkpoint::write::Writer;
use crate::codes::QuantizedLinear;
use crate::device::{ModelOps, SolveOps};
use crate::heap;
use crate::model::decoder::{Block, module_name};
use crate::model::source::Weights;
use crate::progress::{Stage, Stop};
use crate::quantize::block::Activations;
use crate::quantize::block::{BlockOutcome, BlockQuantizer, Chunk, SolvedLayer, round_to_nearest};
use crate::quantize::settings::Solver;
use crate::report::spread::{BlockImportance, shown_blocks};
use crate::report::{BlockReport, LayerReport, RunObserver};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::time::Instant;

/// What is done of the decoder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Blocks {
    pub(super) layers: Vec<LayerReport>,
    pub(super) blocks: Vec<BlockReport>,
}

/// The decoder on its way.
pub(super) struct BlockRun<'a, D> {
    pub(super) device: &'a D,
    pub(super) input: &'a Input,
    pub(super) activations: Activations,
    pub(super) stop: &'a Stop,
    pub(super) done: &'a mut Blocks,
    pub(super) writer: &'a mut Writer,
}

impl<D: ModelOps + SolveOps> BlockRun<'_, D> {
    /// Quantizes block `index`, writes its layers, and leaves its outputs in `chunks`.
    pub(super) fn quantize(
        &mut self,
        index: usize,
        chunks: &mut [Chunk<D::Tensor>],
        observer: &mut dyn RunObserver,
    ) -> Result<()> {
        let Self { device, input, activations, stop, ref mut done, ref mut writer } = *self;
        let Blocks { layers, blocks } = &mut **done;
        stop.check()?;
        let start = Instant::now();
        let (config, solver, importance) = (&input.config.decoder, &input.solver, input.importance);
        let float = Block::load(&Weights::new(device, &input.checkpoint), config, &input.config.names, index)?;
        heap::trim();
        let shared = RefCell::new(&mut *observer);
        let mut finished = |layer: SolvedLayer| {
            let name = module_name(&input.config.names, index, layer.projection);
            let weight = format!("{name}.weight");
            let weight_error = weight_error::of_layer(input.format, input.checkpoint.tensor(&weight)?, &layer.linear)?;
            input.checkpoint.release(&weight);
            let (linear, report) = layer_report(name, index, weight_error, layer);
            findings::tell(&report, layers, input.strict)?;
            writer.write(&report.name, &linear).with_context(|| format!("cannot write {}", report.name))?;
            shared.borrow_mut().layer_finished(&report);
            layers.push(report);
            heap::trim();
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
        blocks.push(BlockReport {
            block: index,
            seconds: start.elapsed().as_secs_f64(),
            path_error: outcome.path_error,
            importance,
        });
        observer.stage_advanced(Stage::Blocks, index as u64 + 1, "");
        Ok(())
    }
}

fn layer_report(name: String, block: usize, weight_error: f64, layer: SolvedLayer) -> (QuantizedLinear, LayerReport) {
    let linear = layer.linear;
    let report = LayerReport {
        name,
        block,
        rows: linear.out_features,
        cols: linear.in_features,
        bits: linear.bits,
        group_columns: linear.group_columns,
        weight_error,
        solve: layer.report,
        importance: layer.importance,
    };
    (linear, report)
}
