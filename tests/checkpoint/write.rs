//! A quantized checkpoint holds what was written, copies all else to the byte, and appears whole or not at all.

use crate::support::alone::{arguments, full_name};
use crate::support::checkpoint::*;
use crate::support::{data, message};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use vlmq::checkpoint::{Checkpoint, Format, LinearSpec, QuantizedCopy, WorkFolder, Writer};
use vlmq::codes::Order;

const GPTQ: Format = Format::GPTQ_V1;

fn tiny() -> Checkpoint {
    Checkpoint::open(&data("tiny-qwen2-vl")).unwrap()
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn what_is_written_is_read_back() {
    let source = tiny();
    let parent = tempfile::tempdir().unwrap();
    for format in Format::ALL.into_iter().filter(|&format| format != Format::DEQUANTIZED) {
        for (bits, group, symmetric, order) in [
            (2, Some(32), false, Order::ActGroup),
            (3, Some(128), false, Order::None),
            (3, Some(64), true, Order::Act),
            (4, None, true, Order::None),
            (8, Some(128), false, Order::Act),
        ] {
            let settings = settings(format, bits, group, symmetric, order);
            let target = parent.path().join(format!("{}-{bits}-{symmetric}-{order:?}", format.name()));
            let written = write_rounded(&source, &target, format, &settings).unwrap();
            let copy = Checkpoint::open(&target).unwrap();
            for (linear, quantized) in &written {
                let read = copy.packed(&linear.module, linear.out_features, linear.in_features).unwrap();
                assert!(read == *quantized, "{format:?} {bits} {}", linear.module);
                let weight = copy.linear(&linear.module, linear.out_features, linear.in_features).unwrap();
                assert!(weight == quantized.dequantize().unwrap(), "{format:?} {bits} {}", linear.module);
            }
        }
    }
}

#[test]
fn plain_weights_are_the_dequantized_ones_in_the_dtype_of_the_checkpoint() {
    let source = tiny();
    let parent = tempfile::tempdir().unwrap();
    let settings = settings(Format::DEQUANTIZED, 3, Some(128), false, Order::None);
    let target = parent.path().join("plain");
    let written = write_rounded(&source, &target, Format::DEQUANTIZED, &settings).unwrap();
    let copy = Checkpoint::open(&target).unwrap();
    assert!(copy.quantization().unwrap().is_none());
    assert_eq!(source.names().collect::<BTreeSet<_>>(), copy.names().collect::<BTreeSet<_>>());
    for (linear, quantized) in &written {
        let weight = copy.linear(&linear.module, linear.out_features, linear.in_features).unwrap();
        let expected: Vec<f32> =
            quantized.dequantize().unwrap().data().iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect();
        assert!(weight.data() == expected, "{}", linear.module);
    }
}

#[test]
fn all_else_that_belongs_to_a_model_is_copied_to_the_byte() {
    let scratch = tempfile::tempdir().unwrap();
    let source_folder = scratch.path().join("source");
    fs::create_dir_all(source_folder.join("additional_chat_templates")).unwrap();
    fs::create_dir(source_folder.join("onnx")).unwrap();
    for entry in fs::read_dir(data("tiny-qwen2-vl")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), source_folder.join(entry.file_name())).unwrap();
    }
    let kept = [
        "README.md",
        "LICENSE",
        "Notice.txt",
        "modeling.py",
        "added_tokens.json",
        "tokenizer.model",
        "video_preprocessor_config.json",
        "additional_chat_templates/tools.jinja",
    ];
    for name in kept {
        fs::write(source_folder.join(name), format!("{name}\r\n\u{0}")).unwrap();
    }
    // Code is the model's where a configuration names some.
    let code = br#"{"auto_map": {"AutoProcessor": "modeling.Own"}}"#;
    fs::write(source_folder.join("processor_config.json"), code).unwrap();
    let left = [
        ".gitattributes",
        "quantize_config.json",
        "pytorch_model.bin",
        "onnx/model.onnx",
        // What trainers leave.
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
        "model.gguf",
        "tf_model.h5",
        "adapter_config.json",
        "adapter_model.bin",
    ];
    for name in left {
        fs::write(source_folder.join(name), "stale").unwrap();
    }
    let source = Checkpoint::open(&source_folder).unwrap();
    for format in Format::ALL {
        let settings = settings(format, 4, Some(64), true, Order::None);
        let target = scratch.path().join(format.name());
        let written = write_rounded(&source, &target, format, &settings).unwrap();

        let mut expected = names_in(&source_folder);
        for name in left {
            expected.remove(name.split('/').next().unwrap());
        }
        if format.name().starts_with("gptq") {
            expected.insert("quantize_config.json".to_owned());
        }
        assert_eq!(names_in(&target), expected);
        for name in &expected {
            let replaced = ["config.json", "model.safetensors", "quantize_config.json"].contains(&name.as_str());
            if !replaced && !target.join(name).is_dir() {
                assert_eq!(fs::read(source_folder.join(name)).unwrap(), fs::read(target.join(name)).unwrap(), "{name}");
            }
        }
        let inside = "additional_chat_templates/tools.jinja";
        assert_eq!(fs::read(source_folder.join(inside)).unwrap(), fs::read(target.join(inside)).unwrap());

        let copy = Checkpoint::open(&target).unwrap();
        let quantized: BTreeSet<String> = written.iter().map(|(l, _)| format!("{}.weight", l.module)).collect();
        let mut copied = 0;
        for name in source.names().filter(|name| !quantized.contains(*name)) {
            let (old, new) = (source.tensor(name).unwrap(), copy.tensor(name).unwrap());
            assert!((old.dtype, old.shape, old.bytes) == (new.dtype, new.shape, new.bytes), "{name}");
            copied += 1;
        }
        assert!(copied > 50);
    }
}

