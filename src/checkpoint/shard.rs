//! One safetensors file, mapped into memory, and which files make up a checkpoint.

use crate::input;
use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

/// Most tensors of a checkpoint, over all its files: the largest published have some 200,000.
pub const MAX_TENSORS: usize = 1 << 20;

/// The one weight file of a small checkpoint.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The list of a large one's.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// An adapter's weights, which are no part of the model until they are merged.
const ADAPTER: &str = "adapter_model.safetensors";

/// Most bytes of a file's header, a third of what the format allows: 100 bytes a tensor, and 300,000 tensors in one file.
const MAX_HEADER_BYTES: u64 = 32 << 20;

/// Longest side of a tensor, and most sides: no model's is longer or has more, and their products fit 64 bits in the order
/// in which they are taken.
const MAX_SIDE: usize = 1 << 31;
const MAX_RANK: usize = 8;

/// What a header says of the file and not of a tensor.
const METADATA: &str = "__metadata__";

/// Most values in that; files have up to some hundred.
const MAX_METADATA_VALUES: usize = 1 << 16;

/// Most values in what a header says of a tensor: a type, a shape of up to [`MAX_RANK`] sides, two offsets, and what holds them.
const MAX_TENSOR_VALUES: usize = 64;

/// A mapped file with its header checked.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) header: Metadata,
    map: Mmap,
    data_start: usize,
}

impl Shard {
    /// Maps `path` and checks its header: length, JSON, shapes, and offsets that cover the file without holes or overlaps.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let file = input::open(&path, u64::MAX)?;
        let length = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        ensure!(
            length >= 8,
            "{} is not a safetensors file: it has {length} bytes, the header's length alone takes 8. \
             Download it again.",
            path.display()
        );
        let map = map(&file).with_context(|| format!("cannot map {} into memory", path.display()))?;
        let declared = declared(&map);
        ensure!(
            declared <= MAX_HEADER_BYTES || declared > length,
            "{} is not a checkpoint's: its header claims {declared} bytes; the limit is {MAX_HEADER_BYTES}",
            path.display()
        );
        // Of what is none of a tensor's the format's reader keeps a hundred bytes for every three.
        let most = |key: &str| if key == METADATA { MAX_METADATA_VALUES } else { MAX_TENSOR_VALUES };
        let header = usize::try_from(declared).ok().and_then(|length| map[8..].get(..length));
        if let Some(key) = header.and_then(|header| input::json::overfull(header, most)) {
            bail!(
                "{} is not a checkpoint's: {:.40?} of its header holds more than {} values",
                path.display(),
                key,
                most(&key)
            );
        }
        let (header_length, header) = SafeTensors::read_metadata(&map)
            .map_err(|error| anyhow::anyhow!("{} {}", path.display(), explain(&error, &map)))?;
        for name in header.offset_keys() {
            let info = header.info(&name).expect("a name from this header");
            ensure!(
                info.shape.len() <= MAX_RANK && info.shape.iter().all(|&side| side <= MAX_SIDE),
                "tensor {name} in {} has a shape no model has: {}",
                path.display(),
                format!("{:?}", info.shape).chars().take(60).collect::<String>()
            );
        }
        Ok(Self { path, header, map, data_start: 8 + header_length })
    }

    /// Where the tensor `name`, one of the header, begins in the file.
    #[cfg(feature = "run")]
    pub(crate) fn start_of(&self, name: &str) -> u64 {
        (self.data_start + self.header.info(name).expect("a name from this header").data_offsets.0) as u64
    }

    /// Where the tensors begin in the file.
    #[cfg(feature = "run")]
    pub(crate) fn data_start(&self) -> u64 {
        self.data_start as u64
    }

    /// The bytes at `offsets` of the data section; the header was checked against the file's size.
    pub(crate) fn bytes(&self, offsets: (usize, usize)) -> &[u8] {
        &self.map[self.data_start + offsets.0..self.data_start + offsets.1]
    }

    /// Takes the pages of these bytes out of this process's memory until they are read again.
    pub(crate) fn release(&self, offsets: (usize, usize)) {
        #[cfg(unix)]
        release(&self.map, self.data_start + offsets.0, offsets.1 - offsets.0);
        #[cfg(not(unix))]
        let _ = offsets;
    }
}

