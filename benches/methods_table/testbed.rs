//! The table on the test bed (benches/testbed).
//!
//! KL from the float model per answer token, image answers and text apart, and how often the likeliest token is the float model's,
//! all tokens of the right answer before it given: nothing is decoded. All rows see the same calibration draws, so that each is
//! compared with the first row draw by draw: draws differ by more than methods do.

use super::record::{Figures, Record, Run, figures};
use super::rows::{self, Draw, Row};
use super::summary::{Entry, table};
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vlmq::checkpoint::Checkpoint;
use vlmq::checkpoint::checksum;
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::Cuda;
use vlmq::model::families;
use vlmq::quantize::settings::{Solver, SolverSettings};
use vlmq::report::provenance::COMMIT;
use vlmq::run::evaluation::{self, EvaluationSettings};
use vlmq::run::{self, CHUNK_TOKENS, RunSettings, Runs};
use vlmq::tensor::{Float, Matrix};

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
    /// Runs at once. On a GPU each has a stream of its own, and one leaves most of it idle; on a CPU they share the cores.
    #[arg(long, default_value = "1")]
    jobs: NonZeroUsize,
    /// Tokens that are added to the statistics at once: other sizes cut the float32 sums elsewhere, which shows how far rounding
    /// alone moves the figures.
    #[arg(long, default_value_t = CHUNK_TOKENS)]
    chunk_tokens: usize,
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
        Where::Cpu => Table::new(&|| Ok(Devices { quantizing: Cpu, evaluating: Cpu }), arguments)?.print(),
        Where::Cuda => {
            // Models are quantized in their own precision, as users do. What they then say is compared in float32: a bfloat16 pass
            // rounds by as much as 4 bits change.
            let precision = families::float_type(&Checkpoint::open(&arguments.bed.join("model"))?)?;
            let open = || {
                let evaluating = Cuda::open(0, Float::F32)?;
                Ok(Devices { quantizing: evaluating.with_precision(precision), evaluating })
            };
            Table::new(&open, arguments)?.print()
        }
    }
}

/// Where models are quantized, and where they are evaluated.
struct Devices<D> {
    quantizing: D,
    evaluating: D,
}

struct Table<'a, D> {
    /// Of the job that asks.
    open: &'a (dyn Fn() -> Result<Devices<D>> + Sync),
    arguments: &'a Arguments,
    rows: Vec<Row>,
    group_size: Option<usize>,
    record: Mutex<Record>,
    /// What every run has in common of what decides its figures.
    common: Map<String, Value>,
}

/// A run that the table needs.
struct Job<'a> {
    key: Map<String, Value>,
    row: &'a Row,
    bits: u32,
    seed: u64,
}

