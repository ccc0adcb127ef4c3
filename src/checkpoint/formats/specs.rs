//! Layers that are quantized, and the tensors that are in a file.

use safetensors::Dtype;

/// A linear layer to be quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Name of the layer in the file, without `.weight`.
    pub module: String,
    /// Output features.
    pub out_features: usize,
    /// Input features.
    pub in_features: usize,
}

/// A tensor that will be in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name of the tensor in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub(super) fn new(module: &str, suffix: &str, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: format!("{module}.{suffix}"), dtype, shape: shape.into() }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Names the layers that `wrong` holds for, with their sizes; many are cut to the first few. Empty where there is none.
pub(super) fn misfits(linears: &[LinearSpec], wrong: impl Fn(&LinearSpec) -> bool) -> String {
    const SHOWN: usize = 8;
    let found: Vec<String> = linears
        .iter()
        .filter(|linear| wrong(linear))
        .map(|l| format!("{} ({} x {})", l.module, l.out_features, l.in_features))
        .collect();
    match found.len() {
        0..=SHOWN => found.join(", "),
        many => format!("{} and {} more", found[..SHOWN].join(", "), many - SHOWN),
    }
}
