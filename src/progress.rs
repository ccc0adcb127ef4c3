//! The stages of a long run, how whoever started it listens, and how they stop it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The long parts of a run, in the order in which they happen. Each is a unit of progress with a total.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Reading conversations and images; counts samples.
    Data,
    /// Taking checksums of what is read; counts no parts.
    Checksums,
    /// Writing tensors that keep their precision; counts megabytes.
    Write,
    /// Running the vision tower; counts samples.
    Vision,
    /// Quantizing the decoder; counts decoder blocks.
    Blocks,
    /// Answering questions; counts samples.
    Evaluate,
    /// Reading quantized layers back; counts layers.
    Verify,
}

impl Stage {
    /// What is done, and of what things the progress counts how many.
    pub fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::Data => ("reading data", "samples"),
            Self::Checksums => ("checksums", "sets"),
            Self::Vision => ("encoding images", "samples"),
            Self::Blocks => ("quantizing", "blocks"),
            Self::Write => ("writing", "MB"),
            Self::Evaluate => ("evaluating", "samples"),
            Self::Verify => ("verifying", "layers"),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.describe().0)
    }
}

/// Listens to a run. Calls come from the thread that runs it, in order; what a user must know beyond them goes to
/// [`log::warn!`]. `()` listens to nothing.
pub trait Observer {
    /// `stage` begins; it will count up to `total`.
    fn stage_started(&mut self, _stage: Stage, _total: u64) {}

    /// `stage` has come to `done` of its total. `step` names what is under way, such as `block 3: importance 12/256`;
    /// the call may repeat a `done` to show a new step.
    fn stage_advanced(&mut self, _stage: Stage, _done: u64, _step: &str) {}

    /// A stage is over.
    fn stage_finished(&mut self, _time: &StageTime) {}

    /// What stops the run before its end, the same for as long as it lasts: it then fails with [`Interrupted`] at the next place
    /// where nothing is lost, between samples, tensors or layers. By default nothing stops it.
    fn stop(&self) -> Stop {
        Stop::default()
    }
}

impl Observer for () {}

/// A wish to stop, from any thread. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks for the work to end.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Errors once somebody wishes so.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
    }
}

/// A run was [stopped](Stop) before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Time spent in a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// A stage under way: tells the observer of its beginning and end and measures what lies between.
#[derive(Debug)]
pub struct StageClock {
    stage: Stage,
    start: Instant,
}

impl StageClock {
    /// Begins `stage`, which will count up to `total`.
    pub fn start(stage: Stage, total: u64, observer: &mut dyn Observer) -> Self {
        observer.stage_started(stage, total);
        Self { stage, start: Instant::now() }
    }

    /// Time spent so far.
    pub fn time(&self) -> StageTime {
        StageTime { stage: self.stage, seconds: self.start.elapsed().as_secs_f64() }
    }

    /// Ends the stage.
    pub fn finish(self, observer: &mut dyn Observer) -> StageTime {
        let time = self.time();
        observer.stage_finished(&time);
        time
    }
}

/// Whether a letter of a text from outside is not to be shown as it is: what a terminal takes for a command (C0, DEL, C1), what turns
/// the order of the letters around it, and what ends a line beside `\n`.
pub fn is_unshown(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A duration as people read it: `0.42 s`, `12.3 s`, `3m05s`, `2h07m`.
pub fn human_seconds(seconds: f64) -> String {
    if seconds < 9.995 {
        return format!("{seconds:.2} s");
    }
    if seconds < 99.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole / 3600 {
        0 => format!("{}m{:02}s", whole / 60, whole % 60),
        hours => format!("{hours}h{:02}m", whole % 3600 / 60),
    }
}

/// A number of bytes as people read it, in binary units: `512 B`, `1.50 KiB`, `2.25 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut size, mut unit) = (bytes as f64, 0);
    while size >= 1024.0 {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.2} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let cases = [
            (0.004, "0.00 s"),
            (9.996, "10.0 s"),
            (99.96, "1m40s"),
            (185.2, "3m05s"),
            (3599.6, "1h00m"),
            (7624.0, "2h07m"),
        ];
        for (value, expected) in cases {
            assert_eq!(human_seconds(value), expected);
        }
    }

    #[test]
    fn sizes() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            ((1 << 20) - 1, "1024.00 KiB"),
            (1 << 20, "1.00 MiB"),
            (78_643_200, "75.00 MiB"),
            (5 << 28, "1.25 GiB"),
            (3 << 40, "3.00 TiB"),
            (1 << 50, "1.00 PiB"),
            (u64::MAX, "16.00 EiB"),
        ];
        for (value, expected) in cases {
            assert_eq!(human_bytes(value), expected);
        }
    }

    #[test]
    fn letters_that_are_not_shown() {
        let unshown = "\0\u{1b}\r\n\t\u{7f}\u{80}\u{9b}\u{9f}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}";
        assert!(unshown.chars().all(is_unshown));
        assert!(!" ~\u{a0}é\u{200b}\u{200d}\u{2027}\u{202f}\u{2065}\u{206a}א字😀\u{fffd}".chars().any(is_unshown));
    }
}
