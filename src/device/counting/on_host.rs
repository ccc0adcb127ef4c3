//! Numbers that the host has beside the tensors.

use super::ledger::Ledger;
use std::sync::Arc;

/// Numbers that the host has, until they are dropped.
#[derive(Debug)]
pub struct OnHost {
    ledger: Arc<Ledger>,
    bytes: u64,
    /// The label under which they count, in the memory that is the device's as well; `None`: beside a device with memory of its own.
    label: Option<&'static str>,
}

impl OnHost {
    /// Numbers in the memory that is the device's as well.
    pub(super) fn shared(ledger: &Arc<Ledger>, bytes: u64) -> Self {
        let label = Some(ledger.add(bytes));
        Self { ledger: Arc::clone(ledger), bytes, label }
    }

    /// Numbers beside a device with memory of its own.
    pub(super) fn beside(ledger: &Arc<Ledger>, bytes: u64) -> Self {
        ledger.hold_on_host(bytes);
        Self { ledger: Arc::clone(ledger), bytes, label: None }
    }
}

impl Drop for OnHost {
    fn drop(&mut self) {
        match self.label {
            Some(label) => self.ledger.take(label, self.bytes),
            None => self.ledger.leave_host(self.bytes),
        }
    }
}
