//! Work on a stranger's behalf that may never end, or end in a stack too deep.

use anyhow::{Context, Result, bail};
use std::cell::RefCell;
use std::error::Error;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::Builder;
use std::time::{Duration, Instant};
use std::{fmt, fs};

/// Stack of the thread that works. A template may be nested as deeply as it has bytes, and what it builds as deeply as its
/// fuel allows; both are walked through by recursion. Pages that nothing touches take no memory.
const STACK_BYTES: usize = 512 << 20;

/// Factor by which the work may take longer by the clock where the system does not tell a thread's own time.
const WALL_TIME: u32 = 10;

/// How often the time is asked for.
const INTERVAL: Duration = Duration::from_millis(50);

thread_local! {
    /// Flag of the work that this thread does.
    static OVER: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// Why work was not waited for: a chat template or a tokenizer took longer than real ones do.
#[derive(Clone, Copy, Debug)]
pub struct TakesTooLong(Duration);

impl fmt::Display for TakesTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it takes more than {} s", self.0.as_secs())
    }
}

impl Error for TakesTooLong {}

/// Whether nobody waits any longer for the work that this thread does.
pub(super) fn is_over() -> bool {
    OVER.with_borrow(|over| over.as_ref().is_some_and(|over| over.load(Ordering::Relaxed)))
}

/// Runs `work` on a thread of its own, for no longer than it may take on a processor.
///
/// Errors with [`TakesTooLong`] where it takes longer. The thread then goes on until it asks [`is_over`], or until the program ends:
/// the caller should see to that, and pass this error on.
pub(super) fn bounded<T: Send + 'static>(
    most: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, result) = mpsc::channel();
    let (begin, task) = mpsc::channel();
    let over = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&over);
    let thread = Builder::new().stack_size(STACK_BYTES).spawn(move || {
        OVER.set(Some(theirs));
        // Nobody listens any more where the time is over.
        let _ = begin.send(fs::read_link("/proc/thread-self").ok());
        let _ = sender.send(work());
    });
    let thread = thread.context("cannot start a thread for a chat template or a tokenizer")?;
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
                Ok(()) => bail!("the thread for a chat template or a tokenizer ended without a result"),
            },
        }
        if let Ok(task) = task.try_recv() {
            status = task.map(|task| std::path::Path::new("/proc").join(task).join("stat"));
        }
        let took_too_long = match status.as_deref().and_then(processor_time) {
            Some(time) => time > most,
            None => started.elapsed() > most * WALL_TIME,
        };
        if took_too_long {
            over.store(true, Ordering::Relaxed);
            return Err(TakesTooLong(most).into());
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
