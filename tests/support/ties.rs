//! Codes of a layer from two devices, and what float64 makes of them.
//!
//! Devices sum in different orders: a weight that float32 cannot tell from a tie may be rounded up on one and down on the other,
//! and every later code of its row then answers to another error. How many codes differ says little, where a row begins to differ
//! says all. Here the weights before rounding are computed again from the codes before them.

use std::ops::Range;
use vlmq::codes::QuantizedLinear;
use vlmq::device::cpu::Cpu;
use vlmq::device::{BLOCK, CrossFactor, Factored, PermuteSymmetric, SolveOps};
use vlmq::quantize::plain::QuantizedLayer;
use vlmq::quantize::settings::{CrossTerm, Solver, SolverSettings};
use vlmq::quantize::statistics::Statistics;
use vlmq::tensor::Float;
use vlmq::tensor::Matrix;

/// What float32 cannot tell from a tie, in steps of the grid. The factors of two devices are within 1e-5 of each other
/// (`factors_agree`), which the corrections of a weight, some steps, take over; of a weight of 128 steps float32 keeps 1e-5.
const NEAR: f64 = 1e-4;

/// Rows of which more than their number is told.
const TOLD: usize = 12;

/// A layer to quantize, factored, in processing order.
pub struct Layer<'a> {
    weight: &'a Matrix,
    settings: &'a SolverSettings,
    order: &'a [u32],
    group: usize,
    blocks: Vec<Range<usize>>,
    /// Columns of R̄ and M.
    root: Vec<Vec<f64>>,
    carry: Option<Vec<Vec<f64>>>,
    cross: Option<CrossFactor<Matrix>>,
}

