//! Every model family through the whole program: quantized in all formats, evaluated, inspected, on the CPU and on emulated
//! kernels.

use crate::support::golden;
use crate::support::program::{emulated_run, read_json, stderr, succeed, text};
use serde_json::Value;
use std::path::Path;

/// A family, a checkpoint of it in tests/golden/model, and flags that keep its samples short.
type Row = (&'static str, &'static str, &'static [&'static str]);

/// Every test of every row, each by itself.
macro_rules! rows {
    ($($name:ident: $row:expr;)+) => {
        $(mod $name {
            #[test]
            fn goes_through_all_formats() {
                super::goes_through_all_formats($row);
            }

            #[test]
            #[ignore = "slow: whole runs on the emulator"]
            fn runs_on_emulated_kernels() {
                super::runs_on_emulated_kernels($row);
            }
        })+
    };
}

rows! {
    qwen2_vl: ("qwen2_vl", "nested-f16-sharded", &["--max-pixels", "12544"]);
    qwen2_5_vl_flat: ("qwen2_5_vl", "qwen2_5_vl-flat-bf16", &["--max-pixels", "20000"]);
    qwen2_5_vl_nested: ("qwen2_5_vl", "qwen2_5_vl-nested-f16", &["--max-pixels", "20000"]);
    llava_onevision_hub: ("llava_onevision", "llava-hub-tied-f16", &[]);
    llava_onevision_v5:
        ("llava_onevision", "llava-v5-f32", &["--image-mode", "anyres", "--chat-template", "chatml"]);
    qwen3_vl_tied: ("qwen3_vl", "qwen3_vl-tied-bf16", &["--max-pixels", "8192"]);
    qwen3_vl_sharded: ("qwen3_vl", "qwen3_vl-f16-sharded", &["--max-pixels", "8192"]);
}

const FORMATS: [&str; 3] = ["compressed-tensors", "gptq", "dequantized"];

/// The checkpoint's folder and its conversations.
fn inputs(checkpoint: &str) -> (String, String) {
    (text(golden("model").join(checkpoint)), text(golden("model").join(format!("{checkpoint}.jsonl"))))
}

fn quantize(checkpoint: &str, out: &Path, flags: &[&str]) -> Vec<String> {
    let (model, calib) = inputs(checkpoint);
    let fixed =
        ["quantize", &model, "--calib", &calib, "--out", &text(out), "--samples", "3", "--group-size", "32", "--quiet"]
            .map(str::to_owned);
    fixed.into_iter().chain(flags.iter().map(|flag| flag.to_string())).collect()
}

/// Scores of a quantized folder against the float checkpoint.
fn evaluate(checkpoint: &str, out: &Path, flags: &[&str]) -> Vec<String> {
    let (model, questions) = inputs(checkpoint);
    let json = text(out.with_extension("scores.json"));
    let fixed = ["eval", &text(out), &questions, "--reference", &model, "--json", &json, "--limit", "4", "--quiet"]
        .map(str::to_owned);
    fixed.into_iter().chain(flags.iter().map(|flag| flag.to_string())).collect()
}

/// Divergence from the float checkpoint, from what `evaluate` wrote.
fn kl(out: &Path) -> f64 {
    let scores = read_json(out.with_extension("scores.json"));
    assert_eq!(scores["n"], 4);
    scores["kl"].as_f64().unwrap()
}

fn goes_through_all_formats((family, checkpoint, flags): Row) {
    let work = tempfile::tempdir().unwrap();
    let inspect = |folder: &str| -> Value { serde_json::from_str(&succeed(&["inspect", folder, "--json"])).unwrap() };
    let float = inspect(&inputs(checkpoint).0);
    assert_eq!((&float["family"], &float["quantization"]), (&Value::from(family), &Value::Null));
    let mut divergences = Vec::new();
    for format in FORMATS {
        let out = work.path().join(format);
        succeed(&quantize(checkpoint, &out, &[flags, &["--format", format, "--bits", "8"]].concat()));
        succeed(&evaluate(checkpoint, &out, flags));
        let found = inspect(&text(&out));
        assert_eq!((&found["family"], &found["decoder"]), (&Value::from(family), &float["decoder"]), "{checkpoint}");
        match format {
            "dequantized" => assert_eq!(found["bytes"], float["bytes"], "{checkpoint}"),
            packed => {
                let said = found["quantization"].as_str().unwrap();
                assert!(said.contains(packed) && said.contains('8'), "{checkpoint}: {said}");
                assert!(found["bytes"].as_u64() < float["bytes"].as_u64(), "{checkpoint}");
            }
        }
        divergences.push(kl(&out));
    }
    println!("{checkpoint}: kl {divergences:?}");
    assert!(divergences.iter().all(|kl| (1e-7..0.01).contains(kl)), "{checkpoint}: {divergences:?}");
}

fn runs_on_emulated_kernels((_, checkpoint, flags): Row) {
    let work = tempfile::tempdir().unwrap();
    let on_device = [flags, &["--device", "cuda"]].concat();
    for format in FORMATS {
        let out = work.path().join(format);
        for arguments in [
            quantize(checkpoint, &out, &[&on_device[..], &["--format", format, "--bits", "4"]].concat()),
            evaluate(checkpoint, &out, &on_device),
            ["inspect", &text(&out), "--device", "cuda"].map(str::to_owned).to_vec(),
        ] {
            let output = emulated_run(&arguments);
            assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        }
        assert_eq!(read_json(out.join("report.json"))["device"], "cuda (emulated)");
        let there = kl(&out);
        // The same folder on the CPU: the device's float16 or bfloat16 weighs little beside 4 bits.
        succeed(&evaluate(checkpoint, &out, flags));
        let here = kl(&out);
        println!("{checkpoint} {format}: kl {there} on the device, {here} on the CPU");
        assert!((1e-5..1.0).contains(&here), "{checkpoint} {format}: {here}");
        assert!((there / here - 1.0).abs() < 0.2, "{checkpoint} {format}: {there} on the device, {here} on the CPU");
    }
}