impl<'a, D: Runs> Table<'a, D> {
    /// Refuses what can be refused before anything is computed.
    fn new(open: &'a (dyn Fn() -> Result<Devices<D>> + Sync), arguments: &'a Arguments) -> Result<Self> {
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
            "device": open()?.quantizing.name(),
            "set": arguments.set.name(),
            "limit": arguments.limit,
            "chunk_tokens": arguments.chunk_tokens,
        });
        let Value::Object(common) = common else { bail!("a key is an object") };
        let record = Mutex::new(Record::open(arguments.json.as_deref())?);
        Ok(Self { open, arguments, rows, group_size, record, common })
    }

    /// Runs what is not yet found, and prints it all.
    fn print(self) -> Result<()> {
        let float = self.run_all()?;
        let Arguments { draws, samples, set, group_size, bits, .. } = self.arguments;
        let nll = |(name, found): (&String, &Figures)| {
            let nll = found.nll.map_or("–".into(), |nll| format!("{nll:.4}"));
            format!("{name} {nll} ({} questions, {} tokens)", found.n, found.tokens)
        };
        let nll: Vec<String> = float.groups.iter().map(nll).collect();
        println!("The float model's negative log-likelihood per token: {}.", nll.join(", "));
        for &bits in bits {
            let record = self.record();
            println!(
                "\nW{bits} g{group_size}, {}; draws of {samples} samples: {draws}; mean ± standard error\n",
                set.name()
            );
            let keys = |row: &Row| -> Vec<Map<String, Value>> {
                let draws = if row.solver.solver == Solver::Rtn { 1 } else { usize::MAX };
                self.seeds().take(draws).map(|seed| self.key(row, bits, seed)).collect()
            };
            let entry = |row: &'_ Row| -> Result<Vec<&Run>> {
                keys(row).iter().map(|key| record.find(key).context("a run is missing")).collect()
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

    /// The row at a width, and at the table's group size.
    fn whole(&self, row: &Row, bits: u32) -> Row {
        Row { solver: SolverSettings { bits, group_size: self.group_size, ..row.solver.clone() }, ..row.clone() }
    }

    /// All that decides a run's figures. Round-to-nearest looks at no data: one run serves all draws.
    fn key(&self, row: &Row, bits: u32, seed: u64) -> Map<String, Value> {
        let mut key = self.common.clone();
        key.insert("settings".into(), Value::Object(rows::settings(&self.whole(row, bits))));
        if row.solver.solver != Solver::Rtn {
            key.insert("samples".into(), self.arguments.samples.into());
            key.insert("seed".into(), seed.into());
        }
        key
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The jobs that are not yet done, draw by draw, so that what an interrupted table has can be compared.
    fn jobs(&self) -> Vec<Job<'_>> {
        let (mut jobs, record) = (Vec::<Job>::new(), self.record());
        for &bits in &self.arguments.bits {
            for seed in self.seeds() {
                for row in &self.rows {
                    let key = self.key(row, bits, seed);
                    if record.find(&key).is_none() && jobs.iter().all(|job| job.key != key) {
                        jobs.push(Job { key, row, bits, seed });
                    }
                }
            }
        }
        jobs
    }

    /// Does all jobs, so many at once as asked for; the float model's run comes back. The first error ends the table: no
    /// further job is begun.
    fn run_all(&self) -> Result<Run> {
        let mut key = self.common.clone();
        key.insert("settings".into(), "float".into());
        let found = self.record().find(&key).cloned();
        let jobs = self.jobs();
        if let (Some(float), true) = (&found, jobs.is_empty()) {
            return Ok(float.clone());
        }
        let device = (self.open)()?.evaluating;
        let start = Instant::now();
        let model = self.arguments.bed.join("model");
        let reference = evaluation::answer_logits(&device, &self.evaluation(model.clone()))?;
        let bytes: usize = reference.iter().map(|rows| size_of_val(rows.data())).sum();
        eprintln!("the float model's logits take {} MiB", bytes >> 20);
        let float = match found {
            Some(float) => float,
            None => {
                let groups = self.evaluate(&device, model, &reference)?;
                let seconds = [0.0, start.elapsed().as_secs_f64()];
                self.add(Run { key, row: "float".into(), groups, path_error: None, findings: 0, seconds }, "float")?
            }
        };
        drop(device);
        let queue = Mutex::new(jobs.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<()> {
            let devices = (self.open)()?;
            while let Some(job) = next() {
                if let Err(error) = self.quantized(&devices, &job, &reference) {
                    while next().is_some() {}
                    return Err(error);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.arguments.jobs.get()).map(|_| scope.spawn(work)).collect();
            let ended = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a job panicked")));
            // All of them, whatever the first says.
            ended.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
        })?;
        Ok(float)
    }

    fn quantized(&self, devices: &Devices<D>, job: &Job, reference: &[Matrix]) -> Result<()> {
        let Job { row, bits, seed, .. } = *job;
        let work = tempfile::tempdir()?;
        let (bed, out) = (&self.arguments.bed, work.path().join("quantized"));
        let settings = RunSettings {
            chunk_tokens: self.arguments.chunk_tokens,
            ..self.whole(row, bits).run(
                bed.join("model"),
                bed.join(CALIB),
                out,
                Draw { samples: self.arguments.samples, seed },
            )
        };
        let start = Instant::now();
        let report = run::run(&devices.quantizing, &settings, &mut ())?;
        let quantizing = start.elapsed().as_secs_f64();
        let groups = self.evaluate(&devices.evaluating, settings.out, reference)?;
        let run = Run {
            key: job.key.clone(),
            row: row.name.clone(),
            groups,
            path_error: report.blocks.last().and_then(|block| block.path_error),
            findings: report.layers.iter().filter(|layer| !layer.solve.findings.is_empty()).count(),
            seconds: [quantizing, start.elapsed().as_secs_f64() - quantizing],
        };
        self.add(run, &format!("W{bits}, draw {seed}")).map(drop)
    }

    fn add(&self, run: Run, what: &str) -> Result<Run> {
        let kl = |(name, found): (&String, &Figures)| found.kl.map_or(String::new(), |kl| format!(" {name} {kl:.4}"));
        let kl: String = run.groups.iter().map(kl).collect();
        let [quantizing, evaluating] = run.seconds;
        eprintln!("{what}, {}: KL{kl}; {quantizing:.0} and {evaluating:.0} s", run.row);
        self.record().add(run.clone())?;
        Ok(run)
    }

    fn evaluation(&self, model: PathBuf) -> EvaluationSettings {
        let data = self.arguments.bed.join(questions(self.arguments));
        EvaluationSettings { limit: self.arguments.limit, decode: false, ..EvaluationSettings::new(model, data) }
    }

    fn evaluate(&self, device: &D, model: PathBuf, reference: &[Matrix]) -> Result<BTreeMap<String, Figures>> {
        Ok(figures(&evaluation::run_against(device, &self.evaluation(model), reference, &mut ())?))
    }
}

const MODEL: &str = "model/model.safetensors";
const CALIB: &str = "data/calib.jsonl";

fn questions(arguments: &Arguments) -> String {
    format!("data/{}.jsonl", arguments.set.name())
}
