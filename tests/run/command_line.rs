//! The program as other programs call it: exit codes, where words go, what is left behind.

use crate::support::program::{names_in, stderr, stdout, text, vlmq_run};
use std::path::Path;

const BITS_HELP: &str = "[possible values: 2, 3, 4, 8]";

fn data(path: &str) -> String {
    text(crate::support::data(path))
}

/// A `quantize` command line that only lacks its fault.
fn quantize(model: &str, out: &Path, extra: &[&str]) -> Vec<String> {
    let fixed = ["quantize", model, "--calib", &data("vqa/calib.jsonl"), "--out", out.to_str().unwrap()];
    fixed.iter().chain(extra).map(|&argument| argument.to_owned()).collect()
}

#[test]
fn help_names_every_flag() {
    for arguments in ["--help", "quantize --help", "eval --help", "inspect --help", "verify --help", "--version"] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = vlmq_run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}");
    }
    let help = stdout(&vlmq_run(&["quantize", "--help"]));
    let flags = "--calib --out --eval --solver --importance --bits --group-size --symmetric --grid --order --damp --alpha \
                 --samples --seed --max-tokens --format --device --threads --image-root --min-pixels --max-pixels --quiet \
                 --log-level";
    for flag in flags.split_ascii_whitespace() {
        assert!(help.contains(flag), "{flag} is not in\n{help}");
    }
    for default in ["[default: gptaq]", "[default: vlmq]", "[default: 3]", "[default: 128]", "[default: act-group]"] {
        assert!(help.contains(default), "{default} is not in\n{help}");
    }
    let help = stdout(&vlmq_run(&["eval", "--help"]));
    for flag in ["--reference", "--limit", "--json", "--image-root"] {
        assert!(help.contains(flag), "{flag} is not in\n{help}");
    }
    assert!(stdout(&vlmq_run(&["inspect", "--help"])).contains("--json"));
    let help = stdout(&vlmq_run(&["verify", "--help"]));
    assert!(help.contains("--against") && help.contains("--json"), "{help}");
}