#[test]
fn config_keeps_every_byte_and_gains_one_key() {
    let source = tiny();
    let scratch = tempfile::tempdir().unwrap();
    let old = fs::read_to_string(data("tiny-qwen2-vl/config.json")).unwrap();
    for format in Format::ALL.into_iter().filter(|&format| format != Format::DEQUANTIZED) {
        let settings = settings(format, 3, Some(128), false, Order::ActGroup);
        let target = scratch.path().join(format.name());
        write_rounded(&source, &target, format, &settings).unwrap();
        let new = fs::read_to_string(target.join("config.json")).unwrap();
        assert!(new.starts_with(old.trim_end().strip_suffix('}').unwrap().trim_end()));
        let mut value: serde_json::Value = serde_json::from_str(&new).unwrap();
        let added = value.as_object_mut().unwrap().shift_remove("quantization_config").unwrap();
        assert_eq!(value, *source.config());
        let (method, layout) = match format.name() {
            name @ ("gptq" | "gptq_v2") => ("gptq", name.into()),
            name => (name, serde_json::Value::Null),
        };
        assert_eq!((&added["quant_method"], &added["checkpoint_format"]), (&method.into(), &layout));
        if format.name().starts_with("gptq") {
            let beside = fs::read(target.join("quantize_config.json")).unwrap();
            assert_eq!(serde_json::from_slice::<serde_json::Value>(&beside).unwrap(), added);
        }
    }
    let target = scratch.path().join("plain");
    let settings = settings(Format::DEQUANTIZED, 3, Some(128), false, Order::ActGroup);
    write_rounded(&source, &target, Format::DEQUANTIZED, &settings).unwrap();
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), old);
}

