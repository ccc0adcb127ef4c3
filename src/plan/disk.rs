//! Room on disk.

use crate::plan::system::free_bytes;
use crate::progress::human_bytes;
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::Path;

/// Bytes on the file system of the output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskPlan {
    /// The finished checkpoint: weights and all that is copied.
    pub output_bytes: u64,
    /// What the run keeps beside it to go on after an interruption, at most.
    pub work_bytes: u64,
    /// What this user may still write there; `None` where the system does not tell.
    pub free_bytes: Option<u64>,
}

impl DiskPlan {
    /// The room for an output in `folder`, or, where there is none yet, in the next folder above it that is.
    pub fn new(folder: &Path, output_bytes: u64, work_bytes: u64) -> Self {
        let there = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
        Self { output_bytes, work_bytes, free_bytes: free_bytes(there) }
    }

    /// Errors, with the numbers, where the file system has not as much room.
    pub fn check(&self, out: &Path) -> Result<()> {
        let needed = self.output_bytes + self.work_bytes;
        if let Some(free) = self.free_bytes {
            ensure!(
                needed <= free,
                "{} takes {} on disk while the run lasts ({} of output, {} to go on after an interruption), but {} are \
                 free there; free some or choose another --out",
                out.display(),
                human_bytes(needed),
                human_bytes(self.output_bytes),
                human_bytes(self.work_bytes),
                human_bytes(free)
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_refused_with_the_numbers() {
        let plan = DiskPlan { output_bytes: 3 << 20, work_bytes: 2 << 20, free_bytes: Some(5 << 20) };
        plan.check(Path::new("out")).unwrap();
        let error = DiskPlan { free_bytes: Some((5 << 20) - 1), ..plan.clone() }.check(Path::new("out")).unwrap_err();
        for part in ["out takes 5.00 MiB", "3.00 MiB of output", "2.00 MiB to go on", "5.00 MiB are free", "--out"] {
            assert!(error.to_string().contains(part), "{part:?} is not in {error}");
        }
        DiskPlan { free_bytes: None, ..plan }.check(Path::new("out")).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_where_the_one_above_it_is() {
        let work = tempfile::tempdir().unwrap();
        let plan = DiskPlan::new(&work.path().join("a/b"), 1, 2);
        assert_eq!(plan.free_bytes.is_some(), cfg!(target_os = "linux"));
    }
}
