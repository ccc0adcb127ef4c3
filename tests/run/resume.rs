//! A run that was stopped goes on behind its last finished block and ends with the same bytes; what is not the same run, or not
//! whole, is refused.

use crate::resuming::{DEEPSTACK, Moment, PLAIN, Place, Stopper, differing, facts};
use crate::support::devices;
use crate::support::golden;
use crate::support::message;
use crate::support::program::{copy_folder, edit_tensor, lasting_files_of, names_in, stderr};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use vlmq::checkpoint::checksum::of_bytes;
use vlmq::checkpoint::{Checkpoint, Format};
use vlmq::device::cpu::Cpu;
use vlmq::progress::{Interrupted, Observer, Stage};
use vlmq::quantize::block::Activations;
use vlmq::quantize::settings::Solver;
use vlmq::report::{LayerReport, RunObserver};
use vlmq::run::{self, RunSettings, Unfinished};
use vlmq::tensor::Float;

const BLOCKS: usize = 3;
const LAYERS: usize = 7 * BLOCKS;

/// The output of a run that nothing stops, and its report.
fn whole(settings: impl Fn(&Place) -> RunSettings, checkpoint: &str) -> (Vec<(String, Vec<u8>)>, serde_json::Value) {
    let place = Place::new(checkpoint);
    let report = run::run(&Cpu, &settings(&place), &mut ()).unwrap();
    (place.finished(), facts(&serde_json::to_value(report).unwrap()))
}

/// A place with a run that was stopped behind its first block.
fn behind_a_block(checkpoint: &str) -> Place {
    let place = Place::new(checkpoint);
    let error = place.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    assert_eq!(error.downcast_ref::<Unfinished>().unwrap().finished, 1);
    place
}

#[test]
fn stopped_at_any_layer_a_run_gives_the_same_bytes() {
    for (checkpoint, solver, format) in [
        (PLAIN, Solver::Gptaq, Format::COMPRESSED_TENSORS),
        (PLAIN, Solver::Gptq, Format::DEQUANTIZED),
        (PLAIN, Solver::Rtn, Format::COMPRESSED_TENSORS),
        (DEEPSTACK, Solver::Gptaq, Format::gptq(false)),
    ] {
        let settings = |place: &Place| {
            let mut settings = place.settings();
            (settings.solver.solver, settings.format) = (solver, format);
            settings
        };
        let (expected, report) = whole(settings, checkpoint);
        for layers in [1, 4, 7, 8, 13, 14, 18, 20] {
            let place = Place::new(checkpoint);
            let outcome = run::run(&Cpu, &settings(&place), &mut Stopper::new(Moment::Layers(layers)));
            // Rounding to nearest is asked between blocks only. A block whose residual stream has not gone on is not done.
            let finished = (layers - 1) / 7 + usize::from(solver == Solver::Rtn);
            if finished < BLOCKS {
                let error = outcome.unwrap_err();
                assert!(error.is::<Interrupted>(), "{error:#}");
                let unfinished = error.downcast_ref::<Unfinished>().unwrap();
                assert_eq!((unfinished.finished, unfinished.blocks), (finished, BLOCKS), "{layers} layers");
                assert_eq!(place.left(), [".out.vlmq"]);
                let mut second = Stopper::new(Moment::Layers(LAYERS + 1));
                let again = run::run(&Cpu, &settings(&place), &mut second).unwrap();
                assert_eq!(second.resumed, Some(finished));
                assert_eq!(
                    facts(&serde_json::to_value(again).unwrap()),
                    report,
                    "{checkpoint} {solver:?}, {layers} layers"
                );
            }
            assert_eq!(differing(&place.finished(), &expected), [""; 0], "{checkpoint} {solver:?}, {layers} layers");
        }
    }
}

