//! The rooms of the house: which module may use which, and that no files use each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The floors of `src`, from the top. A module uses those on floors below its own; modules of one floor do not know each other. What
/// stands on the ground floor everybody may use, and it uses nothing but the ground.
const FLOORS: &[&[&str]] = &[
    &["bin"],
    &["run"],
    &["report"],
    &["plan"],
    &["quantize", "evaluate"],
    &["model"],
    &["data", "checkpoint"],
    &["codes"],
    &["device"],
    &["tensor"],
    &["heap", "input", "parallel", "picture", "progress"],
];

/// A file of the sources: its path below `src`, the module it is, such as `quantize::block`, and its text without comments and tests.
struct Source {
    name: String,
    module: Vec<String>,
    code: String,
}

/// What a module shows under a name that is defined elsewhere: `pub use path::Name`.
type Shown = BTreeMap<(Vec<String>, String), Vec<String>>;

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            let mut module: Vec<String> = name.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
            if ["mod", "lib", "main"].contains(&module.last().unwrap().as_str()) {
                module.pop();
            }
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
            let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap()).collect();
            found.push(Source { name, module, code: code.join("\n") });
        }
    }
    assert!(found.len() > 100, "the sources were not found");
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The paths that a `use` of nested braces names, such as `a::{b, c::{self, d}}`; what follows `as` is left out.
fn expanded(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap().trim();
        return vec![path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()];
    };
    let before: Vec<String> = tree[..open].split("::").map(|p| p.trim().to_owned()).filter(|p| !p.is_empty()).collect();
    let inside = &tree[open + 1..tree.rfind('}').unwrap()];
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (i, letter) in inside.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inside[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&inside[start..]);
    let parts = parts.into_iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(expanded).map(|rest| [before.clone(), rest].concat()).collect()
}

/// A path as seen from `module` as one from the root of the sources; `None` for a path that leaves the house. In the program
/// `crate` is the program, and `vlmq` the library; `vlmq_picture` is a crate of its own in a room of its own.
fn absolute(path: &[String], module: &[String], children: &BTreeSet<Vec<String>>) -> Option<Vec<String>> {
    let program = module.first().is_some_and(|room| room == "bin");
    let root = match module.first().map(String::as_str) {
        Some("bin") => module[..2].to_vec(),
        Some("picture") => module[..1].to_vec(),
        _ => Vec::new(),
    };
    let mut at = module.to_vec();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" => {
            at = root;
            rest = &path[1..];
        }
        "vlmq" if program => {
            at = Vec::new();
            rest = &path[1..];
        }
        "vlmq_picture" => {
            at = vec!["picture".to_owned()];
            rest = &path[1..];
        }
        "self" => rest = &path[1..],
        "super" => {
            while rest.first().is_some_and(|part| part == "super") {
                at.pop();
                rest = &rest[1..];
            }
        }
        first => {
            // A child module, named without `self`.
            if !children.contains(&[at.clone(), vec![first.to_owned()]].concat()) {
                return None;
            }
        }
    }
    let rest = rest.iter().filter(|part| *part != "self").cloned();
    at.extend(rest);
    Some(at)
}

/// Every `use` of a file, public ones marked, and every path that starts at the root elsewhere in its code.
fn uses(source: &Source) -> Vec<(bool, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = source.code.as_str();
    let mut elsewhere = String::new();
    // A `use` stands at the beginning of a line.
    while let Some(at) = rest.match_indices("use ").map(|(i, _)| i).find(|&i| {
        let line = rest[..i].rsplit('\n').next().unwrap().trim();
        line.is_empty() || line == "pub" || (line.starts_with("pub(") && line.ends_with(')'))
    }) {
        let line_start = rest[..at].rfind('\n').map_or(0, |i| i + 1);
        elsewhere += &rest[..line_start];
        let public = rest[line_start..at].trim().starts_with("pub");
        let end = at + rest[at..].find(';').expect("a use ends");
        found.extend(expanded(&rest[at + 4..end]).into_iter().map(|path| (public, path)));
        rest = &rest[end + 1..];
    }
    elsewhere += rest;
    for start in ["crate::", "super::", "vlmq::", "vlmq_picture::"] {
        for (i, _) in elsewhere.match_indices(start) {
            let before = elsewhere[..i].chars().next_back();
            // `pub(in crate::…)` uses nothing.
            if elsewhere[..i].ends_with("(in ")
                || before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_' || letter == ':')
            {
                continue;
            }
            let end = elsewhere[i..].find(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != ':');
            let path = &elsewhere[i..end.map_or(elsewhere.len(), |end| i + end)];
            found.push((false, path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect()));
        }
    }
    found
}

