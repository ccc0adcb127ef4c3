//! Work on all threads.
//!
//! An iterator of rayon's is compiled anew for every closure, 3,000 lines of intermediate code each, which made an eighth of the crate.
//! Here a closure is called by its address, once for a piece of work, and rayon is compiled once for each type of values or results.

use anyhow::Result;
use rayon::prelude::*;

/// Works on pieces of `data` side by side: `size` values each, the last as many as are left. `work` is given a piece's number as well.
/// A `size` of 0 counts as 1.
pub(crate) fn each_chunk<T: Send>(data: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    fn all<T: Send>(data: &mut [T], size: usize, work: &(dyn Fn(usize, &mut [T]) + Sync)) {
        data.par_chunks_mut(size.max(1)).enumerate().for_each(|(i, chunk)| work(i, chunk));
    }
    all(data, size, &work);
}

/// What `work` makes of every number below `count`, in order.
pub(crate) fn map<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    fn all<T: Send>(count: usize, work: &(dyn Fn(usize) -> T + Sync)) -> Vec<T> {
        (0..count).into_par_iter().map(work).collect()
    }
    all(count, &work)
}

/// As [`map`]. Errors with one of the errors of `work`, and does not begin what is left then.
pub(crate) fn try_map<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    fn all<T: Send>(count: usize, work: &(dyn Fn(usize) -> Result<T> + Sync)) -> Result<Vec<T>> {
        (0..count).into_par_iter().map(work).collect()
    }
    all(count, &work)
}
