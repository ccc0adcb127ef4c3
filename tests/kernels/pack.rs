//! Packing, unpacking and dequantizing kernels of `kernels/pack`, against the library's packer and a formula.

use crate::buffers::{Buffer, DTYPES, Element, F32, U8, U32, noise, rounded};
use crate::calls::{accepted, refused, refused_each};
use crate::support::kernels::{Variant, kernels, pass_under_sanitizers, set_seed};
use crate::support::uniform;
use vlmq::codes::pack::{PackedRun, pack, packed_words, unpack};
use vlmq::device::WIDTHS;
use vlmq::device::cuda::bindings::*;

fn codes(count: usize, bits: u32, seed: u64) -> Vec<u8> {
    uniform(seed).take(count).map(|x| ((x + 1.0) * 128.0) as u8 & ((1u32 << bits) - 1) as u8).collect()
}

/// Element `i` of run `r` lies at `i * stride + r * run_stride`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    stride: usize,
    run_stride: usize,
}

impl Layout {
    /// Runs one behind the other.
    fn along(count: usize, gap: usize) -> Self {
        Self { stride: 1, run_stride: count + gap }
    }

    /// Neighbours are of different runs.
    fn across(runs: usize, gap: usize) -> Self {
        Self { stride: runs + gap, run_stride: 1 }
    }

    /// Elements that a matrix of `runs` runs of `count` spans.
    fn len(self, runs: usize, count: usize) -> usize {
        if runs == 0 || count == 0 { 0 } else { (count - 1) * self.stride + (runs - 1) * self.run_stride + 1 }
    }
}

/// Values spread out, poison between them.
fn spread<E: Element>(element: E, values: &[E::Value], runs: usize, count: usize, layout: Layout) -> Vec<E::Value> {
    let mut out = vec![element.poison(); layout.len(runs, count)];
    for r in 0..runs {
        for i in 0..count {
            out[i * layout.stride + r * layout.run_stride] = values[r * count + i];
        }
    }
    out
}

fn packed(codes: &[u8], runs: usize, count: usize, bits: u32, subtract: u8) -> Vec<u32> {
    let words = packed_words(count, bits);
    let mask = ((1u32 << bits) - 1) as u8;
    let shifted: Vec<u8> = codes.iter().map(|code| code.wrapping_sub(subtract) & mask).collect();
    let mut out = vec![0; runs * words];
    for r in 0..runs {
        pack(&shifted[r * count..][..count], &mut out[r * words..][..words], PackedRun::dense(bits, count));
    }
    out
}

struct Case {
    runs: usize,
    count: usize,
    bits: u32,
    code: Layout,
    word: Layout,
}

impl Case {
    /// Packs and unpacks with the kernels and compares all of memory with the library's.
    fn check(&self, seed: u64) {
        let Case { runs, count, bits, code, word } = *self;
        let what = format!("{runs} runs of {count}, {bits} bits, codes {code:?}, words {word:?}");
        set_seed(kernels(), seed);
        let words = packed_words(count, bits);
        let plain = codes(runs * count, bits, 7 + seed);
        for shift in [0, 1] {
            let from = Buffer::input(U8, &spread(U8, &plain, runs, count, code), 0);
            let mut to = Buffer::output(U32, word.len(runs, words), 0);
            let args = vlmq_pack_args {
                codes: from.ptr(),
                words: to.ptr_mut(),
                runs: runs as i64,
                count: count as i64,
                code_stride: code.stride as i64,
                code_run_stride: code.run_stride as i64,
                word_stride: word.stride as i64,
                word_run_stride: word.run_stride as i64,
                bits: bits as i32,
                subtract: shift,
            };
            accepted("vlmq_pack", &args);
            let expected = spread(U32, &packed(&plain, runs, count, bits, shift as u8), runs, words, word);
            assert!(to.values() == expected, "{what}: packed with {shift} taken off");

            let mut back = Buffer::output(U8, code.len(runs, count), 0);
            let args = vlmq_unpack_args {
                words: to.ptr(),
                codes: back.ptr_mut(),
                runs: args.runs,
                count: args.count,
                code_stride: args.code_stride,
                code_run_stride: args.code_run_stride,
                word_stride: args.word_stride,
                word_run_stride: args.word_run_stride,
                bits: args.bits,
                add: shift,
            };
            accepted("vlmq_unpack", &args);
            assert!(back.values() == from.values(), "{what}: unpacked with {shift} added");
        }
    }
}

