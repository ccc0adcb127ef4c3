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

/// Waits for a thread's end, whose panic goes on here.
#[cfg(feature = "run")]
pub(crate) fn join<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// As [`try_map`], on threads of its own, as many as would compute: for work that waits for files, during which those others are to go on.
#[cfg(feature = "run")]
pub(crate) fn try_map_apart<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    use anyhow::Context;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn all<T: Send>(count: usize, work: &(dyn Fn(usize) -> Result<T> + Sync)) -> Result<Vec<T>> {
        let next = AtomicUsize::new(0);
        let some = || -> Result<Vec<(usize, T)>> {
            let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed)).take_while(|&i| i < count);
            // Behind an error nothing more is begun, by any thread.
            let give_up = |_: &anyhow::Error| next.store(count, Ordering::Relaxed);
            numbers.map(|i| Ok((i, work(i).inspect_err(give_up)?))).collect()
        };
        thread::scope(|scope| {
            let threads = rayon::current_num_threads().min(count);
            let started: Result<Vec<_>> = (0..threads)
                .map(|_| thread::Builder::new().name("files".into()).spawn_scoped(scope, some))
                .map(|thread| thread.context("cannot start a thread to read files"))
                .collect();
            let mut made = Vec::with_capacity(count);
            for thread in started? {
                made.extend(join(thread)?);
            }
            made.sort_unstable_by_key(|(i, _)| *i);
            Ok(made.into_iter().map(|(_, value)| value).collect())
        })
    }
    all(count, &work)
}
