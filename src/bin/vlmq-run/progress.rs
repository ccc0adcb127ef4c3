//! What a person sees of a run while it works, all of it on stderr: bars on a terminal, lines elsewhere.

use crate::text;
use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle, WeakProgressBar};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vlmq::progress::{Observer, Stage, StageTime, Stop};
use vlmq::quantize::{Finding, FindingKind};
use vlmq::report::{LayerReport, RunObserver};

/// Time between two lines of progress where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Time between two looks at the clock of a bar.
const TICK: Duration = Duration::from_millis(500);

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Silent,
    Lines,
    Bars,
}

/// The place for everything that is not a result. Clones write to the same screen.
#[derive(Clone)]
pub(crate) struct Screen {
    bars: MultiProgress,
    style: Style,
    /// The bar whose clock runs.
    current: Arc<Mutex<WeakProgressBar>>,
}

impl Screen {
    pub(crate) fn new(quiet: bool) -> Self {
        let style = match quiet {
            true => Style::Silent,
            false if std::io::stderr().is_terminal() => Style::Bars,
            false => Style::Lines,
        };
        Self { bars: MultiProgress::new(), style, current: Arc::default() }
    }

    /// Keeps the clocks of bars running between events: blocks take long. Bars would start a thread for that themselves, and panic
    /// where there is none to be had.
    pub(crate) fn start_clock(&self) -> Result<()> {
        if self.style == Style::Bars {
            let screen = self.clone();
            let thread = std::thread::Builder::new().spawn(move || {
                loop {
                    std::thread::sleep(TICK);
                    let bar = screen.current().upgrade();
                    bar.inspect(ProgressBar::tick);
                }
            });
            thread.context("cannot start a thread for the clock of the progress bars")?;
        }
        Ok(())
    }

    fn current(&self) -> MutexGuard<'_, WeakProgressBar> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints a line above the bars. A closed stderr is no reason to stop a run.
    fn print(&self, line: &str) {
        let line = text::shown(line);
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }

    /// Prints what is no result and no error.
    pub(crate) fn say(&self, text: &str) {
        if self.style != Style::Silent {
            self.print(text);
        }
    }

    /// Prints even where nothing else is shown.
    pub(crate) fn alert(&self, text: &str) {
        self.print(text);
    }

    /// Sends log messages of at least `level` to the screen.
    pub(crate) fn log(&self, level: log::LevelFilter) {
        let screen = self.clone();
        env_logger::Builder::new()
            .filter_level(level)
            // Libraries below us log their own affairs.
            .filter_module("tokenizers", level.min(log::LevelFilter::Warn))
            .format(move |_, record| {
                let line = format!("{}: {}", record.level().as_str().to_lowercase(), record.args());
                screen.print(&text::one_line(&line));
                Ok(())
            })
            .init();
    }

    /// A listener that shows a run on this screen, and asks it to stop when `stop` does.
    pub(crate) fn observer(&self, stop: Stop) -> Progress {
        Progress { screen: self.clone(), stop, stage: None, finished_before: 0, header_shown: false }
    }
}

/// The stage under way.
#[derive(Debug)]
struct Running {
    stage: Stage,
    total: u64,
    /// What was done before the start, by an earlier run.
    before: u64,
    start: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

/// Shows a run's events.
pub(crate) struct Progress {
    screen: Screen,
    stop: Stop,
    stage: Option<Running>,
    /// Blocks that an earlier run did.
    finished_before: u64,
    header_shown: bool,
}

impl Progress {
    fn bar(&self, stage: Stage, total: u64, before: u64) -> Option<ProgressBar> {
        if self.screen.style != Style::Bars {
            return None;
        }
        let (what, things) = stage.describe();
        let template = format!("{what:<15} {{bar:16}} {{pos}}/{{len}} {things}{{left}}  {{wide_msg}}");
        let bar = self.screen.bars.add(ProgressBar::new(total));
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.with_key("left", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let (elapsed, total) = (state.elapsed().as_secs_f64(), state.len().unwrap_or(0));
                let left = time_left(elapsed, state.pos().saturating_sub(before), total.saturating_sub(before));
                let _ = out.write_str(&left);
            }));
        }
        *self.screen.current() = bar.downgrade();
        Some(bar)
    }
}

impl Observer for Progress {
    fn stage_started(&mut self, stage: Stage, total: u64) {
        let (what, things) = stage.describe();
        if self.screen.style == Style::Lines {
            self.screen.print(&format!("{what}: {total} {things}"));
        }
        let now = Instant::now();
        let before = if stage == Stage::Blocks { self.finished_before } else { 0 };
        let bar = self.bar(stage, total, before);
        self.stage = Some(Running { stage, total, before, start: now, last_line: now, bar });
    }

    fn stage_advanced(&mut self, stage: Stage, done: u64, step: &str) {
        let Some(running) = self.stage.as_mut().filter(|running| running.stage == stage) else { return };
        if let Some(bar) = &running.bar {
            bar.set_position(done);
            bar.set_message(text::shown(step));
        } else if self.screen.style == Style::Lines && running.last_line.elapsed() >= LINE_INTERVAL {
            running.last_line = Instant::now();
            let elapsed = running.start.elapsed().as_secs_f64();
            let left =
                time_left(elapsed, done.saturating_sub(running.before), running.total.saturating_sub(running.before));
            let line = progress_line(stage, done, running.total, &left, step);
            self.screen.print(&line);
        }
    }