#[test]
fn wrong_usage_is_exit_code_2_with_a_reason() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["polish"], "polish"),
        (&["quantize"], "--out"),
        (&["quantize", "m", "--out", "o"], "--calib"),
        (&["quantize", "m", "--calib", "c"], "--out"),
        (&["eval", "m"], "DATA"),
        (&["eval", "m", "d", "--limit", "0"], "at least 1"),
        (&["eval", "m", "d", "--bits", "3"], "--bits"),
        (&["inspect"], "MODEL"),
        (&["inspect", "m", "--device", "gpu"], "cuda:N"),
        (&["inspect", "m", "--threads", "0"], "from 1 to 1024"),
        (&["inspect", "m", "--threads", "1000000"], "from 1 to 1024"),
        (&["inspect", "m", "--log-level", "loud"], "loud"),
        (&["eval", "m", "d", "--min-pixels", "9", "--max-pixels", "4"], "--min-pixels 9 is more than --max-pixels 4"),
    ];
    for (arguments, reason) in cases {
        let output = vlmq_run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(reason), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn absurd_settings_are_exit_code_2_and_touch_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let cases: &[(&[&str], &str)] = &[
        (&["--bits", "5"], BITS_HELP),
        (&["--bits", "0"], BITS_HELP),
        (&["--bits", "x"], BITS_HELP),
        (&["--group-size", "7"], "positive multiple of 8, not 7"),
        (&["--group-size", "0"], "positive multiple of 8"),
        (&["--group-size", "-1"], "positive multiple of 8, or `none`"),
        (&["--group-size", "all"], "positive multiple of 8, or `none`"),
        (&["--alpha", "-1"], "alpha must be from 0 to 1"),
        (&["--alpha", "nan"], "alpha must be from 0 to 1"),
        (&["--damp", "0"], "damp must be above 0"),
        (&["--damp", "-0.1"], "damp must be above 0"),
        (&["--damp", "NaN"], "damp must be above 0"),
        (&["--damp", "inf"], "damp must be above 0"),
        (&["--samples", "0"], "at least 1"),
        (&["--samples", "-3"], "at least 1"),
        (&["--samples", "1e3"], "at least 1"),
        (&["--samples", "99999999999999999999999"], "at least 1"),
        (&["--seed", "x"], "--seed"),
        (&["--max-tokens", "0"], "at least 1"),
        (&["--min-pixels", "0"], "at least 1"),
        (&["--threads", "0"], "from 1 to 1024"),
        (&["--solver", "awq"], "rtn, gptq, gptaq"),
        (&["--importance", "yes"], "none, vlmq"),
        (&["--order", "random"], "none, act-group, act"),
        (&["--grid", "max"], "loss, mse, minmax"),
        (&["--format", "gguf"], "compressed-tensors, gptq, dequantized"),
        (&["--device", "cuda:x"], "cuda:N"),
        (&["--max-gpu-memory", "lots"], "8GiB"),
        (&["--max-gpu-memory", "-8"], "8GiB"),
        (&["--max-gpu-memory", "0"], "from 1MiB to 16TiB"),
        (&["--symmetric", "yes"], "unexpected argument 'yes'"),
    ];
    for (extra, reason) in cases {
        let output = vlmq_run(&quantize(&data("tiny-qwen2-vl"), &out, extra));
        assert_eq!(output.status.code(), Some(2), "{extra:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(reason), "{extra:?}: {}", stderr(&output));
        assert!(names_in(folder.path()).is_empty(), "{extra:?}");
    }
}

#[test]
fn a_missing_checkpoint_is_one_error_line() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let model = missing.to_str().unwrap();
    let out = folder.path().join("out");
    let json = folder.path().join("scores.json");
    let eval_data = data("vqa/eval.jsonl");
    let lines = [
        quantize(model, &out, &[]),
        quantize(model, &out, &["--eval", &eval_data, "--quiet"]),
        ["eval", model, &eval_data, "--json", json.to_str().unwrap()].map(str::to_owned).to_vec(),
        ["inspect", model].map(str::to_owned).to_vec(),
        ["inspect", model, "--json"].map(str::to_owned).to_vec(),
    ];
    for arguments in lines {
        let output = vlmq_run(&arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.starts_with("error: ") && message.contains(model), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(output.stdout.is_empty());
        assert!(names_in(folder.path()).is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_output_folder_that_exists_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "kept").unwrap();
    let eval_data = data("vqa/eval.jsonl");
    for extra in [&[][..], &["--eval", &eval_data]] {
        let output = vlmq_run(&quantize(&data("tiny-qwen2-vl"), &out, extra));
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let message = stderr(&output);
        assert!(message.contains("exists") && message.contains("--out"), "{message}");
        assert_eq!(names_in(folder.path()), ["out"]);
        assert_eq!(names_in(&out), ["mine"]);
    }
}

#[test]
fn scores_that_could_not_be_written_are_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("none/scores.json");
    let model = data("tiny-qwen2-vl");
    let output = vlmq_run(&["eval", &model, &data("vqa/eval.jsonl"), "--json", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.contains(file.to_str().unwrap()) && message.contains("does not exist"), "{message}");
}

#[test]
fn a_device_that_this_build_lacks_is_an_error() {
    let output = vlmq_run(&["inspect", &data("tiny-qwen2-vl"), "--device", "cuda:1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cuda:1") && stderr(&output).contains("--device cpu"), "{}", stderr(&output));
}

#[test]
fn a_limit_of_gpu_memory_needs_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = vlmq_run(&quantize(&data("tiny-qwen2-vl"), &out, &["--max-gpu-memory", "8GiB"]));
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.contains("--max-gpu-memory") && message.contains("--device cuda"), "{message}");
    assert!(names_in(folder.path()).is_empty());
}
