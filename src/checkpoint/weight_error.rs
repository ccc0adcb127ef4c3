//! How far stored weights are from the float ones: `‖Ŵ − W‖ / ‖W‖` in the Frobenius norm.
//!
//! Ŵ is what the file holds, scale · (code − zero) in float32 or, as plain weights, that rounded to their dtype. A run
//! records it and `verify` computes it again from the files, so that the sums have one order whatever the number of threads:
//! float64 along a row, then over the rows.

use super::convert::float_type;
use super::formats::Format;
use super::read::StoredTensor;
use crate::codes::QuantizedLinear;
use crate::parallel::try_map;
use crate::tensor::Matrix;
use anyhow::{Result, ensure};
use std::ops::Range;

/// Elements worked on at a time by a thread: 1 MiB of float32 of each of both matrices.
const SLAB: usize = 1 << 18;

/// Error of a layer about to be stored in `format`, against the float `weight` `[out, in]`; 0 where both are all zeros.
///
/// Errors where the shapes differ or `weight` is not of floats.
pub fn of_layer(format: Format, weight: StoredTensor<'_>, layer: &QuantizedLinear) -> Result<f64> {
    let float = float_type(weight.dtype).filter(|_| format.codes().is_none());
    of_rows(weight, layer.out_features, layer.in_features, |rows| {
        let mut matrix = layer.dequantize_rows(rows)?;
        if let Some(float) = float {
            matrix.data_mut().iter_mut().for_each(|value| *value = float.round(*value));
        }
        Ok(matrix)
    })
}

/// Relative error of plain weights `stored`. Errors as [`of_layer`] does.
pub fn of_tensor(weight: StoredTensor<'_>, stored: StoredTensor<'_>) -> Result<f64> {
    let &[rows, cols] = stored.shape else { anyhow::bail!("a weight of shape {:?} is no matrix", stored.shape) };
    of_rows(weight, rows, cols, |rows| floats(stored, rows, cols))
}

fn of_rows(
    weight: StoredTensor<'_>,
    rows: usize,
    cols: usize,
    stored: impl Fn(Range<usize>) -> Result<Matrix> + Sync,
) -> Result<f64> {
    ensure!(weight.shape == [rows, cols], "the float weight is of shape {:?}, not [{rows}, {cols}]", weight.shape);
    let step = (SLAB / cols.max(1)).max(1);
    let slabs: Vec<Range<usize>> = (0..rows).step_by(step).map(|first| first..rows.min(first + step)).collect();
    let sums: Vec<Vec<(f64, f64)>> = try_map(slabs.len(), |i| {
        let (ours, theirs) = (stored(slabs[i].clone())?, floats(weight, slabs[i].clone(), cols)?);
        Ok((0..ours.rows()).map(|row| sums(ours.row(row), theirs.row(row))).collect())
    })?;
    let (error, norm) = sums.into_iter().flatten().fold((0.0, 0.0), |(error, norm), (e, n)| (error + e, norm + n));
    Ok(if error == 0.0 { 0.0 } else { (error / norm).sqrt() })
}

/// Squared distance and squared norm of a row.
fn sums(stored: &[f32], weight: &[f32]) -> (f64, f64) {
    stored.iter().zip(weight).fold((0.0, 0.0), |(error, norm), (&stored, &weight)| {
        let (difference, weight) = (f64::from(stored) - f64::from(weight), f64::from(weight));
        (error + difference * difference, norm + weight * weight)
    })
}

fn floats(tensor: StoredTensor<'_>, rows: Range<usize>, cols: usize) -> Result<Matrix> {
    let Some(float) = float_type(tensor.dtype) else { anyhow::bail!("{:?} is no float", tensor.dtype) };
    let row = cols * tensor.dtype.bitsize() / 8;
    Matrix::new(rows.len(), cols, float.widen(&tensor.bytes[rows.start * row..rows.end * row]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;

    fn layer() -> QuantizedLinear {
        QuantizedLinear {
            out_features: 2,
            in_features: 4,
            bits: 2,
            group_columns: 2,
            symmetric: false,
            codes: vec![0, 1, 2, 3, 3, 2, 1, 0],
            scales: vec![0.5, 2.0, 1.0, 0.3],
            zeros: vec![1, 2, 0, 3],
            group_index: None,
        }
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
    }

    #[test]
    fn errors_by_hand() {
        // Ŵ = [-0.5, 0, 0, 2; 3, 2, -0.6, -0.9] against ones: 2.25 + 1 + 1 + 1 + 4 + 1 + 2.56 + 3.61, over 8.
        let ones = bytes(&[1.0; 8]);
        let weight = StoredTensor { dtype: Dtype::BF16, shape: &[2, 4], bytes: &ones };
        let error = of_layer(Format::COMPRESSED_TENSORS, weight, &layer()).unwrap();
        assert!((error - (16.42f64 / 8.0).sqrt()).abs() < 1e-7, "{error}");
        // -0.6 and -0.9 are others in bfloat16; as plain weights these are what the file holds.
        let plain = bytes(&[-0.5, 0.0, 0.0, 2.0, 3.0, 2.0, -0.6, -0.9]);
        let stored = StoredTensor { bytes: &plain, ..weight };
        let rounded = of_layer(Format::DEQUANTIZED, weight, &layer()).unwrap();
        assert_eq!(rounded, of_tensor(weight, stored).unwrap());
        assert!(rounded != error);
        assert_eq!(of_tensor(weight, weight).unwrap(), 0.0);
        let zeros = bytes(&[0.0; 8]);
        let zeros = StoredTensor { bytes: &zeros, ..weight };
        assert_eq!(of_tensor(zeros, zeros).unwrap(), 0.0);
    }

    #[test]
    fn shapes_must_agree() {
        let ones = bytes(&[1.0; 8]);
        let weight = StoredTensor { dtype: Dtype::BF16, shape: &[4, 2], bytes: &ones };
        assert!(of_layer(Format::GPTQ_V1, weight, &layer()).unwrap_err().to_string().contains("[2, 4]"));
        let weight = StoredTensor { dtype: Dtype::I16, shape: &[2, 4], bytes: &ones };
        assert!(of_layer(Format::GPTQ_V1, weight, &layer()).unwrap_err().to_string().contains("no float"));
    }
}
