//! How far stored weights are from the float ones: `‖Ŵ − W‖ / ‖W‖` in the Frobenius norm.
//!
//! Ŵ is what the file holds, scale · (code − zero) in float32 or, as plain weights, that rounded to their dtype. A run
//! records it and `verify` computes it again from the files, so that the sums have one order whatever the number of threads:
//! float64 along a row in 16 partial sums, then over the rows.

use super::convert::float_type;
use super::formats::Format;
use super::read::StoredTensor;
use crate::codes::QuantizedLinear;
use crate::parallel::map;
use anyhow::{Result, bail, ensure};
use pulp::{Arch, NullaryFnOnce};

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// Partial sums of a row, of the columns whose numbers have this remainder: as many are added up side by side.
const LANES: usize = 16;

/// Error of a layer about to be stored in `format`, against the float `weight` `[out, in]`; 0 where both are all zeros.
///
/// Errors where the shapes differ or `weight` is not of floats.
pub fn of_layer(format: Format, weight: StoredTensor<'_>, layer: &QuantizedLinear) -> Result<f64> {
    let float = float_type(weight.dtype).filter(|_| format.codes().is_none());
    let ours = layer.weight();
    ours.groups()?;
    of_rows(weight, layer.out_features, layer.in_features, |row, values| {
        ours.row(row, values);
        if let Some(float) = float {
            values.iter_mut().for_each(|value| *value = float.round(*value));
        }
    })
}

/// Relative error of plain weights `stored`. Errors as [`of_layer`] does.
pub fn of_tensor(weight: StoredTensor<'_>, stored: StoredTensor<'_>) -> Result<f64> {
    let &[rows, cols] = stored.shape else { bail!("a weight of shape {:?} is no matrix", stored.shape) };
    let read = rows_of(stored, cols)?;
    of_rows(weight, rows, cols, read)
}

fn of_rows(
    weight: StoredTensor<'_>,
    rows: usize,
    cols: usize,
    stored: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<f64> {
    ensure!(weight.shape == [rows, cols], "the float weight is of shape {:?}, not [{rows}, {cols}]", weight.shape);
    let read = rows_of(weight, cols)?;
    let sums = map(rows.div_ceil(ROWS), |i| {
        let (mut ours, mut theirs) = (vec![0.0; cols], vec![0.0; cols]);
        let mut found = [(0.0, 0.0); ROWS];
        for (row, found) in (i * ROWS..rows).zip(&mut found) {
            stored(row, &mut ours);
            read(row, &mut theirs);
            *found = Arch::new().dispatch(Sums(&ours, &theirs));
        }
        found
    });
    let (error, norm) = sums.iter().flatten().fold((0.0, 0.0), |(error, norm), (e, n)| (error + e, norm + n));
    Ok(if error == 0.0 { 0.0 } else { (error / norm).sqrt() })
}

/// Squared distance and squared norm of a row, of which these are the stored and the float weights.
struct Sums<'a>(&'a [f32], &'a [f32]);

impl NullaryFnOnce for Sums<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn call(self) -> (f64, f64) {
        let (mut errors, mut norms) = ([0.0; LANES], [0.0; LANES]);
        let ((stored, last), (weight, last_weight)) = (self.0.as_chunks::<LANES>(), self.1.as_chunks::<LANES>());
        for (stored, weight) in stored.iter().zip(weight) {
            for lane in 0..LANES {
                let (difference, weight) = distance(stored[lane], weight[lane]);
                errors[lane] += difference * difference;
                norms[lane] += weight * weight;
            }
        }
        for (lane, (&stored, &weight)) in last.iter().zip(last_weight).enumerate() {
            let (difference, weight) = distance(stored, weight);
            errors[lane] += difference * difference;
            norms[lane] += weight * weight;
        }
        (errors.iter().sum(), norms.iter().sum())
    }
}

#[inline(always)]
fn distance(stored: f32, weight: f32) -> (f64, f64) {
    (f64::from(stored) - f64::from(weight), f64::from(weight))
}

/// What reads rows of `cols` floats.
fn rows_of(tensor: StoredTensor<'_>, cols: usize) -> Result<impl Fn(usize, &mut [f32]) + Sync> {
    let Some(float) = float_type(tensor.dtype) else { bail!("{:?} is no float", tensor.dtype) };
    let row_bytes = cols * float.bytes();
    Ok(move |row: usize, values: &mut [f32]| {
        let bytes = &tensor.bytes[row * row_bytes..][..row_bytes];
        float.widen_to(bytes, values);
    })
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
