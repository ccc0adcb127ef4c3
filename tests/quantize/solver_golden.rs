//! The solver against the textbook column-by-column loop in float64 (tests/golden/make_solver.py).

use safetensors::SafeTensors;
use serde::Deserialize;
use std::collections::BTreeMap;
use vlmq::codes::QuantizedLinear;
use vlmq::device::{LayerInputs, cpu::Cpu};
use vlmq::quantize::SolveReport;
use vlmq::quantize::plain::quantize_layer;
use vlmq::quantize::settings::{CrossTerm, Grid, Order, Solver, SolverSettings};
use vlmq::quantize::solve::{Prepared, prepare, round_to_nearest, solve_layer};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

#[derive(Clone, Debug, Deserialize)]
struct Case {
    solver: Solver,
    cross_term: CrossTerm,
    order: Order,
    grid: Grid,
    bits: u32,
    group: Option<usize>,
    symmetric: bool,
    scale_type: Float,
    smallest_zero: u8,
    wide: bool,
    error: f64,
}

impl Case {
    fn settings(&self) -> SolverSettings {
        SolverSettings {
            solver: self.solver,
            bits: self.bits,
            group_size: self.group,
            symmetric: self.symmetric,
            grid: self.grid,
            order: self.order,
            damp: 0.01,
            alpha: 0.25,
            cross_term: self.cross_term,
            scale_type: self.scale_type,
            smallest_zero: self.smallest_zero,
        }
    }
}

impl Case {
    /// The value of each setting, by name.
    fn values(&self) -> [String; 8] {
        [
            format!("solver {:?}", self.solver),
            format!("cross term {:?}", self.cross_term),
            format!("order {:?}", self.order),
            format!("grid {:?}", self.grid),
            format!("bits {}", self.bits),
            format!("group {:?}", self.group),
            format!("symmetric {}", self.symmetric),
            format!("scale type {:?}", self.scale_type),
        ]
    }
}

struct Golden {
    cases: Vec<Case>,
    bytes: Vec<u8>,
}

impl Golden {
    fn read() -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/solver");
        let cases = std::fs::read_to_string(format!("{folder}/cases.json")).unwrap();
        let bytes = std::fs::read(format!("{folder}/solver.safetensors")).unwrap();
        Self { cases: serde_json::from_str(&cases).unwrap(), bytes }
    }

    fn raw(&self, name: &str) -> (Vec<usize>, &[u8]) {
        let view = SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap();
        (view.shape().to_vec(), view.data())
    }

    fn f16(&self, name: &str) -> Matrix {
        let (shape, data) = self.raw(name);
        let values = data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        Matrix::new(shape[0], shape[1], values).unwrap()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.raw(name).1.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.raw(name).1.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn statistics(&self, wide: bool) -> Statistics<Matrix> {
        let (mut u, mut f) = (self.f16("u"), self.f16("f"));
        if wide {
            (u, f) = (rolled(&u), rolled(&f));
        }
        let mut statistics = Statistics::new(&Cpu, u.cols(), true).unwrap();
        statistics.accumulate(&Cpu, &u, Some(&f), Some(&self.f32("g"))).unwrap();
        statistics
    }
}

/// Three copies side by side, copy c rolled down by 7c rows.
fn rolled(x: &Matrix) -> Matrix {
    let rows = x.rows();
    let data = (0..rows).flat_map(|t| (0..3).flat_map(move |c| x.row((t + rows - 7 * c) % rows).to_vec())).collect();
    Matrix::new(rows, 3 * x.cols(), data).unwrap()
}

fn run(case: &Case, statistics: &Statistics<Matrix>, weight: &Matrix) -> (QuantizedLinear, SolveReport) {
    let settings = case.settings();
    if case.solver == Solver::Rtn {
        return round_to_nearest(weight, &settings).unwrap();
    }
    let prepared: Prepared<Matrix> = prepare(&Cpu, statistics, &settings).unwrap();
    solve_layer(&Cpu, &prepared, &statistics.hessian, weight, &settings).unwrap()
}

/// Codes, counted for one value of one setting.
#[derive(Default)]
struct Count {
    equal: usize,
    total: usize,
}

