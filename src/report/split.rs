//! Over how many GPUs a server can split a quantized checkpoint's layers (tensor parallelism).
//!
//! Servers give each GPU a share of the heads and of the MLP's inner width: `q`, `k`, `v`, `gate` and `up` are cut along their
//! outputs, `o` and `down` along their inputs. vLLM 0.33 and SGLang 0.5.23 refuse a cut through a group of columns, and cannot cut a
//! word that codes or zeros are packed into.

use crate::checkpoint::formats::Format;
use crate::plan::DecoderShape;
use crate::quantize::settings::SolverSettings;

/// Most GPUs that are asked for: those of two machines.
const MOST: usize = 16;

/// The largest power of two, up to 16, that a file of these settings can be split into; plain weights are cut anywhere.
pub fn largest_split(shape: &DecoderShape, format: Format, settings: &SolverSettings) -> usize {
    let splits = (0..=MOST.ilog2()).map(|power| 1 << power);
    splits.take_while(|&split| can_split(shape, format, settings, split)).last().unwrap_or(1)
}

/// A split in words: `up to 4 GPUs`.
pub fn told(split: usize) -> String {
    match split {
        0 | 1 => "one GPU alone".to_owned(),
        split => format!("up to {split} GPUs"),
    }
}

fn can_split(shape: &DecoderShape, format: Format, settings: &SolverSettings, split: usize) -> bool {
    let &DecoderShape { heads, kv_heads, head_dim, intermediate, .. } = shape;
    // Where there are fewer of them, each GPU has a whole one.
    let keys = if split <= kv_heads { kv_heads.is_multiple_of(split) } else { split.is_multiple_of(kv_heads.max(1)) };
    if !keys || !heads.is_multiple_of(split) || !intermediate.is_multiple_of(split) {
        return false;
    }
    let Some(codes) = format.codes() else {
        return true;
    };
    let whole_words = |values: usize| (values * settings.bits as usize).is_multiple_of(32);
    let (queries, keys, inner) = (heads / split * head_dim, (kv_heads / split).max(1) * head_dim, intermediate / split);
    let inputs = |share: usize| whole_words(share) && settings.group_size.is_none_or(|size| share.is_multiple_of(size));
    // Zeros are packed along the outputs.
    let has_zeros = codes.stores_zeros(settings.symmetric);
    let outputs = |share: usize| !has_zeros || whole_words(share);
    split == 1 || [queries, inner].into_iter().all(inputs) && [queries, keys, inner].into_iter().all(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks do not matter.
    const fn shape(hidden: usize, intermediate: usize, heads: usize, kv_heads: usize, head_dim: usize) -> DecoderShape {
        DecoderShape { blocks: 1, hidden, intermediate, heads, kv_heads, head_dim }
    }

    const OF_2B: DecoderShape = shape(1536, 8960, 12, 2, 128);
    const OF_3B: DecoderShape = shape(2048, 11008, 16, 2, 128);
    const OF_7B: DecoderShape = shape(3584, 18944, 28, 4, 128);
    const OF_72B: DecoderShape = shape(8192, 29568, 64, 8, 128);
    const OF_4B: DecoderShape = shape(2560, 9728, 32, 8, 128);
    const OF_HALF_B: DecoderShape = shape(896, 4864, 14, 2, 64);

    fn split(shape: DecoderShape, group_size: Option<usize>, bits: u32, symmetric: bool) -> usize {
        let settings = SolverSettings { group_size, bits, symmetric, ..SolverSettings::default() };
        largest_split(&shape, Format::COMPRESSED_TENSORS, &settings)
    }

    #[test]
    fn splits_are_those_that_servers_took() {
        // Found by asking vLLM's own check of published sizes.
        for (shape, group_size, expected) in [
            (OF_72B, Some(128), 1),
            (OF_72B, Some(64), 2),
            (OF_72B, Some(32), 4),
            (OF_HALF_B, Some(128), 1),
            (OF_2B, Some(128), 2),
            (OF_3B, Some(128), 2),
            (OF_4B, Some(128), 4),
            (OF_7B, Some(128), 4),
        ] {
            assert_eq!(split(shape, group_size, 4, false), expected, "{shape:?} {group_size:?}");
        }
        // Rows are cut anywhere that a word ends, and 28 heads are no 8 GPUs'.
        assert_eq!(split(OF_72B, None, 4, true), 16);
        assert_eq!(split(OF_7B, None, 4, true), 4);
        // 29568 / 8 codes of 3 bits are no whole words.
        assert_eq!(split(OF_72B, None, 3, true), 4);
    }

    #[test]
    fn zeros_are_cut_at_words() {
        // 16 heads of 8 outputs: of 4 bits a word, of 2 half of one.
        let small = shape(128, 4096, 16, 16, 8);
        assert_eq!(split(small, None, 4, false), 16);
        assert_eq!(split(small, None, 2, false), 8);
        // Without zeros the inputs' codes remain.
        assert_eq!(split(small, None, 2, true), 8);
        let settings = SolverSettings { symmetric: true, ..SolverSettings::default() };
        assert_eq!(largest_split(&OF_72B, Format::DEQUANTIZED, &settings), 16);
    }
}
