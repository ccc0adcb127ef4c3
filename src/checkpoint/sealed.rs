//! safetensors files that end with the checksum of all before, so that a torn or damaged one is never taken for whole.

use super::checksum::{Checksum, of_range};
use super::convert::{bytes_from_floats, dtype_of};
use super::file_layout::header;
use super::formats::TensorSpec;
use super::shard::Shard;
use crate::tensor::Float;
use crate::tensor::Matrix;
use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
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
pub(crate) fn spec(name: String, dtype: Dtype, shape: Vec<usize>) -> TensorSpec {
    TensorSpec { name, dtype, shape }
}

/// A matrix of floats to be written.
pub(crate) fn matrix_spec(name: String, float: Float, (rows, cols): (usize, usize)) -> TensorSpec {
    spec(name, dtype_of(float), vec![rows, cols])
}

/// Writes tensors, wider elements first, over what the file holds, and returns once they have reached the disk. `bytes` is
/// asked for one tensor after the other.
pub(crate) fn write(
    mut file: File,
    mut specs: Vec<TensorSpec>,
    mut bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    specs.push(spec(SEAL.to_owned(), Dtype::U8, vec![64]));
    let all: Vec<&TensorSpec> = specs.iter().collect();
    let header = header(&all, &BTreeMap::new())?;
    file.rewind()?;
    let mut checksum = Checksum::default();
    let mut out = BufWriter::new(&file);
    checksum.update(&header);
    out.write_all(&header)?;
    for (i, spec) in specs[..specs.len() - 1].iter().enumerate() {
        let bytes = bytes(i)?;
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

/// The bytes of `values`, which are exact in `float`.
pub(crate) fn bytes_of(float: Float, values: &Matrix) -> Vec<u8> {
    bytes_from_floats(float, values.data())
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

    /// A matrix of floats. Errors where it has another type or shape.
    pub(crate) fn matrix(&self, name: &str, float: Float, (rows, cols): (usize, usize)) -> Result<Matrix> {
        let bytes = self.bytes(name)?;
        let info = self.shard.header.info(name).filter(|i| i.dtype == dtype_of(float) && i.shape == [rows, cols]);
        ensure!(info.is_some(), "{}: {name} is not {rows}x{cols} of {float:?}", self.path().display());
        Matrix::new(rows, cols, float.widen(&bytes))
    }
}