/// At least 99.9 % of the codes equal for every value of every setting. In a single case a weight that lies on a tie in
/// float32 takes the rest of its row with it (rounding H alone to float32 does that to some rows in the float64 loop),
/// so a case may differ in two rows; everything else in it must be equal.
#[test]
fn codes_scales_and_errors_equal_the_column_loop() {
    let golden = Golden::read();
    let statistics = [golden.statistics(false), golden.statistics(true)];
    let weights = [golden.f16("w"), golden.f16("w_wide")];
    let (scales, zeros, stream) = (golden.f32("scales"), golden.raw("zeros").1, golden.raw("codes").1);
    let (mut place, mut group_place, mut bad, mut exact) = (0, 0, Vec::new(), 0);
    let mut counts: BTreeMap<String, Count> = BTreeMap::new();
    for (index, case) in golden.cases.iter().enumerate() {
        let wide = usize::from(case.wide);
        let (linear, report) = run(case, &statistics[wide], &weights[wide]);
        let (columns, groups, bits) = (linear.in_features, linear.groups(), case.bits as usize);
        let expected: Vec<u8> = (0..linear.codes.len()).map(|i| code_at(&stream[place..], i * bits, bits)).collect();
        place += (expected.len() * bits).div_ceil(8);
        let mut rows_off = 0;
        for row in 0..linear.out_features {
            let at = row * columns..(row + 1) * columns;
            let params = row * groups..(row + 1) * groups;
            let theirs = group_place + params.start..group_place + params.end;
            let same = linear.codes[at.clone()] == expected[at]
                && linear.scales[params.clone()] == scales[theirs.clone()]
                && linear.zeros[params] == zeros[theirs];
            rows_off += usize::from(!same);
        }
        group_place += linear.scales.len();
        let equal = linear.codes.iter().zip(&expected).filter(|(a, b)| a == b).count();
        for value in case.values() {
            let count = counts.entry(value).or_default();
            count.equal += equal;
            count.total += expected.len();
        }
        exact += usize::from(rows_off == 0);
        let error = (report.relative_error / case.error - 1.0).abs();
        if rows_off > 2 || error > if rows_off == 0 { 1e-3 } else { 3e-2 } {
            bad.push(format!("case {index}: {rows_off} rows differ, error off by {error:e}: {case:?}"));
        }
        // Even of one group: a file whose layers are in act order has an index in each.
        let indexed = case.solver != Solver::Rtn && case.order == Order::Act && case.group.is_some();
        assert_eq!(linear.group_index.is_some(), indexed, "{case:?}");
    }
    assert_eq!((place, group_place), (stream.len(), scales.len()));
    println!("{exact} of {} cases equal in every code, scale and zero", golden.cases.len());
    for (value, Count { equal, total }) in &counts {
        println!("{value}: {equal} of {total} codes");
        if (*equal as f64) < 0.999 * *total as f64 {
            bad.push(format!("{value}: only {equal} of {total} codes are equal"));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

fn code_at(stream: &[u8], bit: usize, bits: usize) -> u8 {
    (0..bits).map(|i| (stream[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i).sum()
}

#[test]
fn statistics_equal_float64() {
    let golden = Golden::read();
    let statistics = golden.statistics(false);
    let (h, c) = (statistics.full_hessian(&Cpu).unwrap(), statistics.cross.unwrap());
    for (name, ours) in [("h_rows", h), ("c_rows", c)] {
        let expected = golden.f64(name);
        let (mut off, mut norm, mut largest) = (0.0, 0.0, 0.0f64);
        for (row, expected) in (0..256).step_by(17).zip(expected.chunks(256)) {
            for (&value, &exact) in ours.row(row).iter().zip(expected) {
                off += (f64::from(value) - exact).powi(2);
                norm += exact * exact;
                largest = largest.max((f64::from(value) - exact).abs());
            }
        }
        let relative = (off / norm).sqrt();
        println!("{name}: {relative:e} relative, {largest:e} at most");
        assert!(relative < 1e-6, "{name}: {relative:e}");
    }
    assert_eq!(statistics.tokens, 316, "tokens of importance 0 do not count");
}

#[test]
fn the_library_call_is_the_same_solve() {
    let golden = Golden::read();
    let (u, f, w, g) = (golden.f16("u"), golden.f16("f"), golden.f16("w"), golden.f32("g"));
    let case = golden.cases.iter().find(|case| case.solver == Solver::Gptaq && case.order == Order::ActGroup).unwrap();
    let (linear, report) = run(case, &golden.statistics(false), &w);
    let layer = quantize_layer(&Cpu, &w, &LayerInputs { u: &u, f: Some(&f), g: Some(&g) }, &case.settings()).unwrap();
    assert_eq!(layer.linear, linear);
    assert_eq!(layer.report.relative_error, report.relative_error);
    assert_eq!((layer.report.dead_inputs, layer.report.tokens), (1, 316));
    let mut sorted = layer.order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..256).collect::<Vec<u32>>());
}
