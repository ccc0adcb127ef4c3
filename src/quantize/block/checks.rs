//! What is looked at while a block is quantized: that numbers stay finite, and how far the paths are apart.

use super::chunk::{Activations, Chunk, calibrated};
use super::gathered::Gathered;
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
    /// The path that it is of.
    pub(super) path: Path,
}

/// The two ways through a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// With the model's own weights.
    Float,
    /// With those of the codes.
    Quantized,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float => "float",
            Self::Quantized => "quantized",
        })
    }
}

impl Path {
    /// The path's residual stream in a chunk, where it has one.
    fn of<T>(self, chunk: &mut Chunk<T>) -> Option<&mut T> {
        match self {
            Self::Float => chunk.x_float.as_mut(),
            Self::Quantized => Some(&mut chunk.x_quantized),
        }
    }
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

    /// Errors where a path's residual stream is not finite, naming the sample. `sizes` are the mean absolute values of its tokens, chunk by
    /// chunk.
    pub(super) fn check_finite(&self, chunks: &mut [Chunk<D::Tensor>], sizes: Vec<f32>, behind: Behind) -> Result<()> {
        let Behind { residual, path } = behind;
        let mut rest = sizes.as_slice();
        for chunk in chunks {
            let Some(x) = path.of(chunk) else { continue };
            let (own, others) = rest.split_at(self.device.shape(x).0);
            rest = others;
            if own.iter().all(|size| size.is_finite()) {
                continue;
            }
            // The sum of finite values may be none.
            self.device.fetch(x)?;
            let found = self.device.first_non_finite_row(x)?;
            if self.activations == Activations::Streamed {
                self.device.park(x)?;
            }
            if let Some(row) = found {
                bail!(NotFinite(format!(
                    "activations behind {} of block {} hold a NaN or an infinity on the {path} path (sample {}); check \
                     the checkpoint's weights and that sample's image",
                    residual.module(),
                    self.index,
                    sample_of(&chunk.layout, &chunk.samples, row)
                )))
            }
        }
        Ok(())
    }
}

/// Distance of the paths' residual streams, token by token: tokens of massive activations would drown the others in a sum
/// over all.
pub(super) struct Distance<T> {
    differences: Gathered<T>,
    sizes: Gathered<T>,
}

impl<T> Default for Distance<T> {
    fn default() -> Self {
        Self { differences: Gathered::default(), sizes: Gathered::default() }
    }
}

impl<T> Distance<T> {
    /// Adds the tokens of a chunk.
    pub(super) fn add<D: ModelOps<Tensor = T>>(&mut self, device: &D, x_quantized: &T, x_float: &T) -> Result<()> {
        let differences = device.scaled_difference(x_quantized, x_float, 1.0)?;
        self.differences.add(device, device.mean_abs_rows(&differences)?)?;
        self.sizes.add(device, device.mean_abs_rows(x_float)?)
    }

    /// Mean of the distances, see [`BlockOutcome::path_error`](super::quantizer::BlockOutcome::path_error). Waits.
    pub(super) fn mean<D: ModelOps<Tensor = T>>(self, device: &D) -> Result<Option<f64>> {
        let (differences, sizes) = (self.differences.take(device)?, self.sizes.take(device)?);
        let (mut sum, mut tokens) = (0.0, 0usize);
        // A token that is nothing has no relative distance.
        for (&difference, &size) in differences.iter().zip(&sizes).filter(|(_, size)| **size > 0.0) {
            sum += f64::from(difference) / f64::from(size);
            tokens += 1;
        }
        // A difference may overflow in float16 where its terms do not.
        Ok((tokens > 0).then(|| sum / tokens as f64).filter(|mean| mean.is_finite()))
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