/// A run that saves seldom, asked to stop, finishes the block at hand where there are blocks that no state has, and saves them; there are
/// never more than a state and space for another.
#[test]
fn saved_seldom_a_run_that_is_stopped_loses_no_finished_block() {
    let seldom = |place: &Place| RunSettings { save_every: 1_000_000, ..place.settings() };
    let (expected, report) = whole(seldom, DEEPSTACK);
    // In the first block of a run there is nothing to keep; in the block behind a state, that; in the last one, all comes to its end.
    for (saved, layers, kept, left) in [
        (0, 3, None, &[][..]),
        (0, 7 + 3, Some(2), &["spare-1", "state-2"][..]),
        (1, 3, Some(1), &["spare-0", "state-1"]),
        (1, 7 + 3, Some(BLOCKS), &[]),
    ] {
        let place = if saved == 0 { Place::new(DEEPSTACK) } else { behind_a_block(DEEPSTACK) };
        let outcome = run::run(&Cpu, &seldom(&place), &mut Stopper::new(Moment::Layers(layers)));
        if kept == Some(BLOCKS) {
            outcome.unwrap();
        } else {
            let error = outcome.unwrap_err();
            assert!(error.is::<Interrupted>(), "{error:#}");
            assert_eq!(error.downcast_ref::<Unfinished>().map(|unfinished| unfinished.finished), kept, "{error:#}");
            let states = if kept.is_some() { names_in(&place.work()) } else { place.left() };
            let states: Vec<String> = states.into_iter().filter(|name| name.contains('-')).collect();
            assert_eq!(states, left, "{saved} {layers}");
            let mut second = Stopper::new(Moment::Layers(LAYERS + 1));
            let again = run::run(&Cpu, &seldom(&place), &mut second).unwrap();
            assert_eq!(second.resumed, kept);
            assert_eq!(facts(&serde_json::to_value(again).unwrap()), report);
        }
        assert_eq!(differing(&place.finished(), &expected), [""; 0], "{saved} {layers}");
    }
}

#[test]
fn stopped_in_any_stage_a_run_keeps_what_is_worth_it() {
    let (expected, _) = whole(Place::settings, PLAIN);
    for (stage, kept) in [(Stage::Data, false), (Stage::Write, false), (Stage::Vision, false), (Stage::Blocks, true)] {
        let place = Place::new(PLAIN);
        let error = place.run_until(&Cpu, Moment::Begins(stage)).unwrap_err();
        assert!(error.is::<Interrupted>(), "{stage}: {error:#}");
        assert_eq!(error.is::<Unfinished>(), kept, "{stage}");
        assert_eq!(place.left(), if kept { vec![".out.vlmq"] } else { vec![] }, "{stage}");
        if kept {
            // Stopped once more on its way back, before it knows that it is the same run, it keeps what it had.
            let error = place.run_until(&Cpu, Moment::Begins(Stage::Checksums)).unwrap_err();
            assert!(error.is::<Interrupted>() && place.left() == [".out.vlmq"], "{stage}: {error:#}");
        }
        let mut last = Stopper::new(Moment::Layers(LAYERS + 1));
        run::run(&Cpu, &place.settings(), &mut last).unwrap();
        assert_eq!(last.resumed, kept.then_some(0), "{stage}");
        assert_eq!(differing(&place.finished(), &expected), [""; 0], "{stage}");
    }
}

#[test]
#[ignore = "slow: whole runs on the emulator"]
fn streamed_from_host_memory_or_not_a_run_goes_on_in_half_precision() {
    // The emulated device is slow: the smallest checkpoint, two blocks in bfloat16.
    let device = |limit: Option<u64>| {
        let device = devices::own_device(Float::Bf16);
        limit.map(|limit| device.limit_memory(limit)).transpose().unwrap();
        device
    };
    let mut place = Place::new("flat-tied-bf16");
    // So many samples in so small chunks that their streams matter beside the weights.
    let lines = fs::read_to_string(&place.data).unwrap();
    let more = tempfile::NamedTempFile::new().unwrap();
    fs::write(more.path(), lines.trim_end().to_owned() + "\n" + &lines.repeat(5)).unwrap();
    place.data = more.path().to_owned();
    let settings = RunSettings { chunk_tokens: 64, ..place.settings() };
    let limits = {
        let resident = run::plan(&device(None), &settings).unwrap();
        let streamed = run::plan(&device(Some(resident.device_bytes - 1)), &settings).unwrap();
        assert_eq!((resident.activations, streamed.activations), (Activations::Resident, Activations::Streamed));
        [resident.device_bytes, streamed.device_bytes]
    };
    let whole = run::run(&device(None), &settings, &mut ()).unwrap();
    let expected = place.finished();
    fs::remove_dir_all(place.out()).unwrap();
    for (first, second) in [(0, 1), (1, 1), (1, 0)] {
        let mut stopper = Stopper::new(Moment::Block(1));
        let error = run::run(&device(Some(limits[first])), &settings, &mut stopper).unwrap_err();
        assert!(error.is::<Interrupted>(), "{error:#}");
        let report = run::run(&device(Some(limits[second])), &settings, &mut ()).unwrap();
        assert_eq!(report.memory_plan.activations, [Activations::Resident, Activations::Streamed][second]);
        assert_eq!(differing(&place.finished(), &expected), [""; 0]);
        assert_eq!(report.layers.len(), whole.layers.len());
        // Within the plan, saving and restoring included.
        assert!(report.peak_device_bytes.unwrap() <= limits.into_iter().max().unwrap());
        fs::remove_dir_all(place.out()).unwrap();
    }
    // Another device is another run.
    run::run(&device(None), &settings, &mut Stopper::new(Moment::Block(1))).unwrap_err();
    let error = message(run::run(&Cpu, &settings, &mut ()));
    assert!(error.contains("device: cuda (emulated) then, cpu now"), "{error}");
    // And the same one with other libraries.
    let begun_with = place.work().join("run.json");
    let mut identity = crate::support::program::read_json(&begun_with);
    identity["libraries"]["emulator"] = "0.0.0".into();
    fs::write(&begun_with, identity.to_string()).unwrap();
    let error = message(run::run(&device(None), &settings, &mut ()));
    let expected = concat!("emulator: 0.0.0 then, ", env!("CARGO_PKG_VERSION"), " now");
    assert!(error.contains(expected), "{error}");
}

