//! Writing a quantized checkpoint: everything planned first, each layer put in its place as it is solved.

use super::config::{quantization_entry, with_key};
use super::formats::{Format, LinearSpec, TensorSpec};
use super::plan::{Place, Plan};
use super::read::Checkpoint;
use super::shard::INDEX;
use crate::input::check_link;
use crate::quantize::QuantizedLinear;
use crate::quantize::settings::SolverSettings;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Largest shard in bytes of tensors: what transformers writes, and what file hosts take.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// The one sub-folder that belongs to a checkpoint: transformers keeps further chat templates there.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";

/// A checkpoint being written, in a hidden folder `.NAME.partial-…` beside its target.
///
/// Until [`finish`](Self::finish) nothing exists under the target's name; dropping the writer removes what there is.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    folder: TempDir,
    format: Format,
    settings: SolverSettings,
    linears: HashMap<String, LinearSpec>,
    plan: Plan,
    files: Vec<File>,
    written: HashSet<String>,
}

impl Writer {
    /// Plans a quantized copy of `checkpoint` at `target` with shards of 5 GB, and writes all but the layers `quantized`.
    ///
    /// Tensors that are not quantized and side files are copied byte for byte: every plain file of the folder but weights
    /// (`*.safetensors`, `pytorch_model*.bin`, their indices), a stale `quantize_config.json`, and hidden files; of
    /// sub-folders only `additional_chat_templates`, others are left behind with a warning. Links become what they lead to,
    /// which must lie in the folder or in a download cache. In config.json nothing but
    /// `quantization_config` is added.
    ///
    /// Errors, before anything is created, for a target as [`check_target`] refuses it, when the checkpoint is quantized
    /// already, when a layer is missing, listed twice or of another shape, and when the format cannot hold a layer
    /// ([`Format::check`]); then for a copied tensor that holds a NaN or an infinity, and for any failure to write, in
    /// which case what was written is removed.
    pub fn create(
        target: &Path,
        checkpoint: &Checkpoint,
        quantized: &[LinearSpec],
        format: Format,
        settings: &SolverSettings,
    ) -> Result<Self> {
        Self::with_shards_of(SHARD_BYTES, target, checkpoint, quantized, format, settings)
    }

    /// [`create`](Self::create) with shards of at most `shard_bytes` of tensors.
    pub fn with_shards_of(
        shard_bytes: u64,
        target: &Path,
        checkpoint: &Checkpoint,
        quantized: &[LinearSpec],
        format: Format,
        settings: &SolverSettings,
    ) -> Result<Self> {
        check_target(target)?;
        let (linears, plan) = Self::plan(shard_bytes, checkpoint, quantized, format, settings)?;
        let quantization = format.quantization_config(quantized, &other_matrices(checkpoint, &linears), settings);
        let config = new_config(checkpoint, quantization.as_ref())?;

        let folder = temporary_beside(target)?;
        let mut files = Vec::new();
        for shard in &plan.shards {
            let path = folder.path().join(&shard.name);
            files.push(reserve(&path, shard.length).with_context(|| cannot_write(&path))?);
        }
        let settings = settings.clone();
        let mut writer = Self {
            target: target.to_path_buf(),
            folder,
            format,
            settings,
            linears,
            plan,
            files,
            written: HashSet::new(),
        };
        for shard in 0..writer.files.len() {
            let header = std::mem::take(&mut writer.plan.shards[shard].header);
            writer.put(Place { shard, offset: 0, length: header.len() as u64 }, &header)?;
        }
        copy_side_files(checkpoint.folder(), writer.folder.path())?;
        writer.add_file("config.json", config.as_bytes())?;
        if let (Format::Gptq, Some(quantization)) = (format, &quantization) {
            writer.add_file("quantize_config.json", format!("{quantization:#}\n").as_bytes())?;
        }
        if let Some(index) = writer.plan.index() {
            writer.add_file(INDEX, index.as_bytes())?;
        }
        for name in checkpoint.names() {
            if let Some(&place) = writer.plan.places.get(name).filter(|_| !writer.replaced(name)) {
                checkpoint.check_finite(name)?;
                writer.put(place, checkpoint.tensor(name)?.bytes)?;
                checkpoint.release(name);
                writer.written.insert(name.to_owned());
            }
        }
        Ok(writer)
    }

    /// The layers by name, and where all tensors go.
    fn plan(
        shard_bytes: u64,
        checkpoint: &Checkpoint,
        quantized: &[LinearSpec],
        format: Format,
        settings: &SolverSettings,
    ) -> Result<(HashMap<String, LinearSpec>, Plan)> {
        let (linears, tensors) = Self::check(checkpoint, quantized, format, settings)?;
        let mut metadata: BTreeMap<String, String> = checkpoint.metadata().into_iter().collect();
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        Ok((linears, Plan::new(&tensors, shard_bytes, &metadata)?))
    }

