//! A device that takes its time, and computes nothing: for measuring what the host does not hide behind it.

use crate::device::work::ByKind;
use std::time::{Duration, Instant};

/// A queue of work that is done in its order, at these rates.
#[derive(Debug)]
pub(super) struct Pace {
    rates: ByKind,
    /// When all work so far will be done.
    done: Instant,
    /// Seconds that all work takes.
    busy: f64,
}

impl Pace {
    pub(super) fn new(rates: ByKind) -> Self {
        Self { rates, done: Instant::now(), busy: 0.0 }
    }

    /// Adds work, which begins when that before it is done, or now.
    pub(super) fn enqueue(&mut self, work: ByKind) {
        let seconds = work.seconds(&self.rates);
        self.busy += seconds;
        self.done = self.done.max(Instant::now()) + Duration::from_secs_f64(seconds);
    }

    /// Time until all work so far is done.
    pub(super) fn left(&self) -> Duration {
        self.done.saturating_duration_since(Instant::now())
    }

    /// Seconds that all work takes.
    pub(super) fn busy(&self) -> f64 {
        self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_its_order() {
        let rates = ByKind {
            products: 2.0,
            values: 4.0,
            attention: 1.0,
            statistics: 1.0,
            factors: 1.0,
            codes: 1.0,
            checked: 1.0,
        };
        let mut pace = Pace::new(rates);
        assert_eq!(pace.left(), Duration::ZERO);
        pace.enqueue(ByKind { products: 2000.0, ..ByKind::default() });
        pace.enqueue(ByKind { values: 400.0, ..ByKind::default() });
        assert_eq!(pace.busy(), 1100.0);
        // Whatever passes between two lines is less than a minute.
        let left = pace.left().as_secs_f64();
        assert!(left <= 1100.0 && left > 1040.0, "{left}");
    }
}