#[test]
fn shards_hold_no_more_than_the_limit_and_read_as_one() {
    let source = tiny();
    let scratch = tempfile::tempdir().unwrap();
    let settings = settings(Format::COMPRESSED_TENSORS, 3, Some(128), false, Order::ActGroup);
    let whole = scratch.path().join("whole");
    write_rounded(&source, &whole, Format::COMPRESSED_TENSORS, &settings).unwrap();
    let whole = Checkpoint::open(&whole).unwrap();

    let limit = 400_000;
    let target = scratch.path().join("many");
    let linears = decoder_linears(&source);
    let (format, layout) = (Format::COMPRESSED_TENSORS, settings.layout());
    let copy = QuantizedCopy { checkpoint: &source, linears: &linears, format, layout: &layout };
    let mut writer = Writer::with_shards_of(limit, &target, &copy).unwrap();
    writer.copy_tensors(&source, &mut |_| Ok(())).unwrap();
    // Backwards: places do not depend on the order in which layers are done.
    for linear in linears.iter().rev() {
        let weight = source.linear(&linear.module, linear.out_features, linear.in_features).unwrap();
        writer.write(&linear.module, &round_to_nearest(&weight, &settings)).unwrap();
    }
    writer.finish().unwrap();

    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
    let files: BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|f| f.as_str().unwrap()).collect();
    assert!(files.len() > 3, "{files:?}");
    assert!(files.contains(format!("model-00001-of-{:05}.safetensors", files.len()).as_str()));
    let on_disk: u64 = files.iter().map(|file| fs::metadata(target.join(file)).unwrap().len()).sum();
    let total = index["metadata"]["total_size"].as_u64().unwrap();
    assert!(total < on_disk && on_disk < total + 100_000);

    let many = Checkpoint::open(&target).unwrap();
    assert_eq!(many.names().collect::<BTreeSet<_>>(), whole.names().collect::<BTreeSet<_>>());
    for name in whole.names() {
        let (a, b) = (whole.tensor(name).unwrap(), many.tensor(name).unwrap());
        assert!((a.dtype, a.shape, a.bytes) == (b.dtype, b.shape, b.bytes), "{name}");
        let element = a.bytes.len() / a.shape.iter().product::<usize>();
        assert_eq!(b.bytes.as_ptr() as usize % element, 0, "{name} is not aligned");
    }
    for file in &files {
        let bytes = fs::read(target.join(file)).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert!(header.data_len() as u64 <= limit || header.tensors().len() == 1, "{file}");
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let source = tiny();
    let scratch = tempfile::tempdir().unwrap();
    let settings = settings(GPTQ, 3, Some(32), false, Order::Act);
    for name in ["one", "two"] {
        write_rounded(&source, &scratch.path().join(name), GPTQ, &settings).unwrap();
    }
    for name in names_in(&scratch.path().join("one")) {
        let read = |run: &str| fs::read(scratch.path().join(run).join(&name)).unwrap();
        assert!(read("one") == read("two"), "{name}");
    }
}

#[test]
fn loaders_leave_alone_what_is_not_quantized() {
    let source = tiny();
    let some: Vec<LinearSpec> =
        decoder_linears(&source).into_iter().filter(|l| l.module != "model.layers.3.mlp.down_proj").collect();
    let others: Vec<String> = source
        .names()
        .filter_map(|name| name.strip_suffix(".weight"))
        .filter(|module| some.iter().all(|linear| linear.module != *module))
        .filter(|module| source.tensor(&format!("{module}.weight")).unwrap().shape.len() > 1)
        .map(str::to_owned)
        .collect();
    let settings = settings(Format::COMPRESSED_TENSORS, 3, Some(128), true, Order::ActGroup);
    let config = Format::COMPRESSED_TENSORS.quantization_config(&some, &others, &settings.layout()).unwrap();
    let expected =
        serde_json::json!([r"re:(.*\.)?lm_head$", r"re:(.*\.)?layers\.3\.mlp\.down_proj$", r"re:(.*\.)?visual\..*"]);
    assert_eq!(config["ignore"], expected);
    let config = GPTQ.quantization_config(&some, &others, &settings.layout()).unwrap();
    let rules: Vec<&String> = config["dynamic"].as_object().unwrap().keys().collect();
    assert_eq!(rules, [r"-:(.*\.)?lm_head$", r"-:(.*\.)?layers\.3\.mlp\.down_proj$", r"-:(.*\.)?visual\..*"]);
    assert_eq!(
        config["modules_in_block_to_quantize"],
        serde_json::json!([
            ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
            ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
        ])
    );
}

