//! What programs do with a file, as the formats say it.

use crate::codes::CodeLayout;

/// What programs do with the files of a model family, whatever their format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilySupport {
    /// transformers answers from a compressed-tensors file only where the weights are dequantized as they are loaded.
    pub must_dequantize: bool,
    /// SGLang has no class for the model.
    pub unknown_to_sglang: bool,
}

/// What a server does with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Takes it, under this name, with these options.
    With(&'static str, &'static str),
    /// Refuses it, for a reason that another choice mends.
    Not(&'static str),
}

/// How transformers loads a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InTransformers {
    /// Name of the program, with the packages that it needs.
    pub name: &'static str,
    /// Arguments behind the folder, each with a comma in front.
    pub arguments: String,
}

/// The option that asks for Humming's kernels.
pub(super) const HUMMING: &str = " --quantization humming";

/// SGLang where it runs [`HUMMING`]'s kernels.
pub(super) const SGLANG_HUMMING: &str = "SGLang 0.5.18 or newer with Humming kernels";

/// Why servers refuse a file, for all formats of codes: groups that are no runs of columns, and very small ones.
pub(super) fn refused_groups(layout: &CodeLayout) -> Option<Served> {
    const INDEX: &str = "refuses files with a g_idx; --order act-group writes none";
    const NARROW: &str = "has no kernel for groups of less than 16 columns";
    match layout.group_size {
        _ if layout.group_index => Some(Served::Not(INDEX)),
        Some(..16) => Some(Served::Not(NARROW)),
        Some(_) | None => None,
    }
}

/// What SGLang does with codes that only Humming's kernels are for.
pub(super) fn in_sglang_with_humming(layout: &CodeLayout) -> Served {
    match layout.group_size {
        None => Served::Not("has no kernel for whole rows in this file; --group-size 128 has one"),
        Some(_) => Served::With(SGLANG_HUMMING, HUMMING),
    }
}

/// Whether Marlin is built for these groups.
pub(super) fn marlin_group(layout: &CodeLayout) -> bool {
    matches!(layout.group_size, None | Some(32 | 64 | 128))
}

/// Whether Marlin is built for codes this wide.
pub(super) fn marlin_width(layout: &CodeLayout) -> bool {
    matches!(layout.bits, 4 | 8)
}
