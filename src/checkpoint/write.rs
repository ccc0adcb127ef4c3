//! Writing a quantized checkpoint: everything planned first, each layer put in its place as it is solved.

use super::config::with_key;
use super::file_layout::{FileLayout, Place};
use super::formats::{Format, LinearSpec};
use super::own;
use super::own::cannot_write;
use super::planned::{Planned, QuantizedCopy};
use super::read::Checkpoint;
use super::shard::INDEX;
use super::side_files::SideFiles;
use super::work::{reserve, sync_folder};
use crate::codes::{CodeLayout, QuantizedLinear};
use crate::parallel::try_map;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CONFIG: &str = "config.json";

/// Bytes of a tensor that a thread copies at a time.
const PIECE: usize = 4 << 20;

/// Largest shard in bytes of tensors: what transformers writes, and what file hosts take.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// A checkpoint being written, in a folder of its own: that of a [`WorkFolder`](super::WorkFolder), which gives it its name
/// when all of it is there, or takes it away.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    format: Format,
    layout: CodeLayout,
    linears: HashMap<String, LinearSpec>,
    on_disk: FileLayout,
    beside: SideFiles,
    /// All that this checkpoint is to have: nothing else is written.
    names: BTreeSet<PathBuf>,
    /// The shards, open.
    files: Arc<Vec<OpenShard>>,
    written: HashSet<String>,
}

impl Writer {
    /// Plans a quantized copy in the new folder `folder` with shards of 5 GB, takes its space on the disk, and
    /// writes all but tensors.
    ///
    /// Side files are copied byte for byte: every plain file of the folder but weights (`*.safetensors`,
    /// `pytorch_model*.bin`, their indices), a stale `quantize_config.json`, and hidden files; of sub-folders only
    /// `additional_chat_templates`, others are left behind with a warning. Links become what they lead to, which must lie in
    /// the folder or in a download cache. In config.json nothing but `quantization_config` is added.
    ///
    /// Errors, before anything is created, when the checkpoint is quantized already, when a layer is missing, listed twice or
    /// of another shape, and when the format cannot hold a layer ([`Format::check`]); then for any failure to write.
    pub fn create(folder: &Path, copy: &QuantizedCopy<'_>) -> Result<Self> {
        Self::with_shards_of(SHARD_BYTES, folder, copy)
    }

    /// [`create`](Self::create) with shards of at most `shard_bytes` of tensors.
    pub fn with_shards_of(shard_bytes: u64, folder: &Path, copy: &QuantizedCopy<'_>) -> Result<Self> {
        let mut writer = Self::planned(shard_bytes, folder, copy)?;
        writer.begin(copy.checkpoint, copy.linears)?;
        Ok(writer)
    }

    /// Plans what [`with_shards_of`](Self::with_shards_of) creates, and touches nothing. [`begin`](Self::begin) or
    /// [`go_on`](Self::go_on) comes next.
    pub fn planned(shard_bytes: u64, folder: &Path, copy: &QuantizedCopy<'_>) -> Result<Self> {
        let (linears, on_disk) = Self::lay_out(shard_bytes, copy)?;
        let beside = SideFiles::of(copy.checkpoint.folder())?;
        let (folder, format, layout) = (folder.to_path_buf(), copy.format, copy.layout.clone());
        let names = BTreeSet::new();
        let mut writer = Self {
            folder,
            format,
            layout,
            linears,
            on_disk,
            beside,
            names,
            files: Arc::default(),
            written: HashSet::new(),
        };
        let shards: Vec<String> = writer.on_disk.shards.iter().map(|shard| shard.name.clone()).collect();
        writer.announce(shards);
        writer.announce([CONFIG]);
        writer.announce(format.codes().and_then(|codes| codes.config_file()));
        writer.announce(writer.on_disk.index().map(|_| INDEX));
        writer.announce(writer.beside.kept.clone());
        Ok(writer)
    }

    /// Adds names of files that will stand beside the weights, for [`add_file`](Self::add_file).
    pub fn announce(&mut self, names: impl IntoIterator<Item = impl Into<PathBuf>>) {
        self.names.extend(names.into_iter().map(Into::into));
    }