/// Writes a work folder's tensor file anew after a change, with the seal of its new contents.
fn reseal(path: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    edit_tensor(path, name, change);
    let mut bytes = fs::read(path).unwrap();
    let end = bytes.len() - 64;
    let seal = of_bytes(&bytes[..end]);
    bytes[end..].copy_from_slice(seal.as_bytes());
    fs::write(path, bytes).unwrap();
}

fn tensor(path: &Path, name: &str) -> Vec<u8> {
    let mut found = Vec::new();
    edit_tensor(path, name, |bytes| found = bytes.to_vec());
    found
}

/// The comparison would notice a stream or a feature that is not restored.
#[test]
fn planted_faults_change_the_bytes() {
    let (expected, _) = whole(Place::settings, DEEPSTACK);
    type Fault = fn(&Path);
    let faults: [(&str, Fault); 4] = [
        ("nothing", |work| reseal(&work.join("state-1"), "0.float", |_| {})),
        ("the float path is the quantized one's", |work| {
            let other = tensor(&work.join("state-1"), "0.quantized");
            reseal(&work.join("state-1"), "0.float", |bytes| bytes.copy_from_slice(&other));
        }),
        ("the quantized path is the float one's", |work| {
            let other = tensor(&work.join("state-1"), "0.float");
            reseal(&work.join("state-1"), "0.quantized", |bytes| bytes.copy_from_slice(&other));
        }),
        ("no image features", |work| reseal(&work.join("levels"), "0.level.1", |bytes| bytes.fill(0))),
    ];
    for (name, fault) in faults {
        let place = behind_a_block(DEEPSTACK);
        fault(&place.work());
        run::run(&Cpu, &place.settings(), &mut ()).unwrap();
        assert_eq!(differing(&place.finished(), &expected).is_empty(), name == "nothing", "{name}");
    }
}

