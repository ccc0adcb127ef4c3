//! Files of a checkpoint that are no files, too large, or not where they should be, and tokenizers that would not end: one
//! line says so, soon, and nothing is left behind.

use crate::support::program::{
    Bench, Meets, broken, copy_folder, edit_header, files_of, limited_run, names_in, pipe, question, succeed,
};
use crate::support::{golden, message};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use vlmq::checkpoint::{Checkpoint, MAX_TENSORS};

/// One file of bf16 weights; the shards of f16 ones.
const FLAT: &str = "flat-tied-bf16";
const SHARDED: &str = "nested-f16-sharded";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const OWN_TEMPLATE: &str = "chat_template.jinja";

#[test]
fn what_is_no_file() {
    for (name, meets) in [
        ("config.json", Meets::All),
        (WEIGHTS, Meets::All),
        ("tokenizer.json", Meets::Runs),
        ("tokenizer_config.json", Meets::Runs),
        ("generation_config.json", Meets::Runs),
        ("preprocessor_config.json", Meets::Runs),
        ("processor_config.json", Meets::Runs),
        ("chat_template.json", Meets::Runs),
        (OWN_TEMPLATE, Meets::Runs),
    ] {
        // Opened, a pipe would wait for ever.
        broken(FLAT, meets, &[name, "is not a file, but a pipe"], |model| {
            let _ = fs::remove_file(model.join(name));
            pipe(&model.join(name));
        });
        broken(FLAT, meets, &[name, "is not a file, but a folder"], |model| {
            let _ = fs::remove_file(model.join(name));
            fs::create_dir(model.join(name)).unwrap();
        });
    }
    broken(SHARDED, Meets::All, &[INDEX, "is not a file, but a pipe"], |model| {
        fs::remove_file(model.join(INDEX)).unwrap();
        pipe(&model.join(INDEX));
    });
    // A link to a device is one, wherever links may lead.
    broken(FLAT, Meets::All, &[WEIGHTS, "a device"], |model| {
        fs::remove_file(model.join(WEIGHTS)).unwrap();
        symlink("/dev/zero", model.join(WEIGHTS)).unwrap();
    });
}

#[test]
fn what_is_too_large() {
    let mib = |n: u64| n << 20;
    for (checkpoint, name, limit, meets) in [
        (FLAT, "config.json", mib(16), Meets::All),
        (SHARDED, INDEX, mib(128), Meets::All),
        (FLAT, "tokenizer.json", mib(128), Meets::Runs),
        (FLAT, "tokenizer_config.json", mib(16), Meets::Runs),
        (FLAT, "generation_config.json", mib(16), Meets::Runs),
        (FLAT, "preprocessor_config.json", mib(16), Meets::Runs),
        (FLAT, "chat_template.json", mib(16), Meets::Runs),
        (FLAT, OWN_TEMPLATE, 64 << 10, Meets::Runs),
    ] {
        let says = [name, &format!("has {} bytes", limit + 1), &format!("the limit for such a file is {limit}")];
        broken(checkpoint, meets, &says, |model| {
            File::create(model.join(name)).unwrap().set_len(limit + 1).unwrap();
        });
    }
    broken(FLAT, Meets::Runs, &["chat_template.json", "65537 bytes; the limit is 65536"], |model| {
        fs::write(model.join("chat_template.json"), json!({"chat_template": " ".repeat((64 << 10) + 1)}).to_string())
            .unwrap();
    });
    broken(FLAT, Meets::All, &[WEIGHTS, "claims 33554433 bytes; the limit is 33554432"], |model| {
        let mut file = File::create(model.join(WEIGHTS)).unwrap();
        file.write_all(&((32u64 << 20) + 1).to_le_bytes()).unwrap();
        file.set_len(40 << 20).unwrap();
    });
    for depth in ["[", "{\"a\":"] {
        for (name, checkpoint) in [("tokenizer.json", FLAT), ("generation_config.json", FLAT), (INDEX, SHARDED)] {
            let meets = if name == INDEX { Meets::All } else { Meets::Runs };
            // What the index holds beside its map is skipped without recursion.
            let says = if name == INDEX { "EOF" } else { "recursion limit" };
            broken(checkpoint, meets, &[name, says], |model| {
                let start = if name == INDEX { "{\"other\":" } else { "{\"model\":" };
                fs::write(model.join(name), start.to_owned() + &depth.repeat(1 << 18)).unwrap();
            });
        }
    }
}