/// Which files each file uses, by the names of what it uses there: a name that a module shows for another is the other's.
fn edges(sources: &[Source]) -> BTreeMap<&str, BTreeMap<&str, String>> {
    let files: BTreeMap<&[String], &str> = sources.iter().map(|s| (s.module.as_slice(), s.name.as_str())).collect();
    let children: BTreeSet<Vec<String>> = sources.iter().map(|source| source.module.clone()).collect();
    let mut shown = Shown::new();
    for source in sources {
        for (public, path) in uses(source) {
            let (true, Some(to)) = (public, absolute(&path, &source.module, &children)) else { continue };
            shown.insert((source.module.clone(), to.last().unwrap().clone()), to);
        }
    }
    let resolve = |mut path: Vec<String>| -> Option<&str> {
        for _ in 0..8 {
            let depth = (0..=path.len()).rev().find(|&n| files.contains_key(&path[..n]))?;
            match path.get(depth).and_then(|name| shown.get(&(path[..depth].to_vec(), name.clone()))) {
                Some(to) => path = [to.clone(), path[depth + 1..].to_vec()].concat(),
                None => return files.get(&path[..depth]).copied(),
            }
        }
        panic!("{path:?} is shown in a circle");
    };
    let mut edges: BTreeMap<&str, BTreeMap<&str, String>> = BTreeMap::new();
    for source in sources {
        for (public, path) in uses(source) {
            let Some(to) = absolute(&path, &source.module, &children) else { continue };
            // A name that is shown is used where it is asked for.
            if public && shown.contains_key(&(source.module.clone(), to.last().unwrap().clone())) {
                continue;
            }
            if let Some(file) = resolve(to).filter(|file| *file != source.name) {
                edges.entry(source.name.as_str()).or_default().entry(file).or_insert_with(|| path.join("::"));
            }
        }
    }
    edges
}

fn room(name: &str) -> &str {
    name.split(['/', '.']).next().unwrap()
}

#[test]
fn data_walks_one_way() {
    let sources = sources();
    let floor = |room: &str| FLOORS.iter().position(|rooms| rooms.contains(&room));
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (from, uses) in edges(&sources) {
        if from == "lib.rs" {
            continue;
        }
        for (to, path) in uses {
            seen += 1;
            let (Some(above), Some(below)) = (floor(room(from)), floor(room(to))) else {
                wrong.push(format!(
                    "src/{from} uses src/{to} ({path}), and one of their rooms stands on no floor of this test"
                ));
                continue;
            };
            if room(from) != room(to) && below <= above && !(room(from) == "bin" && to == "lib.rs") {
                wrong.push(format!("src/{from} may not use src/{to} ({path})"));
            }
        }
    }
    assert!(seen > 400, "only {seen} uses were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let sources = sources();
    let edges = edges(&sources);
    let mut circles = Vec::new();
    for start in edges.keys() {
        // The shortest way back.
        let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
        let mut next = vec![*start];
        while !next.is_empty() && !came_from.contains_key(start) {
            let mut then = Vec::new();
            for at in next {
                for to in edges.get(at).into_iter().flat_map(BTreeMap::keys) {
                    if came_from.insert_if_new(to, at) {
                        then.push(*to);
                    }
                }
            }
            next = then;
        }
        if came_from.contains_key(start) {
            let mut way = vec![*start];
            while way.len() == 1 || way.last() != Some(start) {
                way.push(came_from[way.last().unwrap()]);
            }
            way.reverse();
            // Told once, by the file that is first by name.
            if way.iter().min() == Some(start) {
                let told: Vec<String> = way
                    .windows(2)
                    .map(|pair| format!("{} → {} ({})", pair[0], pair[1], edges[pair[0]][pair[1]]))
                    .collect();
                circles.push(told.join(", "));
            }
        }
    }
    assert!(circles.is_empty(), "{} circles:\n{}", circles.len(), circles.join("\n"));
}

trait InsertIfNew<'a> {
    fn insert_if_new(&mut self, key: &'a str, value: &'a str) -> bool;
}

impl<'a> InsertIfNew<'a> for BTreeMap<&'a str, &'a str> {
    fn insert_if_new(&mut self, key: &'a str, value: &'a str) -> bool {
        if self.contains_key(key) {
            return false;
        }
        self.insert(key, value);
        true
    }
}