#[test]
fn another_run_is_refused_with_the_differences() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (folder.path().join("model"), folder.path().join("data.jsonl"));
    copy_folder(&golden("model").join(PLAIN), &model);
    fs::copy(golden(&format!("model/{PLAIN}.jsonl")), &data).unwrap();
    let outputs = tempfile::tempdir().unwrap();
    let mut place = Place::new(PLAIN).beside(outputs);
    (place.model, place.data) = (model.clone(), data.clone());
    let whole = run::run(&Cpu, &place.settings(), &mut ()).unwrap();
    let expected = lasting_files_of(&place.out());
    fs::remove_dir_all(place.out()).unwrap();
    place.run_until(&Cpu, Moment::Block(1)).unwrap_err();
    let refused = |extra: &[&str], says: &[&str]| {
        let output = place.run(extra);
        let errors = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{extra:?}: {errors}");
        let last = errors.lines().last().unwrap_or_default();
        for part in says.iter().chain(&["--restart", ".out.vlmq", "error: "]) {
            assert!(last.contains(part), "{extra:?}: {part:?} is not in {last:?}");
        }
        assert_eq!(errors.matches("error:").count(), 1, "{errors}");
        assert_eq!(place.left(), [".out.vlmq"]);
    };
    refused(&["--bits", "4"], &["bits: 3 then, 4 now"]);
    refused(&["--group-size", "none", "--seed", "7"], &["group_size: 32 then, none now", "seed: 0 then, 7 now"]);
    refused(
        &["--solver", "gptq", "--importance", "none"],
        &["solver: gptaq then, gptq now", "importance: vlmq then, none now"],
    );
    refused(&["--format", "dequantized"], &["format: compressed-tensors then, dequantized now"]);
    refused(&["--damp", "0.02", "--alpha", "0.5"], &["alpha: 0.25 then, 0.5 now", "damp: 0.01 then, 0.02 now"]);
    refused(&["--samples", "2"], &["samples: 512 then, 2 now", "the samples as the model takes them have changed"]);
    refused(&["--chat-template", "chatml"], &["chat_template: checkpoint then, chatml now"]);
    refused(&["--max-pixels", "5000"], &["max_pixels: none then, 5000 now"]);

    let changed = |file: &Path, change: fn(&mut Vec<u8>), says: &[&str]| {
        let before = fs::read(file).unwrap();
        let mut bytes = before.clone();
        change(&mut bytes);
        fs::write(file, bytes).unwrap();
        refused(&[], says);
        fs::write(file, before).unwrap();
    };
    let begun_with = |bytes: &mut Vec<u8>| {
        bytes.splice(1..1, *b"\"libraries\": {\"cuBLAS\": \"13.0.2\"},");
    };
    changed(&place.work().join("run.json"), begun_with, &["cuBLAS: 13.0.2 then, none now"]);
    changed(&data, |bytes| bytes.push(b'\n'), &["the calibration file has changed"]);
    let weights = model.join("model.safetensors");
    changed(&weights, |bytes| *bytes.last_mut().unwrap() ^= 1, &["model.safetensors of the model has changed"]);
    changed(
        &model.join("generation_config.json"),
        |bytes| bytes.push(b' '),
        &["generation_config.json of the model has"],
    );
    fs::write(model.join("more.md"), "more").unwrap();
    refused(&[], &["more.md of the model was not there then"]);
    fs::remove_file(model.join("more.md")).unwrap();

    // What changes no byte may change, and so may the place of things.
    fs::create_dir(folder.path().join("elsewhere")).unwrap();
    let moved = folder.path().join("elsewhere/model");
    fs::rename(&model, &moved).unwrap();
    place.model = moved;
    let output = place.run(&["--threads", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("going on: 1 of 3 blocks are done, from "), "{}", stderr(&output));
    assert_eq!(differing(&place.finished(), &expected), [""; 0]);
    let again = crate::support::program::read_json(place.out().join("report.json"));
    assert_eq!(facts(&again)["layers"], facts(&serde_json::to_value(&whole).unwrap())["layers"]);
}

