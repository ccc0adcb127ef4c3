//! Blocks on their way to the device, read while the one before them is quantized.

use super::input::Input;
use crate::device::ModelOps;
use crate::model::decoder::Block;
use crate::model::source::Weights;
use crate::parallel::join;
use anyhow::{Context, Result};
use std::thread::{Builder, Scope, ScopedJoinHandle};

/// Loads one block after the other.
pub(super) struct Ahead<'scope, 'env, D: ModelOps> {
    scope: &'scope Scope<'scope, 'env>,
    device: &'env D,
    input: &'env Input,
    next: Option<ScopedJoinHandle<'scope, Result<Block<D::Tensor>>>>,
}

impl<'scope, 'env, D: ModelOps> Ahead<'scope, 'env, D> {
    /// One that has loaded nothing yet.
    pub(super) fn new(scope: &'scope Scope<'scope, 'env>, device: &'env D, input: &'env Input) -> Self {
        Self { scope, device, input, next: None }
    }

    /// Block `index`, which is the first or follows the last one asked for. Where the device works beside the host, the block behind it
    /// is on its way when this returns.
    pub(super) fn take(&mut self, index: usize) -> Result<Block<D::Tensor>> {
        let (device, input) = (self.device, self.input);
        let load = move |index| {
            Block::load(&Weights::new(device, &input.checkpoint), &input.config.decoder, &input.config.names, index)
        };
        let block = self.next.take().map_or_else(|| load(index), join)?;
        let next = index + 1;
        if device.works_beside_host() && next < input.config.decoder.layers {
            let thread = Builder::new().name("weights".into()).spawn_scoped(self.scope, move || load(next));
            self.next = Some(thread.context("cannot start a thread to read weights")?);
        }
        Ok(block)
    }
}
