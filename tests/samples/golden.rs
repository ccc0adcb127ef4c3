//! Calibration data against transformers, torchvision and Pillow: goldens of tests/golden/make_calibration.py.

use crate::support::picture::open_png;
use crate::support::{data, golden};
use serde_json::Value;
use std::path::PathBuf;
use vlmq::data::dataset::{self, Conversation, ImageSource, Message, Part};
use vlmq::data::image::decode;
use vlmq::data::native_resolution::{NativeResolution, NativeVision};
use vlmq::data::sequence::{Sequence, SequenceBuilder, collect};
use vlmq::data::template::ChatTemplate;

fn cases() -> Value {
    serde_json::from_slice(&std::fs::read(golden("calibration/cases.json")).unwrap()).unwrap()
}

fn settings() -> NativeResolution {
    NativeResolution::read(&data("tiny-qwen2-vl"), None, None).unwrap()
}

fn builder() -> SequenceBuilder {
    let vision = NativeVision::new(settings(), 613, Some(614));
    SequenceBuilder::new(&data("tiny-qwen2-vl"), Box::new(vision)).unwrap()
}

fn open(path: PathBuf) -> image::RgbImage {
    decode(&ImageSource::File(path), "test").unwrap()
}

/// A list of the golden file, which must not be shorter than `least`: an empty list would test nothing.
fn list(cases: &Value, name: &str, least: usize) -> Vec<Value> {
    let all = cases[name].as_array().unwrap();
    assert!(all.len() >= least, "{name}: {}", all.len());
    all.clone()
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
}

#[test]
fn decoding_equals_pillow() {
    let mut exact = 0;
    for case in list(&cases(), "images", 52).iter().filter(|case| case["decoded"] == true) {
        let name = case["file"].as_str().unwrap();
        let ours = open(golden("calibration").join("images").join(name));
        let theirs = open_png(golden("calibration").join("decoded").join(format!("{name}.png")));
        assert_eq!(ours.dimensions(), theirs.dimensions(), "{name}");
        if case["exact"] == true {
            assert!(ours == theirs, "{name} differs");
            exact += 1;
        } else {
            // Decoders of JPEG differ by a few units; a wrong orientation differs by a hundred.
            let pairs = ours.as_raw().iter().zip(theirs.as_raw());
            let sum: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            let mean = sum as f64 / ours.as_raw().len() as f64;
            assert!(mean < 3.0, "{name} differs by {mean} on average");
        }
    }
    assert!(exact >= 13);
}

#[test]
fn sizes_equal_transformers() {
    for case in list(&cases(), "smart_resize", 48) {
        let settings = NativeResolution {
            min_pixels: case["min"].as_u64().unwrap() as usize,
            max_pixels: case["max"].as_u64().unwrap() as usize,
            ..self::settings()
        };
        let from = numbers(&case["in"]);
        let ours = settings.smart_resize(from[0], from[1]).ok().map(|(height, width)| vec![height, width]);
        let theirs = case["out"].as_array().map(|_| numbers(&case["out"]));
        assert_eq!(ours, theirs, "{case}");
    }
}

/// Resized pixels to the bit; normalised values within 1e-6.
#[test]
fn patches_equal_torchvision() {
    let settings = settings();
    for case in list(&cases(), "images", 52).iter().filter(|case| case["resized"] == true) {
        let name = case["file"].as_str().unwrap();
        let ours = settings.prepare(&open(golden("calibration").join("images").join(name))).unwrap();
        let theirs = open_png(golden("calibration").join("resized").join(name));
        assert!(ours.crops() == [theirs], "{name}: resized pixels differ");
        assert_eq!([ours.grid_height, ours.grid_width], numbers(&case["grid"])[..], "{name}");
        let patches = ours.patches();
        assert_eq!(patches.rows(), ours.grid_height * ours.grid_width);
        assert_eq!(patches.cols() as u64, case["columns"].as_u64().unwrap());
        for pick in case["picks"].as_array().unwrap() {
            let (at, value) = (pick[0].as_u64().unwrap() as usize, pick[1].as_f64().unwrap());
            assert!((f64::from(patches.data()[at]) - value).abs() <= 1e-6, "{name} at {at}");
        }
        if let Some(file) = case["values"].as_str() {
            let bytes = std::fs::read(golden("calibration").join(file)).unwrap();
            let values = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
            assert_eq!(bytes.len(), patches.data().len() * 4);
            let worst = values.zip(patches.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-6, "{name}: {worst}");
        }
    }
}

/// Messages as the golden script writes them; images are only counted.
fn messages(value: &Value) -> Vec<Message> {
    let part = |part: &Value| match part["text"].as_str() {
        Some(text) => Part::Text(text.into()),
        None => Part::Image(ImageSource::Bytes(Vec::new())),
    };
    let message = |message: &Value| Message {
        role: message["role"].as_str().unwrap().into(),
        content: message["content"].as_array().unwrap().iter().map(part).collect(),
        plain: false,
    };
    value.as_array().unwrap().iter().map(message).collect()
}

