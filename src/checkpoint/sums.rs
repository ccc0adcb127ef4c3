//! `SHA256SUMS`: checksums of all files and tensors of a checkpoint.
//!
//! Lines as `sha256sum` prints and checks them, one a file. The tensors' lines are comments to it:
//!
//! ```text
//! 9f86d0…  config.json
//! # 60303a…  model.layers.0.mlp.down_proj.weight_packed
//! ```

use super::checksum::{name_in, of_files, of_range};
use super::own;
use super::read::Checkpoint;
use super::side_files::TEMPLATES;
use crate::input;
use crate::parallel::try_map;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The file's name.
pub const SUMS: &str = "SHA256SUMS";

const HEAD: &str = "# SHA-256 of every file of this folder, for `sha256sum -c SHA256SUMS`.\n";
const TENSORS: &str = "# Of every tensor's bytes, for `vlmq-run verify`:\n";

/// SHA-256, 64 lower-case hexadecimal digits, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Files of the folder but [`SUMS`] itself, sub-folders with a `/`.
    pub files: BTreeMap<String, String>,
    /// Tensors: their bytes as the file holds them.
    pub tensors: BTreeMap<String, String>,
}

impl Sums {
    /// Checksums of the checkpoint in `folder`, which is read from the disk, in parallel.
    pub fn of(folder: &Path) -> Result<Self> {
        Self::with(folder, &BTreeMap::new(), of_tensors(&Checkpoint::open(folder)?)?)
    }

    /// Checksums of the checkpoint in `folder`: of its weights those that are known, of all other files those that are taken now, in
    /// parallel.
    pub(crate) fn with(
        folder: &Path,
        weights: &BTreeMap<PathBuf, String>,
        tensors: BTreeMap<String, String>,
    ) -> Result<Self> {
        let names = files(folder)?.into_iter().map(|name| folder.join(name));
        let others: Vec<PathBuf> = names.filter(|path| !weights.contains_key(path)).collect();
        let mut files = of_files(folder, &others)?;
        files.extend(weights.iter().map(|(path, sum)| (name_in(folder, path), sum.clone())));
        Ok(Self { files, tensors })
    }

    /// Reads [`SUMS`] of `folder`. Errors when there is none, or with the line that is not one.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(SUMS);
        let text = input::read(&path, input::MAX_INDEX_BYTES).with_context(|| {
            format!("cannot read {}: vlmq-run quantize writes it beside the weights", path.display())
        })?;
        Self::parse(&String::from_utf8_lossy(&text)).with_context(|| format!("{} is damaged", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut sums = Self::default();
        for (number, line) in text.lines().enumerate() {
            if [HEAD.trim_end(), TENSORS.trim_end()].contains(&line) {
                continue;
            }
            let (map, entry) = match line.strip_prefix("# ") {
                Some(entry) => (&mut sums.tensors, entry),
                None => (&mut sums.files, line),
            };
            let entry = entry.strip_prefix('\\').map_or_else(|| entry.to_owned(), unescape);
            let (sum, name) = entry.split_once("  ").unwrap_or_default();
            let is_sum = sum.len() == 64 && sum.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            if !is_sum || name.is_empty() || map.insert(name.to_owned(), sum.to_owned()).is_some() {
                bail!("line {} is no checksum, or a second one of a name", number + 1);
            }
        }
        Ok(sums)
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let mut text = HEAD.to_owned();
        let line = |text: &mut String, mark: &str, name: &str, sum: &str| {
            let escaped = escape(name);
            let slash = if escaped == name { "" } else { "\\" };
            writeln!(text, "{mark}{slash}{sum}  {escaped}").expect("a string takes it all");
        };
        self.files.iter().for_each(|(name, sum)| line(&mut text, "", name, sum));
        text += TENSORS;
        self.tensors.iter().for_each(|(name, sum)| line(&mut text, "# ", name, sum));
        text
    }

    /// Takes the checksums of files of `folder` that were written anew, and writes [`SUMS`] in one move.
    pub fn renew(folder: &Path, names: &[&str]) -> Result<()> {
        let mut sums = Self::read(folder)?;
        let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        sums.files.extend(of_files(folder, &paths)?);
        own::replace(&folder.join(SUMS), sums.text().as_bytes())
    }
}

/// SHA-256 of the bytes of every tensor, by name.
pub(crate) fn of_tensors(checkpoint: &Checkpoint) -> Result<BTreeMap<String, String>> {
    let names: Vec<&str> = checkpoint.names().collect();
    let sums = try_map(names.len(), |i| {
        let (file, range) = checkpoint.place(names[i])?;
        Ok((names[i].to_owned(), of_range(file, range)?))
    })?;
    Ok(sums.into_iter().collect())
}

/// Every file of a checkpoint's folder but [`SUMS`], by its name in there, in order: hidden ones are the tools' own. A
/// sub-folder that does not belong to a checkpoint stands for all in it.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(inside) = folders.pop() {
        let shown = folder.join(&inside);
        let cannot_read = || format!("cannot read the folder {}", shown.display());
        for entry in fs::read_dir(&shown).with_context(cannot_read)? {
            let entry = entry.with_context(cannot_read)?;
            let name = inside.join(entry.file_name());
            if entry.file_name().to_string_lossy().starts_with('.') || name == Path::new(SUMS) {
                continue;
            }
            match name == Path::new(TEMPLATES) && entry.path().is_dir() {
                true => folders.push(name),
                false => found.push(name),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Names with line breaks, as sha256sum writes them.
fn escape(name: &str) -> String {
    name.replace('\\', r"\\").replace('\n', r"\n").replace('\r', r"\r")
}

fn unescape(text: &str) -> String {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        plain.push(match letter {
            '\\' => match letters.next() {
                Some('n') => '\n',
                Some('r') => '\r',
                other => other.unwrap_or('\\'),
            },
            _ => letter,
        });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::checksum::of_bytes;

    fn sums() -> Sums {
        let of = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), of_bytes(name.as_bytes()))).collect();
        Sums {
            files: of(&["a", "two  words", "b\nc", "d\\e", "additional_chat_templates/x"]),
            tensors: of(&["t.weight", "odd\nname"]),
        }
    }

    #[test]
    fn texts_read_back() {
        let text = sums().text();
        assert_eq!(Sums::parse(&text).unwrap(), sums());
        assert_eq!(text.lines().count(), 9);
        let a = of_bytes(b"a");
        for wrong in [
            text.replace(&a, &a[1..]),
            text.replace(&a, &a.to_uppercase()),
            text.clone() + &format!("{a}  a\n"),
            text.clone() + "x\n",
            text.replace("  a\n", "\n"),
        ] {
            assert!(Sums::parse(&wrong).is_err(), "{wrong}");
        }
    }

    /// The tool itself, where there is one.
    #[cfg(target_os = "linux")]
    #[test]
    fn sha256sum_takes_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        for name in sums().files.keys() {
            fs::write(folder.path().join(name), name).unwrap();
        }
        fs::write(folder.path().join(SUMS), sums().text()).unwrap();
        let check = || {
            let run =
                std::process::Command::new("sha256sum").args(["-c", "--strict", SUMS]).current_dir(&folder).output();
            run.map(|output| (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
        };
        if let Ok((good, said)) = check() {
            assert!(good && said.lines().count() == 5, "{said}");
            fs::write(folder.path().join("a"), "b").unwrap();
            assert!(!check().unwrap().0);
            Sums::renew(folder.path(), &["a"]).unwrap();
            assert!(check().unwrap().0);
        }
        let found = files(folder.path()).unwrap();
        assert_eq!(found.len(), 5, "{found:?}");
    }
}
