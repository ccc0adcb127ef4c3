//! The device itself: what it stands for, its tensors, and its books.

use super::ledger::{Label, Ledger};
use super::tensor::CountedTensor;
use crate::device::checks;
use crate::device::work::ByKind;
use crate::device::{Device, ModelOps, Work};
use crate::tensor::{Float, Matrix};
use anyhow::{Result, ensure};
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// Bytes that some work takes for itself.
type Workspace = dyn Fn(Work) -> u64 + Send + Sync;

/// Bytes of statistics of so many features.
type Triangle = dyn Fn(usize) -> u64 + Send + Sync;

/// A device that computes nothing, and knows what the one that it stands for would hold and do. A clone has the same books.
#[derive(Clone)]
pub struct Counting {
    pub(super) ledger: Arc<Ledger>,
    name: String,
    pub(super) element: Float,
    /// Whether the device's memory is the host's.
    pub(super) host: bool,
    /// Whether results are as long as a real device's, so that a whole run goes through.
    pub(super) running: bool,
    /// Type of the weights in their files; `None` where what they take on their way is not counted.
    stored: Option<Float>,
    limit: Option<u64>,
    workspace: Arc<Workspace>,
    triangle: Arc<Triangle>,
}

impl fmt::Debug for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {:?}, {} bytes alive", self.name, self.element, self.alive())
    }
}

impl Counting {
    /// In the place of `device`, with new books.
    pub fn of<D: ModelOps>(device: &D) -> Self {
        let (spaces, triangles) = (device.clone(), device.clone());
        Self {
            ledger: Arc::default(),
            name: format!("counting for {}", device.name()),
            element: device.element_type(),
            host: device.peak_bytes().is_none(),
            running: false,
            stored: None,
            limit: device.memory_limit(),
            workspace: Arc::new(move |work| spaces.workspace(work)),
            triangle: Arc::new(move |features| triangles.triangle_bytes(features)),
        }
    }

    /// In the place of a device with memory of its own, weights and activations of type `element`, and no work space.
    pub fn plain(element: Float) -> Self {
        Self {
            ledger: Arc::default(),
            name: "counting".into(),
            element,
            host: false,
            running: false,
            stored: None,
            limit: None,
            workspace: Arc::new(|_| 0),
            triangle: Arc::new(|features| 4 * (features as u64).pow(2)),
        }
    }

    /// This device with new books.
    pub fn afresh(&self) -> Self {
        Self { ledger: Arc::default(), ..self.clone() }
    }

    /// This device with a limit of its memory.
    pub fn limited(self, bytes: u64) -> Self {
        Self { limit: Some(bytes), ..self }
    }

    /// This device, reading weights that lie in their files as `stored`: what they take on the host on their way is counted as well.
    pub fn reading(self, stored: Float) -> Self {
        Self { stored: Some(stored), ..self }
    }

    /// Whether the device's memory is the host's.
    pub fn is_host(&self) -> bool {
        self.host
    }

    /// Bytes of so many weights or activations.
    pub fn model_bytes(&self, values: u64) -> u64 {
        values * self.element.bytes() as u64
    }

    /// Bytes that the host has of weights on their way to the device: `mapped` of their file and, where a device with memory of its own
    /// has another type, float32 and that.
    pub fn loading_bytes(&self, values: u64, mapped: u64) -> u64 {
        if self.host || mapped == self.model_bytes(values) {
            return mapped;
        }
        let converted = if self.element == Float::F32 { 0 } else { self.element.bytes() };
        mapped + values * (size_of::<f32>() + converted) as u64
    }

    /// A counting device for a whole run: weights are read as they would be, and every result is as long as a real device's, so that what the
    /// host does beside its device is all done. All numbers are made up.
    pub fn running(self) -> Self {
        Self { running: true, ..self }
    }

    /// This device, with new books, whose work takes the time that it has at `rates`, work a second, one after the other: what comes back to
    /// the host is waited for.
    pub fn paced(self, rates: ByKind) -> Self {
        let paced = self.afresh();
        paced.ledger.set_pace(rates);
        paced
    }

    /// A tensor of a type.
    pub(super) fn tensor(&self, rows: usize, cols: usize, float: Float) -> Result<CountedTensor> {
        CountedTensor::new(&self.ledger, rows, cols, float)
    }

    /// A tensor of the shape and type of another.
    pub(super) fn like(&self, x: &CountedTensor) -> Result<CountedTensor> {
        self.tensor(x.rows, x.cols, x.float)
    }

