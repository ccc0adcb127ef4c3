//! The flags of the grid, and of the file that codes go into.

use crate::values::{GroupSize, named, widths};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use vlmq::checkpoint::{Format, GptqVersion};
use vlmq::quantize::settings::Grid;

#[derive(Debug, Args)]
#[command(next_help_heading = "Grid and file")]
pub(crate) struct GridArgs {
    /// Bits per code.
    #[arg(long, default_value = "3", value_parser = widths())]
    pub(crate) bits: u32,
    /// Columns that share a scale and a zero: a multiple of 8 that divides every layer's inputs, or `none` for the row.
    #[arg(long, default_value = "128", value_name = "N|none", allow_negative_numbers = true)]
    pub(crate) group_size: GroupSize,
    /// Fix the zero at the middle of the grid.
    #[arg(long)]
    pub(crate) symmetric: bool,
    /// How a group's range becomes its grid.
    #[arg(long, default_value = "loss", value_parser = named::<Grid>(&[
        ("loss", "the range whose codes do the layer's outputs the least harm"),
        ("mse", "the range whose codes are nearest the weights, of 80 shrunken ones"),
        ("minmax", "the full range"),
    ]))]
    pub(crate) grid: Grid,
    /// What to write.
    #[arg(long, default_value = "compressed-tensors", value_parser = named::<Format>(&[
        ("compressed-tensors", "packed codes for transformers, vLLM, SGLang"),
        ("gptq", "packed codes as AutoGPTQ lays them out; symmetric ones of 4 and 8 bits load in the most servers"),
        ("dequantized", "plain weights, to evaluate anywhere; nothing is saved"),
    ]))]
    pub(crate) format: Format,
    /// GPTQ files' version: 1 stores zeros less 1, 2 as they are [default: 1 for symmetric files, else 2, which servers read rightly]
    #[arg(long, value_parser = PossibleValuesParser::new(["1", "2"]).map(|text| match text.as_str() {
        "1" => GptqVersion::V1,
        _ => GptqVersion::V2,
    }))]
    pub(crate) gptq_version: Option<GptqVersion>,
}

impl GridArgs {
    /// What is written: of GPTQ the version that is asked for, or fits.
    pub(crate) fn format(&self) -> Format {
        match self.gptq_version {
            _ if !self.is_gptq() => self.format,
            None => Format::gptq(self.symmetric),
            Some(version) => Format::gptq_of(version),
        }
    }

    /// Whether GPTQ is asked for, of whatever version.
    pub(crate) fn is_gptq(&self) -> bool {
        self.format == Format::GPTQ_V1
    }
}
