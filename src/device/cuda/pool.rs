//! Device memory from a pool of our own, which never holds more than it may.
#![allow(unsafe_code)]

use super::heap::RESERVE;
use crate::device::PoolPeak;
use anyhow::{Context, Result};
use cudarc::driver::result::mem_pool;
use cudarc::driver::sys::{
    CUdeviceptr, CUmemAllocationHandleType, CUmemAllocationType, CUmemLocation, CUmemLocationType, CUmemPool_attribute,
    CUmemPoolProps, CUmemoryPool,
};
use cudarc::driver::{CudaContext, CudaStream, DriverError};
use std::sync::Arc;

/// The driver may round a pool's size up to whole blocks. A limit is rounded down to as many, so that it is never passed, but
/// where that would eat up the reserve, of a few: there it may be passed by less than one.
const BLOCK: u64 = 32 << 20;

/// A pool of the driver's. What it handed out lives on when the pool is dropped.
pub(super) struct Pool {
    pool: CUmemoryPool,
    context: Arc<CudaContext>,
}

// SAFETY: a handle that the driver takes from any thread, and locks by itself.
unsafe impl Send for Pool {}

impl Pool {
    /// A pool of at most `limit` bytes; of all that the device has where there is none. Freed memory stays in it, for the next
    /// allocation: by default each wait would hand it back to the driver.
    pub(super) fn new(context: &Arc<CudaContext>, limit: Option<u64>) -> Result<Self> {
        let size = limit.map_or(0, in_blocks);
        let properties = CUmemPoolProps {
            allocType: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            handleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.cu_device() },
            win32SecurityAttributes: std::ptr::null_mut(),
            maxSize: usize::try_from(size).context("a limit of GPU memory")?,
            usage: 0,
            reserved: [0; 54],
        };
        context.bind_to_thread().context("the GPU's context is lost")?;
        // SAFETY: the properties are read during the call.
        let pool = unsafe { mem_pool::create(&raw const properties) };
        let pool = pool.with_context(|| format!("the driver makes no memory pool of {size} bytes (0: of all)"))?;
        let pool = Self { pool, context: context.clone() };
        let mut threshold = u64::MAX;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is live, and the attribute is a 64-bit number.
        unsafe { mem_pool::set_attribute(pool.pool, attribute, (&raw mut threshold).cast()) }
            .context("the GPU's memory pool")?;
        Ok(pool)
    }

    /// Memory that is there for work enqueued on `stream` from now on. The driver's own error tells a lack of memory from all
    /// else. The context is the calling thread's.
    pub(super) fn allocate(&self, bytes: usize, stream: &CudaStream) -> Result<CUdeviceptr, DriverError> {
        // The driver refuses sizes of 0; its pointers are aligned to 256 bytes.
        // SAFETY: pool and stream are live, and of one device.
        unsafe { mem_pool::alloc_async(self.pool, bytes.max(1), stream.cu_stream()) }
    }

    /// Gives back to the driver what nobody uses. Memory whose release was not waited for may stay.
    pub(super) fn trim(&self) -> Result<()> {
        // SAFETY: the pool is live.
        unsafe { mem_pool::trim_to(self.pool, 0) }.context("the GPU's memory pool keeps what nobody uses")
    }

    /// Bytes that it holds, and bytes of them that are out.
    pub(super) fn held(&self) -> Result<(u64, u64)> {
        use CUmemPool_attribute::{CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT};
        Ok((self.size(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?, self.size(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?))
    }

    /// The most of both since it was made.
    pub(super) fn peak(&self) -> Result<PoolPeak> {
        use CUmemPool_attribute::{CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, CU_MEMPOOL_ATTR_USED_MEM_HIGH};
        Ok(PoolPeak {
            reserved_bytes: self.size(CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
            used_bytes: self.size(CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        })
    }

    fn size(&self, attribute: CUmemPool_attribute) -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: the pool is live, and each of these attributes is a 64-bit number.
        unsafe { mem_pool::get_attribute(self.pool, attribute, (&raw mut bytes).cast()) }
            .context("the GPU's memory pool does not say what it holds")?;
        Ok(bytes)
    }
}

/// A pool's size for a limit: whole blocks.
fn in_blocks(limit: u64) -> u64 {
    let few = limit / RESERVE < BLOCK;
    BLOCK * if few { limit.div_ceil(BLOCK).max(1) } else { limit / BLOCK }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A context that is lost has taken the pool with it. The driver keeps what is out, and frees that being on its way.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made in `new`, destroyed once. An error at the end has nobody to hear it.
            let _ = unsafe { mem_pool::destroy(self.pool) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, RESERVE, in_blocks};

    #[test]
    fn a_pool_keeps_to_its_limit_and_holds_what_tensors_may_take() {
        let few = RESERVE * BLOCK;
        for limit in
            [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, few - 1, few, few + 1, few + BLOCK - 1, 1000 * BLOCK - 1]
        {
            let size = in_blocks(limit);
            assert!(size.is_multiple_of(BLOCK) && size >= limit - limit / RESERVE, "{size} for {limit}");
            assert!(if limit < few { size < limit + BLOCK } else { size <= limit }, "{size} for {limit}");
        }
        // The driver takes 0 for all that there is.
        assert_eq!(in_blocks(0), BLOCK);
    }
}
