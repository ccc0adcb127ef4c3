//! What a run keeps in its work folder, so that the same command goes on behind the last finished block.
//!
//! | file | what it holds |
//! |---|---|
//! | `run.json` | what makes the run: program, settings, checksums of the inputs, device and its libraries; written before the first state |
//! | `checkpoint/` | the output as it grows |
//! | `levels` | image features that the first blocks add (DeepStack); written once, with the first state, where any are still to come |
//! | `state-N` | behind N blocks: reports, times, checksums of the finished layers, both paths' residual streams |
//! | `spare-0`, `spare-1` | space taken on the disk for the next states |
//!
//! State N gets its name when the tensors of N blocks and the state itself have reached the disk; only then the state before it
//! becomes space for the one after. So there is a whole state at every moment from the first on. Layers of blocks behind it,
//! finished or cut short, are written again. How often there is one is a matter of time; a run that is asked to end first saves the
//! blocks that it has finished.
//!
//! Rotary tables, sequence bounds and the data itself are made anew: that takes seconds, and the checksums need the data anyway.
//! What the vision tower made is not: on a CPU it takes as long as some blocks. There is no random state: the one thing left to
//! chance is which samples are drawn, by a seed, and a checksum covers the drawn ones.

mod difference;
mod saver;
mod session;

pub(super) use saver::{Begin, Saved, Saver};
pub(super) use session::{Session, Streams, reopen};

use crate::checkpoint::own;
use crate::checkpoint::sealed::Sealed;
use crate::checkpoint::work::{Kept, WorkFolder, reserve};
use crate::plan::StateBytes;
use crate::progress::{Stage, StageTime};
use crate::report::check::ModelCheck;
use crate::report::peak_memory_bytes;
use crate::report::provenance::Provenance;
use crate::report::{BlockReport, LayerReport};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

/// Version of all this.
const FORMAT: u32 = 2;

/// The reports in a state.
const REPORTS: &str = "reports";

/// What to do about a work folder that cannot be used.
const RESTART: &str = "begin anew with --restart";

/// What is done of the decoder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Blocks {
    pub(super) layers: Vec<LayerReport>,
    pub(super) blocks: Vec<BlockReport>,
}

/// A run behind some of its blocks.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// The finished blocks.
    pub(super) done: Blocks,
    /// What they took.
    pub(super) spent: Spent,
    /// Most device memory in use, by stage.
    pub(super) measured: Vec<(Stage, Option<u64>)>,
    /// SHA-256 of the finished layers' tensors.
    pub(super) checksums: BTreeMap<String, String>,
    /// What came of the model as a whole, once all blocks are done.
    pub(super) check: Option<ModelCheck>,
}

impl State {
    pub(super) fn finished(&self) -> usize {
        self.done.blocks.len()
    }
}

/// Time and memory that a run took so far, in all its processes together; what one lost when it was killed does not count.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Spent {
    pub(super) stages: Vec<StageTime>,
    pub(super) seconds: f64,
    pub(super) peak_memory_bytes: Option<u64>,
}

impl Spent {
    /// The sum of this and what this process has spent since `start`.
    pub(super) fn and(&self, start: Instant, stages: impl IntoIterator<Item = StageTime>) -> Self {
        let mut all = self.stages.clone();
        for time in stages {
            match all.iter_mut().find(|other| other.stage == time.stage) {
                Some(other) => other.seconds += time.seconds,
                None => all.push(time),
            }
        }
        Self {
            stages: all,
            seconds: self.seconds + start.elapsed().as_secs_f64(),
            peak_memory_bytes: peak_memory_bytes().max(self.peak_memory_bytes),
        }
    }
}

/// Context of an error that the same command may go on behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// The work folder.
    pub folder: PathBuf,
    /// Blocks that are done.
    pub finished: usize,
    /// All blocks.
    pub blocks: usize,
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.kept();
        write!(f, "the run ended early, {kept}; the same command goes on from there once the cause is removed")
    }
}

impl Unfinished {
    /// What is told of a run that ended in a way that no run can go on from.
    pub(super) fn lost(&self) -> String {
        let Self { finished, blocks, .. } = self;
        format!(
            "the run ended behind {finished} of {blocks} blocks; with other data or weights it is another run, so they are not kept"
        )
    }