    /// The files that the checkpoint is to have, those of sub-folders with a `/`.
    pub fn names(&self) -> &BTreeSet<PathBuf> {
        &self.names
    }

    /// Creates the planned checkpoint: its folder, its space, and all but tensors. Errors for any failure to write.
    pub fn begin(&mut self, checkpoint: &Checkpoint, quantized: &[LinearSpec]) -> Result<()> {
        self.config(checkpoint, quantized)?;
        fs::create_dir(&self.folder).with_context(|| cannot_write(&self.folder))?;
        let mut files = Vec::new();
        for shard in &mut self.on_disk.shards {
            let path = self.folder.join(&shard.name);
            let mut file = reserve(&path, shard.length)?;
            file.write_all(&std::mem::take(&mut shard.header)).with_context(|| cannot_write(&path))?;
            files.push(OpenShard { path, file });
        }
        self.files = Arc::new(files);
        self.write_side_files(checkpoint, quantized)
    }

    /// Goes on with a checkpoint that [`begin`](Self::begin) began after the same plan. Tensors for which `is_written` holds are
    /// there; all others are still to come.
    ///
    /// Errors where a shard is not what it was created as, and as [`check_contents`](Self::check_contents) does. Side files are
    /// not looked at: [`write_side_files`](Self::write_side_files) makes them anew.
    pub fn go_on(&mut self, is_written: impl Fn(&str) -> bool) -> Result<()> {
        self.check_contents()?;
        let mut files = Vec::new();
        for shard in &mut self.on_disk.shards {
            let path = self.folder.join(&shard.name);
            let mut file = own::open(&path)?;
            let mut read = || {
                let mut header = vec![0; shard.header.len()];
                let length = file.metadata()?.len();
                file.read_exact(&mut header)?;
                std::io::Result::Ok((header, length))
            };
            let (header, length) = read().with_context(|| format!("cannot go on with {}", path.display()))?;
            ensure!(
                header == shard.header && length == shard.length,
                "{} is damaged: it is not as it was begun",
                path.display()
            );
            shard.header.clear();
            files.push(OpenShard { path, file });
        }
        self.files = Arc::new(files);
        self.written = self.on_disk.places.keys().filter(|name| is_written(name)).cloned().collect();
        Ok(())
    }

    /// Refuses, naming it, what lies in the folder and is not to be there: other files, links, folders.
    pub fn check_contents(&self) -> Result<()> {
        own::check_contents(&self.folder, &self.names)
    }

    /// What config.json is to be, and the entry that it gets.
    fn config(&self, checkpoint: &Checkpoint, quantized: &[LinearSpec]) -> Result<(String, Option<serde_json::Value>)> {
        let others = other_matrices(checkpoint, &self.linears);
        let quantization = self.format.quantization_config(quantized, &others, &self.layout);
        Ok((new_config(checkpoint, quantization.as_ref())?, quantization))
    }

    /// Writes all that stands beside the weights, over what there is.
    pub fn write_side_files(&self, checkpoint: &Checkpoint, quantized: &[LinearSpec]) -> Result<()> {
        let (config, quantization) = self.config(checkpoint, quantized)?;
        self.beside.copy(checkpoint.folder(), &self.folder)?;
        self.add_file(CONFIG, config.as_bytes())?;
        let beside = self.format.codes().and_then(|codes| codes.config_file());
        if let (Some(name), Some(quantization)) = (beside, &quantization) {
            self.add_file(name, format!("{quantization:#}\n").as_bytes())?;
        }
        match self.on_disk.index() {
            Some(index) => self.add_file(INDEX, index.as_bytes()),
            None => Ok(()),
        }
    }

    /// Copies the tensors that are not quantized, byte for byte. `copied` hears the bytes of each, and ends the work by an error.
    ///
    /// Errors for one that holds a NaN or an infinity, and for any failure to write.
    pub fn copy_tensors(&mut self, checkpoint: &Checkpoint, copied: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        for name in self.copied_names(checkpoint) {
            checkpoint.check_finite(name)?;
            let place = self.on_disk.places[name];
            let bytes = checkpoint.tensor(name)?.bytes;
            try_map(bytes.len().div_ceil(PIECE), |i| {
                let start = i * PIECE;
                self.put_part(place, start, &bytes[start..bytes.len().min(start + PIECE)])
            })?;
            checkpoint.release(name);
            self.written.insert(name.to_owned());
            copied(place.length)?;
        }
        Ok(())
    }

