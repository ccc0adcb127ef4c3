//! Weighted second-order statistics of a layer's inputs (paper section 4, GPTAQ equation 7).

use crate::device::{Device, LayerInputs, SolveOps};
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
    /// How evenly they carry H.
    pub shares: Shares,
}

/// How evenly the calibration tokens carry H.
///
/// A token's share is `w = g² Σ_c u_c² / H_cc`: its part of each input's second moment, summed over the inputs. They sum up
/// to the number of live inputs, and `(Σw)² / Σw²` is how many tokens of equal share would leave as much noise in H: `Σw²` is
/// the squared Frobenius norm of what the tokens' terms add to H once each input has its own unit. `‖u‖²` would not do: behind
/// the MLP's nonlinearity the first token of each sample can be ten thousand times the others in a few inputs, and would
/// count as all there is although every other input rests on all tokens. The share is the diagonal's part of the statistical
/// leverage `g² uᵀH⁻¹u`; that itself would need a solve a token.
///
/// Tokens come in parts and each part is measured by the H that it completes; what was measured before shrinks as the mean
/// input's second moment has grown. With one part that is exact, with many it is within some hundredths where parts are
/// alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shares {
    sum: f64,
    squares: f64,
    /// H's diagonal behind the last part.
    diagonal: Vec<f32>,
}

impl Shares {
    /// How many tokens of equal share would carry H as well; `None` where nothing was added, or H is not finite.
    pub fn effective_tokens(&self) -> Option<f64> {
        Some(self.sum * self.sum / self.squares).filter(|tokens| tokens.is_finite() && *tokens > 0.0)
    }

    /// Adds a part: `u` `[tokens, in]` and its factors `g` `[tokens]`, which H, whose diagonal this is, has already.
    fn add<D: Device>(&mut self, device: &D, u: &D::Tensor, g: Option<&[f32]>, diagonal: Vec<f32>) -> Result<()> {
        let live = |h: f32| h > f32::MIN_POSITIVE;
        // Before squaring: squares of inputs may leave float32's range, their ratios do not.
        let scale = |h: f32| match h {
            h if !h.is_finite() => f32::NAN,
            h if live(h) => 1.0 / h.sqrt(),
            _ => 0.0,
        };
        let scales: Vec<f32> = diagonal.iter().map(|&h| scale(h)).collect();
        let grown = diagonal.iter().zip(&self.diagonal).filter(|(h, _)| live(**h));
        let (sum, count) = grown
            .fold((0.0, 0usize), |(sum, count), (&h, &before)| (sum + f64::from(before) / f64::from(h), count + 1));
        let left = if count > 0 { sum / count as f64 } else { 0.0 };
        self.sum *= left;
        self.squares *= left * left;
        for (token, share) in device.scaled_squares_rows(u, &scales)?.into_iter().enumerate() {
            let g = g.map_or(1.0, |g| f64::from(g[token]));
            // A token that does not count may hold anything.
            if g > 0.0 {
                let share = g * g * f64::from(share);
                self.sum += share;
                self.squares += share * share;
            }
        }
        self.diagonal = diagonal;
        Ok(())
    }
}

impl<T: Send + Sync> Statistics<T> {
    /// Empty statistics of a layer with `in_features` inputs; `with_cross` for GPTAQ.
    pub fn new<D: Device<Tensor = T>>(device: &D, in_features: usize, with_cross: bool) -> Result<Self> {
        let hessian = device.zero_triangle(in_features)?;
        let cross = with_cross.then(|| device.zeros(in_features, in_features)).transpose()?;
        Ok(Self { hessian, cross, tokens: 0, shares: Shares::default() })
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
        device.accumulate_statistics(&mut self.hessian, self.cross.as_mut(), &LayerInputs { u, f, g })?;
        self.tokens += live;
        let diagonal = device.diagonal(&self.hessian)?;
        self.shares.add(device, u, g, diagonal)
    }

    /// How many tokens of equal weight H rests on, by [`Shares`]; at most [`tokens`](Self::tokens). `None` where that cannot
    /// be said.
    pub fn effective_tokens(&self) -> Option<f64> {
        self.shares.effective_tokens().map(|effective| effective.min(self.tokens as f64))
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