    /// What there is to go on from: `12 of 28 blocks are done and kept in FOLDER`.
    pub fn kept(&self) -> String {
        let Self { folder, finished, blocks } = self;
        format!("{finished} of {blocks} blocks are done and kept in {}", folder.display())
    }
}

/// What a run must have in common with the one that it goes on with.
pub(super) fn identity(
    provenance: &Provenance,
    device: &str,
    libraries: BTreeMap<&'static str, String>,
) -> Result<Value> {
    #[derive(Serialize)]
    struct Identity<'a> {
        work_folder: u32,
        device: &'a str,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        libraries: BTreeMap<&'static str, String>,
        #[serde(flatten)]
        provenance: &'a Provenance,
    }
    Ok(serde_json::to_value(Identity { work_folder: FORMAT, device, libraries, provenance })?)
}

/// Takes the space of the states to come.
pub(super) fn begin(work: &WorkFolder, bytes: StateBytes) -> Result<()> {
    for spare in Kept::SPARES {
        reserve(&work.place(spare), bytes.state)?;
    }
    if bytes.levels > 0 {
        reserve(&work.place(Kept::Levels), bytes.levels)?;
    }
    Ok(())
}

/// What an earlier process left, if there is something to go on with.
pub(super) struct Found {
    pub(super) state: State,
    file: Sealed,
}

/// Looks for a state of the same run, whose `identity` is asked for where there is any. Errors, with all that differs, for one of another
/// run, and for one that is damaged.
pub(super) fn find(work: &WorkFolder, identity: impl FnOnce() -> Result<Value>) -> Result<Option<Found>> {
    // Refuses what is not a run's.
    let contents = work.contents()?;
    // The checkpoint has left when the run was finished.
    let is_there = [Kept::Run, Kept::Checkpoint].iter().all(|kept| contents.contains(kept));
    let Some(last) = states(work)?.pop().filter(|_| is_there) else { return Ok(None) };
    let run = work.place(Kept::Run);
    let text = fs::read(&run).with_context(|| format!("cannot read {}", run.display()))?;
    let then: Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged; {RESTART}", run.display()))?;
    let differences = difference::all(&then, &identity()?);
    ensure!(
        differences.is_empty(),
        "{} holds an unfinished run of this output that is not the same: {}. Run it as it was then, or {RESTART}.",
        work.path().display(),
        differences.join("; ")
    );
    // What a process left that was killed between two steps of saving.
    recycle_all_but(work, last)?;
    let read = || {
        let file = Sealed::open(work.place(Kept::State(last)))?;
        let state: State = ciborium::from_reader(file.bytes(REPORTS)?.as_slice()).context("its reports")?;
        ensure!(state.finished() == last, "{} holds {} blocks", file.path().display(), state.finished());
        Ok(Found { state, file })
    };
    read().context(Unusable).map(Some)
}

/// Context of an error that the same command would meet again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unusable;

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "what the unfinished run left cannot be used ({RESTART})")
    }
}

/// Numbers of finished blocks of which there is a state, ascending.
fn states(work: &WorkFolder) -> Result<Vec<usize>> {
    let number = |kept| if let Kept::State(finished) = kept { Some(finished) } else { None };
    let names = own::names_in(work.path())?;
    let mut found: Vec<usize> = names.iter().filter_map(|name| number(Kept::of(name)?)).collect();
    found.sort_unstable();
    Ok(found)
}

/// The first place with space for a state.
fn spare(work: &WorkFolder) -> PathBuf {
    let [first, second] = Kept::SPARES.map(|spare| work.place(spare));
    if first.exists() { first } else { second }
}

/// Makes all states but one space for those to come.
fn recycle_all_but(work: &WorkFolder, kept: usize) -> Result<()> {
    for finished in states(work)?.into_iter().filter(|&finished| finished != kept) {
        let path = work.place(Kept::State(finished));
        let [first, second] = Kept::SPARES.map(|spare| work.place(spare));
        let spare = if first.exists() { second } else { first };
        fs::rename(&path, spare).with_context(|| format!("cannot rename {}", path.display()))?;
    }
    Ok(())
}