#[test]
fn refusals_come_before_anything_is_created() {
    let source = tiny();
    let scratch = tempfile::tempdir().unwrap();
    let taken = scratch.path().join("taken");
    fs::create_dir(&taken).unwrap();
    let target = scratch.path().join("new");
    let good = settings(Format::COMPRESSED_TENSORS, 3, Some(128), false, Order::None);
    let linears = decoder_linears(&source);
    let create = |target: &Path, source: &Checkpoint, linears: &[LinearSpec], format: Format, layout: &_| {
        message(Writer::create(target, &QuantizedCopy { checkpoint: source, linears, format, layout }))
    };

    let error = message(WorkFolder::open(&taken));
    assert!(error.contains("taken exists. Remove it"), "{error}");

    let mut wrong = linears.clone();
    wrong[0].out_features += 1;
    let error = create(&target, &source, &wrong, Format::COMPRESSED_TENSORS, &good.layout());
    assert!(error.contains("model.layers.0.mlp.down_proj.weight") && error.contains("[256, 768]"), "{error}");
    wrong[0].module = "model.layers.9.mlp.down_proj".to_owned();
    let error = create(&target, &source, &wrong, Format::COMPRESSED_TENSORS, &good.layout());
    assert!(error.contains("no tensor model.layers.9.mlp.down_proj.weight"), "{error}");
    wrong[0] = wrong[1].clone();
    let error = create(&target, &source, &wrong, Format::COMPRESSED_TENSORS, &good.layout());
    assert!(error.contains("announced twice"), "{error}");

    let error = create(&target, &source, &linears, GPTQ, &good.layout());
    assert!(error.contains("gptq files start at 1"), "{error}");
    let mut half = settings(GPTQ, 3, Some(128), false, Order::None);
    half.scale_type = vlmq::tensor::Float::Bf16;
    let error = create(&target, &source, &linears, GPTQ, &half.layout());
    assert!(error.contains("scales of type F16"), "{error}");

    let error = create(
        &target,
        &source,
        &linears,
        Format::COMPRESSED_TENSORS,
        &(settings(Format::COMPRESSED_TENSORS, 3, Some(512), false, Order::None)).layout(),
    );
    assert!(error.contains("group size 512 does not divide") && error.contains("q_proj (256 x 256)"), "{error}");
    assert!(error.contains("8, 16, 32, 64, 128, 256, none"), "{error}");

    let odd = made("model.layers.0.mlp.up_proj.weight", &[40, 16], &[0.5; 640]);
    let files = folder(&[("config.json", b"{}".to_vec()), ("model.safetensors", safetensors(&[odd]))]);
    let odd = Checkpoint::open(files.path()).unwrap();
    let spec = LinearSpec { module: "model.layers.0.mlp.up_proj".to_owned(), out_features: 40, in_features: 16 };
    let error = create(&target, &odd, &[spec], GPTQ, &(settings(GPTQ, 3, Some(16), false, Order::None)).layout());
    assert!(error.contains("multiples of 32") && error.contains("up_proj (40 x 16)"), "{error}");

    let done = scratch.path().join("done");
    write_rounded(&source, &done, Format::COMPRESSED_TENSORS, &good).unwrap();
    let error =
        create(&target, &Checkpoint::open(&done).unwrap(), &linears, Format::COMPRESSED_TENSORS, &good.layout());
    assert!(error.contains("already quantized"), "{error}");
    assert_eq!(names_in(scratch.path()), BTreeSet::from(["done".to_owned(), "taken".to_owned()]));
}

