//! Weighted second-order statistics of a layer's inputs (paper section 4, GPTAQ equation 7).

use crate::device::{Device, SolveOps};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};

/// `H = Σ g² u uᵀ` and, for GPTAQ, `C = Σ g² (f − u) uᵀ` over the calibration tokens.
#[derive(Clone, Debug)]
pub struct Statistics<T> {
    /// `[in, in]`, upper triangle; what lies below the diagonal means nothing, see [`full_hessian`](Self::full_hessian).
    pub hessian: T,
    /// `[in, in]`, row index from `f − u`, column index from `u`; only for GPTAQ.
    pub cross: Option<T>,
    /// Tokens added so far, those of importance 0 left out.
    pub tokens: usize,
}

impl<T: Send + Sync> Statistics<T> {
    /// Empty statistics of a layer with `in_features` inputs; `with_cross` for GPTAQ.
    pub fn new<D: Device<Tensor = T>>(device: &D, in_features: usize, with_cross: bool) -> Result<Self> {
        let zeros = || device.zeros(in_features, in_features);
        Ok(Self { hessian: zeros()?, cross: with_cross.then(zeros).transpose()?, tokens: 0 })
    }

    /// Adds tokens: inputs on the quantized path `u` and, where there is a cross term, on the float path `f`, both
    /// `[tokens, in]`; importance factors `g` `[tokens]`, all 1 when absent. A token with g = 0 counts for nothing.
    ///
    /// Errors when shapes disagree, `f` is missing or not wanted, or an importance factor is negative or not finite.
    pub fn accumulate<D: SolveOps<Tensor = T>>(
        &mut self,
        device: &D,
        u: &T,
        f: Option<&T>,
        g: Option<&[f32]>,
    ) -> Result<()> {
        let (tokens, features) = device.shape(u);
        let expected = device.shape(&self.hessian).0;
        ensure!(features == expected, "inputs have {features} features, the statistics {expected}");
        match (f.map(|f| device.shape(f)), &self.cross) {
            (Some(shape), Some(_)) => ensure!(
                shape == (tokens, features),
                "float-path inputs are {}x{}, quantized-path inputs {tokens}x{features}",
                shape.0,
                shape.1
            ),
            (None, None) => {}
            (None, Some(_)) => anyhow::bail!("GPTAQ statistics need the inputs on the float path too"),
            (Some(_), None) => anyhow::bail!("these statistics have no cross term for float-path inputs"),
        }
        let mut live = tokens;
        if let Some(g) = g {
            ensure!(g.len() == tokens, "{} importance factors for {tokens} tokens", g.len());
            if let Some(bad) = g.iter().position(|g| !g.is_finite() || *g < 0.0) {
                anyhow::bail!("importance factor {} of token {bad} is negative or not finite", g[bad]);
            }
            live = g.iter().filter(|&&g| g != 0.0).count();
        }
        device.accumulate_statistics(&mut self.hessian, self.cross.as_mut(), u, f, g)?;
        self.tokens += live;
        Ok(())
    }

    /// H with both triangles, on the host.
    pub fn full_hessian<D: Device<Tensor = T>>(&self, device: &D) -> Result<Matrix> {
        let mut full = device.download(&self.hessian)?;
        let n = full.cols();
        for i in 1..n {
            for j in 0..i {
                full.data_mut()[i * n + j] = full.data()[j * n + i];
            }
        }
        Ok(full)
    }
}
