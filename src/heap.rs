//! What glibc's allocator keeps of memory that was given back to it. Other allocators are left alone.
//!
//! Left to itself, glibc lets the largest array that was given back decide which later ones come from a heap, and keeps what is
//! free there for as long as anything behind it is in use: a process then holds up to a quarter more than it uses, and
//! another amount in each run. A memory [`plan`](crate::plan) could not be kept to.

/// Bytes from which an array is mapped by itself and goes back to the system when it is dropped. Arrays of a few MiB come and
/// go with every operation on small models: mapped, each would cost the time of clearing its pages (all of them from 4 MiB:
/// one and a half times the time of a run).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_FROM: i32 = 16 << 20;

/// Bytes free at the end of a heap above which it is cut: twice the largest array that comes from there.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT: i32 = 2 * MAPPED_FROM;

/// Heaps of all threads together: with one a thread, as glibc has it, a process keeps more the more threads there are, and another amount
/// in each run.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS: i32 = 2;

/// Bytes that a heap keeps beside what is in use, where arrays of so many bytes came and went. Arrays that stay have others between them
/// that were given back, and what is asked for next need not fit in: a fifth to the whole of the largest that comes from there was
/// measured.
pub(crate) fn between_arrays(arrays: impl Iterator<Item = u64>) -> u64 {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    let largest = arrays.filter(|&bytes| bytes < MAPPED_FROM as u64).max();
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let largest = arrays.max();
    2 * largest.unwrap_or(0) / 3
}

/// Makes what a program holds the same in every run, as [`plan`](crate::plan) counts it. For the beginning
/// of a program; one that links the library and does not call it holds somewhat more than is planned.
pub fn fix_thresholds() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: takes no pointer; the parameters and values are those of mallopt(3), which refuses others.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Gives memory that is free back to the system, between two steps that need it for other things. Not for inner loops: what
/// comes next has its pages cleared anew.
pub(crate) fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: takes no pointer and touches only what is free; malloc_trim(3) is safe in threads.
    unsafe {
        libc::malloc_trim(0);
    }
}
