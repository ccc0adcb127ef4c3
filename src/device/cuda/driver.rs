//! A GPU through NVIDIA's driver, and cuBLAS for the plain products. Both libraries are opened at run time.
#![allow(unsafe_code)]

use super::bindings::vlmq_stream;
use super::blas::{Blas, Cublas, WORKSPACE_BYTES};
use super::pool::Pool;
use super::runtime::{Address, Arrival, LATE, Product, Runtime};
use super::staging::{Engine, Staging};
use crate::device::PoolPeak;
use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result as driver};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Oldest GPU that the kernels run on.
const OLDEST: (i32, i32) = (8, 0);

/// Bytes of a slot of page-locked memory that copies go through: long enough that a device's start of each does not count.
const SLOT: usize = 16 << 20;

/// CUDA version that the driver must support: the kernels' own.
const OLDEST_CUDA: i32 = 13_000;

/// Shared memory that a block must be granted: what every GPU from compute capability 8.0 on offers, and all that a kernel
/// asks for.
const LEAST_SHARED: i32 = 99 << 10;

/// One GPU, one stream for its work and one for copies beside it.
pub(super) struct Driver {
    /// cuBLAS, before its stream, as fields are dropped in this order.
    blas: Mutex<Blas>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Parks and fetches, in their order: what is fetched takes the place of what was parked before it, so that no more than
    /// one piece is on its way in while another is worked on.
    copies: Arc<CudaStream>,
    /// What copies between ordinary host memory and the device, on the stream of the work, go through.
    staging: Staging<OnStream>,
    /// What is allocated comes from here.
    pool: Mutex<Pool>,
    name: String,
    libraries: BTreeMap<&'static str, String>,
}

impl Driver {
    /// Takes GPU `ordinal`. Errors, saying what is missing, without driver, GPU or cuBLAS, where one of them is too old, and
    /// where cuBLAS is of another version.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: opens and closes the driver's library, whose initializers are meant to run in any program.
        let present = unsafe { cudarc::driver::sys::is_culib_present() };
        ensure!(present, "there is no NVIDIA driver here (libcuda.so.1 is not found)");
        driver::init().map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_STUB_LIBRARY => anyhow!(
                "the libcuda.so found is a stub, for linkers only: take the toolkit's folders named `stubs` out of \
                 LD_LIBRARY_PATH"
            ),
            _ => Error::new(error).context("the NVIDIA driver does not start"),
        })?;
        let mut cuda = 0;
        // SAFETY: writes one number.
        unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut cuda) }
            .result()
            .context("the NVIDIA driver's version")?;
        check_version(cuda)?;
        let count = CudaContext::device_count().context("the NVIDIA driver counts no GPUs")?;
        ensure!(count > 0, "the NVIDIA driver finds no GPU");
        if ordinal >= count as usize {
            bail!("there is no GPU {ordinal}: the driver finds {count}, counted from 0");
        }
        let context = CudaContext::new(ordinal).with_context(|| format!("GPU {ordinal} cannot be used"))?;
        let model = context.name().context("the GPU has no name")?;
        let capability = context.compute_capability().context("the GPU has no compute capability")?;
        let shared = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        check_gpu(capability, shared.context("the GPU does not say how much shared memory it has")?)
            .with_context(|| format!("GPU {ordinal} ({model})"))?;
        let cublas = Cublas::find(|name| std::env::var_os(name))?;
        ensure!(context.has_async_alloc(), "the driver offers no memory pools: it is too old");
        let pool = Mutex::new(Pool::new(&context, None)?);
        let stream = context.new_stream().context("no stream")?;
        let copies = context.new_stream().context("no second stream")?;
        let blas = Blas::new(cublas, &context, &stream)?;
        let libraries = BTreeMap::from([("cuBLAS", blas.version().to_string()), ("NVIDIA driver", driver_name(cuda))]);
        let staging = Staging::new(OnStream(stream.clone()), SLOT);
        let name = format!("cuda:{ordinal} ({model})");
        Ok(Self { blas: Mutex::new(blas), context, stream, copies, staging, pool, name, libraries })
    }

    /// Makes the GPU the calling thread's.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().context("the GPU's context is lost")
    }

    /// Memory that is there for work enqueued on `stream` from now on.
    fn allocate_on(&self, stream: &CudaStream, bytes: usize) -> Result<Address> {
        self.bind()?;
        let pool = self.pool();
        let address = match pool.allocate(bytes, stream) {
            // Freed blocks of other sizes may be in its way: those are given up, and made anew.
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                self.finish()?;
                pool.trim()?;
                pool.allocate(bytes, stream)
            }
            other => other,
        };
        let address = address.with_context(|| match (self.context.mem_get_info(), pool.held()) {
            (Ok((free, total)), Ok((held, used))) => format!(
                "{bytes} bytes do not fit on the GPU: {free} of {total} bytes are free, beside {held} that this process \
                 holds, {used} of them in use"
            ),
            _ => format!("{bytes} bytes do not fit on the GPU"),
        })?;
        Ok(address as Address)
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the work and for the copies beside it.
    fn finish(&self) -> Result<()> {
        self.synchronize()?;
        self.copies.synchronize().context("the GPU failed in copies that were enqueued before")
    }
}

