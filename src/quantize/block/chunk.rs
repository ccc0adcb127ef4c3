//! Samples on their way through a block, and the passes over them.

use super::labels::PASS;
use crate::device::{Device, ModelOps};
use crate::heap;
use crate::model::decoder::Layout;
use crate::progress::Stop;
use anyhow::{Context, Result};
use serde::Serialize;

/// Where the residual streams and rotary tables are between passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Activations in device memory.
    #[default]
    Resident,
    /// Activations in page-locked host memory; a chunk is fetched while the one before it is worked on, and parked behind it.
    Streamed,
}

/// Some calibration samples, packed, on their way through the decoder.
pub struct Chunk<T> {
    /// Rotary tables and sequence bounds.
    pub layout: Layout<T>,
    /// Residual stream of the quantized path, `[tokens, hidden]`.
    pub x_quantized: T,
    /// Residual stream of the float path; `None` where nothing needs it.
    pub x_float: Option<T>,
    /// Whether its tokens go into no statistics; such chunks stand behind all others.
    pub held_out: bool,
    /// Whether a token stands for image patches, token by token.
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
pub(super) fn calibrated<T>(chunks: &mut [Chunk<T>]) -> &mut [Chunk<T>] {
    let count = chunks.iter().take_while(|chunk| !chunk.held_out).count();
    &mut chunks[..count]
}

/// Rows of both paths' residual streams, `[float, quantized]`, of the chunks and rows that `places` names in turn, in that order;
/// `None` where it names none. Errors where one of these chunks has no float path.
pub fn rows_of_paths<'a, D: ModelOps>(
    device: &D,
    chunks: &mut [Chunk<D::Tensor>],
    places: impl Iterator<Item = (usize, &'a [u32])>,
    activations: Activations,
    stop: &Stop,
) -> Result<Option<[D::Tensor; 2]>> {
    let mut paths: [Option<D::Tensor>; 2] = [None, None];
    for (chunk, rows) in places {
        stop.check()?;
        let Chunk { x_float, x_quantized, .. } = &mut chunks[chunk];
        let x_float = x_float.as_mut().context("a chunk that is looked at has a float path")?;
        for (path, x) in paths.iter_mut().zip([x_float, x_quantized]) {
            device.fetch(x)?;
            let some = device.gather_rows(x, rows)?;
            if activations == Activations::Streamed {
                device.park(x)?;
            }
            match path {
                Some(path) => device.append_rows(path, &some)?,
                None => *path = Some(some),
            }
        }
    }
    let [Some(float), Some(quantized)] = paths else { return Ok(None) };
    Ok(Some([float, quantized]))
}

/// One pass over chunks, in order. Streamed ones are parked before and after; the next is fetched while one is worked on.
pub(super) struct Pass<'a, D> {
    pub(super) device: &'a D,
    pub(super) activations: Activations,
    pub(super) stop: &'a Stop,
    /// Whether the pass looks at the float path.
    pub(super) with_float: bool,
    /// The block that the pass leaves, if it does.
    pub(super) leaves: Option<usize>,
}

impl<D: Device> Pass<'_, D> {
    pub(super) fn run(
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
            let label = self.device.label(PASS);
            visit(i, &mut chunks[i])?;
            drop(label);
            if self.activations == Activations::Streamed {
                chunks[i].park(self.device)?;
            }
        }
        heap::trim();
        Ok(())
    }
}
