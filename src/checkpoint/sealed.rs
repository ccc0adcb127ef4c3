//! safetensors files that end with the checksum of all before, so that a torn or damaged one is never taken for whole.

use super::checksum::{Checksum, of_range};
use super::convert::dtype_of;
use super::file_layout::header;
use super::formats::TensorSpec;
use super::shard::Shard;
use crate::tensor::Float;
use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The last tensor: 64 digits.
const SEAL: &str = "sha256";

/// What is not known to fit the header beforehand: names, shapes.
const HEADER_BYTES: u64 = 200;

/// Bytes of a file of so many tensors with so many bytes in all, at most.
pub(crate) fn length(tensors: u64, bytes: u64) -> u64 {
    bytes + HEADER_BYTES * (tensors + 2)
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Sealing<'a> {
    spec: TensorSpec,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Sealing<'a> {
    /// Some bytes.
    pub(crate) fn bytes(name: &str, bytes: Vec<u8>) -> Self {
        Self { spec: spec(name.to_owned(), Dtype::U8, vec![bytes.len()]), bytes: bytes.into() }
    }

    /// A matrix of floats as it is stored.
    pub(crate) fn matrix(name: String, float: Float, (rows, cols): (usize, usize), bytes: Cow<'a, [u8]>) -> Self {
        Self { spec: spec(name, dtype_of(float), vec![rows, cols]), bytes }
    }

    /// This tensor with bytes of its own.
    pub(crate) fn into_owned(self) -> Sealing<'static> {
        Sealing { spec: self.spec, bytes: self.bytes.into_owned().into() }
    }
}

fn spec(name: String, dtype: Dtype, shape: Vec<usize>) -> TensorSpec {
    TensorSpec { name, dtype, shape }
}

/// Writes tensors, wider elements first, over what the file holds, and returns once they have reached the disk.
pub(crate) fn write(mut file: File, tensors: Vec<Sealing<'_>>) -> Result<()> {
    let seal = spec(SEAL.to_owned(), Dtype::U8, vec![64]);
    let all: Vec<&TensorSpec> = tensors.iter().map(|tensor| &tensor.spec).chain([&seal]).collect();
    let header = header(&all, &BTreeMap::new())?;
    file.rewind()?;
    let mut checksum = Checksum::default();
    let mut out = BufWriter::new(&file);
    checksum.update(&header);
    out.write_all(&header)?;
    for Sealing { spec, bytes } in tensors {
        ensure!(bytes.len() == spec.bytes(), "{}: {} bytes in place of {}", spec.name, bytes.len(), spec.bytes());
        checksum.update(&bytes);
        out.write_all(&bytes)?;
    }
    out.write_all(checksum.finish().as_bytes())?;
    out.flush()?;
    drop(out);
    let end = file.stream_position()?;
    file.set_len(end)?;
    Ok(file.sync_all()?)
}

/// A file that was written so. It is read, not mapped: a mapped file counts as memory in use.
#[derive(Debug)]
pub(crate) struct Sealed {
    shard: Shard,
}

impl Sealed {
    /// Errors for a file that is not whole.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let damaged = format!("{} is damaged", path.display());
        let sealed = Self { shard: Shard::open(path).with_context(|| damaged.clone())? };
        let seal = sealed.bytes(SEAL).with_context(|| damaged.clone())?;
        let before = 0..sealed.shard.start_of(SEAL);
        ensure!(
            of_range(sealed.path(), before)?.as_bytes() == seal,
            "{damaged}: its checksum is not that of its contents"
        );
        Ok(sealed)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.shard.path
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path().display();
        let info = self.shard.header.info(name).with_context(|| format!("{path} lacks {name}"))?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        let mut read = || {
            let mut file = File::open(self.path())?;
            file.seek(SeekFrom::Start(self.shard.start_of(name)))?;
            file.read_exact(&mut bytes)
        };
        read().with_context(|| format!("cannot read {path}"))?;
        Ok(bytes)
    }

    /// The bytes of a matrix of floats. Errors where it has another type or shape.
    pub(crate) fn matrix(&self, name: &str, float: Float, (rows, cols): (usize, usize)) -> Result<Vec<u8>> {
        let bytes = self.bytes(name)?;
        let info = self.shard.header.info(name).filter(|i| i.dtype == dtype_of(float) && i.shape == [rows, cols]);
        ensure!(info.is_some(), "{}: {name} is not {rows}x{cols} of {float:?}", self.path().display());
        Ok(bytes)
    }
}