#[test]
fn templates_render_as_jinja2_does() {
    let cases = cases();
    let tokens = serde_json::json!({"bos_token": "<|begin|>", "eos_token": "<|im_end|>"});
    for case in &list(&cases, "templates", 18) {
        let name = case["template"].as_str().unwrap();
        let source = cases["template_sources"][name].as_str().unwrap();
        let template = ChatTemplate::new(source, tokens.as_object().unwrap().clone(), name.into()).unwrap();
        let ours = template.render(&messages(&case["messages"]), case["prompt"] == true).unwrap();
        assert_eq!(ours, case["text"].as_str().unwrap(), "{name}");
    }
}

/// The golden's conversation, through a data file as a user would write it.
fn conversation(case: &Value) -> Conversation {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.jsonl");
    let line = serde_json::json!({"id": case["id"], "messages": case["messages"]});
    std::fs::write(&path, line.to_string()).unwrap();
    let root = if case["where"] == "vqa" { data("vqa") } else { golden("calibration") };
    dataset::read(&path, Some(&root)).unwrap().remove(0)
}

#[test]
fn tokens_and_positions_equal_transformers() {
    let builder = builder();
    for case in &list(&cases(), "sequences", 11) {
        let conversation = conversation(case);
        let check = |ours: &Sequence, theirs: &Value| {
            let id = &ours.id;
            let tokens: Vec<usize> = ours.tokens.iter().map(|&token| token as usize).collect();
            assert_eq!(tokens, numbers(&theirs["tokens"]), "{id}");
            for axis in 0..3 {
                let positions: Vec<usize> = ours.positions.iter().map(|three| three[axis] as usize).collect();
                assert_eq!(positions, numbers(&theirs["positions"][axis]), "{id}, axis {axis}");
            }
            let grids: Vec<_> = ours.images.iter().map(|image| vec![image.grid_height, image.grid_width]).collect();
            let wanted: Vec<_> = theirs["grids"].as_array().unwrap().iter().map(numbers).collect();
            assert_eq!(grids, wanted, "{id}");
            let vision: usize = grids.iter().map(|grid| grid[0] * grid[1] / 4).sum();
            assert_eq!(ours.vision_tokens, vision, "{id}");
        };
        let whole = builder.build(&conversation).unwrap();
        check(&whole, &case["full"]);
        let prompt = builder.prompt(&conversation).unwrap();
        check(&prompt, &case["prompt"]);
        assert!(prompt.answer.is_empty());
        match case["answer_text"].as_str() {
            None => assert!(whole.answer.is_empty()),
            Some(answer) => {
                let tokens = &whole.tokens[whole.answer.clone()];
                assert_eq!(*tokens.last().unwrap(), 609, "the end of the turn belongs to the answer");
                assert_eq!(builder.decode(tokens).unwrap(), answer);
                assert_eq!(whole.tokens[whole.answer.end..].len(), 1, "the line break after it does not");
                // The prompt need not end where a token ends, but here it does: with a line break of its own.
                assert_eq!(whole.answer.start, prompt.tokens.len());
            }
        }
    }
}

#[test]
fn the_data_of_the_project_collects_whole_and_in_order() {
    let all = dataset::read(&data("vqa/calib.jsonl"), None).unwrap();
    assert_eq!(all.len(), 256);
    let first = &all[0];
    assert_eq!((first.id.as_str(), first.group.as_deref()), ("calib-0000", Some("exists")));
    assert_eq!(first.answer().as_deref(), Some("yes"));
    assert!(first.origin.ends_with("calib.jsonl:1"));
    let some = dataset::select(all.clone(), Some(24), 7);
    assert_eq!(some, dataset::select(all.clone(), Some(24), 7));
    assert_ne!(some, dataset::select(all.clone(), Some(24), 8));
    assert_eq!(some[..9], dataset::select(all.clone(), Some(9), 7));
    assert_eq!(dataset::select(all.clone(), Some(1000), 7).len(), 256);

    let builder = builder();
    let lengths: Vec<_> = some.iter().map(|one| builder.build(one).unwrap().tokens.len()).collect();
    let limit = *lengths.iter().min().unwrap() + 3;
    let collected = collect(&builder, &some, limit, false, || Ok(())).unwrap();
    let kept: Vec<_> =
        some.iter().zip(&lengths).filter(|(_, length)| **length <= limit).map(|(one, _)| &one.id).collect();
    assert_eq!(collected.sequences.iter().map(|one| &one.id).collect::<Vec<_>>(), kept);
    assert_eq!(collected.too_long, 24 - kept.len());
    assert!(collected.too_long > 0);

    let error = collect(&builder, &some, 10, false, || Ok(())).unwrap_err().to_string();
    assert!(
        error.contains("all 24") && error.contains(&(limit - 3).to_string()) && error.contains("--max-tokens"),
        "{error}"
    );

    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let sequences = pool.install(|| collect(&builder, &some, 4096, false, || Ok(())).unwrap().sequences);
        let plain = sequences.into_iter().map(|one| {
            let patches: Vec<_> = one.images.iter().map(|image| image.patches()).collect();
            (one.id, one.tokens, one.positions, one.answer, patches)
        });
        plain.collect::<Vec<_>>()
    };
    assert!(on(1) == on(5), "the number of threads must not show");
}