#[test]
fn a_broken_run_leaves_nothing() {
    let source = tiny();
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("out");
    let good = settings(Format::COMPRESSED_TENSORS, 3, Some(128), false, Order::None);
    let linears = decoder_linears(&source);
    let rounded = |linear: &LinearSpec| {
        let weight = source.linear(&linear.module, linear.out_features, linear.in_features).unwrap();
        round_to_nearest(&weight, &good)
    };
    let create = || {
        let work = WorkFolder::open(&target).unwrap();
        let (format, layout) = (Format::COMPRESSED_TENSORS, good.layout());
        let copy = QuantizedCopy { checkpoint: &source, linears: &linears, format, layout: &layout };
        let mut writer = Writer::create(&work.checkpoint(), &copy).unwrap();
        writer.copy_tensors(&source, &mut |_| Ok(())).unwrap();
        (work, writer)
    };

    let (work, mut writer) = create();
    assert_eq!(names_in(scratch.path()), BTreeSet::from([".out.vlmq".to_owned()]));
    writer.write(&linears[0].module, &rounded(&linears[0])).unwrap();
    let error = message(writer.write(&linears[0].module, &rounded(&linears[0])));
    assert!(error.contains("written before"), "{error}");
    let error = message(writer.write("lm_head", &rounded(&linears[0])));
    assert!(error.contains("lm_head was not announced"), "{error}");
    let error = message(writer.write(&linears[1].module, &rounded(&linears[0])));
    assert!(error.contains("announced as 768 x 256"), "{error}");
    for (change, cause) in [
        ((|q| q.scales[3] = 1.0 + f32::EPSILON) as fn(&mut vlmq::codes::QuantizedLinear), "cannot hold"),
        (|q| q.scales[3] = f32::INFINITY, "not finite"),
        (|q| q.codes[5] = 8, "above 7"),
        (|q| q.bits = 4, "other settings"),
        (|q| q.codes.truncate(5), "wrong number"),
    ] {
        let mut broken = rounded(&linears[1]);
        change(&mut broken);
        let error = message(writer.write(&linears[1].module, &broken));
        assert!(error.contains(cause) && error.contains(&linears[1].module), "{error}");
    }
    let error = message(writer.finish());
    assert!(error.contains("never written, among them model.layers.0"), "{error}");
    drop(work);
    assert_eq!(names_in(scratch.path()), BTreeSet::new());

    let (mut work, mut writer) = create();
    for linear in &linears {
        writer.write(&linear.module, &rounded(linear)).unwrap();
    }
    writer.finish().unwrap();
    fs::create_dir(&target).unwrap();
    let error = message(work.finish());
    assert!(error.contains("out exists"), "{error}");
    drop(work);
    assert_eq!(names_in(scratch.path()), BTreeSet::from(["out".to_owned()]));
}

/// The disk is full: a limit on the size of files stands in for it, set by a shell around this very test program.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing() {
    const FOLDER: &str = "VLMQ_TEST_FULL_DISK";
    if let Ok(folder) = std::env::var(FOLDER) {
        let target = Path::new(&folder).join("out");
        let settings = settings(Format::COMPRESSED_TENSORS, 3, Some(128), false, Order::None);
        let error = message(write_rounded(&tiny(), &target, Format::COMPRESSED_TENSORS, &settings));
        assert!(error.contains("cannot write") && error.contains("model.safetensors"), "{error}");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    // The limit is in blocks of 512 bytes, or of 1024 in some shells: below the weights either way.
    let script = "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\"";
    let name = full_name(module_path!(), "a_full_disk_leaves_nothing");
    let run = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(program)
        .args(arguments(&name))
        .env(FOLDER, scratch.path())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
    assert!(String::from_utf8_lossy(&run.stdout).contains("1 passed"));
    assert_eq!(names_in(scratch.path()), BTreeSet::new());
}
