//! What a quantization run says of itself: layers as they finish, and `report.json` beside the output.

pub mod card;
pub mod check;
mod html;
pub mod provenance;
pub mod samples;
pub mod settings;
pub mod split;
pub mod spread;
mod templates;

pub use settings::RunSettings;

use crate::checkpoint::formats::Loader;
use crate::checkpoint::own;
use crate::checkpoint::sums::Sums;
use crate::device::PoolPeak;
use crate::evaluate::Comparison;
use crate::plan::MemoryPlan;
use crate::plan::system::status_bytes;
use crate::progress::{Observer, StageTime};
use crate::quantize::SolveReport;
use crate::quantize::importance::ImportanceSpread;
use anyhow::Result;
use check::ModelCheck;
use provenance::Provenance;
use samples::ReportSample;
use serde::{Deserialize, Serialize};
use spread::BlockImportance;
use std::path::Path;

/// Listens to a quantization run: to its stages, and to layers as they finish. `()` listens to nothing.
pub trait RunObserver: Observer {
    /// A linear layer has its codes.
    fn layer_finished(&mut self, _layer: &LayerReport) {}

    /// The run goes on with what an earlier one left in `folder`, behind so many of so many blocks.
    fn resumed(&mut self, _finished: usize, _blocks: usize, _folder: &Path) {}
}

impl RunObserver for () {}

/// One linear layer's quantization.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Name in the checkpoint, without `.weight`.
    pub name: String,
    /// Decoder block, from 0.
    pub block: usize,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Width of a code.
    pub bits: u32,
    /// Input columns that share a scale.
    pub group_columns: usize,
    /// `‖Ŵ − W‖ / ‖W‖` of what is stored, see [`weight_error`](crate::checkpoint::weight_error); `verify` computes it again.
    pub weight_error: f64,
    /// How the solve went.
    #[serde(flatten)]
    pub solve: SolveReport,
    /// The importance factors used; `None` where all tokens counted alike.
    pub importance: Option<ImportanceSpread>,
}

/// One decoder block's quantization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockReport {
    /// Number of the block, from 0.
    pub block: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// How far the quantized path is from the float path behind the block, relative, mean over tokens
    /// ([`BlockOutcome`](crate::quantize::block::BlockOutcome)), where the float path runs; `None` where it runs nowhere.
    pub path_error: Option<f64>,
    /// Importance of the tokens; `None` where all counted alike.
    pub importance: Option<BlockImportance>,
}

/// What became of the calibration data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CalibrationCounts {
    /// Samples used.
    pub used: usize,
    /// Samples left out because they had more than the allowed number of tokens.
    pub too_long: usize,
    /// Samples left out because an image of theirs could not be read.
    pub bad_images: usize,
    /// Tokens that stand for image patches.
    pub vision_tokens: usize,
    /// All other tokens.
    pub text_tokens: usize,
}

impl CalibrationCounts {
    /// Counts of samples as they are told: `5 samples, 1 left out as too long`.
    pub fn samples(&self) -> String {
        let bad = match self.bad_images {
            0 => String::new(),
            bad => format!(", {bad} for a bad image"),
        };
        format!("{} samples, {} left out as too long{bad}", self.used, self.too_long)
    }
}

/// All that a finished run has to say; `report.json` is this structure.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RunReport {
    /// Program, settings, checksums of what was read.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// The checkpoint's `model_type`.
    pub family: String,
    /// The format written.
    pub format: String,
    /// Device that computed, such as `cpu`.
    pub device: String,
    /// What became of the calibration data.
    pub calibration: CalibrationCounts,
    /// Layers in the order in which they were quantized.
    pub layers: Vec<LayerReport>,
    /// Decoder blocks, in order.
    pub blocks: Vec<BlockReport>,
    /// How likely the finished model holds some calibration tokens; `None` where no sample went through it, as rounding to
    /// nearest runs none.
    pub check: Option<ModelCheck>,
    /// Where the bins of the blocks' importance meet.
    pub importance_edges: Vec<f64>,
    /// Calibration samples whose importance some blocks hold token by token.
    pub samples: Vec<ReportSample>,
    /// Stages in the order in which they ended.
    pub stages: Vec<StageTime>,
    /// Wall-clock seconds from the first file read to the last one written.
    pub seconds: f64,
    /// Most memory that the process ever held, in bytes; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// What was counted before the start, and what the stages then had in use. On the CPU it is the arrays alone, beside
    /// which the process holds files and images.
    pub memory_plan: MemoryPlan,
    /// Most device memory in use at once, in bytes; `None` on a device whose memory is the host's.
    pub peak_device_bytes: Option<u64>,
    /// Most that the device's own memory pool held, which is what a limit of GPU memory limits; `None` where there is none.
    pub device_pool: Option<PoolPeak>,
    /// Bytes of the float checkpoint's tensors.
    pub bytes_before: u64,
    /// Bytes of the written checkpoint's tensors.
    pub bytes_after: u64,
    /// Bytes of the quantized layers in the written checkpoint: codes, scales, zeros, indices.
    pub quantized_bytes: u64,
    /// Loaders that take exactly this checkpoint.
    pub loaders: Vec<Loader>,
    /// Servers that do not, though they take other files of the model, each with why.
    pub shut_out: Vec<String>,
    /// The most GPUs, a power of two up to 16, that a server can split the checkpoint's layers over.
    pub largest_split: usize,
    /// The float model's answers beside those of the quantized one, if they were asked.
    pub evaluation: Option<Comparison>,
}