#[test]
fn shapes_and_numbers_of_tensors() {
    for shape in [json!([0, 1u64 << 40]), json!([1u64 << 32, 0]), json!([1, 1, 1, 1, 1, 1, 1, 1, 0])] {
        broken(FLAT, Meets::All, &["tensor extra", WEIGHTS, "a shape no model has"], |model| {
            edit_header(&model.join(WEIGHTS), |all| {
                all.insert("extra".into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}));
            });
        });
    }
    // Names are for messages alone: one like a path writes nowhere, one with a terminal's commands gives none.
    let bench = Bench::new(FLAT);
    edit_header(&bench.file(WEIGHTS), |all| {
        all.insert("../../stray".into(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}));
    });
    succeed(&bench.quantize(&["--solver", "rtn"]));
    assert_eq!(names_in(&bench.outputs()), ["out"]);
    assert_eq!(
        names_in(bench.model().parent().unwrap()),
        ["data.jsonl", crate::support::program::IMAGE, "model", "outputs"]
    );
    let bench = Bench::new(FLAT);
    edit_header(&bench.file(WEIGHTS), |all| {
        all.insert("a\u{1b}[2Jb".into(), json!({"dtype": "F32", "shape": [1u64 << 40, 0], "data_offsets": [0, 0]}));
    });
    bench.refused(&bench.inspect(), &["tensor a\u{fffd}[2Jb"]);

    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    let half = MAX_TENSORS / 2;
    for (file, names) in [("a.safetensors", 0..half), ("b.safetensors", half..MAX_TENSORS + 1)] {
        let mut header = String::from("{");
        for name in names {
            header += &format!(
                "{}\"{name}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                if header.len() > 1 { "," } else { "" }
            );
        }
        fs::write(folder.path().join(file), crate::support::checkpoint::with_header(&(header + "}"), Vec::new()))
            .unwrap();
    }
    assert!(message(Checkpoint::open(folder.path())).contains("more than 1048576 tensors"));
}

/// The files of a checkpoint as a download cache keeps them: blobs, and a folder of links.
fn cached(bench: &Bench) -> PathBuf {
    let cache = bench.model().parent().unwrap().join("cache/models--some--model");
    let snapshot = cache.join("snapshots/0123");
    fs::create_dir_all(cache.join("blobs")).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (number, (name, bytes)) in files_of(&bench.model()).into_iter().enumerate() {
        fs::write(cache.join(format!("blobs/{number}")), bytes).unwrap();
        symlink(format!("../../blobs/{number}"), snapshot.join(name)).unwrap();
    }
    snapshot
}

#[test]
fn links_of_a_download_cache_are_followed() {
    let bench = Bench::new(SHARDED);
    let snapshot = cached(&bench);
    let before = files_of(&bench.model());
    fs::remove_dir_all(bench.model()).unwrap();
    symlink(&snapshot, bench.model()).unwrap();
    succeed(&bench.inspect());
    succeed(&bench.quantize(&["--format", "dequantized"]));
    let out = bench.outputs().join("out");
    for name in names_in(&out) {
        assert!(fs::symlink_metadata(out.join(&name)).unwrap().is_file(), "{name}");
    }
    assert_eq!(
        fs::read(out.join("tokenizer.json")).unwrap(),
        before.iter().find(|f| f.0 == "tokenizer.json").unwrap().1
    );
    fs::remove_dir_all(out).unwrap();
    // Older tools filled any folder with links to the cache.
    fs::remove_file(bench.model()).unwrap();
    fs::create_dir(bench.model()).unwrap();
    for name in names_in(&snapshot) {
        symlink(snapshot.join(&name).canonicalize().unwrap(), bench.file(&name)).unwrap();
    }
    succeed(&bench.quantize(&["--solver", "rtn"]));
}

