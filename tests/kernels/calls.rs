//! Calls of the C API whose outcome is known, and runs under several schedules and on several GPUs.

use crate::buffers::Bits;
use crate::support::kernels::{self, SHARED_KIB, Variant};
use std::fmt::Debug;
use std::ops::Range;
use vlmq::device::cuda::bindings::vlmq_status;

/// Calls a function that must accept its arguments.
#[track_caller]
pub(crate) fn accepted<A: Debug>(name: &str, args: &A) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_OK, "{name} of {args:?}");
}

/// Calls a function that must refuse its arguments.
#[track_caller]
pub(crate) fn refused<A: Debug>(name: &str, args: &A) {
    assert_eq!(kernels::call(name, args), vlmq_status::VLMQ_BAD_ARGUMENT, "{name} of {args:?}");
}

/// Calls a function with good arguments, each time spoiled in one way, which it must refuse.
#[track_caller]
pub(crate) fn refused_each<A: Debug + Copy>(name: &str, good: &A, spoiled: &[fn(&mut A)]) {
    for (number, spoil) in spoiled.iter().enumerate() {
        let mut args = *good;
        spoil(&mut args);
        let status = kernels::call(name, &args);
        assert_eq!(status, vlmq_status::VLMQ_BAD_ARGUMENT, "{name}, way {number}: {args:?}");
    }
}

/// Runs under several schedules, each on a GPU with other shared memory: all must give the same bits. Returns the outputs.
#[track_caller]
pub(crate) fn every_schedule<O: Bits>(run: impl Fn() -> O) -> O {
    schedules(0..if Variant::current() == Variant::Plain { 3 } else { 2 }, run)
}

/// The same under schedules that are named, the GPUs in turn.
#[track_caller]
pub(crate) fn schedules<O: Bits>(seeds: Range<u64>, run: impl Fn() -> O) -> O {
    let mut first: Option<O> = None;
    for (seed, kib) in seeds.zip(SHARED_KIB.into_iter().cycle()) {
        kernels::set_seed(kernels::kernels(), seed);
        kernels::set_shared_kib(kernels::kernels(), kib);
        let outputs = run();
        match &first {
            // No assert_eq: nobody reads a million numbers.
            Some(first) => {
                assert!(outputs.bits() == first.bits(), "the outputs differ under schedule {seed} with {kib} KiB");
            }
            None => first = Some(outputs),
        }
    }
    kernels::set_seed(kernels::kernels(), 0);
    kernels::set_shared_kib(kernels::kernels(), SHARED_KIB[0]);
    first.unwrap()
}