impl RunReport {
    /// Names of the files that tell of a run: all of it, and a page to read.
    pub const NAMES: [&str; 2] = ["report.json", "report.html"];

    /// These files, by name.
    pub fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let json = numbers_in_line(&serde_json::to_string_pretty(self)?);
        Ok(Self::NAMES.into_iter().zip([json.into_bytes(), html::page(self)?.into_bytes()]).collect())
    }

    /// Writes [`files`](Self::files) anew into the finished `folder`, each under its name only once it is whole, and their
    /// checksums.
    pub fn replace_in(&self, folder: &Path) -> Result<()> {
        let files = self.files()?;
        for (name, bytes) in &files {
            own::replace(&folder.join(name), bytes)?;
        }
        Sums::renew(folder, &files.iter().map(|(name, _)| *name).collect::<Vec<_>>())
    }

    /// Bits that one quantized weight takes in the file, scales, zeros and indices included; `None` without layers.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let weights: usize = self.layers.iter().map(|layer| layer.rows * layer.cols).sum();
        (weights > 0).then(|| 8.0 * self.quantized_bytes as f64 / weights as f64)
    }

    /// Mean of the layers' relative errors; `None` without layers.
    pub fn mean_relative_error(&self) -> Option<f64> {
        let sum: f64 = self.layers.iter().map(|layer| layer.solve.relative_error).sum();
        (!self.layers.is_empty()).then(|| sum / self.layers.len() as f64)
    }

    /// The layer whose statistics rest on the fewest effective tokens, compared with its inputs; `None` where no layer has
    /// statistics.
    pub fn fewest_tokens(&self) -> Option<(&LayerReport, f64)> {
        let layers = self.layers.iter().filter_map(|layer| Some((layer, layer.solve.effective_tokens?)));
        layers.min_by(|(a, m), (b, n)| (m / a.cols as f64).total_cmp(&(n / b.cols as f64)))
    }

    /// Largest relative error and the layer that has it.
    pub fn worst_layer(&self) -> Option<&LayerReport> {
        self.layers.iter().max_by(|a, b| a.solve.relative_error.total_cmp(&b.solve.relative_error))
    }
}

/// JSON of one value a line with lists of numbers in one line each: there are thousands of them, deep inside.
fn numbers_in_line(pretty: &str) -> String {
    let mut out = String::with_capacity(pretty.len());
    let mut in_list = false;
    for line in pretty.lines() {
        let value = line.trim_start();
        // Strings and keys begin with a quotation mark, and hold no line break.
        let number = value.starts_with(|c: char| c == '-' || c.is_ascii_digit() || c == 'n');
        match (in_list, number) {
            (true, true) => out += &format!(" {value}"),
            // The list's end.
            (true, false) => out += value,
            (false, true) => out += value,
            (false, false) => {
                if !out.is_empty() {
                    out.push('\n');
                }
                out += line;
            }
        }
        in_list = number;
    }
    out.push('\n');
    out
}

/// Most memory that this process ever held at once, in bytes; `None` where the system does not tell.
///
/// Pages of memory-mapped checkpoints that were touched count, although the system may take them back at any time.
pub fn peak_memory_bytes() -> Option<u64> {
    status_bytes("VmHWM")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(relative_error: f64) -> LayerReport {
        let solve = SolveReport { relative_error, tokens: 7, ..SolveReport::default() };
        let name = "model.layers.0.self_attn.q_proj".into();
        LayerReport { name, rows: 4, cols: 8, bits: 3, solve, ..LayerReport::default() }
    }

    #[test]
    fn solve_reports_lie_flat_in_the_layer() {
        let value = serde_json::to_value(layer(0.25)).unwrap();
        assert_eq!(value["relative_error"], 0.25);
        assert_eq!(value["tokens"], 7);
        assert!(value.get("solve").is_none());
    }

    #[test]
    fn bits_and_errors_are_over_all_layers() {
        let report = RunReport {
            layers: vec![layer(0.25), layer(0.5)],
            seconds: 1.0,
            quantized_bytes: 26,
            ..RunReport::default()
        };
        assert_eq!(report.bits_per_weight(), Some(8.0 * 26.0 / 64.0));
        assert_eq!(report.mean_relative_error(), Some(0.375));
        assert_eq!(report.worst_layer().unwrap().solve.relative_error, 0.5);
    }

    #[test]
    fn peak_memory_is_at_least_what_is_held() {
        if cfg!(target_os = "linux") {
            let held = vec![1u8; 64 << 20];
            assert!(peak_memory_bytes().unwrap() >= std::hint::black_box(&held).len() as u64);
        }
    }
}
