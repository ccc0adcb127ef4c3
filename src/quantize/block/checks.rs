//! What is looked at while a block is quantized: that numbers stay finite, and how far the paths are apart.

use super::chunk::{Chunk, calibrated};
use super::quantizer::BlockQuantizer;
use super::set::LayerSet;
use crate::device::{ModelOps, SolveOps};
use crate::model::decoder::{Layout, Projection};
use crate::quantize::importance::Unusable;
use crate::quantize::{Finding, FindingKind};
use anyhow::{Result, bail};
use std::fmt;

/// The error of a sample whose activations are not finite. It is of the input: the same comes of it again, and other data or other
/// weights make another run.
#[derive(Debug)]
pub struct NotFinite(String);

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotFinite {}

/// Where a residual stream is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behind {
    /// The projection that has just been added to it.
    pub(super) residual: Projection,
    /// The path's name.
    pub(super) path: &'static str,
}

impl<D: ModelOps + SolveOps> BlockQuantizer<'_, D> {
    /// Says which sample's inputs leave no statistics. What reaches a layer that is not finite reaches all layers behind it:
    /// no run can go on from there. Finite inputs whose squares overflow cost their own layer only.
    pub(super) fn check_inputs(
        &self,
        set: LayerSet,
        projection: Projection,
        chunks: &mut [Chunk<D::Tensor>],
    ) -> Result<()> {
        self.pass(false, None).run(calibrated(chunks), |_, chunk| {
            let u = self.input(set, &self.quantized, &chunk.x_quantized, &chunk.layout)?;
            let Some(row) = self.device.first_non_finite_row(&u)? else { return Ok(()) };
            bail!(NotFinite(format!(
                "{}: its inputs hold a NaN or an infinity on the quantized path (sample {}); check the checkpoint's \
                 weights and that sample's image, or leave the sample out",
                self.place(projection),
                sample_of(&chunk.layout, &chunk.samples, row)
            )))
        })
    }

    /// Errors where a path's residual stream `x` is not finite, naming the sample.
    pub(super) fn check_finite(
        &self,
        x: &D::Tensor,
        layout: &Layout<D::Tensor>,
        samples: &[String],
        behind: Behind,
    ) -> Result<()> {
        let Behind { residual, path } = behind;
        let Some(row) = self.device.first_non_finite_row(x)? else { return Ok(()) };
        bail!(NotFinite(format!(
            "activations behind {} of block {} hold a NaN or an infinity on the {path} path (sample {}); check the \
             checkpoint's weights and that sample's image",
            residual.module(),
            self.index,
            sample_of(layout, samples, row)
        )))
    }
}

/// Distance of the paths' residual streams, token by token: tokens of massive activations would drown the others in a sum
/// over all.
#[derive(Default)]
pub(super) struct Distance {
    sum: f64,
    tokens: usize,
}

impl Distance {
    /// Adds the tokens of a chunk.
    pub(super) fn add<D: ModelOps>(&mut self, device: &D, x_quantized: &D::Tensor, x_float: &D::Tensor) -> Result<()> {
        let differences = device.mean_abs_rows(&device.scaled_difference(x_quantized, x_float, 1.0)?)?;
        let sizes = device.mean_abs_rows(x_float)?;
        // A token that is nothing has no relative distance.
        for (&difference, &size) in differences.iter().zip(&sizes).filter(|(_, size)| **size > 0.0) {
            self.sum += f64::from(difference) / f64::from(size);
            self.tokens += 1;
        }
        Ok(())
    }

    /// Mean of the distances, see [`BlockOutcome::path_error`](super::quantizer::BlockOutcome::path_error).
    pub(super) fn mean(&self) -> Option<f64> {
        // A difference may overflow in float16 where its terms do not.
        (self.tokens > 0).then(|| self.sum / self.tokens as f64).filter(|mean| mean.is_finite())
    }
}

/// Id of the sample that a chunk's token belongs to.
fn sample_of<'a, T>(layout: &Layout<T>, samples: &'a [String], token: usize) -> &'a str {
    let sample = layout.spans.iter().position(|span| span.q.contains(&token));
    sample.map_or("?", |i| &samples[i])
}

/// What is said of a projection whose importance factors are of no use.
pub(super) fn without_importance<T>(why: Unusable, chunks: &[Chunk<T>]) -> Finding {
    let found = match why {
        Unusable::Zero => "the importance of all tokens is 0".to_owned(),
        Unusable::NotFinite { count, chunk, token } => {
            let Chunk { layout, samples, .. } = &chunks[chunk];
            let sample = sample_of(layout, samples, token);
            format!("the importance of {count} tokens is not finite (first in sample {sample})")
        }
    };
    Finding::new(FindingKind::ImportanceUnusable, found, "all tokens weighed alike")
}
