//! The table on the test bed (benches/testbed).
//!
//! KL from the float model per answer token, image answers and text apart, and how often the likeliest token is the float model's,
//! all tokens of the right answer before it given: nothing is decoded. All rows see the same calibration draws, so that each is
//! compared with the first row draw by draw: draws differ by more than methods do.

use super::record::{Record, Run, figures};
use super::rows::{self, Row};
use super::summary::{Entry, table};
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use vlmq::checkpoint::Checkpoint;
use vlmq::checkpoint::checksum;
use vlmq::checkpoint::formats::Format;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::{Cuda, Precision};
use vlmq::device::{ModelOps, SolveOps};
use vlmq::evaluate::{self, EvaluationSettings};
use vlmq::model::families::{self, ImageOptions};
use vlmq::quantize::pipeline::{self, CHUNK_TOKENS, PipelineSettings};
use vlmq::quantize::provenance::COMMIT;
use vlmq::quantize::settings::{Solver, SolverSettings};
use vlmq::tensor::Matrix;

/// Compares methods on the test bed that benches/testbed/make.py makes, and prints a Markdown table for each width.
#[derive(Parser)]
#[command(max_term_width = 110)]
pub(crate) struct Arguments {
    /// Folder that make.py made.
    bed: PathBuf,
    /// Widths of codes, one table each.
    #[arg(long, value_delimiter = ',', default_value = "3")]
    bits: Vec<u32>,
    /// Columns that share a scale, or `none`. 128, the usual default, does not divide the bed's 576.
    #[arg(long, default_value = "64")]
    group_size: String,
    /// Calibration draws, with consecutive seeds.
    #[arg(long, default_value_t = 10)]
    draws: u64,
    /// Seed of the first draw, so that several programs can share a table's draws.
    #[arg(long, default_value_t = 0)]
    first_draw: u64,
    /// Samples of a draw, out of 600.
    #[arg(long, default_value_t = 128)]
    samples: usize,
    /// Questions: choose defaults by the first set, report figures of the other.
    #[arg(long, value_enum, default_value = "choose")]
    set: Set,
    /// Only the first so many questions.
    #[arg(long)]
    limit: Option<usize>,
    /// Rows by name: rtn, gptq, gptaq, vlmq-gptq, vlmq-gptaq. All, where there is no --vary; else the default, vlmq-gptaq.
    #[arg(long, value_delimiter = ',')]
    methods: Vec<String>,
    /// A row of the default with settings changed, such as "grid=mse alpha=0.5"; can be repeated. Keys: solver, importance, grid,
    /// alpha, damp, order, cross-term, symmetric, and what else report.json has under settings.
    #[arg(long)]
    vary: Vec<String>,
    /// Settings changed in every row.
    #[arg(long)]
    all: Vec<String>,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: Where,
    /// Raw results, one line a run, added to what the file has. Runs of the same program, bed and settings that it has already are
    /// taken from there.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Set {
    Choose,
    Report,
}

#[derive(Clone, Copy, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

