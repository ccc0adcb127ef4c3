//! The command line: flags in, the library's work, words out.
//!
//! Exit codes: 0 done; 1 an error, told on stderr; 2 wrong usage; 130 and 143 ended by SIGINT and SIGTERM.

mod args;
mod device;
mod dry_run;
mod eval;
mod grid_args;
mod inspect;
mod json_file;
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
use serde::Serialize;
use signals::Signals;
use std::io::Write;
use std::process::ExitCode;
use values::MAX_THREADS;
use vlmq::device::cpu::Cpu;
use vlmq::progress::Interrupted;
use vlmq::run::Runs;
use vlmq::run::Unfinished;

/// Stack of the thread that does the work, and of those that help it, whatever limits the program was started under.
const STACK_BYTES: usize = 8 << 20;
const HELPER_STACK_BYTES: usize = 2 << 20;

fn main() -> ExitCode {
    vlmq::heap::fix_thresholds();
    if has_enough_stack() {
        return work();
    }
    match std::thread::Builder::new().name("main".into()).stack_size(STACK_BYTES).spawn(work) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(error) => fail(&format!("cannot start the main thread: {error}")),
    }
}

/// Whether the first thread may grow its stack as far as the work needs. It is not left for another without need: what that
/// allocates comes from other heaps, which hold more.
fn has_enough_stack() -> bool {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit};
        getrlimit(Resource::Stack).current.is_none_or(|bytes| bytes >= STACK_BYTES as u64)
    }
    #[cfg(not(unix))]
    false
}

fn work() -> ExitCode {
    let signals = Signals::default();
    match Cli::read().and_then(|cli| run(&cli, &signals)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            let kept = error.downcast_ref::<Unfinished>().map(|unfinished| format!(": {}", unfinished.kept()));
            let message = format!("interrupted{}; run the same command again to go on", kept.unwrap_or_default());
            let _ = writeln!(std::io::stderr(), "{}", text::one_line(&message));
            signals.exit_code()
        }
        // Whoever reads our output has had enough of it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("{error:#}")),
    }
}

/// Tells of the error that ends the program.
fn fail(message: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", text::one_line(message));
    ExitCode::FAILURE
}

fn run(cli: &Cli, signals: &Signals) -> Result<()> {
    let screen = Screen::new(cli.machine.quiet);
    signals.listen(&screen)?;
    screen.start_clock()?;
    prepare(&cli.machine, &screen)?;
    cli.command.check()?;
    match device::choose(cli.machine.device, cli.command.model(), cli.command.max_gpu_memory())? {
        Chosen::Cpu => run_on(&Cpu, &cli.command, &screen, signals),
        Chosen::Cuda(device) => run_on(&device, &cli.command, &screen, signals),
    }
}

fn run_on<D: Runs>(device: &D, command: &Command, screen: &Screen, signals: &Signals) -> Result<()> {
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
    let all = || std::thread::available_parallelism().map_or(1, |all| all.get().min(MAX_THREADS));
    let threads = machine.threads.unwrap_or_else(all);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(HELPER_STACK_BYTES);
    pool.build_global().with_context(|| format!("cannot start {threads} threads; ask for fewer with --threads"))
}

/// Writes lines of a result to stdout.
fn print_lines(lines: &[String]) -> Result<()> {
    print(&lines.iter().map(|line| text::shown(line) + "\n").collect::<String>())
}

/// Writes a result to stdout for programs to read.
fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(text::json(value)? + "\n"))
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
