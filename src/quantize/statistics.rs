//! Weighted second-order statistics of a layer's inputs (paper section 4, GPTAQ equation 7).

/// `H = Σ g² u uᵀ` and, for GPTAQ, `C = Σ g² (f − u) uᵀ` over the calibration tokens.
#[derive(Clone, Debug)]
pub struct Statistics<T> {
    /// `[in, in]`.
    pub hessian: T,
    /// `[in, in]`, row index from `f − u`, column index from `u`; only for GPTAQ.
    pub cross: Option<T>,
    /// Tokens added so far.
    pub tokens: usize,
}
