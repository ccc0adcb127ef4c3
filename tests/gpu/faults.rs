//! Failures on the GPU name themselves: the call, what was refused and why. The emulator is told what to fail.

use crate::support::devices::{device, numbers};
use crate::support::kernels::{call, kernels};
use crate::support::message;
use std::ffi::{CStr, CString, c_char};
use vlmq::device::cuda::Cuda;
use vlmq::device::cuda::bindings::{vlmq_add_args, vlmq_dtype, vlmq_status};
use vlmq::device::{Device, ModelOps};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// What the calling thread's next operations fail with; "": nothing.
#[allow(unsafe_code)]
fn fail(what: &str) {
    // SAFETY: kernels/emulator/runtime.cpp defines it with this signature.
    let set = unsafe { kernels().get::<unsafe extern "C" fn(*const c_char)>("vlmq_emulator_fail") }.unwrap();
    // SAFETY: it copies the text.
    unsafe { set(CString::new(what).unwrap().as_ptr()) };
}

#[allow(unsafe_code)]
fn last_error() -> String {
    // SAFETY: vlmq.h declares it so.
    let last = unsafe { kernels().get::<unsafe extern "C" fn() -> *const c_char>("vlmq_last_error") }.unwrap();
    // SAFETY: the text is terminated, and this thread makes no call before it is copied.
    unsafe { CStr::from_ptr(last()) }.to_str().unwrap().to_owned()
}

/// A device, and a matrix on it.
fn with_matrix() -> (Cuda, vlmq::device::cuda::CudaTensor) {
    let cuda = device(Float::Bf16);
    let x = cuda.upload_model(numbers(3, 5, 1)).unwrap();
    (cuda, x)
}

#[test]
fn the_last_failure_of_each_thread_is_kept() {
    let (a, b, mut out) = ([1.0f32, 2.0], [3.0f32, 4.0], [0.0f32; 2]);
    let mut args = vlmq_add_args {
        a: a.as_ptr().cast(),
        b: b.as_ptr().cast(),
        out: out.as_mut_ptr().cast(),
        rows: 1,
        b_rows: 1,
        cols: -2,
        sign: 1.0,
        factor: 1.0,
        dtype: vlmq_dtype::VLMQ_F32,
        float_a: 0,
    };
    assert_eq!(last_error(), "");
    assert_eq!(call("vlmq_add", &args), vlmq_status::VLMQ_BAD_ARGUMENT);
    let expected = "vlmq_add: an argument is outside what vlmq.h documents of vlmq_add_args";
    assert_eq!(last_error(), expected);
    std::thread::scope(|scope| scope.spawn(|| assert_eq!(last_error(), "")).join().unwrap());
    // One that succeeds does not touch it.
    args.cols = 2;
    assert_eq!(call("vlmq_add", &args), vlmq_status::VLMQ_OK);
    assert_eq!((last_error().as_str(), out), (expected, [4.0, 6.0]));
    // The next failure does.
    fail("vlmq_add:cudaErrorMemoryAllocation");
    assert_eq!(call("vlmq_add", &args), vlmq_status::VLMQ_CUDA_ERROR);
    assert!(last_error().ends_with("bytes of shared memory): cudaErrorMemoryAllocation: out of memory"));
    fail("vlmq_add:cudaErrorNoKernelImageForDevice");
    assert_eq!(call("vlmq_add", &args), vlmq_status::VLMQ_NO_KERNEL_IMAGE);
}

