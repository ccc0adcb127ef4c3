//! Values that a thread of their own makes while the run goes on without them.

use crate::checkpoint::checksum::Check;
use crate::parallel::join;
use crate::progress::Stop;
use anyhow::{Context, Result};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle, sleep};
use std::time::Duration;

/// How long is waited before it is asked again whether to go on: a thread's end can be asked for, but not waited for with an end.
const PATIENCE: Duration = Duration::from_millis(2);

/// A value on its way. Dropped, it is given up.
pub(super) struct Awaited<'scope, T> {
    thread: Mutex<Option<ScopedJoinHandle<'scope, Result<T>>>>,
    value: OnceLock<T>,
    given_up: Stop,
}

impl<'scope, T: Send + 'scope> Awaited<'scope, T> {
    /// Has a thread `make` a value; what that is given, it is to ask often whether to go on.
    pub(super) fn start(
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        make: impl FnOnce(Check<'_>) -> Result<T> + Send + 'scope,
    ) -> Result<Self> {
        let given_up = Stop::default();
        let stop = given_up.clone();
        let thread = Builder::new().name(name.into()).spawn_scoped(scope, move || make(&|| Ok(stop.check()?)));
        let thread = thread.context("cannot start a thread to take checksums")?;
        Ok(Self { thread: Mutex::new(Some(thread)), value: OnceLock::new(), given_up })
    }

    /// Waits for the value, as long as `check` lets it. Errors once with that of the thread.
    pub(super) fn get(&self, check: Check<'_>) -> Result<&T> {
        loop {
            if self.is_there()? {
                return self.value.get().context("what failed before is asked for again");
            }
            check()?;
            sleep(PATIENCE);
        }
    }

    /// Whether there is anything to wait for no more. Errors once with that of the thread.
    pub(super) fn is_there(&self) -> Result<bool> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ended) = thread.take_if(|thread| thread.is_finished()) else { return Ok(thread.is_none()) };
        Ok(self.value.set(join(ended)?).is_ok())
    }
}

impl<T> Drop for Awaited<'_, T> {
    fn drop(&mut self) {
        self.given_up.request();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use std::thread;

    #[test]
    fn a_value_is_waited_for_and_an_error_told_once() {
        thread::scope(|scope| {
            let value = Awaited::start(scope, "value", |_| Ok(7)).unwrap();
            assert_eq!((value.get(&|| Ok(())).unwrap(), value.is_there().unwrap()), (&7, true));
            assert_eq!(value.get(&|| Ok(())).unwrap(), &7);
            let error = Awaited::<()>::start(scope, "error", |_| bail!("broken")).unwrap();
            assert_eq!(error.get(&|| Ok(())).unwrap_err().to_string(), "broken");
            assert!(error.get(&|| Ok(())).unwrap_err().to_string().contains("asked for again"));
        });
    }

    #[test]
    fn nobody_waits_longer_than_wanted() {
        thread::scope(|scope| {
            // Ends when it is given up, which it is at the end of the scope.
            let never = Awaited::<()>::start(scope, "never", |check| {
                loop {
                    check()?;
                    sleep(PATIENCE);
                }
            })
            .unwrap();
            assert_eq!(never.get(&|| bail!("enough")).unwrap_err().to_string(), "enough");
        });
    }
}
