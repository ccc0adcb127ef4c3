//! How often a call is repeated, so that its time can be told from what is around it.

use anyhow::Result;
use std::time::Duration;

/// Calls of a sample that takes `least`, doubled from one on until it does, and what it took.
pub(crate) fn repeat(least: Duration, mut sample: impl FnMut(u32) -> Result<Duration>) -> Result<(u32, Duration)> {
    let (mut calls, mut time) = (1, sample(1)?);
    while time < least {
        calls *= 2;
        time = sample(calls)?;
    }
    Ok((calls, time))
}
