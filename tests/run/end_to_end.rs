//! Whole runs of the program: what it prints, what it writes, that others find everything where they look for it, and
//! that the same input gives the same bytes.

use crate::support::program::{
    Bench, IMAGE, copy_folder, files_of, lasting_files_of, names_in, question, read_json, stderr, succeed, text,
    vlmq_run,
};
use crate::support::{data, golden};
use serde_json::Value;
use std::fs;
use std::path::Path;
use vlmq::checkpoint::Checkpoint;

const FLAT: &str = "flat-tied-bf16";

/// A bench with all data of the small checkpoints: images, several turns, text alone.
fn bench(checkpoint: &str) -> Bench {
    let bench = Bench::new(checkpoint);
    let lines = fs::read_to_string(golden("model/flat-tied-bf16.jsonl")).unwrap();
    fs::write(bench.data(), lines + r#"{"id": "plain", "text": "a red circle and a blue square."}"#).unwrap();
    bench
}

/// `extra` with the images of the shared data.
fn with_images(extra: &[&str]) -> Vec<String> {
    let root = text(golden("model"));
    extra.iter().copied().chain(["--image-root", &root]).map(str::to_owned).collect()
}

/// Quantizes with `extra` and returns the files written but the reports; then removes them.
fn written(bench: &Bench, extra: &[&str]) -> Vec<(String, Vec<u8>)> {
    let extra = with_images(extra);
    let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
    succeed(&bench.quantize(&extra));
    let out = bench.outputs().join("out");
    let files = lasting_files_of(&out);
    fs::remove_dir_all(out).unwrap();
    files
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn a_whole_run_prints_scores_and_writes_a_checkpoint() {
    let work = tempfile::tempdir().unwrap();
    let model = data("tiny-qwen2-vl-narrow");
    // Twelve questions with their images.
    let questions = work.path().join("questions.jsonl");
    let lines = fs::read_to_string(data("vqa/eval.jsonl")).unwrap();
    let lines: Vec<&str> = lines.lines().take(12).collect();
    fs::write(&questions, lines.join("\n")).unwrap();
    copy_folder(&data("vqa/images"), &work.path().join("images"));
    let out = work.path().join("out");
    let arguments = ["quantize", &text(&model), "--calib", &text(data("vqa/calib.jsonl")), "--samples", "8"];
    let output = vlmq_run(&[&arguments[..], &["--eval", &text(&questions), "--out", &text(&out)]].concat());
    let (shown, progress) = (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output));
    assert_eq!(output.status.code(), Some(0), "{progress}");

    for line in [
        "wrote",
        "bits per quantized weight",
        "rel. error",
        "peak memory",
        "loads with",
        "vlmq-run eval",
        "transformers",
    ] {
        assert!(shown.contains(line), "{line:?} is not in {shown}");
    }
    let table: Vec<&str> = shown.lines().skip_while(|line| !line.contains("nll float")).collect();
    assert!(table[0].contains("float") && table[0].ends_with("kl"), "{shown}");
    let total: Vec<&str> = table.last().unwrap().split_whitespace().collect();
    assert_eq!((total[0], total[1], total.len()), ("total", "12", 7), "{shown}");
    assert!(total[6].parse::<f64>().unwrap() > 0.0, "{shown}");
    for line in
        ["reading data: 8 samples", "block  layer", "self_attn.q_proj", "mlp.down_proj", "evaluating: 12 samples"]
    {
        assert!(progress.contains(line), "{line:?} is not in {progress}");
    }

    let report = read_json(out.join("report.json"));
    let expected = "blocks bytes_after bytes_before calibration check commit device device_pool evaluation family format \
                    importance_edges inputs largest_split layers loaders memory_plan model peak_device_bytes peak_memory_bytes quantized_bytes samples seconds \
                    settings shut_out stages vlmq_version";
    assert_eq!(keys(&report).join(" "), expected);
    let layer = "bits block cols damp dead_inputs effective_tokens findings group_columns importance name relative_error rows seconds tokens weight_error";
    assert_eq!(keys(&report["layers"][0]).join(" "), layer);
    assert_eq!(keys(&report["loaders"][0]), ["command", "name"]);
    assert_eq!(report["calibration"]["used"], 8);
    assert_eq!(report["settings"]["solver"]["bits"], 3);
    assert!(report["layers"].as_array().unwrap().len().is_multiple_of(7));

    // Side files and untouched tensors byte for byte; config.json with all it had, in its order.
    let (source, copy) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
    for (name, bytes) in files_of(&model) {
        if !["config.json", "model.safetensors"].contains(&name.as_str()) {
            assert!(fs::read(out.join(&name)).unwrap() == bytes, "{name}");
        }
    }
    let quantized: Vec<&str> =
        report["layers"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect();
    let mut kept = 0;
    for name in source.names() {
        if !name.strip_suffix(".weight").is_some_and(|module| quantized.contains(&module)) {
            let (old, new) = (source.tensor(name).unwrap(), copy.tensor(name).unwrap());
            assert!(old.bytes == new.bytes && old.dtype == new.dtype && old.shape == new.shape, "{name}");
            kept += 1;
        }
    }
    assert_eq!(source.names().count(), kept + quantized.len());
    let added: Vec<(&String, &Value)> = copy.config().as_object().unwrap().iter().collect();
    let had: Vec<(&String, &Value)> = source.config().as_object().unwrap().iter().collect();
    assert_eq!(added[..had.len()], had);
    let new: Vec<&str> = added[had.len()..].iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(new, ["quantization_config", "vlmq"]);
    assert_eq!(names_in(work.path()), ["images", "out", "questions.jsonl"]);
}

#[test]
fn every_solver_and_format_can_be_evaluated() {
    let runs: &[&[&str]] = &[
        &["--solver", "rtn", "--format", "compressed-tensors", "--bits", "8", "--order", "act"],
        &["--solver", "rtn", "--format", "gptq", "--group-size", "none"],
        &["--solver", "rtn", "--format", "dequantized", "--symmetric"],
        &["--solver", "gptq", "--format", "compressed-tensors", "--order", "act", "--bits", "4"],
        &["--solver", "gptq", "--format", "gptq", "--order", "act", "--bits", "2", "--importance", "none"],
        &["--solver", "gptq", "--format", "dequantized", "--grid", "mse", "--group-size", "none"],
        &["--solver", "gptaq", "--format", "compressed-tensors", "--symmetric", "--grid", "mse", "--bits", "2"],
        &["--solver", "gptaq", "--format", "gptq", "--order", "none", "--symmetric", "--bits", "8"],
        &["--solver", "gptaq", "--format", "dequantized", "--order", "act", "--alpha", "1", "--damp", "0.1"],
    ];
    for run in runs {
        let bench = bench(FLAT);
        let extra: Vec<String> = with_images(run);
        let extra: Vec<&str> = extra.iter().map(String::as_str).chain(["--quiet"]).collect();
        let mut arguments = bench.quantize(&extra);
        if run.contains(&"rtn") {
            // Needs no calibration data, not even a flag.
            let at = arguments.iter().position(|argument| argument == "--calib").unwrap();
            arguments.drain(at..at + 2);
        }
        let output = vlmq_run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{run:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{run:?} with --quiet");

        bench.write_data(&[&question(IMAGE)]);
        let out = bench.outputs().join("out");
        let json = bench.outputs().join("scores.json");
        let (model, reference) = (text(&out), text(bench.model()));
        let eval = ["eval", &model, &text(bench.data()), "--json", &text(&json), "--reference", &reference, "--quiet"];
        let output = vlmq_run(&eval);
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()), "{run:?}");
        let scores = read_json(&json);
        let expected = "agreement answers groups kl max_pixels min_pixels n nll points preset score tokens";
        assert_eq!(keys(&scores).join(" "), expected, "{run:?}");
        // The checkpoint's own limits, which no flag changed.
        assert!(
            scores["min_pixels"].is_u64() && scores["max_pixels"].is_u64() && scores["preset"].is_null(),
            "{run:?}"
        );
        assert_eq!(keys(&scores["answers"][0]), ["answer", "id", "score"], "{run:?}");
        assert!(scores["kl"].as_f64().unwrap() > 0.0, "{run:?}: {scores}");
        assert!(scores["nll"].as_f64().unwrap().is_finite(), "{run:?}");
        assert_eq!((&scores["n"], names_in(&bench.outputs()).len()), (&1.into(), 2), "{run:?}");

        let inspected: Value = serde_json::from_str(&succeed(&["inspect", &model, "--json"])).unwrap();
        assert_eq!(inspected["quantization"].is_null(), run.contains(&"dequantized"), "{run:?}");
    }
}

#[test]
fn scores_of_a_model_against_itself() {
    let work = tempfile::tempdir().unwrap();
    let json = text(work.path().join("scores.json"));
    let model = text(data("tiny-qwen2-vl-narrow"));
    let arguments = ["eval", &model, &text(data("vqa/eval.jsonl")), "--limit", "10", "--json", &json];
    let shown = succeed(&[&arguments[..], &["--reference", &model]].concat());
    let scores = read_json(&json);
    assert_eq!((&scores["n"], &scores["kl"], &scores["agreement"]), (&10.into(), &0.0.into(), &1.0.into()));
    assert_eq!(scores["answers"].as_array().unwrap().len(), 10);
    assert_eq!(scores["answers"][0]["id"], "eval-0000");
    let groups = scores["groups"].as_object().unwrap();
    assert!(groups.values().all(|group| keys(group).join(" ") == "agreement kl n nll score tokens"), "{scores}");
    assert_eq!(groups.values().map(|group| group["n"].as_u64().unwrap()).sum::<u64>(), 10);
    assert!(groups.keys().all(|name| shown.contains(name.as_str())) && shown.contains("total"), "{shown}");

    // Without a reference there is no divergence; scores and likelihood stay.
    let alone = ["eval", &model, &text(data("vqa/eval.jsonl")), "--limit", "10", "--json", &json];
    succeed(&alone);
    let again = read_json(&json);
    assert!(again["kl"].is_null() && again["agreement"].is_null());
    assert_eq!((&again["nll"], &again["answers"]), (&scores["nll"], &scores["answers"]));
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let bench = bench("rope-parameters-f32");
    let first = written(&bench, &["--threads", "1"]);
    assert!(first.iter().any(|(name, _)| name == "model.safetensors"));
    for threads in ["1", "2", "7"] {
        assert!(written(&bench, &["--threads", threads]) == first, "{threads} threads");
    }
    // Another draw, another order or fewer samples change the statistics, and only those.
    let two = written(&bench, &["--samples", "2", "--seed", "1"]);
    assert!(written(&bench, &["--samples", "2", "--seed", "1"]) == two);
    let others: Vec<_> = (2..6).map(|seed| written(&bench, &["--samples", "2", "--seed", &seed.to_string()])).collect();
    assert!(others.iter().any(|other| *other != two), "no seed draws other samples");
    assert!(two != first);
}

#[test]
fn data_in_other_forms() {
    let bench = Bench::new(FLAT);
    let image = "blocks-131x50.png";
    let root = text(golden("model/images"));
    // ShareGPT: one JSON list. The images lie elsewhere.
    bench.write_data(&[r#"[{"id": 1, "image": "blocks-131x50.png", "conversations": [
        {"from": "human", "value": "<image>\nwhat shape?"}, {"from": "gpt", "value": "square"}]}]"#]);
    let shared = written_report(&bench, &["--image-root", &root]);
    assert_eq!(shared["calibration"]["used"], 1);
    assert!(shared["calibration"]["vision_tokens"].as_u64().unwrap() > 0);
    bench.write_data(&[&question(image)]);
    assert_eq!(written_report(&bench, &["--image-root", &root])["calibration"], shared["calibration"]);
    // Without the flag the image is looked for beside the data.
    bench.refused(&bench.quantize(&[]), &[image, "--image-root"]);
    fs::copy(golden("model/images").join(image), bench.data().parent().unwrap().join(image)).unwrap();
    assert_eq!(written_report(&bench, &[])["calibration"], shared["calibration"]);
    // Text alone needs no vision tower.
    bench.write_data(&[r#"{"text": "a green square, a red circle, and what is left of the rest"}"#]);
    let plain = written_report(&bench, &[]);
    assert_eq!(plain["calibration"]["vision_tokens"], 0);
    assert!(plain["calibration"]["text_tokens"].as_u64().unwrap() > 10);
    // What is too long is counted and told.
    bench.write_data(&[&question(image), &format!(r#"{{"text": "{}"}}"#, "red circle ".repeat(200))]);
    let output = vlmq_run(&bench.quantize(&["--max-tokens", "100"]));
    assert!(stderr(&output).contains("warn: 1 of 2 conversations are longer than 100 tokens"), "{}", stderr(&output));
    let report = read_json(bench.outputs().join("out/report.json"));
    assert_eq!((&report["calibration"]["used"], &report["calibration"]["too_long"]), (&1.into(), &1.into()));
}

/// Quantizes, reads the report, and removes the output.
fn written_report(bench: &Bench, extra: &[&str]) -> Value {
    succeed(&bench.quantize(extra));
    let out = bench.outputs().join("out");
    let report = read_json(out.join("report.json"));
    fs::remove_dir_all(out).unwrap();
    report
}

#[test]
fn inspection_as_json() {
    let value: Value = serde_json::from_str(&succeed(&["inspect", &text(data("tiny-qwen2-vl")), "--json"])).unwrap();
    assert_eq!(keys(&value).join(" "), "bytes decoder estimate family model parts quantizable quantization splits");
    assert_eq!((&value["family"], &value["quantization"]), (&"qwen2_vl".into(), &Value::Null));
    assert_eq!(value["quantizable"].as_array().unwrap().len(), 7);
    let weights = fs::metadata(data("tiny-qwen2-vl/model.safetensors")).unwrap().len();
    assert!((weights - 100_000..weights).contains(&value["bytes"].as_u64().unwrap()), "{value}");
}

#[test]
fn paths_of_every_kind() {
    // A name with spaces and letters beyond ASCII, an output given relative to the working folder, no trailing names.
    let work = tempfile::tempdir().unwrap();
    let model = work.path().join("my  modèle");
    copy_folder(&golden("model").join(FLAT), &model);
    let run = |out: &str| {
        std::process::Command::new(env!("CARGO_BIN_EXE_vlmq-run"))
            .current_dir(work.path())
            .args(["quantize", "my  modèle", "--solver", "rtn", "--group-size", "32", "--quiet", "--out", out])
            .output()
            .unwrap()
    };
    for out in ["out", "./two", "three/"] {
        let output = run(out);
        assert_eq!(output.status.code(), Some(0), "{out}: {}", stderr(&output));
        assert!(work.path().join(Path::new(out)).join("config.json").is_file());
    }
    assert!(stderr(&run("out")).starts_with("error: out exists."));
    assert_eq!(names_in(work.path()), ["my  modèle", "out", "three", "two"]);
}