#[test]
fn packs_and_unpacks_as_the_library() {
    let lengths: &[(usize, usize)] = match Variant::current() {
        Variant::Plain => &[(1, 1), (1, 17), (17, 33), (33, 127), (32, 128), (31, 129), (129, 300), (70, 520)],
        _ => &[(1, 1), (17, 33), (33, 130)],
    };
    for &(runs, count) in lengths {
        for bits in WIDTHS {
            let words = packed_words(count, bits);
            for code in [Layout::along(count, 0), Layout::along(count, 3), Layout::across(runs, 0)] {
                for word in [Layout::along(words, 0), Layout::across(runs, 0), Layout::across(runs, 2)] {
                    Case { runs, count, bits, code, word }.check(count as u64);
                }
            }
            // Neighbours in neither direction.
            let code = Layout { stride: 2, run_stride: 2 * count + 1 };
            let word = Layout { stride: 3, run_stride: 3 * words };
            Case { runs, count, bits, code, word }.check(1);
        }
    }
}

/// The library's unpacker reads what the kernel packed for GPTQ: `qweight` `[words, out]` of codes `[out, in]`, and zeros
/// `[groups, out]`, less one, in runs along the outputs.
#[test]
fn gptq_files_read_back() {
    let (outputs, inputs, groups) = (40, 96, 3);
    for bits in WIDTHS {
        let layer = codes(outputs * inputs, bits, 3);
        let words = packed_words(inputs, bits);
        let mut qweight = Buffer::output(U32, words * outputs, 0);
        let mut args = vlmq_pack_args {
            codes: layer.as_ptr(),
            words: qweight.ptr_mut(),
            runs: outputs as i64,
            count: inputs as i64,
            code_stride: 1,
            code_run_stride: inputs as i64,
            word_stride: outputs as i64,
            word_run_stride: 1,
            bits: bits as i32,
            subtract: 0,
        };
        accepted("vlmq_pack", &args);
        let read = qweight.values();
        for output in 0..outputs {
            let mut row = vec![0; inputs];
            let run = PackedRun { word_stride: outputs, ..PackedRun::dense(bits, inputs) };
            unpack(&read[output..], &mut row, run);
            assert!(row == layer[output * inputs..][..inputs], "{bits} bits, output {output}");
        }

        let zeros: Vec<u8> = codes(outputs * groups, bits, 4).iter().map(|zero| (*zero).max(1)).collect();
        let words = packed_words(outputs, bits);
        let mut qzeros = Buffer::output(U32, groups * words, 0);
        (args.codes, args.words, args.subtract) = (zeros.as_ptr(), qzeros.ptr_mut(), 1);
        (args.runs, args.count) = (groups as i64, outputs as i64);
        (args.code_stride, args.code_run_stride) = (groups as i64, 1);
        (args.word_stride, args.word_run_stride) = (1, words as i64);
        accepted("vlmq_pack", &args);
        let read = qzeros.values();
        for group in 0..groups {
            let mut column = vec![0; outputs];
            unpack(&read[group * words..], &mut column, PackedRun::dense(bits, outputs));
            assert!((0..outputs).all(|o| column[o] + 1 == zeros[o * groups + group]), "{bits} bits, group {group}");
        }
    }
}

struct Dequantize {
    rows: usize,
    cols: usize,
    groups: usize,
    index: Option<Vec<i32>>,
}

impl Dequantize {
    fn check(&self, dtype: vlmq_dtype) {
        let Dequantize { rows, cols, groups, ref index } = *self;
        let what = format!("{rows}x{cols} in {groups} groups, index {}, {dtype:?}", index.is_some());
        let (codes, zeros) = (codes(rows * cols, 8, 5), codes(rows * groups, 8, 6));
        let scales = noise(F32, rows * groups, 8);
        let mut out = Buffer::output(dtype, rows * cols, 0);
        let args = vlmq_dequantize_args {
            codes: codes.as_ptr(),
            scales: scales.as_ptr(),
            zeros: zeros.as_ptr(),
            group_index: index.as_ref().map_or(std::ptr::null(), Vec::as_ptr),
            out: out.ptr_mut(),
            rows: rows as i64,
            cols: cols as i64,
            groups: groups as i64,
            dtype,
        };
        accepted("vlmq_dequantize", &args);
        for (place, value) in out.values().iter().enumerate() {
            let (row, col) = (place / cols, place % cols);
            let group = index.as_ref().map_or_else(|| col / (cols / groups), |index| index[col] as usize);
            let at = row * groups + group;
            let expected = scales[at] * (f32::from(codes[place]) - f32::from(zeros[at]));
            assert_eq!(value.to_bits(), rounded(dtype, expected).to_bits(), "{what}: [{row}, {col}]");
        }
    }
}

#[test]
fn dequantizes_by_the_formula() {
    let shapes: &[(usize, usize, usize)] = match Variant::current() {
        Variant::Plain => &[(1, 1, 1), (17, 33, 3), (5, 127, 1), (33, 128, 4), (129, 132, 11), (3, 4112, 16)],
        _ => &[(1, 1, 1), (17, 33, 3), (2, 2064, 16)],
    };
    for &(rows, cols, groups) in shapes {
        let index = (0..cols).map(|c| (c * 7 % groups) as i32).collect();
        for index in [None, Some(index)] {
            let case = Dequantize { rows, cols, groups, index };
            DTYPES.into_iter().for_each(|dtype| case.check(dtype));
        }
    }
}