impl Set {
    fn name(self) -> &'static str {
        match self {
            Self::Choose => "choose",
            Self::Report => "report",
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match arguments.device {
        Where::Cpu => Table::new(&Cpu, &Cpu, arguments)?.print(),
        Where::Cuda => {
            // Models are quantized in their own precision, as users do. What they then say is compared in float32: a bfloat16 pass
            // rounds by as much as 4 bits change.
            let exact = Cuda::open(0, Precision::F32)?;
            let model = Checkpoint::open(&arguments.bed.join("model"))?;
            let own = exact.with_precision(families::float_type(&model)?.into());
            Table::new(&own, &exact, arguments)?.print()
        }
    }
}

struct Table<'a, D> {
    /// Where models are quantized, and where they are evaluated.
    devices: [&'a D; 2],
    arguments: &'a Arguments,
    rows: Vec<Row>,
    group_size: Option<usize>,
    record: Record,
    /// What every run has in common of what decides its figures.
    common: Map<String, Value>,
    /// The float model's logits, once a run needs them.
    reference: Option<Vec<Matrix>>,
}

impl<'a, D: ModelOps + SolveOps> Table<'a, D> {
    /// Refuses what can be refused before anything is computed.
    fn new(quantizing: &'a D, evaluating: &'a D, arguments: &'a Arguments) -> Result<Self> {
        ensure!(arguments.draws > 0, "a table of no draws");
        let rows = rows::rows(&arguments.methods, &arguments.vary, &arguments.all)?;
        let group_size = match arguments.group_size.as_str() {
            "none" => None,
            size => Some(size.parse().with_context(|| format!("--group-size {size}: neither a number nor `none`"))?),
        };
        for &bits in &arguments.bits {
            SolverSettings { bits, group_size, ..SolverSettings::default() }.validate()?;
        }
        let mut bed = Map::new();
        for (key, file) in
            [("model", MODEL.to_owned()), ("calib", CALIB.to_owned()), ("questions", questions(arguments))]
        {
            let path = arguments.bed.join(file);
            let sum =
                checksum::of_file(&path).with_context(|| format!("{} is no test bed", arguments.bed.display()))?;
            bed.insert(key.into(), sum.into());
        }
        let common = json!({
            "program": format!("{}+{COMMIT}", env!("CARGO_PKG_VERSION")),
            "bed": bed,
            "device": quantizing.name(),
            "set": arguments.set.name(),
            "limit": arguments.limit,
        });
        let Value::Object(common) = common else { bail!("a key is an object") };
        let record = Record::open(arguments.json.as_deref())?;
        Ok(Self { devices: [quantizing, evaluating], arguments, rows, group_size, record, common, reference: None })
    }

    /// Runs what is not yet found, and prints it all.
    fn print(mut self) -> Result<()> {
        let float = self.float()?;
        for bits in self.arguments.bits.clone() {
            // Draw by draw, so that what an interrupted table has can be compared.
            for seed in self.seeds() {
                for row in self.rows.clone() {
                    self.quantized(&row, bits, seed)?;
                }
            }
        }
        let Arguments { draws, samples, set, group_size, bits, .. } = self.arguments;
        let nll = |(name, found): (&String, &super::record::Figures)| {
            let nll = found.nll.map_or("–".into(), |nll| format!("{nll:.4}"));
            format!("{name} {nll} ({} questions, {} tokens)", found.n, found.tokens)
        };
        let nll: Vec<String> = float.groups.iter().map(nll).collect();
        println!("The float model's negative log-likelihood per token: {}.", nll.join(", "));
        for &bits in bits {
            println!(
                "\nW{bits} g{group_size}, {}; draws of {samples} samples: {draws}; mean ± standard error\n",
                set.name()
            );
            let keys = |row: &Row| -> Vec<Map<String, Value>> {
                let draws = if row.solver.solver == Solver::Rtn { 1 } else { usize::MAX };
                self.seeds().take(draws).map(|seed| self.key(row, bits, seed)).collect()
            };
            let entry = |row: &'_ Row| -> Result<Vec<&Run>> {
                keys(row).iter().map(|key| self.record.find(key).context("a run is missing")).collect()
            };
            let runs: Vec<Vec<&Run>> = self.rows.iter().map(entry).collect::<Result<_>>()?;
            let entries = self.rows.iter().zip(runs).map(|(row, runs)| Entry { name: &row.name, runs });
            print!("{}", table(&entries.collect::<Vec<_>>()));
        }
        Ok(())
    }

    fn seeds(&self) -> std::ops::Range<u64> {
        self.arguments.first_draw..self.arguments.first_draw.saturating_add(self.arguments.draws)
    }

    fn solver(&self, row: &Row, bits: u32) -> SolverSettings {
        SolverSettings { bits, group_size: self.group_size, ..row.solver.clone() }
    }

    /// All that decides a run's figures. Round-to-nearest looks at no data: one run serves all draws.
    fn key(&self, row: &Row, bits: u32, seed: u64) -> Map<String, Value> {
        let mut key = self.common.clone();
        let whole = Row { solver: self.solver(row, bits), ..row.clone() };
        key.insert("settings".into(), Value::Object(rows::settings(&whole)));
        if row.solver.solver != Solver::Rtn {
            key.insert("samples".into(), self.arguments.samples.into());
            key.insert("seed".into(), seed.into());
        }
        key
    }