/// 13000 is CUDA 13.0.
fn cuda_version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

fn check_version(cuda: i32) -> Result<()> {
    ensure!(
        cuda >= OLDEST_CUDA,
        "the NVIDIA driver supports CUDA {}; the kernels need {}, so driver 580 or newer",
        cuda_version(cuda),
        cuda_version(OLDEST_CUDA)
    );
    Ok(())
}

fn check_gpu(capability: (i32, i32), shared: i32) -> Result<()> {
    ensure!(
        capability >= OLDEST,
        "compute capability {}.{}; the kernels need {}.{} or more",
        capability.0,
        capability.1,
        OLDEST.0,
        OLDEST.1
    );
    ensure!(
        shared >= LEAST_SHARED,
        "a block may have {shared} bytes of shared memory; the kernels need {LEAST_SHARED}"
    );
    Ok(())
}

/// The driver's own version, where the system tells it, and the CUDA version that it supports.
fn driver_name(cuda: i32) -> String {
    let supports = format!("CUDA {}", cuda_version(cuda));
    match std::fs::read_to_string("/sys/module/nvidia/version") {
        Ok(version) => format!("{} ({supports})", version.trim()),
        Err(_) => supports,
    }
}

/// Page-locked memory of a context that is the calling thread's.
fn page_locked(bytes: usize) -> Result<Address> {
    // SAFETY: no flags: memory that this context copies from and to.
    let address = unsafe { driver::malloc_host(bytes.max(1), 0) };
    let address = address.with_context(|| format!("the system grants no {bytes} bytes of page-locked memory"))?;
    Ok(address as Address)
}

/// Copies on a stream, in order with the work there.
struct OnStream(Arc<CudaStream>);

impl OnStream {
    fn bind(&self) -> Result<()> {
        self.0.context().bind_to_thread().context("the GPU's context is lost")
    }
}

impl Engine for OnStream {
    type Mark = CudaEvent;

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.bind()?;
        page_locked(bytes)
    }

    unsafe fn free(&self, address: Address, _: usize) {
        if self.bind().is_ok() {
            // SAFETY: the caller's promise.
            let _ = unsafe { driver::free_host(address as *mut c_void) };
        }
    }

    unsafe fn upload(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe {
            let from = std::slice::from_raw_parts(from as *const u8, bytes);
            driver::memcpy_htod_async(to as u64, from, self.0.cu_stream())
        }
        .context("copy to the GPU")
    }

    unsafe fn download(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to as *mut u8, bytes);
            driver::memcpy_dtoh_async(to, from as u64, self.0.cu_stream())
        }
        .context("copy from the GPU")
    }

    fn record(&self, mark: &mut Option<CudaEvent>) -> Result<()> {
        match mark {
            Some(event) => event.record(&self.0).context("no event")?,
            None => *mark = Some(self.0.record_event(None).context("no event")?),
        }
        Ok(())
    }

    fn wait(&self, mark: &CudaEvent) -> Result<()> {
        mark.synchronize().context("the GPU failed in work that was enqueued before")
    }

    fn finish(&self) -> Result<()> {
        self.0.synchronize().context("the GPU failed in work that was enqueued before")
    }
}