/// Column by column, in float64.
fn columns(x: &Matrix) -> Vec<Vec<f64>> {
    (0..x.cols()).map(|j| (0..x.rows()).map(|i| f64::from(x.row(i)[j])).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl<'a> Layer<'a> {
    /// With the order and the damping that the CPU came to.
    pub fn new(
        weight: &'a Matrix,
        [u, f]: [&Matrix; 2],
        g: &[f32],
        settings: &'a SolverSettings,
        by_cpu: &'a QuantizedLayer,
    ) -> Self {
        let (n, order) = (weight.cols(), by_cpu.order.as_slice());
        let with_cross = settings.solver == Solver::Gptaq;
        let mut statistics = Statistics::new(&Cpu, n, with_cross).unwrap();
        statistics.accumulate(&Cpu, u, with_cross.then_some(f), Some(g)).unwrap();
        let diagonal: Vec<f64> = (0..n).map(|i| f64::from(statistics.hessian.row(i)[i])).collect();
        let damp = by_cpu.report.damp.unwrap() * diagonal.iter().sum::<f64>() / n as f64;
        let damped: Vec<f32> = diagonal.iter().map(|h| (h + damp) as f32).collect();
        // The solver's own: whole groups in a block, a wider group in blocks of its own.
        let group = settings.group_columns(n);
        let (part, width) = if group > BLOCK { (group, BLOCK) } else { (n, BLOCK / group * group) };
        let in_part = |first: usize| {
            let end = first + part;
            (first..end).step_by(width).map(move |start| start..(start + width).min(end))
        };
        let blocks: Vec<_> = (0..n).step_by(part).flat_map(in_part).collect();
        let how = PermuteSymmetric { order, diagonal: &damped };
        let permuted = Cpu.permute_symmetric(&statistics.hessian, how).unwrap();
        let Factored::Done(factor) = Cpu.factor(permuted, &blocks).unwrap() else { panic!("not positive definite") };
        let cross = statistics.cross.map(|cross| {
            let cross = Cpu.permute(&cross, order).unwrap();
            Cpu.cross_factor(cross, &factor, &blocks, settings.alpha as f32).unwrap()
        });
        let carry = cross.as_ref().map(|cross| columns(&cross.scaled));
        Self { weight, settings, order, group, blocks, root: columns(&factor.root), carry, cross }
    }

    /// Code, zero and scale of a place.
    fn code(&self, linear: &QuantizedLinear, row: usize, place: usize) -> (f64, f64, f32) {
        let column = self.order[place] as usize;
        let grid = row * linear.groups() + linear.group_of(column);
        let code = linear.codes[row * self.order.len() + column];
        (f64::from(code), f64::from(linear.zeros[grid]), linear.scales[grid])
    }

    /// A row's weights before they are rounded, each with the codes before it as they are in `linear`, in steps of its grid.
    ///
    /// With E = weights before rounding − rounded: E·Ū = (W − Ŵ) + carried·P, so E = (W − Ŵ)·R̄ + carried·M. Where rounded
    /// weights are carried from block to block, those before rounding still are inside of one: E·P_BB is carried beside them.
    fn steps(&self, linear: &QuantizedLinear, row: usize) -> Vec<f64> {
        let quantized = self.settings.cross_term == CrossTerm::Quantized;
        let (mut steps, mut off, mut carried, mut lost) = (vec![], vec![], vec![], vec![]);
        for block in &self.blocks {
            for place in block.clone() {
                let (code, zero, scale) = self.code(linear, row, place);
                let weight = f64::from(self.weight.row(row)[self.order[place] as usize]);
                let rounded = f64::from(scale * (code - zero) as f32);
                let shift = match &self.cross {
                    Some(cross) if quantized => (block.start..place)
                        .map(|k| lost[k] * f64::from(cross.blocks.row(k)[place - block.start]))
                        .sum(),
                    _ => 0.0,
                };
                let mut before = weight + dot(&off, &self.root[place]) + shift;
                if let Some(carry) = &self.carry {
                    before += dot(&carried, &carry[place]);
                }
                steps.push(before / f64::from(scale));
                off.push(weight - rounded + shift);
                carried.push(if quantized { rounded } else { before });
                lost.push(before - rounded);
            }
        }
        steps
    }

    /// How much further than half a step a code is from its weight, at worst: 0 where each is the nearest.
    fn excess(&self, linear: &QuantizedLinear) -> f64 {
        let largest = f64::from(self.settings.largest_code());
        let rows = (0..self.weight.rows()).map(|row| {
            let steps = self.steps(linear, row).into_iter().enumerate();
            let of_place = steps.map(|(place, steps)| {
                let (code, zero, _) = self.code(linear, row, place);
                ((steps + zero).clamp(0.0, largest) - code).abs() - 0.5
            });
            // Not f64::max, which would take 0 for a NaN.
            of_place.fold(0.0, |worst: f64, off| if off <= worst { worst } else { off })
        });
        rows.fold(0.0, |worst: f64, off| if off <= worst { worst } else { off })
    }

    /// Where a row begins to differ, and why; an error where float32 does not explain it.
    fn beginning(
        &self,
        found: &QuantizedLinear,
        expected: &QuantizedLinear,
        row: usize,
    ) -> Option<Result<String, String>> {
        let pair = |place| (self.code(found, row, place), self.code(expected, row, place));
        let all = 0..self.order.len();
        let first = all.clone().find(|&place| pair(place).0 != pair(place).1)?;
        let differ: Vec<usize> = all.filter(|&place| pair(place).0.0 != pair(place).1.0).collect();
        let ((code, zero, scale), (wanted, wanted_zero, wanted_scale)) = pair(first);
        let grids_differ = (zero, scale) != (wanted_zero, wanted_scale);
        let (explained, why) = if grids_differ {
            let step = match self.settings.scale_type {
                Float::Bf16 => 1.0 / 128.0,
                Float::F16 => 1.0 / 1024.0,
                Float::F32 => 0.0,
            };
            let off = (f64::from(scale) / f64::from(wanted_scale) - 1.0).abs();
            let near = off <= step + 1e-5 && (zero - wanted_zero).abs() <= 1.0;
            (near, format!("scale {scale:e} zero {zero}, CPU's {wanted_scale:e} and {wanted_zero}: {off:.1e} apart"))
        } else {
            let steps = self.steps(expected, row)[first] + zero;
            let off = (steps - (code + wanted) / 2.0).abs();
            let near = off <= NEAR && (code - wanted).abs() == 1.0;
            (near, format!("code {code}, CPU's {wanted}, of a weight at {steps:.7}: {off:.1e} from their tie"))
        };
        let text = format!(
            "row {row}, place {first} (column {}, group {}): {why}; {} codes differ, at {:?}{}",
            self.order[first],
            first / self.group,
            differ.len(),
            &differ[..differ.len().min(10)],
            if differ.len() > 10 { "…" } else { "" }
        );
        Some(if explained { Ok(text) } else { Err(text) })
    }

    /// Holds a device's layer against the CPU's: each code is the nearest to its weight, as near as float32 can tell, and no row
    /// begins to differ but at a tie, or by a scale that is rounded to a neighbour. Panics otherwise; says what differs.
    pub fn compare(&self, found: &QuantizedLinear, expected: &QuantizedLinear) {
        let beginnings: Vec<_> =
            (0..self.weight.rows()).filter_map(|row| self.beginning(found, expected, row)).collect();
        let codes = found.codes.len();
        let different = found.codes.iter().zip(&expected.codes).filter(|(a, b)| a != b).count();
        let excess = [found, expected].map(|linear| self.excess(linear));
        println!(
            "{different} of {codes} codes differ, in {} rows; past half a step {:.1e}, CPU {:.1e}; {:?}",
            beginnings.len(),
            excess[0],
            excess[1],
            self.settings
        );
        for beginning in beginnings.iter().take(TOLD) {
            match beginning {
                Ok(text) => println!("  {text}"),
                Err(text) => println!("  NOT A TIE: {text}"),
            }
        }
        let why = format!("with {:?}", self.settings);
        let strange: Vec<_> = beginnings.iter().filter_map(|beginning| beginning.as_ref().err()).collect();
        assert!(strange.is_empty(), "{} rows begin to differ at no tie, {why}: {}", strange.len(), strange[0]);
        assert!(excess.iter().all(|&off| off <= NEAR), "codes are {excess:?} past half a step {why}");
        // As many weights as lie so near a tie.
        let ties = (2.0 * NEAR * codes as f64).ceil() as usize;
        assert!(beginnings.len() <= ties, "{} rows begin to differ, {ties} may {why}", beginnings.len());
    }
}
