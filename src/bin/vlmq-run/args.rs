//! The flags, their checks, and the library's settings made of them.

use crate::grid_args::GridArgs;
use crate::values::{DeviceChoice, log_level, named, positive, presets, threads};
use crate::{json_file, text};
use anyhow::Context;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use vlmq::checkpoint::target;
use vlmq::data::template::TemplateChoice;
use vlmq::evaluate::presets::Preset;
use vlmq::model::families::{ImageMode, ImageOptions};
use vlmq::quantize::settings::{CrossTerm, Importance, ImportancePower, Order, Refit, Solver, SolverSettings};
use vlmq::run::RunSettings;
use vlmq::run::evaluation::EvaluationSettings;

/// Quantizes vision-language models after training (VLMQ, arXiv 2508.03351) and measures what that costs.
#[derive(Debug, Parser)]
#[command(name = "vlmq-run", version = concat!(env!("CARGO_PKG_VERSION"), "+", env!("VLMQ_COMMIT")), max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Quantize a checkpoint's language backbone into a new folder.
    Quantize(Box<QuantizeArgs>),
    /// Answer a data set's questions and score the answers.
    Eval(EvalArgs),
    /// Show what a checkpoint holds, what would be quantized, and what that would take.
    Inspect(InspectArgs),
    /// Read a checkpoint that `quantize` wrote back: checksums, tensors, and errors against the float weights.
    Verify(VerifyArgs),
}

impl Command {
    /// Refuses what can be refused before a device is opened and any work done.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::Quantize(args) => args.settings().check(),
            Self::Eval(EvalArgs { json, .. }) | Self::Verify(VerifyArgs { json, .. }) => {
                json.as_deref().map_or(Ok(()), json_file::check_target)
            }
            Self::Inspect(_) => Ok(()),
        }
    }

    /// GPU memory to use at most, where the command sets a limit.
    pub(crate) fn max_gpu_memory(&self) -> Option<u64> {
        match self {
            Self::Quantize(args) => args.max_gpu_memory,
            Self::Eval(_) | Self::Inspect(_) | Self::Verify(_) => None,
        }
    }

    /// Folder of the checkpoint that the command reads.
    pub(crate) fn model(&self) -> &Path {
        match self {
            Self::Quantize(args) => &args.model,
            Self::Eval(args) => &args.model,
            Self::Inspect(args) => &args.model,
            Self::Verify(args) => &args.against,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine and messages")]
pub(crate) struct MachineArgs {
    /// Where to compute: `cpu`, `cuda` or `cuda:N`, or `auto`: the first GPU where there is one.
    // Not auto by default until a published model has been quantized on a GPU.
    #[arg(long, global = true, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: DeviceChoice,
    /// Threads to use; all cores when not given. Results do not depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    /// Print only errors and results.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Least serious messages to show: off, error, warn, info, debug or trace [default: warn; with --quiet: error]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = log_level(), hide_possible_values = true)]
    pub(crate) log_level: Option<log::LevelFilter>,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// Folder of the float checkpoint: config.json, *.safetensors, tokenizer, processor and chat template.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Calibration data: JSONL of conversations with images, or ShareGPT4V/LLaVA JSON. Not needed with --solver rtn.
    #[arg(long, value_name = "FILE")]
    calib: Option<PathBuf>,
    /// Folder to write; must not exist. A run that was ended early goes on when the same command is given again.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Discard what an earlier run left unfinished, instead of going on from there.
    #[arg(long)]
    restart: bool,
    /// Least time between two saves of what the end of the program would lose; 0 saves behind every block
    #[arg(long, default_value_t = RunSettings::default().save_every, value_name = "SECONDS")]
    save_every: u64,
    /// Evaluate on this data before and after, and print both; its images are relative to it.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval: Option<PathBuf>,
    /// Stop with an error where numbers go wrong, such as a damping that had to be raised, instead of doing something about
    /// it and saying so
    #[arg(long)]
    strict: bool,
    /// GPU memory for tensors and, a sixteenth of it, the gaps between them, such as 24GiB or 500MB; otherwise what is free
    #[arg(long, value_name = "SIZE", value_parser = text::parse_bytes, allow_negative_numbers = true)]
    max_gpu_memory: Option<u64>,
    /// Check all inputs and say what memory, disk and time the run would take; read no weights, write nothing
    #[arg(long, value_name = "text|json", num_args = 0..=1, require_equals = true, default_missing_value = "text",
        hide_possible_values = true)]
    pub(crate) dry_run: Option<DryRunFormat>,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    grid: GridArgs,
    #[command(flatten)]
    data: CalibrationArgs,
    #[command(flatten)]
    images: ImageArgs,
}

