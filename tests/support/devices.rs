//! The CUDA device under test, numbers for it, and how its results are compared with the CPU's.

use super::golden::{relative_error, widened};
use super::kernels::{Variant, build};
use super::noise;
use std::sync::OnceLock;
use vlmq::device::cuda::{Cuda, CudaTensor};
use vlmq::device::{Device, ModelOps};
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

const PRECISIONS: [Float; 3] = [Float::F32, Float::Bf16, Float::F16];

/// Whether the tests run on a GPU: the one that `VLMQ_TEST_GPU` names (benches/gpu.sh).
pub fn on_gpu() -> bool {
    std::env::var_os("VLMQ_TEST_GPU").is_some()
}

fn open(precision: Float) -> Cuda {
    match std::env::var("VLMQ_TEST_GPU") {
        Ok(ordinal) => Cuda::open(ordinal.parse().unwrap(), precision).unwrap(),
        Err(_) => Cuda::emulated(&build("vlmq_kernels", "kernels", Variant::Plain), precision).unwrap(),
    }
}

/// The GPU of all tests of a program. It stays open to the end, and with it the driver's context: to make one anew for each
/// test takes seconds under a sanitizer, and gives each the modules and handles of another.
fn kept() -> &'static Cuda {
    static KEPT: OnceLock<Cuda> = OnceLock::new();
    KEPT.get_or_init(|| open(Float::F32))
}

/// A device under test, which shares memory and stream with others on a GPU.
pub fn device(precision: Float) -> Cuda {
    if on_gpu() { kept().with_precision(precision) } else { open(precision) }
}

/// A device with memory and a limit of its own.
pub fn own_device(precision: Float) -> Cuda {
    if on_gpu() {
        kept();
    }
    open(precision)
}

/// Noise of moderate size, exact in every precision.
pub fn numbers(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut x = noise(rows, cols, seed);
    // Eight leading bits, none too small for f16.
    x.data_mut().iter_mut().for_each(|v| *v = f32::from_bits((*v / 4.0).to_bits() & 0xffff_0000));
    x.data_mut().iter_mut().filter(|v| v.abs() < 1e-3).for_each(|v| *v = 0.0);
    x
}

/// Whole numbers, exact in every precision.
pub fn whole(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut x = noise(rows, cols, seed);
    x.data_mut().iter_mut().for_each(|v| *v = v.round().clamp(-8.0, 8.0));
    x
}

/// Largest difference, by the largest value.
pub fn difference(found: &Matrix, expected: &Matrix) -> f64 {
    assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()));
    let pairs = || found.data().iter().zip(expected.data()).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let largest = pairs().map(|(_, b)| b.abs()).fold(0.0, f64::max);
    let worst = pairs().map(|(a, b)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max);
    if worst == 0.0 { 0.0 } else { worst / largest }
}

/// `‖found − expected‖ / ‖expected‖`.
pub fn norm_error(found: &Matrix, expected: &Matrix) -> f64 {
    assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()));
    relative_error(found.data(), &widened(expected.data()))
}

/// One rounding to the precision, and sums in another order.
pub fn tolerance(precision: Float) -> f64 {
    match precision {
        Float::F32 => 2e-6,
        Float::Bf16 => 1.0 / 256.0,
        Float::F16 => 1.0 / 2048.0,
    }
}

/// A device with its precision, and what to do with results.
pub struct Case {
    pub cuda: Cuda,
    pub precision: Float,
}

impl Case {
    /// Every precision of the model.
    pub fn all() -> impl Iterator<Item = Case> {
        PRECISIONS.into_iter().map(|precision| Case { cuda: device(precision), precision })
    }

    /// A tensor in the model's precision.
    pub fn up(&self, x: &Matrix) -> CudaTensor {
        self.cuda.upload_model(x.clone()).unwrap()
    }

    /// What a tensor holds.
    pub fn down(&self, x: &CudaTensor) -> Matrix {
        self.cuda.download(x).unwrap()
    }

    /// Each value is off by one rounding.
    pub fn check(&self, what: &str, found: &CudaTensor, expected: &Matrix) {
        let off = difference(&self.down(found), expected);
        assert!(off <= tolerance(self.precision), "{what} in {:?} is {off:e} off", self.precision);
    }

    /// The whole is off by less than `limit` in the norm.
    pub fn check_norm(&self, what: &str, found: &CudaTensor, expected: &Matrix, limit: f64) {
        let off = norm_error(&self.down(found), expected);
        assert!(off <= limit, "{what} in {:?} is {off:e} off", self.precision);
    }
}