#[test]
fn a_launch_that_is_refused_names_call_kernel_and_cause() {
    let (cuda, x) = with_matrix();
    fail("vlmq_convert:cudaErrorInvalidValue");
    let error = message(cuda.convert(&x, Float::F32));
    assert!(error.starts_with("vlmq_convert: cudaLaunchKernel of "), "{error}");
    let cause =
        "(grid 1 x 1 x 1, block 256 x 1 x 1, 0 bytes of shared memory): cudaErrorInvalidValue: invalid argument";
    assert!(error.ends_with(cause), "{error}");
    // It was that launch alone.
    cuda.convert(&x, Float::F32).unwrap();

    // A kernel by its own name, where a call launches it for the second time.
    let n = 200;
    let identity = Matrix::new(n, n, (0..n * n).map(|i| f32::from(i / n == i % n)).collect()).unwrap();
    fail("diagonal_kernel:cudaErrorLaunchOutOfResources:2");
    let error = message(cuda.cholesky_inverse(cuda.upload(identity.clone()).unwrap(), 0.0));
    assert!(
        error.starts_with("vlmq_cholesky_inverse: cudaLaunchKernel of diagonal_kernel (grid 1 x 1 x 1,"),
        "{error}"
    );
    fail("diagonal_kernel:cudaErrorLaunchOutOfResources:3");
    cuda.cholesky_inverse(cuda.upload(identity.clone()).unwrap(), 0.0).unwrap();

    // What is enqueued beside kernels.
    fail("cudaMemsetAsync:cudaErrorInvalidValue");
    let error = message(cuda.cholesky_inverse(cuda.upload(identity).unwrap(), 0.0));
    assert_eq!(error, "vlmq_cholesky_inverse: cudaMemsetAsync: cudaErrorInvalidValue: invalid argument");

    fail("vlmq_convert:cudaErrorNoKernelImageForDevice");
    let error = message(cuda.convert(&x, Float::F32));
    assert!(error.starts_with("vlmq_convert: cudaLaunchKernel of "), "{error}");
    assert!(error.contains("cudaErrorNoKernelImageForDevice: no kernel image is available"), "{error}");
    assert!(error.ends_with(
        "This program holds no kernels for cuda (emulated); build it again with VLMQ_ARCHS naming that GPU"
    ));
}

/// As on a GPU: the call that did it has returned, whatever comes next is told, and nothing works any more.
#[test]
fn an_error_of_a_kernel_that_ran_comes_later_and_says_so() {
    let (cuda, x) = with_matrix();
    fail("vlmq_convert:cudaErrorIllegalAddress");
    cuda.convert(&x, Float::F32).unwrap();
    let cause = "cudaErrorIllegalAddress: an illegal memory access was encountered";
    for _ in 0..2 {
        let error = message(cuda.first_non_finite_row(&x));
        assert!(error.starts_with("vlmq_first_non_finite_row: cudaLaunchKernel of "), "{error}");
        assert!(error.contains(&format!("{cause}; a kernel enqueued before caused it")), "{error}");
        for error in [message(cuda.synchronize()), message(cuda.download(&x))] {
            assert!(error.contains("in work that was enqueued before") && error.contains("VLMQ_SYNC=1"), "{error}");
            assert!(error.ends_with(cause), "{error}");
        }
    }
    fail("");
    assert_eq!(cuda.first_non_finite_row(&x).unwrap(), None);
}

#[cfg(feature = "run")]
mod program {
    use crate::support::data;
    use crate::support::program::{emulated, names_in, stderr, text};
    use std::path::Path;

    /// What a run says that ends at a failure, and leaves no output.
    fn failed(environment: &[(&str, &str)]) -> String {
        let work = tempfile::tempdir().unwrap();
        let out = work.path().join("out");
        let (model, calib) = (text(data("tiny-qwen2-vl-narrow")), text(data("vqa/calib.jsonl")));
        let mut command = emulated(&["quantize", &model, "--calib", &calib, "--out", &text(&out)]);
        command.args(["--samples", "1", "--device", "cuda", "--quiet"]).envs(environment.iter().copied());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{environment:?}: {}", stderr(&output));
        assert!(!Path::new(&out).exists(), "{:?}", names_in(work.path()));
        stderr(&output)
    }

    #[test]
    fn a_run_ends_with_the_call_and_the_cause() {
        let error = failed(&[("VLMQ_EMULATOR_FAIL", "vlmq_factor:cudaErrorLaunchOutOfResources:2")]);
        assert!(error.contains("vlmq_factor: cudaLaunchKernel of diagonal_kernel (grid 1 x 1 x 1, "), "{error}");
        assert!(error.contains("cudaErrorLaunchOutOfResources: too many resources requested for launch"), "{error}");
        assert!(failed(&[("VLMQ_SYNC", "yes")]).contains("VLMQ_SYNC=yes: must be 0 or 1"));
    }

    /// Without it a later call is told.
    #[test]
    fn vlmq_sync_finds_the_call() {
        let fault = ("VLMQ_EMULATOR_FAIL", "vlmq_norm:cudaErrorIllegalAddress");
        let is_named = "vlmq_norm: the GPU failed in work that was enqueued before";
        let cause = "cudaErrorIllegalAddress: an illegal memory access was encountered";
        let error = failed(&[fault, ("VLMQ_SYNC", "1")]);
        assert!(error.contains(is_named) && error.contains(cause), "{error}");
        let error = failed(&[fault]);
        assert!(!error.contains(is_named) && error.contains(cause), "{error}");
    }
}