    /// Bytes of the tensors that are not quantized.
    pub fn bytes_to_copy(&self, checkpoint: &Checkpoint) -> u64 {
        self.copied_names(checkpoint).iter().map(|&name| self.on_disk.places[name].length).sum()
    }

    fn copied_names<'a>(&self, checkpoint: &'a Checkpoint) -> Vec<&'a str> {
        checkpoint.names().filter(|name| !self.replaced(name)).collect()
    }

    /// The layers by name, and where all tensors go.
    fn lay_out(shard_bytes: u64, copy: &QuantizedCopy<'_>) -> Result<(HashMap<String, LinearSpec>, FileLayout)> {
        let Planned { linears, tensors } = Planned::of(copy)?;
        let mut metadata: BTreeMap<String, String> = copy.checkpoint.metadata().into_iter().collect();
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        Ok((linears, FileLayout::new(&tensors, shard_bytes, &metadata)?))
    }

    /// Bytes of the files that [`create`](Self::create) would reserve and copy. Errors as it does, of what headers tell.
    #[cfg(feature = "run")]
    pub(crate) fn planned_bytes(copy: &QuantizedCopy<'_>) -> Result<u64> {
        let (_, on_disk) = Self::lay_out(SHARD_BYTES, copy)?;
        let folder = copy.checkpoint.folder();
        let mut bytes = on_disk.shards.iter().map(|shard| shard.length).sum::<u64>();
        for name in SideFiles::of(folder)?.kept.into_iter().chain([CONFIG.into()]) {
            let path = folder.join(name);
            bytes += fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
        }
        Ok(bytes + on_disk.index().map_or(0, |index| index.len() as u64))
    }

    /// Whether the tensor `name` of the source is a weight that is quantized.
    fn replaced(&self, name: &str) -> bool {
        name.strip_suffix(".weight").is_some_and(|module| self.linears.contains_key(module))
    }

    /// Writes the layer `module`, one of those announced, in any order. Returns its tensors by name, as the file holds them.
    ///
    /// Errors when it was not announced, was written before, is not as announced, or cannot be written.
    pub fn write(&mut self, module: &str, quantized: &QuantizedLinear) -> Result<Vec<(String, Vec<u8>)>> {
        let Some(linear) = self.linears.get(module) else {
            bail!("the layer {module} was not announced to the writer");
        };
        let specs = self.format.specs(linear, &self.layout);
        let tensors = self.format.encode(linear, &self.layout, quantized)?;
        for (spec, bytes) in specs.iter().zip(&tensors) {
            ensure!(self.written.insert(spec.name.clone()), "the layer {module} was written before");
            self.put(self.on_disk.places[&spec.name], bytes)?;
        }
        Ok(specs.into_iter().map(|spec| spec.name).zip(tensors).collect())
    }

    /// Adds the file `name`, one of those [announced](Self::announce), with these `bytes` beside the weights, in place of one of
    /// that name from the source.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        ensure!(self.names.contains(Path::new(name)), "the file {name} was not announced to the writer");
        let path = self.folder.join(name);
        own::renew(&path)?.write_all(bytes).with_context(|| cannot_write(&path))
    }

    /// Adds `key` to config.json. Loaders keep keys that they do not know, at the top level; in `quantization_config` some
    /// refuse them.
    pub fn add_to_config(&self, key: &str, value: &serde_json::Value) -> Result<()> {
        let path = self.folder().join(CONFIG);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        self.add_file(CONFIG, with_key(&text, key, value)?.as_bytes())
    }

    /// Where the checkpoint grows until it is finished.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes all bytes of a tensor.
    fn put(&self, place: Place, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(place.length, bytes.len() as u64);
        self.put_part(place, 0, bytes)
    }

    /// Writes the bytes of a tensor from the one numbered `start` on.
    fn put_part(&self, place: Place, start: usize, bytes: &[u8]) -> Result<()> {
        let OpenShard { path, file } = &self.files[place.shard];
        own::write_at(file, place.offset + start as u64, bytes).with_context(|| cannot_write(path))
    }

    /// The files of tensors, and the tensors in them in their order, with the byte behind each.
    #[cfg(feature = "run")]
    pub(crate) fn file_contents(&self) -> Vec<(PathBuf, Vec<(String, u64)>)> {
        let mut files: Vec<(PathBuf, Vec<(String, u64)>)> =
            self.on_disk.shards.iter().map(|shard| (self.folder.join(&shard.name), Vec::new())).collect();
        for (name, place) in &self.on_disk.places {
            files[place.shard].1.push((name.clone(), place.offset + place.length));
        }
        files.iter_mut().for_each(|(_, tensors)| tensors.sort_unstable_by_key(|(_, end)| *end));
        files
    }

    /// Names of the tensors that are written.
    #[cfg(feature = "run")]
    pub(crate) fn written(&self) -> &HashSet<String> {
        &self.written
    }

    /// What brings the tensors written so far to the disk, on whichever thread.
    pub fn flush(&self) -> Flush {
        Flush { folder: self.folder.clone(), files: Arc::clone(&self.files) }
    }

    /// Errors when a tensor was not written.
    pub fn check_complete(&self) -> Result<()> {
        let missing: Vec<&String> = self.on_disk.places.keys().filter(|name| !self.written.contains(*name)).collect();
        match missing.iter().min() {
            None => Ok(()),
            Some(first) => bail!("{} tensors were never written, among them {first}", missing.len()),
        }
    }

    /// Returns once the whole checkpoint has reached the disk. Errors when a layer was not written, and when writing fails.
    pub fn finish(self) -> Result<()> {
        self.check_complete()?;
        self.check_contents()?;
        let mut folders = BTreeSet::from([self.folder.clone()]);
        for name in &self.names {
            let path = self.folder.join(name);
            // Open for writing: some systems bring nothing else to the disk.
            own::open(&path)?.sync_all().with_context(|| cannot_write(&path))?;
            folders.extend(path.parent().map(Path::to_path_buf));
        }
        folders.iter().try_for_each(|folder| sync_folder(folder))
    }
}