/// Takes pages of a map out of this process's memory: those from `start` on, and what the system mapped around them.
#[cfg(unix)]
#[allow(unsafe_code)]
fn release(map: &Mmap, start: usize, length: usize) {
    // Linux maps pages that it has at hand by windows of 64 KiB (fault_around_bytes).
    const WINDOW: usize = 64 << 10;
    let end = (start + length).next_multiple_of(WINDOW).min(map.len());
    let start = start / WINDOW * WINDOW;
    let length = end - start;
    // SAFETY: the map is of a file and never written to, so that what is dropped is read from the file again.
    // A system that refuses keeps the pages, which is no harm.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, length) };
}

/// Maps a file for reading.
#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and never written to through us. Should another program write to the file meanwhile,
    // the numbers change, but every bit pattern is a valid byte; should it cut the file short, the system ends this
    // process. Weights cannot be copied first: they may be larger than memory.
    unsafe { Mmap::map(file) }
}

/// The header's length as the first bytes have it.
fn declared(file: &[u8]) -> u64 {
    file.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// What is wrong with a header, and what to do.
fn explain(error: &SafeTensorError, file: &[u8]) -> String {
    let declared = declared(file);
    match error {
        SafeTensorError::InvalidHeaderLength => format!(
            "is cut short or not a safetensors file: its header claims {declared} bytes, the file has {}. \
             Download it again.",
            file.len()
        ),
        SafeTensorError::HeaderTooLarge => {
            format!("is not a safetensors file: its header claims {declared} bytes, more than the format allows.")
        }
        SafeTensorError::InvalidHeader(_)
        | SafeTensorError::InvalidHeaderDeserialization(_)
        | SafeTensorError::JsonError(_) => format!("is not a safetensors file: its header is not valid ({error})."),
        SafeTensorError::InvalidOffset(tensor) => format!(
            "is damaged: the data of tensor {tensor} overlaps another tensor's or leaves a hole. Download it again."
        ),
        SafeTensorError::MetadataIncompleteBuffer => {
            "is damaged: its tensors' offsets lead out of the file, or do not reach its end. Download it again.".into()
        }
        SafeTensorError::TensorInvalidInfo => {
            "is damaged: a tensor's shape and dtype disagree with its number of bytes. Download it again.".into()
        }
        other => format!("is damaged: {other}. Download it again."),
    }
}

/// Paths of the weight files of `folder`, and what the index says: tensor → file name.
///
/// `model.safetensors` wins, then the index, then every `*.safetensors` in order of name.
pub(crate) fn weight_files(folder: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, String>)> {
    if folder.join(SINGLE).exists() {
        return Ok((vec![folder.join(SINGLE)], BTreeMap::new()));
    }
    let index = folder.join(INDEX);
    if index.exists() {
        let map = read_index(&index)?;
        let files: BTreeSet<&String> = map.values().collect();
        let mut paths = Vec::new();
        for name in files {
            ensure!(
                !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_))),
                "{} lists the shard {name:?}, which leaves the checkpoint's folder. Correct the index; shards must be \
                 beside it.",
                index.display()
            );
            let path = folder.join(name);
            ensure!(
                path.exists(),
                "{} lists the shard {name}, which is not in the folder. Download the missing file.",
                index.display()
            );
            paths.push(path);
        }
        return Ok((paths, map));
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))? {
        let path = entry.with_context(|| format!("cannot read the folder {}", folder.display()))?.path();
        let is_adapter = path.file_name().is_some_and(|name| name == ADAPTER);
        if path.extension().is_some_and(|extension| extension == "safetensors") && !is_adapter {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        bail!(
            "{} holds no weights: neither {SINGLE}, nor {INDEX}, nor any *.safetensors. Other weight formats are not \
             read; convert them to safetensors.",
            folder.display()
        );
    }
    Ok((paths, BTreeMap::new()))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let cannot_read = || format!("cannot read {}", path.display());
    let folder = path.parent().with_context(cannot_read)?;
    let text = input::read_beside(folder, INDEX, input::MAX_INDEX_BYTES)?.with_context(cannot_read)?;
    let most = |key: &str| if key == "weight_map" { MAX_TENSORS + 1 } else { usize::MAX };
    ensure!(input::json::overfull(&text, most).is_none(), "{} lists more than {MAX_TENSORS} tensors", path.display());
    let index: Index = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not an index of safetensors files (weight_map)", path.display()))?;
    ensure!(!index.weight_map.is_empty(), "{} lists no tensors", path.display());
    Ok(index.weight_map)
}
