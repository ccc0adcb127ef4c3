//! Weight files read once, from their first byte to their last: their checksums, and whether all numbers in them are finite.

use super::checksum::{Check, Checksum, Pieces};
use super::convert::{float_type, is_finite};
use super::read::Checkpoint;
use super::shard::Shard;
use crate::parallel::try_map_apart;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Checksums of weight files, and of tensors in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// SHA-256 of the files.
    pub(crate) files: BTreeMap<PathBuf, String>,
    /// SHA-256 of the bytes of tensors, by name.
    pub(crate) tensors: BTreeMap<String, String>,
}

impl Checkpoint {
    /// SHA-256 of the weight files, and of the tensors that are `wanted`. Files are read side by side, as long as `check` lets it, and not
    /// mapped: a mapped file counts as memory in use.
    ///
    /// Errors, naming it, where a float tensor holds a NaN or an infinity, and for files that cannot be read.
    pub(crate) fn scan(&self, wanted: impl Fn(&str) -> bool + Sync, check: Check<'_>) -> Result<Scanned> {
        let scanned = try_map_apart(self.shards.len(), |i| self.scan_file(&self.shards[i], &wanted, check))?;
        let mut all = Scanned::default();
        for (shard, (file, tensors)) in self.shards.iter().zip(scanned) {
            all.files.insert(shard.path.clone(), file);
            all.tensors.extend(tensors);
        }
        Ok(all)
    }

    /// SHA-256 of a file, and of the tensors in it that are wanted.
    fn scan_file(
        &self,
        shard: &Shard,
        wanted: &dyn Fn(&str) -> bool,
        check: Check<'_>,
    ) -> Result<(String, Vec<(String, String)>)> {
        let (mut file, mut whole, mut tensors) = (Pieces::of(&shard.path)?, Checksum::default(), Vec::new());
        file.read(shard.data_start(), check, &mut |piece| whole.update(piece))?;
        for name in shard.header.offset_keys() {
            let info = shard.header.info(&name).expect("a name from this header");
            let (float, mut clean) = (float_type(info.dtype), true);
            let mut checksum = wanted(&name).then(Checksum::default);
            let length = (info.data_offsets.1 - info.data_offsets.0) as u64;
            file.read(length, check, &mut |piece| {
                whole.update(piece);
                clean &= float.is_none_or(|float| is_finite(float, piece));
                checksum.iter_mut().for_each(|checksum| checksum.update(piece));
            })?;
            if !clean {
                self.check_finite(&name)?;
            }
            tensors.extend(checksum.map(|checksum| (name, checksum.finish())));
        }
        Ok((whole.finish(), tensors))
    }
}