/// A file of tensors.
#[derive(Debug)]
struct OpenShard {
    path: PathBuf,
    file: File,
}

/// The tensors that a [`Writer`] had written at some moment, on their way to the disk.
#[derive(Clone, Debug)]
pub struct Flush {
    folder: PathBuf,
    files: Arc<Vec<OpenShard>>,
}

impl Flush {
    /// Returns once they have reached the disk.
    pub fn wait(&self) -> Result<()> {
        for OpenShard { path, file } in &*self.files {
            file.sync_data().with_context(|| cannot_write(path))?;
        }
        sync_folder(&self.folder)
    }
}

/// Modules with a matrix as weight that are not quantized: what a loader might take for a quantized linear layer.
fn other_matrices(checkpoint: &Checkpoint, linears: &HashMap<String, LinearSpec>) -> Vec<String> {
    let module = |name: &str| Some((name.strip_suffix(".weight")?.to_owned(), checkpoint.tensor(name).ok()?));
    checkpoint
        .names()
        .filter_map(module)
        .filter(|(module, tensor)| tensor.shape.len() >= 2 && !linears.contains_key(module))
        .map(|(module, _)| module)
        .collect()
}

/// config.json with `quantization_config`, see [`with_key`].
fn new_config(checkpoint: &Checkpoint, quantization: Option<&serde_json::Value>) -> Result<String> {
    let path = checkpoint.folder().join(CONFIG);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = match checkpoint.own_config() {
        Cow::Owned(config) => format!("{config:#}\n"),
        // To the byte.
        Cow::Borrowed(_) => text,
    };
    let Some(quantization) = quantization else {
        return Ok(text);
    };
    ensure!(
        !checkpoint.config().get("quantization_config").is_some_and(serde_json::Value::is_null),
        "{} has an empty quantization_config; remove that line",
        path.display()
    );
    with_key(&text, "quantization_config", quantization).with_context(|| format!("cannot use {}", path.display()))
}
