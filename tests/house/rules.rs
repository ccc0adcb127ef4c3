//! The rules of the house, read off the sources: who may use whom, where `unsafe` may stand, what must not be left lying.

use std::fs;
use std::path::{Path, PathBuf};

/// The files that may hold `unsafe`, each block with its reason.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/device/cpu/gemm.rs",
    "src/checkpoint/shard.rs",
    "src/heap.rs",
    "src/device/cuda/blas.rs",
    "src/device/cuda/device.rs",
    "src/device/cuda/driver.rs",
    "src/device/cuda/emulated.rs",
    "src/device/cuda/kernels.rs",
    "src/device/cuda/memory.rs",
    "src/device/cuda/pool.rs",
    "src/device/cuda/runtime.rs",
    "src/device/cuda/staging.rs",
    GENERATED,
];

/// Made by bindgen from kernels/include/vlmq.h.
const GENERATED: &str = "src/device/cuda/bindings.rs";

/// More lines than this want to be two files.
const LONGEST: usize = 450;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Text files below `folder`, relative to the crate, with their contents.
fn files(folder: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| extensions.contains(&e.to_str().unwrap())) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let found = files("src", &["rs"]);
    assert!(found.len() > 40, "the sources were not found");
    found
}

/// Lines of code with their numbers, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line.split("//").next().unwrap())).filter(|(_, l)| !l.is_empty())
}

#[test]
fn unsafe_stands_where_it_may_and_says_why() {
    let mut blocks = 0;
    for (name, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in code(&text) {
            // A block; the type of a foreign function is none.
            if !line.contains("unsafe {") && !line.contains("unsafe impl") && !line.contains("pub unsafe fn") {
                continue;
            }
            blocks += 1;
            assert!(
                MAY_BE_UNSAFE.contains(&name.as_str()),
                "{name}:{number} is not among the files that may be unsafe"
            );
            let before = &lines[number.saturating_sub(8)..number];
            assert!(
                before.iter().any(|line| line.contains("// SAFETY:")),
                "{name}:{number} does not say why it is sound"
            );
        }
        assert!(
            !text.contains("allow(unsafe_code)") || MAY_BE_UNSAFE.contains(&name.as_str()),
            "{name} lifts the ban on unsafe code"
        );
    }
    assert!(blocks >= MAY_BE_UNSAFE.len() - 1, "the search finds too little: {blocks} blocks");
}

#[test]
fn files_are_short() {
    for (name, text) in sources().into_iter().filter(|(name, _)| name != GENERATED) {
        assert!(text.lines().count() <= LONGEST, "{name} has {} lines", text.lines().count());
    }
}

#[test]
fn nothing_is_left_lying() {
    // In two pieces each, so that this file does not find itself.
    let words = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["un", "implemented!"], ["to", "do!("], ["db", "g!("]];
    let homes = [["/ro", "ot/"], ["/ho", "me/"], ["/wo", "rk/"], ["/Use", "rs/"], ["/tm", "p/"], ["C:", "\\"]];
    let kinds = ["rs", "py", "toml", "md", "sh", "txt", "cu", "cuh", "h", "jinja", "css"];
    let folders = ["src", "tests", "benches", "kernels", "build", "docs", ".ci"];
    let mut all: Vec<(String, String)> = folders.iter().flat_map(|folder| files(folder, &kinds)).collect();
    for name in ["build.rs", "Cargo.toml", "README.md", ".ci/run"] {
        if let Ok(text) = fs::read_to_string(root().join(name)) {
            all.push((name.to_owned(), text));
        }
    }
    for (name, text) in &all {
        for (number, line) in text.lines().enumerate() {
            for word in words.iter().chain(&homes).map(|pieces| pieces.concat()) {
                assert!(!line.contains(&word), "{name}:{}: {word} in {line:?}", number + 1);
            }
        }
    }
}

/// A family is one file of src/model/families and its line there: no other code knows one.
#[test]
fn families_are_known_to_nobody_else() {
    let names = ["qwen", "llava", "siglip", "internvl", "model_type\")? =="];
    for (name, text) in sources().into_iter().filter(|(name, _)| !name.starts_with("src/model/families/")) {
        for (number, line) in code(&text) {
            let lower = line.to_lowercase();
            assert!(!names.iter().any(|family| lower.contains(family)), "{name}:{number} knows a family: {line:?}");
        }
    }
    // And each is registered once.
    let registry = fs::read_to_string(root().join("src/model/families/mod.rs")).unwrap();
    let files = files("src/model/families", &["rs"]);
    let families: Vec<_> = files.iter().filter(|(_, text)| text.contains("Family<D> for")).collect();
    assert!(families.len() >= 2);
    for (name, _) in families {
        let module = Path::new(name).file_stem().unwrap().to_str().unwrap();
        assert_eq!(registry.matches(&format!("&{module}::")).count(), 1, "{module} is not in the registry, or twice");
    }
}

/// Beginnings of documentation that only the lines around it explain.
const ELLIPTIC: &[&str] = &[
    "And ",
    "As they ",
    "All of it",
    "All of them",
    "Bytes.",
    "Does ",
    "How it ",
    "How much ",
    "It ",
    "Its ",
    "Of ",
    "Their ",
    "Them ",
    "They ",
    "Those",
    "The other",
    "The same",
    "What it ",
    "Where it ",
    "Whether it ",
    "Which",
    "Wishes ",
];

/// Whoever looks an item up sees its own documentation alone.
#[test]
fn documentation_says_what_it_is_about() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (name, text) in sources().into_iter().filter(|(name, _)| name != GENERATED) {
        let mut inside = false;
        for (number, line) in text.lines().enumerate() {
            let documentation = line.trim_start().strip_prefix("/// ");
            if let Some(first) = documentation.filter(|_| !inside) {
                seen += 1;
                if ELLIPTIC.iter().any(|beginning| first.starts_with(beginning)) {
                    wrong.push(format!("{name}:{}: {first}", number + 1));
                }
            }
            inside = line.trim_start().starts_with("///");
        }
    }
    assert!(seen > 1000, "only {seen} items with documentation were found");
    assert!(wrong.is_empty(), "documentation without its subject:\n{}", wrong.join("\n"));
}

/// A file format is one file of src/checkpoint/formats and its line in the list there: other code asks a format what it does, not
/// which one it is. The command line alone has a flag of one format's own.
#[test]
fn formats_are_told_apart_by_nobody_else() {
    let homes = ["src/checkpoint/formats/", "src/bin/"];
    for (name, text) in sources().into_iter().filter(|(name, _)| !homes.iter().any(|home| name.starts_with(home))) {
        for (number, line) in code(&text) {
            let asks = ["== Format::", "!= Format::"].iter().any(|question| line.contains(question));
            assert!(!asks, "{name}:{number} asks for one format: {line:?}");
        }
    }
    // And each is in the list.
    let list = fs::read_to_string(root().join("src/checkpoint/formats/mod.rs")).unwrap();
    let files = files("src/checkpoint/formats", &["rs"]);
    let formats: Vec<_> = files.iter().filter(|(_, text)| text.contains("FileFormat for")).collect();
    assert!(formats.len() >= 3);
    for (name, _) in formats {
        let module = Path::new(name).file_stem().unwrap().to_str().unwrap();
        assert!(
            list.contains(&format!("mod {module};")) && list.contains(&module.to_uppercase()),
            "{module} is not in the list"
        );
    }
}
