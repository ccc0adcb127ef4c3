//! What blocks of columns bring back from the GPU (codes, scales, zeros, errors), and the weights that codes stand for.

use super::Cuda;
use super::bindings::vlmq_dequantize_args;
use super::memory::Memory;
use super::tensor::{CudaTensor, dtype_of};
use crate::device::{BlockCodes, BlockShape, GridRule, GroupGrid, QuantizedWeight};
use anyhow::Result;
use std::ptr;

/// The codes of a layer, on the device.
pub struct CudaCodes {
    pub(super) outputs: Outputs,
    /// Blocks that have theirs.
    pub(super) done: usize,
}

/// What blocks bring back, in one piece of memory so that it comes in one copy.
pub(super) struct Outputs {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    /// Byte of the one status that all blocks lower.
    pub(super) status: usize,
    pub(super) blocks: Vec<Place>,
}

/// Where a block's outputs begin, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) shape: BlockShape,
    pub(super) row_errors: usize,
    pub(super) scales: usize,
    pub(super) codes: usize,
    pub(super) zeros: usize,
}

impl Outputs {
    pub(super) fn new(device: &Cuda, rows: usize, blocks: &[BlockShape]) -> Result<Self> {
        let mut end = 0;
        // For vector stores, each starts where an allocation could.
        let mut place = |bytes: usize| {
            let at = end;
            end = (end + bytes).next_multiple_of(256);
            at
        };
        let status = place(size_of::<i32>());
        let blocks = blocks
            .iter()
            .map(|&shape| Place {
                shape,
                row_errors: place(rows * size_of::<f64>()),
                scales: place(rows * shape.groups * size_of::<f32>()),
                codes: place(rows * shape.columns),
                zeros: place(rows * shape.groups),
            })
            .collect();
        let mut memory = Memory::new(&device.runtime, end)?;
        // All of it comes back, what no kernel writes as well: NaN and the largest code, should anybody look at those.
        memory.fill(0xff)?;
        memory.write(status, bytemuck::bytes_of(&i32::MAX))?;
        Ok(Self { memory, rows, status, blocks })
    }

    /// Waits. Errors where a scale did not fit.
    pub(super) fn take(self, rule: &GridRule) -> Result<Vec<BlockCodes>> {
        let bytes: Vec<u8> = self.memory.read(0, self.memory.bytes())?;
        let status: i32 = bytemuck::pod_read_unaligned(&bytes[self.status..][..size_of::<i32>()]);
        if status != i32::MAX {
            return Err(rule.misfit(status as usize));
        }
        let block = |place: &Place| {
            let count = self.rows * place.shape.groups;
            // A group's grid alone has no codes, and its errors were not written.
            let errors = if place.shape.columns == 0 { 0 } else { self.rows };
            let errors: Vec<f64> =
                bytemuck::pod_collect_to_vec(&bytes[place.row_errors..][..errors * size_of::<f64>()]);
            BlockCodes {
                codes: bytes[place.codes..][..self.rows * place.shape.columns].to_vec(),
                grid: GroupGrid {
                    scales: bytemuck::pod_collect_to_vec(&bytes[place.scales..][..count * size_of::<f32>()]),
                    zeros: bytes[place.zeros..][..count].to_vec(),
                },
                error: errors.iter().sum(),
            }
        };
        Ok(self.blocks.iter().map(block).collect())
    }
}

impl Cuda {
    /// Weights of codes, see [`ModelOps::dequantize`](crate::device::ModelOps::dequantize).
    pub(super) fn weight_of_codes(&self, weight: &QuantizedWeight<'_>) -> Result<CudaTensor> {
        let groups = weight.groups()?;
        let QuantizedWeight { rows, cols, codes, scales, zeros, group_index } = *weight;
        let codes = Memory::of(&self.runtime, codes)?;
        let scales = Memory::of(&self.runtime, scales)?;
        let zeros = Memory::of(&self.runtime, zeros)?;
        let index = group_index.map(|index| Memory::of(&self.runtime, index)).transpose()?;
        let mut out = self.tensor(rows, cols, self.precision)?;
        self.launch(&vlmq_dequantize_args {
            codes: codes.at(0),
            scales: scales.at(0),
            zeros: zeros.at(0),
            group_index: index.as_ref().map_or(ptr::null(), |index| index.at(0)),
            out: self.write(&mut out)?,
            rows: rows as i64,
            cols: cols as i64,
            groups: groups as i64,
            dtype: dtype_of(self.precision),
        })?;
        Ok(out)
    }
}
