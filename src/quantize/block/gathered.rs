//! Numbers of tokens that stay on the device until a pass over all chunks is done, so that no chunk waits for the host.

use crate::device::ModelOps;
use crate::quantize::importance::{Factors, Magnitudes};
use anyhow::Result;

/// One number a token, of one chunk behind the other.
pub(super) struct Gathered<T>(Option<T>);

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Gathered<T> {
    /// Adds the numbers of a chunk, `[tokens, 1]`.
    pub(super) fn add<D: ModelOps<Tensor = T>>(&mut self, device: &D, numbers: T) -> Result<()> {
        match &mut self.0 {
            Some(all) => device.append_rows(all, &numbers),
            None => {
                self.0 = Some(numbers);
                Ok(())
            }
        }
    }

    /// Waits for all of them.
    pub(super) fn take<D: ModelOps<Tensor = T>>(self, device: &D) -> Result<Vec<f32>> {
        self.0.map_or(Ok(Vec::new()), |all| Ok(device.download(&all)?.into_data()))
    }
}

/// Importance of the tokens of one chunk behind the other.
pub(super) struct Importances<T> {
    projections: [Gathered<T>; 4],
    /// Tokens of each chunk, and what its gradient was multiplied by.
    chunks: Vec<(usize, f32)>,
}

impl<T> Default for Importances<T> {
    fn default() -> Self {
        Self { projections: Default::default(), chunks: Vec::new() }
    }
}

impl<T> Importances<T> {
    /// Adds a chunk.
    pub(super) fn add<D: ModelOps<Tensor = T>>(&mut self, device: &D, chunk: Magnitudes<T>) -> Result<()> {
        let Magnitudes { projections, scale } = chunk;
        self.chunks.push((device.shape(&projections[0]).0, scale));
        self.projections.iter_mut().zip(projections).try_for_each(|(all, some)| all.add(device, some))
    }

    /// Waits for all of them. Factors of each chunk, not yet normalised.
    pub(super) fn take<D: ModelOps<Tensor = T>>(self, device: &D) -> Result<Vec<Factors>> {
        let mut factors = vec![Factors::default(); self.chunks.len()];
        for (projection, gathered) in self.projections.into_iter().enumerate() {
            let all = gathered.take(device)?;
            let mut rest = all.as_slice();
            for (&(tokens, scale), factors) in self.chunks.iter().zip(&mut factors) {
                let (own, behind) = rest.split_at(tokens);
                factors.projections[projection] = own.iter().map(|g| g / scale).collect();
                rest = behind;
            }
        }
        Ok(factors)
    }
}