/// How `--dry-run` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DryRunFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Method")]
struct MethodArgs {
    /// How codes are found.
    #[arg(long, default_value = "gptaq", value_parser = named::<Solver>(&[
        ("rtn", "round to nearest"),
        ("gptq", "carry each column's rounding error on to the next columns"),
        ("gptaq", "the same, towards the float model's outputs"),
    ]))]
    solver: Solver,
    /// How calibration tokens are weighted.
    #[arg(long, default_value = "vlmq", value_parser = named::<Importance>(&[
        ("none", "all alike"),
        ("vlmq", "by the gradient of the attention block's loss"),
    ]))]
    importance: Importance,
    /// Power of the weights, above 0, at most 1: below 1 brings them closer together; `auto`: for each layer the largest that
    /// leaves every input enough tokens
    #[arg(long, default_value_t, value_name = "P|auto", allow_negative_numbers = true)]
    importance_power: ImportancePower,
    /// Scales that are refitted once a layer has its codes. Default: residual at 2 bits, none above, where it brings nothing.
    #[arg(long, value_parser = named::<Refit>(&[
        ("none", "all stay as the solve had them"),
        ("residual", "those of o_proj and down_proj, so that the residual stream gets what it lacks"),
    ]))]
    refit: Option<Refit>,
    /// Order in which columns are quantized.
    #[arg(long, default_value = "act-group", value_parser = named::<Order>(&[
        ("none", "left to right"),
        ("act-group", "most active first inside groups, and whole groups; needs nothing from loaders"),
        ("act", "most active first over the whole row; the file needs g_idx, which fewer loaders take"),
    ]))]
    order: Order,
    /// Damping: this times the mean of the Hessian's diagonal is added to it; above 0, at most 1.
    #[arg(long, default_value = "0.01", value_name = "X", allow_negative_numbers = true)]
    damp: f64,
    /// Strength of the GPTAQ term, 0 to 1.
    #[arg(long, default_value = "0.25", value_name = "X", allow_negative_numbers = true)]
    alpha: f64,
    /// The weights that the GPTAQ term carries to later blocks of columns.
    #[arg(long, default_value = "unquantized", hide = true, value_parser = named::<CrossTerm>(&[
        ("unquantized", "those before rounding"),
        ("quantized", "those after rounding"),
    ]))]
    cross_term: CrossTerm,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Calibration")]
struct CalibrationArgs {
    /// Samples to draw; all, when the data has fewer.
    #[arg(long, default_value = "512", value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    samples: usize,
    /// Seed of the draw.
    #[arg(long, default_value = "0", value_name = "N")]
    seed: u64,
    /// Leave out samples of more tokens, image tokens included; none is ever cut.
    #[arg(long, default_value = "2048", value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    max_tokens: usize,
    /// Leave out samples with an image that cannot be read, naming and counting them, instead of ending the run.
    #[arg(long)]
    skip_bad_images: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Images and text")]
struct ImageArgs {
    /// Folder that image paths are relative to [default: the data file's]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// Enlarge smaller images to about this area [default: the checkpoint's processor's]
    #[arg(long, value_name = "PIXELS", value_parser = positive, allow_negative_numbers = true)]
    min_pixels: Option<usize>,
    /// Reduce larger images to about this area [default: the checkpoint's processor's]
    #[arg(long, value_name = "PIXELS", value_parser = positive, allow_negative_numbers = true)]
    max_pixels: Option<usize>,
    /// For models that cut images into tiles [default: tiles where a sample has one image]
    #[arg(long, value_parser = named::<ImageMode>(&[
        ("anyres", "the whole image, and tiles of it at a higher resolution"),
        ("single", "the whole image only, padded to a square"),
    ]))]
    image_mode: Option<ImageMode>,
    /// What turns conversations into text: `checkpoint`, `chatml` (line breaks, a system prompt), or a Jinja file.
    #[arg(long, default_value = "checkpoint", value_name = "checkpoint|chatml|FILE")]
    chat_template: TemplateChoice,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Folder of the checkpoint, float or written by `vlmq-run quantize`.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// JSONL of conversations whose last assistant turn is the answer; with --preset, of its questions.
    #[arg(value_name = "DATA")]
    data: PathBuf,
    /// Also measure the KL divergence from this checkpoint, per answer token.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// Only the first N samples.
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    limit: Option<usize>,
    /// Benchmark whose columns DATA has; words the questions, bounds and scores the answers as LMMs-Eval does.
    #[arg(long, value_name = "NAME", value_parser = presets())]
    preset: Option<&'static Preset>,
    /// Longest answer, where the sample does not say [default: the preset's, or 64]
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    max_new_tokens: Option<usize>,
    /// Write scores and answers to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    images: ImageArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Folder of the checkpoint.
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Folder that `vlmq-run quantize` wrote; it may have been moved or renamed.
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// Folder of the float checkpoint that it was made from.
    #[arg(long, value_name = "MODEL")]
    pub(crate) against: PathBuf,
    /// Write all differences and every layer's error to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

impl Cli {
    /// Reads the command line; wrong usage ends the program with exit code 2. Errors where the help that was asked for cannot be
    /// printed.
    pub(crate) fn read() -> anyhow::Result<Self> {
        let cli = match Self::try_parse() {
            Ok(cli) => cli,
            Err(wrong) if wrong.use_stderr() => wrong.exit(),
            Err(help) => {
                help.print().context("cannot write to stdout")?;
                std::process::exit(0);
            }
        };
        if let Err(message) = cli.check() {
            Self::command().error(ErrorKind::ValueValidation, message).exit();
        }
        Ok(cli)
    }