#[test]
fn links_out_of_the_folder() {
    let elsewhere = tempfile::tempdir().unwrap();
    copy_folder(&golden("model").join(FLAT), elsewhere.path());
    fs::write(elsewhere.path().join("secret"), "a secret").unwrap();
    let target = |name: &str| elsewhere.path().join(name);
    for (name, meets) in [
        ("config.json", Meets::All),
        ("tokenizer.json", Meets::Runs),
        ("tokenizer_config.json", Meets::Runs),
        ("generation_config.json", Meets::Runs),
        ("preprocessor_config.json", Meets::Runs),
        ("chat_template.json", Meets::Runs),
    ] {
        let says = [name, "is a link to", "outside the checkpoint's folder; put a copy"];
        broken(FLAT, meets, &says, |model| {
            fs::remove_file(model.join(name)).unwrap();
            symlink(target(name), model.join(name)).unwrap();
        });
    }
    // What no command reads would go into the output.
    for name in ["README.md", "merges.txt", "additional_chat_templates"] {
        broken(FLAT, Meets::Quantize, &[name, "is a link to", "put a copy"], |model| {
            let to = if name.contains('.') { target("secret") } else { elsewhere.path().to_path_buf() };
            symlink(to, model.join(name)).unwrap();
        });
    }
    broken(FLAT, Meets::Quantize, &["tool.jinja", "is a link to", "put a copy"], |model| {
        fs::create_dir(model.join("additional_chat_templates")).unwrap();
        symlink(target("secret"), model.join("additional_chat_templates/tool.jinja")).unwrap();
    });
    // Weights may lie where there is room, and a link may stay in the folder.
    let bench = Bench::new(FLAT);
    for name in [WEIGHTS, "tokenizer.json"] {
        let to = if name == WEIGHTS { target(name) } else { bench.file("other.json") };
        fs::rename(bench.file(name), &to).unwrap();
        symlink(to, bench.file(name)).unwrap();
    }
    succeed(&bench.quantize(&["--solver", "rtn"]));
}

/// Changes tokenizer.json.
fn tokenizer(edit: impl FnOnce(&mut Value)) -> impl FnOnce(&Path) {
    move |model| {
        let path = model.join("tokenizer.json");
        let mut all = crate::support::program::read_json(&path);
        edit(&mut all);
        fs::write(path, all.to_string()).unwrap();
    }
}

#[test]
fn tokenizers() {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let cases: Vec<(&str, Value, &str)> = vec![
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}),
            "\"Replace\"; known are NFC",
        ),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 17]}),
            "17 steps; the limit is 16",
        ),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "\"Precompiled\""),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}),
            "\"Sequence\"",
        ),
        ("pre_tokenizer", split(&"a".repeat(4097)), "4097 bytes; the limit is 4096"),
        ("pre_tokenizer", split("(a"), "not a tokenizer this program can read"),
        // Takes twice as many steps for each further `a`; the tokenizer's own crate would cut the text there and go on.
        ("pre_tokenizer", split("((?=a)a*)*b(?=c)"), "tokenizer.json fails on 64 bytes of text"),
        ("pre_tokenizer", json!({"type": "Metaspace"}), "\"Metaspace\"; known are Split"),
        ("decoder", json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}), "\"Strip\"; known are ByteLevel"),
        ("post_processor", json!({"type": "Odd"}), "\"Odd\""),
        ("post_processor", json!(7), "`post_processor` has no `type`"),
        ("model", json!({"type": "Unigram", "unk_id": 0, "vocab": []}), "\"Unigram\"; known is BPE"),
        ("model", json!({"vocab": {}, "merges": []}), "`model` has no `type`"),
        ("model", Value::Null, "`model` has no `type`"),
    ];
    for (key, value, says) in cases {
        let bench = Bench::new(FLAT);
        tokenizer(|all| all[key] = value)(&bench.model());
        bench.write_data(&[&json!({"text": "a".repeat(64)}).to_string()]);
        bench.refused(&bench.quantize(&[]), &["tokenizer", says]);
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let says = ["tokenizer.json", key, "\"##\"; known is none"];
        broken(FLAT, Meets::Runs, &says, tokenizer(|all| all["model"][key] = json!("##")));
    }
    broken(
        FLAT,
        Meets::Runs,
        &["tokenizer.json", "`dropout` of 0.1"],
        tokenizer(|all| all["model"]["dropout"] = json!(0.1)),
    );
    // A token that the model has no row for: told with the sample, before anything is multiplied.
    let bench = Bench::new(FLAT);
    tokenizer(|all| all["model"]["vocab"]["q"] = json!(5000))(&bench.model());
    bench.write_data(&[&question(crate::support::program::IMAGE), r#"{"id": "odd", "text": "q"}"#]);
    bench.refused(&bench.quantize(&[]), &["sample odd has the token 5000, but the embedding has 640 rows"]);
}

/// A search that looks ahead from every place takes few steps back, and a time that grows with the square of the text.
#[test]
fn tokenizers_that_take_too_long() {
    let bench = Bench::new(FLAT);
    let pattern = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        tokenizer(|all| all["pre_tokenizer"] = split)(&bench.model());
    };
    let long = json!({"text": "a".repeat(90_000)}).to_string();
    for (searched, lines, says) in [
        // Within one search, and in as many as the text has letters.
        ("(?=(a+))a*b", vec![&*long], ["data.jsonl:1", "it takes more than 1 s"]),
        ("a+b|a", vec![&*long], ["data.jsonl:1", "it takes more than 1 s"]),
        // Held out, of which only what is wrong with the sample costs no more than the sample.
        ("(?=(a+))a*b", vec![&*long, "{\"text\": \"b\"}"], ["data.jsonl:1", "it takes more than 1 s"]),
    ] {
        pattern(searched);
        bench.write_data(&lines);
        let output = limited_run(2048, 40, &bench.quantize(&["--samples", "1", "--threads", "2"]));
        bench.check_refusal(&output, searched, &[&says[..], &["tokenizer.json fails on 90000 bytes"]].concat());
    }
}

