//! Work on a stranger's behalf that may never end, or end in a stack too deep.

use anyhow::{Context, Result, bail};
use std::fs;
use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Stack of the thread that works. A template may be nested as deeply as it has bytes, and what it builds as deeply as its
/// fuel allows; both are walked through by recursion. Pages that nothing touches take no memory.
const STACK_BYTES: usize = 512 << 20;

/// Most time that the work may take on a processor: real templates need milliseconds. Fuel counts what a template asks for,
/// not how often a list is walked through that holds itself many times over; text made of one was seen to grow by 0.6 GB
/// a second.
const MAX_TIME: Duration = Duration::from_secs(1);

/// As much where the system does not tell a thread's own time.
const MAX_WALL_TIME: Duration = Duration::from_secs(10);

/// How often the time is asked for.
const INTERVAL: Duration = Duration::from_millis(50);

/// Runs `work` on a thread of its own, for no longer than it may take.
///
/// Errors where it takes longer. Nothing stops the thread then, which goes on until the program ends: the caller should
/// see to that.
pub(super) fn bounded<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, result) = mpsc::channel();
    let (begin, task) = mpsc::channel();
    let thread = Builder::new().stack_size(STACK_BYTES).spawn(move || {
        // Nobody listens any more where the time is over.
        let _ = begin.send(fs::read_link("/proc/thread-self").ok());
        let _ = sender.send(work());
    });
    let thread = thread.context("cannot start a thread for a chat template")?;
    let started = Instant::now();
    let mut status = None;
    loop {
        match result.recv_timeout(INTERVAL) {
            Ok(result) => {
                // What it leaves is freed before anything else is begun.
                let _ = thread.join();
                return result;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => resume_unwind(panic),
                Ok(()) => bail!("the thread for a chat template ended without a result"),
            },
        }
        if let Ok(task) = task.try_recv() {
            status = task.map(|task| std::path::Path::new("/proc").join(task).join("stat"));
        }
        let over = match status.as_deref().and_then(processor_time) {
            Some(time) => time > MAX_TIME,
            None => started.elapsed() > MAX_WALL_TIME,
        };
        if over {
            bail!("it takes more than {} s", MAX_TIME.as_secs());
        }
    }
}

/// Time that a thread has had, from its `stat` under /proc (proc_pid_stat(5): fields 14 and 15, in hundredths of a second on
/// every Linux).
fn processor_time(stat: &std::path::Path) -> Option<Duration> {
    let text = fs::read_to_string(stat).ok()?;
    // The name, in parentheses, may hold spaces.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}
