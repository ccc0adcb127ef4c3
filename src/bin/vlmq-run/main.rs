//! The command line: flags in, the library's work, words out.
//!
//! Exit codes: 0 done; 1 an error, told on stderr; 2 wrong usage; 130 and 143 ended by SIGINT and SIGTERM.

mod args;
mod device;
mod dry_run;
mod eval;
mod grid_args;
mod inspect;
mod progress;
mod quantize;
mod signals;
mod text;
mod values;
mod verify;

use anyhow::{Context, Result};
use args::{Cli, Command, MachineArgs};
use device::Chosen;
use progress::Screen;
use signals::Signals;
use std::io::Write;
use std::process::ExitCode;
use vlmq::device::cpu::Cpu;
use vlmq::device::{ModelOps, SolveOps};
use vlmq::progress::Interrupted;
use vlmq::quantize::pipeline::Unfinished;

fn main() -> ExitCode {
    vlmq::heap::fix_thresholds();
    let cli = Cli::read();
    let signals = Signals::default();
    match run(&cli, &signals) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            let kept = error.downcast_ref::<Unfinished>().map(|unfinished| format!(": {}", unfinished.kept()));
            let kept = kept.unwrap_or_default();
            let _ = writeln!(std::io::stderr(), "interrupted{kept}; run the same command again to go on");
            signals.exit_code()
        }
        // Whoever reads our output has had enough of it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// Causes from libraries may span lines; whoever reads our stderr counts on one line an error. Names from strangers' files
/// may hold what a terminal takes for commands.
fn one_line(message: &str) -> String {
    let line = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    line.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn run(cli: &Cli, signals: &Signals) -> Result<()> {
    let screen = Screen::new(cli.machine.quiet);
    signals.listen(&screen)?;
    prepare(&cli.machine, &screen)?;
    cli.command.check()?;
    match device::choose(cli.machine.device, cli.command.model(), cli.command.max_gpu_memory())? {
        Chosen::Cpu => run_on(&Cpu, &cli.command, &screen, signals),
        Chosen::Cuda(device) => run_on(&device, &cli.command, &screen, signals),
    }
}

fn run_on<D: ModelOps + SolveOps>(device: &D, command: &Command, screen: &Screen, signals: &Signals) -> Result<()> {
    match command {
        Command::Quantize(args) => quantize::run(device, args, screen, signals),
        Command::Eval(args) => eval::run(device, args, screen),
        Command::Inspect(args) => inspect::run(device, args),
        Command::Verify(args) => verify::run(args, screen),
    }
}

fn prepare(machine: &MachineArgs, screen: &Screen) -> Result<()> {
    let usual = if machine.quiet { log::LevelFilter::Error } else { log::LevelFilter::Warn };
    screen.log(machine.log_level.unwrap_or(usual));
    let threads = machine.threads.unwrap_or(0);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot start the threads")
}

/// Writes lines of a result to stdout.
fn print_lines(lines: &[String]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    out.flush()?;
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