/// What no known tokenizer comes near, and what nobody reads.
#[test]
fn json_of_any_shape_takes_little_memory() {
    let lists = format!("[{}0]", "[],".repeat(5 << 20));
    let runs = |says: &[&str], fault: &dyn Fn(&Bench)| {
        let bench = Bench::new(FLAT);
        fault(&bench);
        for arguments in [bench.quantize(&["--threads", "2"]), bench.eval(&["--threads", "2"])] {
            let output = limited_run(1600, 60, &arguments);
            bench.check_refusal(&output, says[0], says);
        }
    };
    for name in ["config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"] {
        runs(&[name, "it holds more than 262144 values"], &|bench| {
            let text = fs::read_to_string(bench.file(name)).unwrap_or("{}".into());
            let comma = if text.trim() == "{}" { "" } else { "," };
            fs::write(bench.file(name), text.replacen('{', &format!("{{\"unused\": {lists}{comma}"), 1)).unwrap();
        });
    }
    runs(&["tokenizer.json", "it holds more than 3145728 values"], &|bench| {
        let text = fs::read_to_string(bench.file("tokenizer.json")).unwrap();
        fs::write(bench.file("tokenizer.json"), text.replacen('{', &format!("{{\"unused\": {lists},"), 1)).unwrap();
    });
    runs(&["tokenizer.json", "a token has 4097 bytes; the limit is 4096"], &|bench| {
        tokenizer(|all| all["model"]["vocab"]["a".repeat(4097)] = json!(0))(&bench.model());
    });
    runs(&["tokenizer.json", "its added tokens have 4198400 bytes; the limit is 4194304"], &|bench| {
        let token = |id: usize| {
            json!({"id": id, "content": format!("{id:04096}"), "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let tokens: Vec<Value> = (1000..2025).map(token).collect();
        tokenizer(|all| all["added_tokens"] = json!(tokens))(&bench.model());
    });
    for (key, value) in
        [("q", lists.clone()), ("__metadata__", format!("{{{}\"a\":\"\"}}", "\"a\":\"\",".repeat(3 << 20)))]
    {
        runs(&[WEIGHTS, &format!("{key:?} of its header holds more than")], &|bench| {
            let header = format!("{{\"{key}\":{value}}}");
            fs::write(bench.file(WEIGHTS), crate::support::checkpoint::with_header(&header, vec![0; 64])).unwrap();
        });
    }
    runs(&[INDEX, "lists more than 1048576 tensors"], &|bench| {
        fs::remove_file(bench.file(WEIGHTS)).unwrap();
        let entries: Vec<String> = (0..(8 << 20)).map(|i| format!("\"{i}\":\"a\"")).collect();
        let index = format!("{{\"weight_map\":{{{}}}}}", entries.join(","));
        fs::write(bench.file(INDEX), index).unwrap();
    });
}