    /// The float model on the questions.
    fn float(&mut self) -> Result<Run> {
        let mut key = self.common.clone();
        key.insert("settings".into(), "float".into());
        if let Some(found) = self.record.find(&key) {
            return Ok(found.clone());
        }
        let start = Instant::now();
        let groups = self.evaluate(&self.arguments.bed.join("model"))?;
        let seconds = [0.0, start.elapsed().as_secs_f64()];
        self.add(Run { key, row: "float".into(), groups, path_error: None, findings: 0, seconds }, "float")
    }

    fn quantized(&mut self, row: &Row, bits: u32, seed: u64) -> Result<()> {
        let key = self.key(row, bits, seed);
        if self.record.find(&key).is_some() {
            return Ok(());
        }
        let work = tempfile::tempdir()?;
        let settings = PipelineSettings {
            model: self.arguments.bed.join("model"),
            calib: Some(self.arguments.bed.join(CALIB)),
            image_root: None,
            out: work.path().join("quantized"),
            format: Format::CompressedTensors,
            solver: self.solver(row, bits),
            importance: row.importance,
            importance_power: row.importance_power,
            samples: self.arguments.samples,
            seed,
            max_tokens: 2048,
            chunk_tokens: CHUNK_TOKENS,
            image_options: ImageOptions::default(),
            chat_template: Default::default(),
            strict: false,
            restart: false,
            // A run is too short to be gone on with.
            save_every: u64::MAX,
        };
        let start = Instant::now();
        let report = pipeline::run(self.devices[0], &settings, &mut ())?;
        let quantizing = start.elapsed().as_secs_f64();
        let groups = self.evaluate(&settings.out)?;
        let run = Run {
            key,
            row: row.name.clone(),
            groups,
            path_error: report.blocks.last().and_then(|block| block.path_error),
            findings: report.layers.iter().filter(|layer| !layer.solve.findings.is_empty()).count(),
            seconds: [quantizing, start.elapsed().as_secs_f64() - quantizing],
        };
        self.add(run, &format!("W{bits}, draw {seed}")).map(drop)
    }

    fn add(&mut self, run: Run, what: &str) -> Result<Run> {
        let kl = |(name, found): (&String, &super::record::Figures)| {
            found.kl.map_or(String::new(), |kl| format!(" {name} {kl:.4}"))
        };
        let kl: String = run.groups.iter().map(kl).collect();
        let [quantizing, evaluating] = run.seconds;
        eprintln!("{what}, {}: KL{kl}; {quantizing:.0} and {evaluating:.0} s", run.row);
        self.record.add(run.clone())?;
        Ok(run)
    }

    fn evaluate(&mut self, model: &Path) -> Result<std::collections::BTreeMap<String, super::record::Figures>> {
        let data = self.arguments.bed.join(questions(self.arguments));
        let settings = EvaluationSettings {
            limit: self.arguments.limit,
            decode: false,
            ..EvaluationSettings::new(model.to_owned(), data)
        };
        let reference = match self.reference.take() {
            Some(reference) => reference,
            None => {
                let model = self.arguments.bed.join("model");
                let float = EvaluationSettings { model, ..settings.clone() };
                let logits = evaluate::answer_logits(self.devices[1], &float)?;
                let bytes: usize = logits.iter().map(|rows| size_of_val(rows.data())).sum();
                eprintln!("the float model's logits take {} MiB", bytes >> 20);
                logits
            }
        };
        let found = evaluate::run_against(self.devices[1], &settings, &reference, &mut ());
        self.reference = Some(reference);
        Ok(figures(&found?))
    }
}

const MODEL: &str = "model/model.safetensors";
const CALIB: &str = "data/calib.jsonl";

fn questions(arguments: &Arguments) -> String {
    format!("data/{}.jsonl", arguments.set.name())
}
