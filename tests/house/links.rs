//! Every relative link of a Markdown file leads to a file of this repository, and every `#anchor` to a heading of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Markdown files by their path from the root of the repository, with their text.
type Pages = BTreeMap<String, String>;

/// Whether a file or folder is none of the repository's: hidden, or built.
fn is_foreign(name: &str) -> bool {
    name.starts_with('.') || name == "target"
}

/// All Markdown files below `folder`, a path from `root` that is empty or ends with a slash.
fn read_pages(root: &Path, folder: &str, pages: &mut Pages) {
    for entry in fs::read_dir(root.join(folder)).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let (path, kind) = (format!("{folder}{name}"), entry.file_type().unwrap());
        if kind.is_dir() && !is_foreign(&name) {
            read_pages(root, &format!("{path}/"), pages);
        } else if kind.is_file() && name.ends_with(".md") {
            pages.insert(path, fs::read_to_string(entry.path()).unwrap());
        }
    }
}

/// The text with fenced blocks and, if `spans` is set, code spans as spaces, so that every line stays where it is.
fn without_code(text: &str, spans: bool) -> String {
    let mut fence: Option<&str> = None;
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        let start = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| start.starts_with(mark));
        let is_code = fence.is_some() || mark.is_some();
        if fence.is_none() || fence == mark {
            fence = if fence.is_none() { mark } else { None };
        }
        out += if is_code { "\n" } else { line };
    }
    if spans { without_spans(&out) } else { out }
}

/// The text with code spans as spaces: a run of backticks ends at the next run that is as long, in the same paragraph.
fn without_spans(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find('`') {
        out += &rest[..start];
        rest = &rest[start..];
        let ticks = rest.len() - rest.trim_start_matches('`').len();
        let (run, after) = rest.split_at(ticks);
        let paragraph = &after[..after.find("\n\n").unwrap_or(after.len())];
        let ends = paragraph
            .match_indices(run)
            .find(|&(at, _)| !paragraph[..at].ends_with('`') && !paragraph[at + ticks..].starts_with('`'));
        let length = ends.map_or(0, |(at, _)| at + ticks);
        out.extend(after[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &after[length..];
    }
    out + rest
}

/// Targets of all links and images, with the numbers of their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let text = without_code(text, true);
    let mut found = Vec::new();
    // In the text, as the definition of a reference, and in HTML.
    for (mark, ends) in [("](", ") \n\t"), ("]: ", " \n\t"), ("href=\"", "\""), ("src=\"", "\"")] {
        for (at, _) in text.match_indices(mark) {
            let target = text[at + mark.len()..].trim_start_matches([' ', '\n', '<']);
            let length = target.find(|c| ends.contains(c) || c == '>').unwrap_or(target.len());
            let begins_line = text[..at].rfind('\n').map_or(&text[..at], |end| &text[end + 1..at]).starts_with('[');
            if mark != "]: " || begins_line {
                found.push((1 + text[..at].matches('\n').count(), target[..length].to_owned()));
            }
        }
    }
    found
}

/// The anchors of a page: those of its `#` headings, made as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for line in without_code(text, false).lines() {
        let title = line.trim_start_matches('#');
        if !(1..=6).contains(&(line.len() - title.len())) || !title.starts_with(' ') {
            continue;
        }
        let kept = title.trim().to_lowercase().replace(' ', "-");
        let kept: String = kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect();
        let again = (1..).map(|n| format!("{kept}-{n}"));
        let free = std::iter::once(kept.clone()).chain(again).find(|anchor| !anchors.contains(anchor));
        anchors.extend(free);
    }
    anchors
}

/// The path from the root that `target` is, seen from the page `from`; `None` where it leads out of the repository.
fn resolve(from: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name if is_foreign(name) && name != ".ci" => return None,
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// What is wrong with a link of the page `from`; `exists` tells whether a path is a file or folder of the repository.
fn fault(pages: &Pages, exists: &impl Fn(&str) -> bool, from: &str, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") || link.starts_with("data:") {
        return None;
    }
    if link.starts_with('/') || link.is_empty() {
        return Some("is not relative".to_owned());
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let page = if path.is_empty() { Some(from.to_owned()) } else { resolve(from, path) };
    let Some(page) = page else { return Some("leads out of the repository".to_owned()) };
    if !pages.contains_key(&page) && !exists(&page) {
        return Some(format!("leads to {page}, which does not exist"));
    }
    let anchor = anchor?;
    match pages.get(&page) {
        None => Some(format!("has an anchor in {page}, which is not Markdown")),
        Some(text) => {
            (!anchors(text).contains(anchor)).then(|| format!("asks for a heading that {page} does not have"))
        }
    }
}

/// All faults of all pages, one a line.
fn faults(pages: &Pages, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (from, text) in pages {
        for (line, link) in links(text) {
            let fault = fault(pages, &exists, from, &link);
            wrong.extend(fault.map(|fault| format!("{from}:{line}: the link {link:?} {fault}")));
        }
    }
    wrong
}

fn house() -> (&'static Path, Pages) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = Pages::new();
    read_pages(root, "", &mut pages);
    (root, pages)
}

#[test]
fn links_lead_somewhere() {
    let (root, pages) = house();
    let wrong = faults(&pages, |path| root.join(path).exists());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let seen: usize = pages.values().map(|text| links(text).len()).sum();
    assert!(seen > 40, "only {seen} links were found");
}

#[test]
fn every_page_of_docs_is_linked_from_the_readme() {
    let (_, pages) = house();
    let linked: BTreeSet<String> = links(&pages["README.md"]).into_iter().map(|(_, link)| link).collect();
    for page in pages.keys().filter(|path| path.starts_with("docs/")) {
        assert!(linked.contains(page), "README.md does not link to {page}");
    }
}

#[test]
fn wrong_links_are_found() {
    let right = "# A `b_c` (d), e\n[one](docs/x.md) [two](docs/x.md#top) [three](#a-b_c-d-e) [web](https://a.b/#c)\n\
                 ![four](docs/p.png \"title\") <img src=\"docs/p.png\">\n[five]: docs/x.md#top-1\n`[code](no.md)`\n```\n[x](no.md)\n# No\n```\n";
    let wrong = "[one\ntwo](gone.md) [a](/docs/x.md) [b](docs/x.md#gone) [c](#no) [d](../../out.md) [e](docs/p.png#x)\n\
                 <a href=\"gone.md\">\n[f]: gone.md\n[g](target/x.md) ``a ` b`` [h](gone.md)\n";
    let pages = |text: &str| {
        let files =
            [("README.md", text), ("docs/x.md", "# Top\n## Top\n[up](../README.md) [folder](..) [side](x.md)\n")];
        files.map(|(path, text)| (path.to_owned(), text.to_owned())).into()
    };
    let exists = |path: &str| ["", "docs", "docs/p.png"].contains(&path);
    assert_eq!(faults(&pages(right), exists), Vec::<String>::new());
    let found = faults(&pages(wrong), exists);
    let lines: Vec<&str> = found.iter().map(|fault| fault.split(':').nth(1).unwrap()).collect();
    assert_eq!(lines, ["2", "2", "2", "2", "2", "2", "5", "5", "4", "3"], "{}", found.join("\n"));
}