impl Runtime for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn libraries(&self) -> BTreeMap<&'static str, String> {
        self.libraries.clone()
    }

    fn own_bytes(&self) -> u64 {
        WORKSPACE_BYTES as u64
    }

    fn stream(&self) -> Result<vlmq_stream> {
        self.bind()?;
        Ok(self.stream.cu_stream().cast())
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.allocate_on(&self.stream, bytes)
    }

    unsafe fn free(&self, address: Address, _: usize) {
        // A context that is lost has taken its memory with it.
        if self.bind().is_ok() {
            // SAFETY: the caller's promise; the stream is the one of the allocation, or has waited for it.
            let _ = unsafe { driver::free_async(address as u64, self.stream.cu_stream()) };
        }
    }

    unsafe fn write(&self, to: Address, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.staging.write(to, from) }
    }

    unsafe fn read(&self, from: Address, to: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.staging.read(from, to) }
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { driver::memcpy_dtod_async(to as u64, from as u64, bytes, self.stream.cu_stream()) }
            .context("copy on the GPU")
    }

    unsafe fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { driver::memset_d8_async(to as u64, byte, bytes, self.stream.cu_stream()) }.context("fill on the GPU")
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        let (free, _) = self.context.mem_get_info().context("the GPU does not say how much memory it has")?;
        Ok(Some(free as u64))
    }

    fn limit_pool(&self, bytes: u64) -> Result<()> {
        self.bind()?;
        self.finish()?;
        let mut pool = self.pool();
        // What it holds is there for the next one.
        pool.trim()?;
        let free = self.free_bytes()?.unwrap_or(u64::MAX);
        ensure!(bytes <= free, "a limit of {bytes} bytes of GPU memory, where {free} bytes are free");
        *pool = Pool::new(&self.context, Some(bytes))?;
        Ok(())
    }

    fn pool_peak(&self) -> Result<Option<PoolPeak>> {
        self.bind()?;
        Ok(Some(self.pool().peak()?))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Address> {
        self.bind()?;
        page_locked(bytes)
    }

    unsafe fn free_host(&self, address: Address, _: usize) {
        // Copies from and to it may be under way; a context that is lost has none.
        if self.bind().is_ok() && self.copies.synchronize().is_ok() {
            // SAFETY: the caller's promise.
            let _ = unsafe { driver::free_host(address as *mut c_void) };
        }
    }

    unsafe fn park(&self, address: Address, to: Option<Address>, bytes: usize) -> Result<()> {
        self.bind()?;
        let used = self.stream.record_event(None).context("no event")?;
        self.copies.wait(&used).context("the copies do not wait")?;
        if let Some(to) = to.filter(|_| bytes > 0) {
            // SAFETY: the caller's promise: page-locked memory that only this stream's copies touch.
            let to = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            // SAFETY: as above, and live device memory.
            unsafe { driver::memcpy_dtoh_async(to, address as u64, self.copies.cu_stream()) }
                .context("copy from the GPU")?;
        }
        // SAFETY: the caller's promise; all uses are done when the copies' stream comes to this.
        unsafe { driver::free_async(address as u64, self.copies.cu_stream()) }.context("memory given back")
    }

    fn finish_parking(&self) -> Result<()> {
        self.bind()?;
        self.copies.synchronize().context(LATE)
    }

    unsafe fn fetch(&self, from: Address, bytes: usize) -> Result<(Address, Arrival)> {
        let address = self.allocate_on(&self.copies, bytes)?;
        let start = || -> Result<Arrival> {
            if bytes > 0 {
                // SAFETY: the caller's promise: page-locked memory that only this stream's copies touch.
                let from = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
                // SAFETY: as above, and memory that was just made.
                unsafe { driver::memcpy_htod_async(address as u64, from, self.copies.cu_stream()) }
                    .context("copy to the GPU")?;
            }
            Ok(Arrival::Event(self.copies.record_event(None).context("no event")?))
        };
        let arrival = start().inspect_err(|_| {
            // SAFETY: made above, on this stream, and handed to nobody.
            let _ = unsafe { driver::free_async(address as u64, self.copies.cu_stream()) };
        })?;
        Ok((address, arrival))
    }

    unsafe fn wait(&self, arrival: Arrival) -> Result<()> {
        match arrival {
            Arrival::Event(event) => self.stream.wait(&event).context("the work does not wait for a copy"),
            Arrival::Late { .. } => unreachable!("the driver's copies have events"),
        }
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        self.bind()?;
        let blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        unsafe { blas.product(product) }
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.stream.synchronize().context(LATE)
    }
}

#[cfg(test)]
mod tests {
    use super::{check_gpu, check_version};

    #[test]
    fn what_is_too_old_or_too_small_is_told_with_its_numbers() {
        let of_driver = |cuda| check_version(cuda).map_err(|error| error.to_string());
        assert_eq!((of_driver(13_000), of_driver(13_010)), (Ok(()), Ok(())));
        let expected = "the NVIDIA driver supports CUDA 12.4; the kernels need 13.0, so driver 580 or newer";
        assert_eq!(of_driver(12_040), Err(expected.into()));
        let of_gpu = |capability, shared| check_gpu(capability, shared).map_err(|error| error.to_string());
        assert_eq!((of_gpu((8, 0), 101_376), of_gpu((9, 0), 232_448)), (Ok(()), Ok(())));
        assert_eq!(of_gpu((7, 5), 65_536), Err("compute capability 7.5; the kernels need 8.0 or more".into()));
        let expected = "a block may have 65536 bytes of shared memory; the kernels need 101376";
        assert_eq!(of_gpu((8, 7), 65_536), Err(expected.into()));
    }
}