    /// Bytes of the files that [`create`](Self::create) would reserve and copy. Errors as it does, of what headers tell.
    pub(crate) fn planned_bytes(
        checkpoint: &Checkpoint,
        quantized: &[LinearSpec],
        format: Format,
        settings: &SolverSettings,
    ) -> Result<u64> {
        let (_, plan) = Self::plan(SHARD_BYTES, checkpoint, quantized, format, settings)?;
        let mut bytes = plan.shards.iter().map(|shard| shard.length).sum::<u64>();
        for name in side_files(checkpoint.folder())?.into_iter().chain(["config.json".into()]) {
            let path = checkpoint.folder().join(name);
            bytes += fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
        }
        Ok(bytes + plan.index().map_or(0, |index| index.len() as u64))
    }

    /// What the headers alone can tell of a plan: [`create`](Self::create)'s errors about checkpoint, layers and settings.
    /// Returns the layers by name, and the new checkpoint's tensors in the order of the old.
    pub(crate) fn check(
        checkpoint: &Checkpoint,
        quantized: &[LinearSpec],
        format: Format,
        settings: &SolverSettings,
    ) -> Result<(HashMap<String, LinearSpec>, Vec<TensorSpec>)> {
        checkpoint.refuse_quantized()?;
        format.check(quantized, settings)?;
        let linears = check_linears(checkpoint, quantized, format, settings)?;
        let tensors = planned_tensors(checkpoint, &linears, format, settings)?;
        Ok((linears, tensors))
    }

    /// Whether the tensor `name` of the source is a weight that is quantized.
    fn replaced(&self, name: &str) -> bool {
        name.strip_suffix(".weight").is_some_and(|module| self.linears.contains_key(module))
    }

    /// Writes the layer `module`, one of those announced, in any order.
    ///
    /// Errors when it was not announced, was written before, is not as announced, or cannot be written.
    pub fn write(&mut self, module: &str, quantized: &QuantizedLinear) -> Result<()> {
        let Some(linear) = self.linears.get(module) else {
            bail!("the layer {module} was not announced to the writer");
        };
        let specs = self.format.specs(linear, &self.settings);
        let tensors = self.format.encode(linear, &self.settings, quantized)?;
        for (spec, bytes) in specs.iter().zip(&tensors) {
            ensure!(self.written.insert(spec.name.clone()), "the layer {module} was written before");
            self.put(self.plan.places[&spec.name], bytes)?;
        }
        Ok(())
    }