    /// Errors where one of these tensors may not be used.
    pub(super) fn check<'a>(&self, tensors: impl IntoIterator<Item = &'a CountedTensor>) -> Result<()> {
        tensors.into_iter().try_for_each(|tensor| tensor.check(&self.ledger))
    }

    /// Runs what the host does beside its device in a whole run; without one it is left out.
    pub(super) fn meanwhile<T>(&self, on_the_host: impl FnOnce() -> Result<T>) -> Result<()> {
        if self.running { on_the_host().map(drop) } else { Ok(()) }
    }

    /// Bytes that an operation, whose results are there, takes for itself: of `work`, and tables of `bytes`.
    pub(super) fn takes(&self, work: Option<Work>, bytes: usize) {
        self.ledger.pass(bytes as u64 + work.map_or(0, |work| (self.workspace)(work)));
    }

    /// Notes what the host has of values that go between it and a device with memory of its own, which has them as `float`: float32, and
    /// where that is another type, those as well.
    pub(super) fn passes_host(&self, (rows, cols): (usize, usize), float: Float) {
        if !self.host {
            let value = size_of::<f32>() + if float == Float::F32 { 0 } else { float.bytes() };
            self.ledger.pass_on_host(rows as u64 * cols as u64 * value as u64);
        }
    }

    /// Notes what the host has of stored values on their way to the device.
    pub(super) fn comes_from_file(&self, (rows, cols): (usize, usize)) {
        if let Some(stored) = self.stored {
            let values = rows as u64 * cols as u64;
            self.ledger.pass_on_host(self.loading_bytes(values, values * stored.bytes() as u64));
        }
    }

    /// Values that are computed one by one.
    pub(super) fn values(&self, values: f64) {
        self.ledger.work(ByKind { values, ..ByKind::default() });
    }
}

impl Device for Counting {
    type Tensor = CountedTensor;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CountedTensor> {
        let made = self.tensor(rows, cols, Float::F32)?;
        self.values(made.count());
        Ok(made)
    }

    fn zero_triangle(&self, features: usize) -> Result<CountedTensor> {
        ensure!(features.checked_mul(features).is_some(), "statistics of {features} features");
        self.values((features as f64).powi(2));
        let (shape, bytes) = ((features, features), self.triangle_bytes(features));
        Ok(CountedTensor::holding(&self.ledger, shape, Float::F32, bytes))
    }

    fn clear(&self, tensor: &mut CountedTensor) -> Result<()> {
        self.check([&*tensor])?;
        self.values(tensor.count());
        Ok(())
    }

    fn upload(&self, matrix: Matrix) -> Result<CountedTensor> {
        self.passes_host((matrix.rows(), matrix.cols()), Float::F32);
        self.tensor(matrix.rows(), matrix.cols(), Float::F32)
    }

    fn upload_with(
        &self,
        (rows, cols): (usize, usize),
        make: impl FnOnce() -> Result<Matrix>,
    ) -> Result<CountedTensor> {
        self.meanwhile(make)?;
        self.passes_host((rows, cols), Float::F32);
        self.tensor(rows, cols, Float::F32)
    }

    fn download(&self, tensor: &CountedTensor) -> Result<Matrix> {
        self.check([tensor])?;
        self.values(tensor.count());
        self.passes_host((tensor.rows, tensor.cols), tensor.float);
        self.ledger.wait("numbers");
        // Zeros take no memory until they are looked at.
        Ok(Matrix::zeros(tensor.rows, tensor.cols))
    }