#[test]
fn restart_discards() {
    let place = behind_a_block(PLAIN);
    let output = place.run(&["--restart", "--bits", "4", "--quiet"]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
    let four = place.finished();
    let other = Place::new(PLAIN);
    assert_eq!(other.run(&["--bits", "4"]).status.code(), Some(0));
    assert_eq!(differing(&four, &other.finished()), [""; 0]);
    // Where there is nothing to discard it changes nothing.
    fs::remove_dir_all(other.out()).unwrap();
    assert_eq!(other.run(&["--bits", "4", "--restart"]).status.code(), Some(0));
    assert_eq!(differing(&four, &other.finished()), [""; 0]);
}

/// Every file of a folder, those of sub-folders too.
fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in names_in(folder) {
        let path = folder.join(name);
        if path.is_dir() { found.extend(all_files(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn what_is_damaged_is_refused_and_not_used() {
    let (expected, _) = whole(Place::settings, DEEPSTACK);
    let place = behind_a_block(DEEPSTACK);
    let refused = |file: &str, what: &str, change: &dyn Fn(&mut Vec<u8>), says: &str| {
        let path = place.work().join(file);
        let before = fs::read(&path).unwrap();
        let mut bytes = before.clone();
        change(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let error = message(run::run(&Cpu, &place.settings(), &mut ()));
        assert!(error.contains("--restart") && error.contains(says), "{file}, {what}: {error}");
        assert_eq!(place.left(), [".out.vlmq"], "{file}, {what}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{file}, {what}: was touched");
        fs::write(&path, before).unwrap();
    };
    for file in ["state-1", "levels"] {
        let length = fs::metadata(place.work().join(file)).unwrap().len() as usize;
        for at in (0..length).step_by(length / 40).chain([length - 1, length - 64, length - 65]) {
            refused(file, &format!("bit of byte {at}"), &|bytes| bytes[at] ^= 0x10, file);
        }
        for cut in [0, 5, 100, length / 2, length - 1] {
            refused(file, &format!("cut to {cut}"), &|bytes| bytes.truncate(cut), file);
        }
        refused(file, "too long", &|bytes| bytes.push(0), file);
    }
    refused("run.json", "cut", &|bytes| bytes.truncate(bytes.len() / 2), "run.json is damaged");
    refused("run.json", "empty", &|bytes| bytes.clear(), "run.json is damaged");
    // Tensors of a finished layer, and such as were copied; those of later blocks are still to be written.
    let weights = "checkpoint/model.safetensors";
    let grown = Checkpoint::open(&place.work().join("checkpoint")).unwrap();
    for (name, matters) in [
        ("layers.0.self_attn.q_proj.weight_packed", true),
        ("layers.0.mlp.down_proj.weight_scale", true),
        ("embed_tokens.weight", true),
        ("layers.2.mlp.down_proj.weight_packed", false),
    ] {
        let name = grown.names().find(|found| found.ends_with(name)).unwrap();
        let change = |bytes: &mut Vec<u8>| {
            let path = tempfile::NamedTempFile::new().unwrap();
            fs::write(path.path(), &*bytes).unwrap();
            edit_tensor(path.path(), name, |tensor| tensor[3] ^= 1);
            *bytes = fs::read(path.path()).unwrap();
        };
        if matters {
            refused(weights, name, &change, name);
        } else {
            let mut bytes = fs::read(place.work().join(weights)).unwrap();
            change(&mut bytes);
            fs::write(place.work().join(weights), bytes).unwrap();
        }
    }
    refused(weights, "header", &|bytes| bytes[20] ^= 1, "model.safetensors");
    refused(weights, "cut", &|bytes| bytes.truncate(bytes.len() - 1), "model.safetensors");
    // Side files are made anew.
    fs::write(place.work().join("checkpoint/config.json"), "{}").unwrap();
    run::run(&Cpu, &place.settings(), &mut ()).unwrap();
    assert_eq!(differing(&place.finished(), &expected), [""; 0]);
}

#[test]
fn what_is_left_of_a_finished_run_goes_and_what_is_not_ours_stays() {
    let place = behind_a_block(PLAIN);
    let aside = place.folder().join("aside");
    fs::create_dir(&aside).unwrap();
    for file in all_files(&place.work()).iter().filter(|file| !file.starts_with(place.work().join("checkpoint"))) {
        fs::copy(file, aside.join(file.file_name().unwrap())).unwrap();
    }
    run::run(&Cpu, &place.settings(), &mut ()).unwrap();
    // Killed behind the rename of the output: the rest of the work folder is still there.
    fs::rename(&aside, place.work()).unwrap();
    let error = message(run::run(&Cpu, &place.settings(), &mut ()));
    assert!(error.contains("out exists. Remove it"), "{error}");
    let expected = place.finished();
    // The same, and the output went elsewhere meanwhile.
    let left = place.folder().join("left");
    behind_a_block_in(&place, &left);
    fs::rename(place.out(), place.folder().join("elsewhere")).unwrap();
    fs::rename(&left, place.work()).unwrap();
    run::run(&Cpu, &place.settings(), &mut ()).unwrap();
    assert_eq!(place.left(), ["elsewhere", "out"]);
    assert_eq!(differing(&lasting_files_of(&place.out()), &expected), [""; 0]);

    fs::remove_dir_all(place.out()).unwrap();
    fs::create_dir(place.work()).unwrap();
    fs::write(place.work().join("diary.txt"), "mine").unwrap();
    let error = message(run::run(&Cpu, &place.settings(), &mut ()));
    assert!(error.contains(".out.vlmq is in the way"), "{error}");
    assert_eq!(names_in(&place.work()), ["diary.txt"]);
}

/// A work folder's files without the growing checkpoint, as a finished run leaves them that is killed.
fn behind_a_block_in(place: &Place, folder: &Path) {
    fs::create_dir(folder).unwrap();
    let other = behind_a_block(PLAIN);
    for name in names_in(&other.work()).iter().filter(|name| *name != "checkpoint") {
        fs::copy(other.work().join(name), folder.join(name)).unwrap();
    }
    assert!(place.out().exists());
}

/// Puts something in the place where the state behind the last block is to be written.
struct Blocker<'a>(&'a Place);

impl Observer for Blocker<'_> {}

impl RunObserver for Blocker<'_> {
    fn layer_finished(&mut self, layer: &LayerReport) {
        let spares = ["spare-0", "spare-1"].map(|name| self.0.work().join(name));
        if layer.block == 2 && layer.name.ends_with("down_proj") {
            let spare = spares.iter().find(|spare| spare.exists()).unwrap();
            fs::remove_file(spare).unwrap();
            fs::create_dir(spare).unwrap();
        }
    }
}

#[test]
fn an_error_keeps_what_is_done_and_a_refusal_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(&golden("model").join(PLAIN), &model);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let filled = |name: &str, value: f32| {
        let name = checkpoint.names().find(|n| n.contains(name)).unwrap().to_owned();
        edit_tensor(&model.join("model.safetensors"), &name, |bytes| {
            bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|bytes| *bytes = value.to_le_bytes());
        });
    };
    let mut place = Place::new(PLAIN);
    place.model.clone_from(&model);
    let error = message(run::run(&Cpu, &place.settings(), &mut Blocker(&place)));
    assert!(error.contains("2 of 3 blocks are done and kept in"), "{error}");
    assert_eq!(place.left(), [".out.vlmq"]);
    // It is still in the way.
    let error = message(run::run(&Cpu, &place.settings(), &mut ()));
    assert!(error.contains("is not this run's"), "{error}");
    assert_eq!(place.left(), [".out.vlmq"]);
    for name in ["spare-0", "spare-1"] {
        let _ = fs::remove_dir(place.work().join(name));
    }
    run::run(&Cpu, &place.settings(), &mut ()).unwrap();
    fs::remove_dir_all(place.out()).unwrap();

    // With weights that overflow no run can go on, and none is kept.
    filled("layers.2.mlp.up_proj.weight", 1e38);
    let error = message(run::run(&Cpu, &place.settings(), &mut ()));
    assert!(error.contains("ended behind 2 of 3 blocks; with other data or weights it is another run"), "{error}");
    assert_eq!(place.left(), [""; 0]);
    // Those that are no numbers are found at the start.
    filled("layers.2.mlp.up_proj.weight", f32::NAN);
    let error = message(run::run(&Cpu, &place.settings(), &mut ()));
    assert!(error.contains("holds NaN") && !error.contains("blocks"), "{error}");
    assert_eq!(place.left(), [""; 0]);
}

/// Looks at the work folder when the vision stage begins.
struct Look<'a> {
    place: &'a Place,
    reserved: Vec<(String, u64)>,
}

impl Observer for Look<'_> {
    fn stage_started(&mut self, stage: Stage, _total: u64) {
        if stage == Stage::Vision {
            self.reserved = lengths(&self.place.work());
        }
    }
}

