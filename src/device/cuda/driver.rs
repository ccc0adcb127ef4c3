//! A GPU through NVIDIA's driver, and cuBLAS for the plain products. Both libraries are opened at run time.
#![allow(unsafe_code)]

use super::bindings::vlmq_stream;
use super::pool::Pool;
use super::runtime::{Address, Arrival, Product, Runtime};
use super::staging::{Engine, Staging};
use super::tensor::Precision;
use crate::device::PoolPeak;
use anyhow::{Context, Result, bail, ensure};
use cudarc::cublas::result as cublas;
use cudarc::cublas::sys::{
    self as blas, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasMath_t, cublasOperation_t,
    cudaDataType_t,
};
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result as driver};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Oldest GPU that the kernels run on.
const OLDEST: (i32, i32) = (8, 0);

/// Bytes of a slot of page-locked memory that copies go through: long enough that a device's start of each does not count.
const SLOT: usize = 16 << 20;

/// One GPU, one stream for its work and one for copies beside it.
pub(super) struct Driver {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Parks and fetches, in their order: what is fetched takes the place of what was parked before it, so that no more than
    /// one piece is on its way in while another is worked on.
    copies: Arc<CudaStream>,
    /// What copies between ordinary host memory and the device, on the stream of the work, go through.
    staging: Staging<OnStream>,
    /// What is allocated comes from here.
    pool: Mutex<Pool>,
    /// A handle serves one thread at a time.
    blas: Mutex<Blas>,
    name: String,
}

struct Blas(cublasHandle_t);

// SAFETY: a handle may move between threads; the mutex around it lets one use it at a time.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is live and dropped once. An error at the end has nobody to hear it.
        let _ = unsafe { cublas::destroy_handle(self.0) };
    }
}

impl Driver {
    /// Takes GPU `ordinal`. Errors, saying what is missing, without driver, GPU or cuBLAS, and on a GPU that is too old.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: opens and closes the driver's library, whose initializers are meant to run in any program.
        let present = unsafe { cudarc::driver::sys::is_culib_present() };
        ensure!(present, "there is no NVIDIA driver here (libcuda.so.1 is not found)");
        driver::init().context("the NVIDIA driver does not start")?;
        let count = CudaContext::device_count().context("the NVIDIA driver counts no GPUs")?;
        ensure!(count > 0, "the NVIDIA driver finds no GPU");
        if ordinal >= count as usize {
            bail!("there is no GPU {ordinal}: the driver finds {count}, counted from 0");
        }
        let context = CudaContext::new(ordinal).with_context(|| format!("GPU {ordinal} cannot be used"))?;
        let model = context.name().context("the GPU has no name")?;
        let capability = context.compute_capability().context("the GPU has no compute capability")?;
        ensure!(
            capability >= OLDEST,
            "GPU {ordinal} ({model}) has compute capability {}.{}; the kernels need {}.{} or more",
            capability.0,
            capability.1,
            OLDEST.0,
            OLDEST.1
        );
        // SAFETY: as above, for cuBLAS.
        let present = unsafe { blas::is_culib_present() };
        ensure!(
            present,
            "cuBLAS is not found (libcublas.so.13): install the CUDA 13 libraries, or name their folder in LD_LIBRARY_PATH"
        );
        ensure!(context.has_async_alloc(), "the driver offers no memory pools: it is too old");
        let pool = Mutex::new(Pool::new(&context, None)?);
        let stream = context.new_stream().context("no stream")?;
        let copies = context.new_stream().context("no second stream")?;
        let blas = Blas(cublas::create_handle().context("cuBLAS does not start")?);
        // SAFETY: handle and stream are live, and the driver's stream type is the runtime's under another name.
        unsafe {
            cublas::set_stream(blas.0, stream.cu_stream().cast()).context("cuBLAS")?;
            // Sums of split products stay in float32.
            let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            blas::cublasSetMathMode(blas.0, mode).result().context("cuBLAS")?;
        }
        let staging = Staging::new(OnStream(stream.clone()), SLOT);
        let name = format!("cuda:{ordinal} ({model})");
        Ok(Self { context, stream, copies, staging, pool, blas: Mutex::new(blas), name })
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
        let int = |size: usize| c_int::try_from(size).context("a matrix of more than 2^31 rows or columns");
        let (rows, cols, inner) = (int(product.rows)?, int(product.cols)?, int(product.inner)?);
        let kind = match product.precision {
            Precision::F32 => cudaDataType_t::CUDA_R_32F,
            Precision::Bf16 => cudaDataType_t::CUDA_R_16BF,
            Precision::F16 => cudaDataType_t::CUDA_R_16F,
        };
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        // cuBLAS counts column by column, where a row-major matrix is its transpose: cᵀ = op(b)ᵀ·aᵀ.
        let (operation, b_stride) = match product.transposed {
            true => (cublasOperation_t::CUBLAS_OP_T, inner),
            false => (cublasOperation_t::CUBLAS_OP_N, cols),
        };
        let handle = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise; alpha and beta are host memory that is read before the call returns.
        unsafe {
            cublas::gemm_ex(
                handle.0,
                operation,
                cublasOperation_t::CUBLAS_OP_N,
                cols,
                rows,
                inner,
                (&raw const alpha).cast(),
                product.b as *const c_void,
                kind,
                b_stride,
                product.a as *const c_void,
                kind,
                inner,
                (&raw const beta).cast(),
                product.c as *mut c_void,
                kind,
                cols,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .with_context(|| format!("cuBLAS: product of {rows}x{inner} by {inner}x{cols}"))
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.stream.synchronize().context("the GPU failed in work that was enqueued before")
    }
}
