//! Golden tensors, as the scripts in tests/golden wrote them.

use safetensors::{Dtype, SafeTensors};
#[cfg(feature = "run")]
use vlmq::device::{Span, cpu::Cpu};
#[cfg(feature = "run")]
use vlmq::model::config::DecoderConfig;
#[cfg(feature = "run")]
use vlmq::model::decoder::Layout;
#[cfg(feature = "run")]
use vlmq::model::rope;
use vlmq::tensor::Matrix;

/// Checkpoints with random weights in tests/golden/model, of every family (tests/golden/families).
pub const RANDOM: &[&str] = &[
    "flat-tied-bf16",
    "nested-f16-sharded",
    "rope-parameters-f32",
    "qwen2_5_vl-flat-bf16",
    "qwen2_5_vl-nested-f16",
    "llava-hub-tied-f16",
    "llava-resaved-f16-sharded",
    "llava-v5-f32",
    "qwen3_vl-tied-bf16",
    "qwen3_vl-f16-sharded",
    "qwen3_vl-f32",
];

/// A file of golden tensors.
pub struct Golden {
    name: String,
    bytes: Vec<u8>,
}

impl Golden {
    /// Reads tests/golden/`path`.
    pub fn read(path: &str) -> Self {
        let bytes = std::fs::read(super::golden(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        Self { name: path.into(), bytes }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, tensor: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(tensor).is_ok()
    }

    /// Shape and values of a tensor; integers and floats alike become f64, which holds them exactly.
    pub fn get(&self, tensor: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(tensor).unwrap_or_else(|e| panic!("{}: {tensor}: {e}", self.name));
        fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.chunks_exact(N).map(|chunk| convert(chunk.try_into().unwrap())).collect()
        }
        let values = match view.dtype() {
            Dtype::F32 => each(view.data(), |b| f64::from(f32::from_le_bytes(b))),
            Dtype::F64 => each(view.data(), f64::from_le_bytes),
            Dtype::I32 => each(view.data(), |b| f64::from(i32::from_le_bytes(b))),
            Dtype::I64 => each(view.data(), |b| i64::from_le_bytes(b) as f64),
            Dtype::U8 => each(view.data(), |b: [u8; 1]| f64::from(b[0])),
            other => panic!("{}: {tensor} is {other:?}", self.name),
        };
        (view.shape().to_vec(), values)
    }

    /// Where a block's inputs stand, `position_ids` and `lengths` of an importance file: samples one after another.
    #[cfg(feature = "run")]
    pub fn layout(&self, decoder: &DecoderConfig) -> Layout<Matrix> {
        let positions = self.values("position_ids");
        let tokens = positions.len() / 3;
        let positions: Vec<[u32; 3]> =
            (0..tokens).map(|token| std::array::from_fn(|axis| positions[axis * tokens + token] as u32)).collect();
        let frequencies = rope::inverse_frequencies(decoder.rope_theta, decoder.attention.head_dim);
        let rotary = rope::multimodal(&Cpu, &positions, &frequencies, decoder.rope_axes).unwrap();
        let mut start = 0;
        let spans = self.values("lengths").into_iter().map(|length| {
            start += length as usize;
            Span::own(start - length as usize..start)
        });
        Layout { spans: spans.collect(), rotary, deepstack: None }
    }

    /// Values of a tensor.
    pub fn values(&self, tensor: &str) -> Vec<f64> {
        self.get(tensor).1
    }

    /// A two-dimensional tensor as a matrix.
    pub fn matrix(&self, tensor: &str) -> Matrix {
        let (shape, values) = self.get(tensor);
        assert_eq!(shape.len(), 2, "{}: {tensor}", self.name);
        Matrix::new(shape[0], shape[1], values.iter().map(|&v| v as f32).collect()).unwrap()
    }
}

/// Float32 values as float64 holds them.
pub fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// ‖got − expected‖ / ‖expected‖.
pub fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got.iter().zip(expected).map(|(&g, e)| (f64::from(g) - e).powi(2)).sum();
    (difference / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

/// Largest |got − expected| over the largest |expected|.
pub fn largest_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference = got.iter().zip(expected).map(|(&g, e)| (f64::from(g) - e).abs()).fold(0.0, f64::max);
    assert!(got.iter().all(|g| g.is_finite()));
    difference / expected.iter().map(|e| e.abs()).fold(0.0, f64::max)
}