/// More rows than blocks fit along y: each block takes several.
#[test]
fn dequantizes_many_rows() {
    Dequantize { rows: 65_537, cols: 3, groups: 1, index: None }.check(F32);
}

#[test]
fn bad_arguments_are_refused() {
    let (layer, mut words) = (vec![0u8; 64], Buffer::output(U32, 64, 0));
    let good = vlmq_pack_args {
        codes: layer.as_ptr(),
        words: words.ptr_mut(),
        runs: 4,
        count: 16,
        code_stride: 1,
        code_run_stride: 16,
        word_stride: 4,
        word_run_stride: 1,
        bits: 4,
        subtract: 0,
    };
    let bad: [fn(&mut vlmq_pack_args); 11] = [
        |a| a.codes = std::ptr::null(),
        |a| a.words = std::ptr::null_mut(),
        |a| a.runs = -1,
        |a| a.count = -1,
        |a| a.bits = 5,
        |a| a.bits = 0,
        |a| a.code_stride = 0,
        |a| a.code_run_stride = -16,
        |a| a.word_stride = 1,
        |a| a.code_run_stride = 15,
        |a| a.count = i64::MAX,
    ];
    refused_each("vlmq_pack", &good, &bad);
    for spoil in bad {
        let mut args = good;
        spoil(&mut args);
        let mut codes = Buffer::output(U8, 64, 0);
        let unpack = vlmq_unpack_args {
            words: args.words,
            codes: if args.codes.is_null() { std::ptr::null_mut() } else { codes.ptr_mut() },
            runs: args.runs,
            count: args.count,
            code_stride: args.code_stride,
            code_run_stride: args.code_run_stride,
            word_stride: args.word_stride,
            word_run_stride: args.word_run_stride,
            bits: args.bits,
            add: 0,
        };
        refused("vlmq_unpack", &unpack);
        assert!(codes.is_untouched());
    }
    // No width is taken for another.
    let mut codes = Buffer::output(U8, 64, 0);
    for bits in (-32..=32).filter(|bits| !WIDTHS.map(|width| width as i32).contains(bits)) {
        refused("vlmq_pack", &vlmq_pack_args { bits, ..good });
        let unpack = vlmq_unpack_args {
            words: good.words,
            codes: codes.ptr_mut(),
            runs: good.runs,
            count: good.count,
            code_stride: good.code_stride,
            code_run_stride: good.code_run_stride,
            word_stride: good.word_stride,
            word_run_stride: good.word_run_stride,
            bits,
            add: 0,
        };
        refused("vlmq_unpack", &unpack);
    }
    assert!(codes.is_untouched());
    assert!(words.is_untouched());
    let empty = vlmq_pack_args { runs: 0, codes: std::ptr::null(), words: std::ptr::null_mut(), ..good };
    accepted("vlmq_pack", &empty);

    let (scales, mut out) = (vec![1.0f32; 16], Buffer::output(F32, 64, 0));
    let good = vlmq_dequantize_args {
        codes: layer.as_ptr(),
        scales: scales.as_ptr(),
        zeros: layer.as_ptr(),
        group_index: std::ptr::null(),
        out: out.ptr_mut(),
        rows: 4,
        cols: 16,
        groups: 4,
        dtype: F32,
    };
    let bad: [fn(&mut vlmq_dequantize_args); 9] = [
        |a| a.codes = std::ptr::null(),
        |a| a.scales = std::ptr::null(),
        |a| a.zeros = std::ptr::null(),
        |a| a.out = std::ptr::null_mut(),
        |a| a.groups = 3,
        |a| a.groups = 0,
        |a| a.rows = -1,
        |a| a.dtype = vlmq_dtype(3),
        |a| a.dtype = vlmq_dtype(7),
    ];
    refused_each("vlmq_dequantize", &good, &bad);
    assert!(out.is_untouched());
    let empty = vlmq_dequantize_args { cols: 0, groups: 0, codes: std::ptr::null(), ..good };
    accepted("vlmq_dequantize", &empty);
}

#[test]
#[ignore = "slow: the kernels compiled under sanitizers"]
fn small_cases_pass_under_the_sanitizers() {
    let tests = [
        "packs_and_unpacks_as_the_library",
        "gptq_files_read_back",
        "dequantizes_by_the_formula",
        "bad_arguments_are_refused",
    ];
    pass_under_sanitizers(module_path!(), &tests, &[("vlmq_kernels", "kernels")]);
}
