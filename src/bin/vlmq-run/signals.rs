//! What SIGINT and SIGTERM do: work that keeps a state gets to finish what it writes; all else, and a second signal, ends the
//! program at once. Either way it exits with 128 and the signal's number, as shells have it.

use crate::progress::Screen;
use anyhow::Result;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use vlmq::progress::Stop;

/// The signals so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    stop: Stop,
    /// The first one's number, 0 as long as there was none.
    first: Arc<AtomicI32>,
    /// Whether the work under way looks at `stop`.
    patient: Arc<AtomicBool>,
}

impl Signals {
    /// Begins to listen. On systems without these signals the program ends as others do.
    #[cfg_attr(not(unix), allow(clippy::unnecessary_wraps))]
    pub(crate) fn listen(&self, screen: &Screen) -> Result<()> {
        #[cfg(unix)]
        {
            use anyhow::Context;
            use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
            // Taken and not looked at: a file that grows beyond what `ulimit -f` allows is then an error like a full disk.
            signal_hook::flag::register(SIGXFSZ, Arc::default()).context("cannot take signals")?;
            let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context("cannot take signals")?;
            let (this, screen) = (self.clone(), screen.clone());
            let thread = std::thread::Builder::new().spawn(move || {
                for signal in &mut signals {
                    let first = this.first.swap(signal, Ordering::Relaxed) == 0;
                    if !first || !this.patient.load(Ordering::Relaxed) {
                        screen.alert("interrupted");
                        signal_hook::low_level::exit(128 + signal);
                    }
                    screen.say("stopping where nothing is lost; a second signal ends the program at once");
                    this.stop.request();
                }
            });
            thread.context("cannot start a thread to take signals")?;
        }
        #[cfg(not(unix))]
        let _ = screen;
        Ok(())
    }

    /// Runs work that stops when it is asked to.
    pub(crate) fn wait_for<T>(&self, work: impl FnOnce(Stop) -> T) -> T {
        self.patient.store(true, Ordering::Relaxed);
        let done = work(self.stop.clone());
        self.patient.store(false, Ordering::Relaxed);
        done
    }

    /// Exit code of a program that was asked to stop.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(128 + self.first.load(Ordering::Relaxed) as u8)
    }
}