    fn bytes<'a>(&self, tensor: &'a CountedTensor) -> Result<Cow<'a, [u8]>> {
        tensor.check_owner(&self.ledger)?;
        self.values(tensor.count());
        self.ledger.wait("a copy of numbers");
        // Zeros take no memory until they are looked at.
        Ok(Cow::Owned(vec![0; tensor.rows * tensor.cols * tensor.float.bytes()]))
    }

    fn first_non_finite_row(&self, tensor: &CountedTensor) -> Result<Option<usize>> {
        self.check([tensor])?;
        self.takes(None, size_of::<i32>());
        self.values(tensor.count());
        self.ledger.wait("whether numbers are finite");
        Ok(None)
    }

    fn scaled_squares_rows(&self, tensor: &CountedTensor, scales: &[f32]) -> Result<Vec<f32>> {
        self.check([tensor])?;
        checks::scaled(tensor, scales)?;
        self.takes(None, (tensor.rows + tensor.cols) * size_of::<f32>());
        self.values(tensor.count());
        self.ledger.wait("sizes of rows");
        Ok(vec![1.0; tensor.rows])
    }

    fn park(&self, tensor: &mut CountedTensor) -> Result<()> {
        if !self.host {
            tensor.park();
        }
        Ok(())
    }

    fn fetch(&self, tensor: &mut CountedTensor) -> Result<()> {
        tensor.fetch();
        Ok(())
    }

    fn works_beside_host(&self) -> bool {
        !self.host
    }

    fn memory_limit(&self) -> Option<u64> {
        self.limit
    }

    fn peak_bytes(&self) -> Option<u64> {
        (!self.host).then(|| self.ledger.peak().bytes)
    }

    fn reset_peak(&self) {
        self.ledger.reset_peak();
    }

    fn workspace(&self, work: Work) -> u64 {
        (self.workspace)(work)
    }

    fn triangle_bytes(&self, features: usize) -> u64 {
        (self.triangle)(features)
    }

    fn label(&self, what: &'static str) -> Label {
        Label::new(&self.ledger, what)
    }

    fn shape(&self, tensor: &CountedTensor) -> (usize, usize) {
        (tensor.rows, tensor.cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::counting::{Holding, StandsFor};
    use crate::device::cpu::Cpu;
    use crate::device::{
        Activation, AttentionOperands, AttentionShape, BlockShape, Factored, Grid, GridRule, LayerInputs,
        PermuteSymmetric, ProductRange, SolveOps, Span,
    };

    fn matrix(rows: usize, cols: usize) -> Matrix {
        Matrix::zeros(rows, cols)
    }

    #[test]
    fn bytes_are_alive_until_tensors_are_dropped() {
        let device = Counting::plain(Float::Bf16);
        let x = device.upload_model(matrix(3, 4)).unwrap();
        let label = device.label("weights");
        let weight = device.upload_model(matrix(5, 4)).unwrap();
        drop(label);
        assert_eq!(device.alive(), 24 + 40);
        device.step("a product");
        let y = device.linear(&x, &weight, None).unwrap();
        assert_eq!((device.shape(&y), device.alive()), ((3, 5), 24 + 40 + 30));
        let statistics = device.zeros(4, 4).unwrap();
        drop((x, y));
        assert_eq!(device.alive(), 40 + 64);
        let peak = device.peak();
        assert_eq!((peak.bytes, peak.bytes_of("weights"), peak.step.as_str()), (158, 40, "a product"));
        let held = [Holding { label: "other", bytes: 118 }, Holding { label: "weights", bytes: 40 }];
        assert_eq!(peak.held, held);
        device.reset_peak();
        assert_eq!((device.peak().bytes, device.peak_bytes()), (104, Some(104)));
        drop((weight, statistics));
        assert_eq!((device.alive(), device.peak().bytes), (0, 104));
        assert_eq!(device.work().products, 2.0 * 3.0 * 4.0 * 5.0);
    }

    #[test]
    fn one_tensor_stands_for_several() {
        let device = Counting::plain(Float::Bf16);
        device.stands_for("cache", StandsFor { bytes: 3.0, work: 2.0 });
        let label = device.label("cache");
        let mut cache = device.upload_model(matrix(4, 5)).unwrap();
        drop(label);
        let more = device.upload_model(matrix(1, 5)).unwrap();
        assert_eq!(device.alive(), 3 * 40 + 10);
        // Twice as much as is needed, beside which one of the three is there as it was.
        let label = device.label("growing");
        device.append_rows(&mut cache, &more).unwrap();
        drop(label);
        assert_eq!(device.alive(), 3 * 100 + 10);
        assert_eq!([&["growing"][..], &["cache", "other"]].map(|during| device.peak_during(during).bytes), [350, 130]);
        assert_eq!(device.peak().bytes_of("cache"), 340);
        let before = device.work().values;
        let label = device.label("cache");
        drop(device.activate(&more, Activation::Silu).unwrap());
        drop((label, cache, more));
        assert_eq!((device.work().values - before, device.alive()), (2.0 * 3.0 * 5.0, 0));
        device.reset_peak();
        assert_eq!(device.peak_during(&["growing"]).bytes, 0);
    }

    #[test]
    fn work_takes_its_space_at_the_peak() {
        let device = Counting::of(&Cpu);
        let heads = AttentionShape { heads: 2, kv_heads: 1, head_dim: 8, causal: true };
        let (q, k) = (device.upload_model(matrix(6, 16)).unwrap(), device.upload_model(matrix(6, 8)).unwrap());
        let spans = [Span::own(0..2), Span::own(2..6)];
        let operands = AttentionOperands { q: &q, k: &k, v: &k, spans: &spans, shape: heads };
        let out = device.attention(&operands).unwrap();
        let space = Cpu.workspace(Work::Attention { tokens: 6, longest: 4, shape: heads });
        assert_eq!(device.alive(), 4 * (6 * 16 + 6 * 8 + 6 * 16));
        assert_eq!(device.peak().bytes, device.alive() + space + size_of_val(&spans) as u64);
        assert_eq!(device.peak().bytes_of("work space"), device.peak().bytes - device.alive());
        // What is not masked: 3 and 10 scores.
        assert_eq!(device.work().attention, 4.0 * 13.0 * 16.0);
        // Memory of the host's is not measured as a device's own.
        assert_eq!(device.peak_bytes(), None);
        drop(out);
    }

    #[test]
    fn parked_tensors_are_in_host_memory() {
        let device = Counting::plain(Float::F16);
        let mut x = device.upload_model(matrix(10, 10)).unwrap();
        device.park(&mut x).unwrap();
        assert_eq!((device.alive(), device.parked_bytes()), (0, 200));
        assert!(device.download(&x).unwrap_err().to_string().contains("parked in host memory"));
        device.fetch(&mut x).unwrap();
        device.park(&mut x).unwrap();
        device.fetch(&mut x).unwrap();
        assert_eq!((device.alive(), device.parked_bytes(), device.shape(&x)), (200, 200, (10, 10)));
        drop(x);
        let mut on_host = Counting::of(&Cpu).upload_model(matrix(2, 2)).unwrap();
        Counting::of(&Cpu).park(&mut on_host).unwrap();
        on_host.append(1, |_, needed| needed).unwrap();
    }

    #[test]
    fn shapes_and_types_are_checked_as_real_devices_do() {
        let device = Counting::plain(Float::Bf16);
        let x = device.upload_model(matrix(3, 4)).unwrap();
        let float = device.upload(matrix(4, 4)).unwrap();
        assert!(device.linear(&x, &x, None).is_ok());
        assert!(device.matmul(&x, &x).is_err());
        assert!(device.linear(&x, &float, None).is_err(), "another type");
        assert!(device.scaled_difference(&x, &float, 1.0).is_err());
        assert!(device.slice_rows(&x, 2..4).is_err());
        assert!(device.gather_rows(&x, &[3]).is_err());
        assert!(device.upload_model(matrix(1, 1)).unwrap().check(&Counting::plain(Float::Bf16).ledger).is_err());
        let mut hessian = device.zero_triangle(4).unwrap();
        assert!(device.accumulate_statistics(&mut hessian, None, &LayerInputs { u: &x, f: None, g: None }).is_ok());
        assert!(
            device.accumulate_statistics(&mut hessian, None, &LayerInputs { u: &x, f: None, g: Some(&[1.0]) }).is_err()
        );
        assert_eq!(device.work().statistics, 2.0 * 0.5 * 3.0 * 16.0);
    }

    #[test]
    fn a_solve_goes_through_with_made_up_numbers() {
        let device = Counting::plain(Float::Bf16).running();
        let rule = GridRule { bits: 3, symmetric: false, grid: Grid::Minmax, scale_type: Float::F16, smallest_zero: 1 };
        let hessian = device.zero_triangle(256).unwrap();
        let order: Vec<u32> = (0..256).collect();
        let how = PermuteSymmetric { order: &order, diagonal: &device.diagonal(&hessian).unwrap() };
        let blocks = [0..128, 128..256];
        let Factored::Done(factor) = device.factor(device.permute_symmetric(&hessian, how).unwrap(), &blocks).unwrap()
        else {
            panic!("it never fails")
        };
        let mut errors = device.zeros(10, 256).unwrap();
        let range = ProductRange { inner: 0..128, columns: 128..256, target: 0 };
        let residual = device.zeros(10, 256).unwrap();
        device.add_product(&mut errors, &residual, &factor.root, &range).unwrap();
        assert_eq!(device.work().products, 2.0 * 10.0 * 128.0 * 128.0);
        assert_eq!(device.work().factors, 256f64.powi(3) / 3.0);
        let shapes = [BlockShape { columns: 128, groups: 1 }; 2];
        let room = device.room_for_codes(10, &shapes).unwrap();
        assert!(device.take_codes(room, &rule).is_err(), "no block has its codes");
    }
}