    /// Adds the file `name` with these `bytes` beside the weights, in place of one of that name from the source.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).with_context(|| cannot_write(&path))
    }

    /// Adds `key` to config.json. Loaders keep keys that they do not know, at the top level; in `quantization_config` some
    /// refuse them.
    pub fn add_to_config(&self, key: &str, value: &serde_json::Value) -> Result<()> {
        let path = self.folder().join("config.json");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        self.add_file("config.json", with_key(&text, key, value)?.as_bytes())
    }

    /// Where the checkpoint grows until it is finished.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn put(&self, place: Place, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(place.length, bytes.len() as u64);
        let mut file = &self.files[place.shard];
        file.seek(SeekFrom::Start(place.offset))
            .and_then(|_| file.write_all(bytes))
            .with_context(|| cannot_write(&self.folder.path().join(&self.plan.shards[place.shard].name)))
    }

    /// Makes the checkpoint appear under its name, once everything has reached the disk.
    ///
    /// Errors when a layer was not written, when writing fails, or when the target has appeared meanwhile; then nothing is
    /// left.
    pub fn finish(self) -> Result<()> {
        let missing: Vec<&String> = self.plan.places.keys().filter(|name| !self.written.contains(*name)).collect();
        if let Some(first) = missing.iter().min() {
            bail!("{} tensors were never written, among them {first}", missing.len());
        }
        for (file, shard) in self.files.iter().zip(&self.plan.shards) {
            file.sync_all().with_context(|| cannot_write(&self.folder.path().join(&shard.name)))?;
        }
        refuse_existing(&self.target)?;
        fs::rename(self.folder.path(), &self.target)
            .with_context(|| format!("cannot rename the finished folder to {}", self.target.display()))?;
        // The folder has another name now: nothing to remove.
        let _ = self.folder.keep();
        sync_folder(&self.target)?;
        sync_folder(parent_of(&self.target))
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Refuses an output folder that could not be created: one that exists, has no name, or lies where nothing can be written.
/// Asks the system by creating a folder beside it and removing it at once.
pub fn check_target(target: &Path) -> Result<()> {
    refuse_existing(target)?;
    temporary_beside(target).map(drop)
}

fn refuse_existing(target: &Path) -> Result<()> {
    // A dangling link exists too, and a rename would replace it.
    ensure!(
        fs::symlink_metadata(target).is_err(),
        "{} exists. Remove it or choose another output folder with --out.",
        target.display()
    );
    Ok(())
}

fn parent_of(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn check_linears(
    checkpoint: &Checkpoint,
    quantized: &[LinearSpec],
    format: Format,
    settings: &SolverSettings,
) -> Result<HashMap<String, LinearSpec>> {
    let mut linears = HashMap::new();
    for linear in quantized {
        let name = format!("{}.weight", linear.module);
        let shape = checkpoint.tensor(&name)?.shape;
        ensure!(
            shape == [linear.out_features, linear.in_features],
            "tensor {name} in {} has shape {shape:?}, but config.json asks for [{}, {}]",
            checkpoint.file_of(&name),
            linear.out_features,
            linear.in_features
        );
        let wanted = format.scale_type(checkpoint.float_type(&name)?);
        ensure!(
            settings.scale_type == wanted,
            "{} files of this checkpoint hold scales of type {wanted:?}, but the solver rounds them to {:?} ({name})",
            format.name(),
            settings.scale_type
        );
        ensure!(
            linears.insert(linear.module.clone(), linear.clone()).is_none(),
            "the layer {} is announced twice",
            linear.module
        );
    }
    Ok(linears)
}

/// Tensors of the new checkpoint, in the order of the old.
fn planned_tensors(
    checkpoint: &Checkpoint,
    linears: &HashMap<String, LinearSpec>,
    format: Format,
    settings: &SolverSettings,
) -> Result<Vec<TensorSpec>> {
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        match name.strip_suffix(".weight").and_then(|module| linears.get(module)) {
            Some(linear) => tensors.extend(format.specs(linear, settings)),
            None => {
                let tensor = checkpoint.tensor(name)?;
                tensors.push(TensorSpec { name: name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.to_vec() });
            }
        }
    }
    let mut names = HashSet::new();
    for tensor in &tensors {
        ensure!(
            names.insert(&tensor.name),
            "{} has a tensor {} already, though its config.json announces no quantization",
            checkpoint.folder().display(),
            tensor.name
        );
    }
    Ok(tensors)
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
    let path = checkpoint.folder().join("config.json");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let Some(quantization) = quantization else {
        return Ok(text);
    };
    debug_assert!(quantization_entry(checkpoint.config()).is_none());
    ensure!(
        checkpoint.config().get("quantization_config").is_none(),
        "{} has an empty quantization_config; remove that line",
        path.display()
    );
    with_key(&text, "quantization_config", quantization).with_context(|| format!("cannot use {}", path.display()))
}

fn temporary_beside(target: &Path) -> Result<TempDir> {
    let name = target
        .file_name()
        .with_context(|| format!("{:?} is no name for an output folder; choose another --out", target.display()))?
        .to_string_lossy();
    let parent = parent_of(target);
    ensure!(
        parent.is_dir(),
        "the output {} cannot be written: there is no folder {}; create it first",
        target.display(),
        parent.display()
    );
    let prefix = format!(".{name}.partial-");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    // What is private while it is temporary would stay so under its final name.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder
        .tempdir_in(parent)
        .with_context(|| format!("cannot create a folder in {}; choose another --out", parent.display()))
}

/// Creates `path` with `length` bytes of space.
///
/// On Linux the space is taken now, so that a disk too small fails here and not after hours of solving.
fn reserve(path: &Path, length: u64) -> std::io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length) {
        // Some file systems cannot: then a full disk shows when the data comes.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    file.set_len(length)?;
    Ok(file)
}

/// The files of a checkpoint that go into a copy as they are, by their names in `source`, in order; sub-folders that stay behind
/// are named in a warning.
pub(crate) fn side_files(source: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let shown = source.join(&folder);
        let cannot_read = || format!("cannot read the folder {}", shown.display());
        for entry in fs::read_dir(&shown).with_context(cannot_read)? {
            let entry = entry.with_context(cannot_read)?;
            let (path, name) = (entry.path(), folder.join(entry.file_name()));
            let name_text = entry.file_name().to_string_lossy().into_owned();
            if name_text.starts_with('.') {
                continue;
            }
            // Follows links: download caches keep the files elsewhere. What a stranger's link leads to is not copied.
            let kind = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            // Not below itself: links may go round in circles.
            if kind.is_dir() && name_text == TEMPLATES && folder == Path::new("") {
                check_link(&path, source)?;
                folders.push(name);
            } else if kind.is_dir() {
                log::warn!("the sub-folder {} is not copied", path.display());
            } else if kind.is_file() && !is_replaced(&name_text) {
                check_link(&path, source)?;
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn copy_side_files(source: &Path, target: &Path) -> Result<()> {
    for name in side_files(source)? {
        let to = target.join(&name);
        let folder = parent_of(&to);
        fs::create_dir_all(folder).with_context(|| cannot_write(folder))?;
        copy(&source.join(&name), &to)?;
    }
    Ok(())
}

/// Whether a file of the source holds weights, or describes them, and so has no place in the copy.
pub(crate) fn is_replaced(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json"))
        || name == "quantize_config.json"
        || name == "config.json"
}

/// Copies contents only: a read-only source must not make a read-only copy.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut copy = File::create(to).with_context(|| cannot_write(to))?;
    std::io::copy(&mut source, &mut copy)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Brings the entries of a folder to the disk, where the system has a way to.
fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("cannot bring {} to the disk", folder.display()))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