impl RunObserver for Look<'_> {}

fn lengths(folder: &Path) -> Vec<(String, u64)> {
    let files = names_in(folder).into_iter().filter(|name| folder.join(name).is_file());
    files.map(|name| (name.clone(), fs::metadata(folder.join(name)).unwrap().len())).collect()
}

#[test]
fn space_is_taken_before_the_work_begins_and_is_enough() {
    for checkpoint in [PLAIN, DEEPSTACK] {
        let place = Place::new(checkpoint);
        let mut look = Look { place: &place, reserved: Vec::new() };
        let report = run::run(&Cpu, &place.settings(), &mut look).unwrap();
        let reserved: BTreeMap<String, u64> = look.reserved.into_iter().collect();
        let tokens = (report.calibration.vision_tokens + report.calibration.text_tokens) as u64;
        let streams = 2 * tokens * report.layers[0].cols as u64 * 4;
        assert_eq!(reserved["spare-0"], reserved["spare-1"]);
        assert!((streams..streams + (1 << 20)).contains(&reserved["spare-0"]), "{reserved:?}, {streams}");
        let used: BTreeMap<String, u64> = lengths(&behind_a_block(checkpoint).work()).into_iter().collect();
        assert!((streams..reserved["spare-1"]).contains(&used["state-1"]), "{used:?}, {reserved:?}");
        assert_eq!(used.contains_key("levels"), checkpoint == DEEPSTACK);
        if let Some(levels) = used.get("levels") {
            assert!(*levels <= reserved["levels"], "{used:?}, {reserved:?}");
        }
    }
}