    fn stage_finished(&mut self, time: &StageTime) {
        if let Some(bar) = self.stage.take().and_then(|running| running.bar) {
            bar.finish_and_clear();
        }
        self.screen.say(&format!("{}: done in {}", time.stage, text::seconds(time.seconds)));
    }

    fn stop(&self) -> Stop {
        self.stop.clone()
    }
}

impl RunObserver for Progress {
    fn resumed(&mut self, finished: usize, blocks: usize, folder: &Path) {
        self.finished_before = finished as u64;
        self.screen.say(&format!("going on: {finished} of {blocks} blocks are done, from {}", folder.display()));
    }

    fn layer_finished(&mut self, layer: &LayerReport) {
        if self.screen.style == Style::Silent {
            return;
        }
        if !self.header_shown {
            self.header_shown = true;
            self.screen.print(&layer_header());
        }
        self.screen.print(&layer_row(layer));
    }
}

fn progress_line(stage: Stage, done: u64, total: u64, left: &str, step: &str) -> String {
    let (what, things) = stage.describe();
    let mut line = format!("{what}: {done} of {total} {things}{left}");
    if !step.is_empty() {
        line += &format!(" ({step})");
    }
    line
}

/// What is left at the pace so far, `, 12 s left`; nothing as long as there is no pace.
fn time_left(elapsed: f64, done: u64, total: u64) -> String {
    if done == 0 {
        return String::new();
    }
    let left = elapsed * total.saturating_sub(done) as f64 / done as f64;
    format!(", {} left", text::seconds(left))
}

fn layer_header() -> String {
    let (block, layer, shape, error) = ("block", "layer", "out x in", "rel. error");
    format!("{block:>5}  {layer:<18}  {shape:>13}  {error:>10}  {:>9}  {:>8}", "damping", "time")
}

/// One line of the table; its columns have fixed widths because the later rows are not known yet.
fn layer_row(layer: &LayerReport) -> String {
    let name = layer.name.rsplit('.').take(2).collect::<Vec<_>>();
    let name = name.into_iter().rev().collect::<Vec<_>>().join(".");
    let shape = format!("{} x {}", layer.rows, layer.cols);
    let damp = match layer.solve.damp {
        None => "-".into(),
        // What would not fit its column.
        Some(damp) if damp < 1e-4 => format!("{damp:.2e}"),
        Some(damp) => format!("{damp}"),
    };
    let time = text::seconds(layer.solve.seconds);
    let error = layer.solve.relative_error;
    let mut row = format!("{:>5}  {name:<18}  {shape:>13}  {error:>10.3e}  {damp:>9}  {time:>8}", layer.block);
    // A few dead inputs are no finding, but worth a word.
    let finding = |finding: &Finding| match finding.kind {
        FindingKind::DeadInputs => None,
        kind => Some(kind.to_string()),
    };
    let dead = (layer.solve.dead_inputs > 0).then(|| format!("{} dead inputs", layer.solve.dead_inputs));
    for mark in layer.solve.findings.iter().filter_map(finding).chain(dead) {
        row += &format!("  {mark}");
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlmq::quantize::SolveReport;

    fn layer(damp: Option<f64>, dead_inputs: usize, findings: &[FindingKind]) -> LayerReport {
        LayerReport {
            name: "model.language_model.layers.12.self_attn.q_proj".into(),
            block: 12,
            rows: 3584,
            cols: 18944,
            bits: 3,
            group_columns: 128,
            weight_error: 0.1,
            solve: SolveReport {
                relative_error: 0.01234,
                damp,
                dead_inputs,
                tokens: 9,
                effective_tokens: None,
                seconds: 1.5,
                findings: findings
                    .iter()
                    .map(|&kind| Finding { kind, found: "this".into(), done: "that".into() })
                    .collect(),
            },
            importance: None,
        }
    }

    #[test]
    fn rows_stand_under_the_header() {
        let row = layer_row(&layer(Some(0.01), 0, &[]));
        assert_eq!(row.chars().count(), layer_header().chars().count());
        assert_eq!(row, "   12  self_attn.q_proj     3584 x 18944    1.234e-2       0.01    1.50 s");
        assert!(layer_row(&layer(None, 0, &[])).contains(" - "));
        assert!(layer_row(&layer(Some(1.024e-7), 0, &[])).contains("   1.02e-7    1.50 s"));
    }

    #[test]
    fn findings_and_dead_inputs_are_marked() {
        let row = layer_row(&layer(Some(0.04), 3, &[FindingKind::DeadInputs, FindingKind::DampingRaised]));
        assert!(row.ends_with(" s  damping raised  3 dead inputs"), "{row}");
        let row = layer_row(&layer(Some(0.01), 3, &[]));
        assert!(row.ends_with(" s  3 dead inputs"), "{row}");
    }

    #[test]
    fn lines_tell_what_is_left() {
        let line = progress_line(Stage::Blocks, 7, 28, &time_left(10.0, 7, 28), "block 7: importance");
        assert_eq!(line, "quantizing: 7 of 28 blocks, 30.0 s left (block 7: importance)");
        assert_eq!(progress_line(Stage::Data, 0, 5, &time_left(1.0, 0, 5), ""), "reading data: 0 of 5 samples");
    }
}