    /// What no single flag's parser can see.
    fn check(&self) -> Result<(), String> {
        let images = match &self.command {
            Command::Quantize(args) => {
                args.solver_settings().validate().map_err(|error| error.to_string())?;
                if args.grid.gptq_version.is_some() && !args.grid.is_gptq() {
                    return Err("--gptq-version is of --format gptq".into());
                }
                if args.calib.is_none() && args.method.solver != Solver::Rtn {
                    return Err("--calib FILE is missing; only --solver rtn needs no calibration data".into());
                }
                &args.images
            }
            Command::Eval(args) => &args.images,
            Command::Inspect(_) | Command::Verify(_) => return Ok(()),
        };
        match (images.min_pixels, images.max_pixels) {
            (Some(min), Some(max)) if min > max => Err(format!("--min-pixels {min} is more than --max-pixels {max}")),
            _ => Ok(()),
        }
    }
}

impl QuantizeArgs {
    fn solver_settings(&self) -> SolverSettings {
        SolverSettings {
            solver: self.method.solver,
            bits: self.grid.bits,
            group_size: self.grid.group_size.0,
            symmetric: self.grid.symmetric,
            grid: self.grid.grid,
            order: self.method.order,
            damp: self.method.damp,
            alpha: self.method.alpha,
            cross_term: self.method.cross_term,
            ..SolverSettings::default()
        }
    }

    pub(crate) fn settings(&self) -> RunSettings {
        RunSettings {
            format: self.grid.format(),
            solver: self.solver_settings(),
            importance: self.method.importance,
            importance_power: self.method.importance_power,
            refit: self.method.refit,
            samples: self.data.samples,
            seed: self.data.seed,
            max_tokens: self.data.max_tokens,
            image_root: self.images.image_root.clone(),
            image_options: self.images.options(),
            chat_template: self.images.chat_template.clone(),
            skip_bad_images: self.data.skip_bad_images,
            strict: self.strict,
            restart: self.restart,
            save_every: self.save_every,
            ..RunSettings::new(self.model.clone(), self.calib.clone(), self.out.clone())
        }
    }

    /// The float checkpoint on `data`.
    pub(crate) fn evaluation_before(&self, data: PathBuf) -> EvaluationSettings {
        EvaluationSettings {
            model: self.model.clone(),
            data,
            reference: None,
            limit: None,
            preset: None,
            decode: true,
            max_new_tokens: None,
            // --image-root belongs to the calibration data.
            image_root: None,
            image_options: self.images.options(),
            chat_template: self.images.chat_template.clone(),
        }
    }

    /// The written checkpoint on `data`, against the float one.
    pub(crate) fn evaluation_after(&self, data: PathBuf) -> EvaluationSettings {
        EvaluationSettings {
            model: target::plain(&self.out),
            reference: Some(self.model.clone()),
            ..self.evaluation_before(data)
        }
    }
}

impl ImageArgs {
    fn options(&self) -> ImageOptions {
        ImageOptions { min_pixels: self.min_pixels, max_pixels: self.max_pixels, image_mode: self.image_mode }
    }
}

impl EvalArgs {
    pub(crate) fn settings(&self) -> EvaluationSettings {
        EvaluationSettings {
            model: self.model.clone(),
            data: self.data.clone(),
            reference: self.reference.clone(),
            limit: self.limit,
            preset: self.preset,
            decode: true,
            max_new_tokens: self.max_new_tokens,
            image_root: self.images.image_root.clone(),
            image_options: self.images.options(),
            chat_template: self.images.chat_template.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_librarys() {
        let cli = Cli::try_parse_from(["vlmq-run", "quantize", "m", "--calib", "c", "--out", "o"]).unwrap();
        let Command::Quantize(args) = cli.command else { panic!("not quantize") };
        assert_eq!(args.settings(), RunSettings::new("m".into(), Some("c".into()), "o".into()));
    }

    #[test]
    fn every_name_reads_back() {
        for solver in ["rtn", "gptq", "gptaq"] {
            for order in ["none", "act-group", "act"] {
                for grid in ["loss", "minmax", "mse"] {
                    let flags = ["--solver", solver, "--order", order, "--grid", grid, "--group-size", "none"];
                    let base = ["vlmq-run", "quantize", "m", "--calib", "c", "--out", "o", "--cross-term", "quantized"];
                    let cli = Cli::try_parse_from(base.iter().chain(&flags)).unwrap();
                    let Command::Quantize(args) = cli.command else { panic!("not quantize") };
                    let value = serde_json::to_value(args.settings()).unwrap();
                    assert_eq!(value["solver"]["solver"], solver);
                    assert_eq!(value["solver"]["order"], order);
                    assert_eq!(value["solver"]["grid"], grid);
                    assert_eq!(value["solver"]["cross_term"], "quantized");
                    assert_eq!(value["solver"]["group_size"], serde_json::Value::Null);
                }
            }
        }
    }
}
