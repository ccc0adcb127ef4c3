//! Weight files read once, from their first byte to their last: their checksums, and whether all numbers in them are finite.

use super::checksum::{Check, Checksum, PIECE};
use super::convert::{float_type, is_finite};
use super::read::Checkpoint;
use super::shard::Shard;
use crate::parallel::try_map_apart;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
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
        let cannot_read = || format!("cannot read {}", shard.path.display());
        let mut file = File::open(&shard.path).with_context(cannot_read)?;
        let (mut whole, mut tensors, mut buffer) = (Checksum::default(), Vec::new(), vec![0; PIECE]);
        // Reads so many bytes, and has `look` see each piece.
        let mut pass = |length: u64, look: &mut dyn FnMut(&[u8])| -> Result<()> {
            let mut left = length;
            while left > 0 {
                check()?;
                let piece = &mut buffer[..left.min(PIECE as u64) as usize];
                file.read_exact(piece).with_context(cannot_read)?;
                whole.update(piece);
                look(piece);
                left -= piece.len() as u64;
            }
            Ok(())
        };
        pass(shard.data_start(), &mut |_| ())?;
        for name in shard.header.offset_keys() {
            let info = shard.header.info(&name).expect("a name from this header");
            let (float, mut clean) = (float_type(info.dtype), true);
            let mut checksum = wanted(&name).then(Checksum::default);
            let length = (info.data_offsets.1 - info.data_offsets.0) as u64;
            pass(length, &mut |piece| {
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
