//! The CUDA device on emulated kernels, or on a GPU (`VLMQ_TEST_GPU`), operation by operation, against the CPU device on the
//! same numbers.
//!
//! Inputs are bfloat16 numbers on both sides, so that what differs is the operation. The CPU keeps float32; the CUDA device
//! rounds each result once to the precision that the model runs in.

use crate::support::devices::{Case, device, difference, norm_error, numbers, on_gpu, own_device, tolerance, whole};
use crate::support::ties::Layer;
use crate::support::{message, noise};
use vlmq::codes::pack::{PackedRun, pack};
use vlmq::device::cpu::Cpu;
use vlmq::device::cuda::{CodeMatrix, CodesAlong, Cuda, CudaTensor};
use vlmq::device::{
    Activation, AttentionOperands, AttentionShape, BLOCK, BlockCodes, BlockShape, ColumnBlock, Device, Factored,
    GridRule, LayerInputs, ModelOps, PermuteSymmetric, ProductRange, QuantizedWeight, Rotary, SolveOps, SolveState,
    Span,
};
use vlmq::quantize::plain::quantize_layer;
use vlmq::quantize::settings::{CrossTerm, Grid, Order, Solver, SolverSettings};
use vlmq::tensor::{Float, Matrix, StoredMatrix};

#[test]
fn tensors_go_and_come_back() {
    for case in Case::all() {
        let (cuda, x) = (&case.cuda, numbers(17, 33, 1));
        assert!(cuda.name().starts_with("cuda"));
        let tensor = case.up(&x);
        assert_eq!((tensor.precision(), cuda.shape(&tensor)), (case.precision, (17, 33)));
        assert_eq!(case.down(&tensor), x);
        // Float32 whatever the model's precision.
        let odd = Matrix::new(1, 2, vec![1.0 + f32::EPSILON, -3.5]).unwrap();
        assert_eq!(case.down(&cuda.upload(odd.clone()).unwrap()), odd);
        let mut zeros = cuda.zeros(3, 5).unwrap();
        assert_eq!(case.down(&zeros), Matrix::zeros(3, 5));
        cuda.append_rows(&mut zeros, &cuda.upload(Matrix::row_vector(vec![7.0; 5])).unwrap()).unwrap();
        cuda.clear(&mut zeros).unwrap();
        assert_eq!(case.down(&zeros), Matrix::zeros(4, 5));

        let mut broken = x.clone();
        assert_eq!(cuda.first_non_finite_row(&tensor).unwrap(), None);
        broken.row_mut(16)[32] = f32::NAN;
        assert_eq!(cuda.first_non_finite_row(&case.up(&broken)).unwrap(), Some(16));
        broken.row_mut(3)[0] = f32::INFINITY;
        assert_eq!(cuda.first_non_finite_row(&case.up(&broken)).unwrap(), Some(3));
    }
}

#[test]
fn stored_numbers_arrive_as_they_are() {
    for case in Case::all() {
        // Zeros of both signs and the smallest numbers beside the others.
        let mut x = numbers(5, 7, 4);
        x.row_mut(2)[..4].copy_from_slice(&[-0.0, case.precision.smallest(), -case.precision.smallest(), 1.0]);
        for float in [Float::F16, Float::Bf16, Float::F32] {
            let mut bytes = vec![0u8];
            for &value in x.data() {
                match float {
                    Float::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
                    Float::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                    Float::F32 => bytes.extend(value.to_le_bytes()),
                }
            }
            let stored = StoredMatrix::new(float, 5, 7, &bytes[1..]).unwrap();
            let found = case.cuda.upload_stored(stored).unwrap();
            assert_eq!(found.precision(), case.precision);
            let bits = |x: &Matrix| x.data().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&case.down(&found)), bits(&case.down(&case.up(&stored.to_matrix()))), "{float:?}");
        }
    }
}

/// What was handed over may change at once, although the device comes to it later: on a GPU, behind work that takes longer
/// than these calls. The emulator copies when a kernel starts; how slots are used again is tested in
/// src/device/cuda/staging.rs.
#[test]
fn sources_may_change_while_their_copy_waits() {
    let cuda = device(Float::F32);
    let (rows, cols) = if on_gpu() { (2048, 4096) } else { (40, 96) };
    let side = if on_gpu() { 4096 } else { 8 };
    let square = cuda.zeros(side, side).unwrap();
    // Small ones and large ones, more than all slots hold, with lengths that fill no slot.
    for (rows, cols) in [(1, cols), (3, cols - 1), (rows, cols), (rows + 1, 2 * cols - 1)] {
        let mut codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 251) as u8).collect();
        let mut scales: Vec<f32> = (0..rows).map(|row| 2f32.powi(row as i32 % 5 - 3)).collect();
        let mut zeros: Vec<u8> = (0..rows).map(|row| (row % 251) as u8).collect();
        let weight = QuantizedWeight { rows, cols, codes: &codes, scales: &scales, zeros: &zeros, group_index: None };
        let expected = Cpu.dequantize(&weight).unwrap();
        let matrix = Matrix::new(rows, cols, codes.iter().map(|&code| f32::from(code)).collect()).unwrap();
        let whole = matrix.clone();
        for _ in 0..12 {
            cuda.linear(&square, &square, None).unwrap();
        }
        let there = cuda.upload(matrix).unwrap();
        let dequantized = cuda.dequantize(&weight).unwrap();
        codes.fill(255);
        scales.fill(-1e3);
        zeros.fill(7);
        // The matrix is gone already: whoever asks for memory next gets its place.
        let others: Vec<Matrix> = (0..4).map(|_| Matrix::new(rows, cols, vec![-5.0; rows * cols]).unwrap()).collect();
        assert!(cuda.download(&dequantized).unwrap() == expected, "{rows}x{cols}: weights of other codes");
        assert!(cuda.download(&there).unwrap() == whole, "{rows}x{cols}: other numbers");
        drop(others);
    }
}

#[test]
fn rows_are_moved_exactly() {
    for case in Case::all() {
        let cuda = &case.cuda;
        let (x, y) = (numbers(20, 7, 1), numbers(3, 7, 2));
        let (there, more) = (case.up(&x), case.up(&y));
        let indices = [19, 0, 0, 5];
        assert_eq!(case.down(&cuda.gather_rows(&there, &indices).unwrap()), Cpu.gather_rows(&x, &indices).unwrap());
        assert_eq!(case.down(&cuda.slice_rows(&there, 4..9).unwrap()), Cpu.slice_rows(&x, 4..9).unwrap());
        assert_eq!(cuda.shape(&cuda.slice_rows(&there, 4..4).unwrap()), (0, 7));
        let (mut ours, mut theirs) = (case.up(&x), x.clone());
        cuda.scatter_rows(&mut ours, &[17, 2, 9], &more).unwrap();
        Cpu.scatter_rows(&mut theirs, &[17, 2, 9], &y).unwrap();
        // Often enough that memory grows more than once.
        for _ in 0..30 {
            cuda.append_rows(&mut ours, &more).unwrap();
            Cpu.append_rows(&mut theirs, &y).unwrap();
        }
        assert_eq!(case.down(&ours), theirs);
        let reshaped = cuda.reshape(ours, 7, 110).unwrap();
        assert_eq!(case.down(&reshaped), theirs.reshaped(7, 110).unwrap());

        assert!(cuda.gather_rows(&there, &[20]).is_err());
        assert!(cuda.slice_rows(&there, 4..21).is_err());
        let mut target = case.up(&x);
        assert!(cuda.scatter_rows(&mut target, &[1, 2, 1], &more).is_err());
        assert!(cuda.scatter_rows(&mut target, &[1, 2, 20], &more).is_err());
        assert!(cuda.reshape(target, 3, 47).is_err());
    }
}

#[test]
fn codes_are_packed_and_become_weights() {
    for case in Case::all() {
        let (cuda, rows, cols) = (&case.cuda, 33, 192);
        for bits in [2u32, 3, 4, 8] {
            let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            // Scales that every type holds.
            let scales: Vec<f32> = (0..rows * 3).map(|i| 2f32.powi(i as i32 % 5 - 3)).collect();
            let zeros: Vec<u8> = (0..rows * 3).map(|i| (i % (1 << bits)) as u8).collect();
            let index: Vec<u32> = (0..cols as u32).map(|column| column * 7 % 3).collect();
            for group_index in [None, Some(index.as_slice())] {
                let weight = QuantizedWeight { rows, cols, codes: &codes, scales: &scales, zeros: &zeros, group_index };
                let found = cuda.dequantize(&weight).unwrap();
                assert_eq!(found.precision(), case.precision);
                assert_eq!(case.down(&found), Cpu.dequantize(&weight).unwrap());
                let short = QuantizedWeight { zeros: &zeros[1..], ..weight };
                assert_eq!(message(cuda.dequantize(&short)), message(Cpu.dequantize(&short)));
            }
            let (along, down) = ((cols * bits as usize).div_ceil(32), (rows * bits as usize).div_ceil(32));
            let mut expected = [vec![0; rows * along], vec![0; down * cols]];
            for (codes, words) in codes.chunks(cols).zip(expected[0].chunks_mut(along)) {
                pack(codes, words, PackedRun::dense(bits, cols));
            }
            let less: Vec<u8> = codes.iter().map(|c| c.wrapping_sub(1) & ((1u16 << bits) - 1) as u8).collect();
            for column in 0..cols {
                let run = PackedRun { bits, count: rows, code_stride: cols, word_stride: cols };
                pack(&less[column..], &mut expected[1][column..], run);
            }
            for (along, offset, expected) in
                [(CodesAlong::Rows, 0, &expected[0]), (CodesAlong::Columns, 1, &expected[1])]
            {
                let matrix = CodeMatrix { rows, cols, bits, along, offset };
                assert_eq!(&cuda.pack(&codes, &matrix).unwrap(), expected, "{matrix:?}");
                assert_eq!(cuda.unpack(expected, &matrix).unwrap(), codes, "{matrix:?}");
            }
        }
        let x = numbers(17, 33, 40);
        let wide = cuda.convert(&case.up(&x), Float::F32).unwrap();
        assert_eq!((wide.precision(), case.down(&wide)), (Float::F32, x));
        let order: Vec<u32> = (0..33).map(|place| place * 5 % 33).collect();
        let x = numbers(17, 33, 41);
        let found = cuda.permute_columns(&case.up(&x), &order, &[4, 32]).unwrap();
        assert_eq!(case.down(&found), Cpu.permute_columns(&x, &order, &[4, 32]).unwrap());
    }
}

/// H⁻¹ = UᵀU: H·UᵀU is the identity.
#[test]
fn inverses_agree() {
    let cuda = device(Float::Bf16);
    for n in [1, 65, 300] {
        let (h, ..) = statistics(n);
        let mut damped = h.clone();
        let mean = (0..n).map(|i| h.row(i)[i]).sum::<f32>() / n as f32;
        for i in 0..n {
            damped.row_mut(i)[i] += 0.01 * mean;
            (0..i).for_each(|j| damped.row_mut(i)[j] = h.row(j)[i]);
        }
        let u = cuda.download(&cuda.cholesky_inverse(cuda.upload(h.clone()).unwrap(), 0.01).unwrap()).unwrap();
        let transposed = Matrix::new(n, n, (0..n * n).map(|i| u.row(i % n)[i / n]).collect()).unwrap();
        let inverse = Cpu.matmul(&transposed, &u).unwrap();
        let product = Cpu.matmul(&damped, &inverse).unwrap();
        let identity = Matrix::new(n, n, (0..n * n).map(|i| f32::from(i / n == i % n)).collect()).unwrap();
        let error = norm_error(&product, &identity);
        assert!(error < 1e-3, "{n}: {error:e}");
    }
    let mut broken = Matrix::zeros(3, 3);
    for (i, value) in [1.0, -2.0, 1.0].into_iter().enumerate() {
        broken.row_mut(i)[i] = value;
    }
    let error = message(cuda.cholesky_inverse(cuda.upload(broken).unwrap(), 0.0));
    assert!(error.contains("pivot 1"), "{error}");
}

#[test]
fn products_agree() {
    for case in Case::all() {
        let cuda = &case.cuda;
        // The last in several parts: more float32 sums than wait for their bias at once.
        let (many, wide) = if on_gpu() { (2001, 4301) } else { (301, 257) };
        for (rows, inner, outputs) in [(1, 17, 5), (33, 128, 40), (3, 0, 4), (many, 9, wide)] {
            let (x, weight, bias) = (whole(rows, inner, 1), whole(outputs, inner, 2), whole(1, outputs, 3));
            let expected = Cpu.linear(&x, &weight, Some(&bias)).unwrap();
            let found = cuda.linear(&case.up(&x), &case.up(&weight), Some(&case.up(&bias))).unwrap();
            // Whole numbers: exact but for the one rounding.
            assert_eq!(case.down(&found), case.down(&case.up(&expected)));
            let b = whole(inner, outputs, 4);
            let found = cuda.matmul(&case.up(&x), &case.up(&b)).unwrap();
            assert_eq!(case.down(&found), case.down(&case.up(&Cpu.matmul(&x, &b).unwrap())));
        }
        let (x, y) = (whole(5, 6, 1), whole(5, 7, 2));
        assert!(cuda.linear(&case.up(&x), &case.up(&y), None).is_err());
        assert!(cuda.matmul(&case.up(&x), &case.up(&y)).is_err());
        let short = case.up(&whole(1, 4, 3));
        assert!(cuda.linear(&case.up(&x), &case.up(&whole(5, 6, 2)), Some(&short)).is_err());
    }
}

#[test]
fn elementwise_operations_agree() {
    for case in Case::all() {
        let cuda = &case.cuda;
        let (x, y) = (numbers(17, 130, 1), numbers(17, 130, 2));
        let (a, b) = (case.up(&x), case.up(&y));
        let (mut sum, mut expected) = (case.up(&x), x.clone());
        cuda.add_assign(&mut sum, &b).unwrap();
        Cpu.add_assign(&mut expected, &y).unwrap();
        assert_eq!(case.down(&sum), case.down(&case.up(&expected)));
        let found = cuda.scaled_difference(&a, &b, 2.0).unwrap();
        assert_eq!(case.down(&found), case.down(&case.up(&Cpu.scaled_difference(&x, &y, 2.0).unwrap())));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu] {
            let found = cuda.activate(&a, activation).unwrap();
            case.check("activation", &found, &Cpu.activate(&x, activation).unwrap());
            let found = cuda.gated(&a, &b, activation).unwrap();
            case.check("gate", &found, &Cpu.gated(&x, &y, activation).unwrap());
        }
        let (weight, bias) = (numbers(1, 130, 3), numbers(1, 130, 4));
        let found = cuda.rms_norm(&a, &case.up(&weight), 1e-6).unwrap();
        case.check("rms norm", &found, &Cpu.rms_norm(&x, &weight, 1e-6).unwrap());
        let found = cuda.rms_norm_backward(&a, &case.up(&weight), &b, 1e-6).unwrap();
        case.check("rms norm's gradient", &found, &Cpu.rms_norm_backward(&x, &weight, &y, 1e-6).unwrap());
        let found = cuda.layer_norm(&a, &case.up(&weight), &case.up(&bias), 1e-6).unwrap();
        case.check("layer norm", &found, &Cpu.layer_norm(&x, &weight, &bias, 1e-6).unwrap());
        let means = cuda.download(&cuda.mean_abs_rows(&a).unwrap()).unwrap();
        assert!(difference(&means, &Cpu.mean_abs_rows(&x).unwrap()) < 1e-6);

        let scales: Vec<f32> = (0..130).map(|i| 0.5 + (i % 7) as f32).collect();
        let squares = Matrix::row_vector(cuda.scaled_squares_rows(&a, &scales).unwrap());
        let expected = Matrix::row_vector(Cpu.scaled_squares_rows(&x, &scales).unwrap());
        assert!(difference(&squares, &expected) < 1e-6);
        assert!(cuda.scaled_squares_rows(&a, &scales[1..]).is_err());

        let narrow = case.up(&numbers(17, 129, 1));
        assert!(cuda.add_assign(&mut sum, &narrow).is_err());
        assert!(cuda.gated(&a, &narrow, Activation::Silu).is_err());
        assert!(cuda.rms_norm(&narrow, &case.up(&weight), 1e-6).is_err());
        assert!(cuda.rms_norm_backward(&a, &case.up(&weight), &narrow, 1e-6).is_err());
        if case.precision != Float::F32 {
            // Float32 does not mix with the model's precision by accident.
            let float = cuda.upload(y.clone()).unwrap();
            assert!(format!("{:#}", cuda.scaled_difference(&a, &float, 1.0).err().unwrap()).contains("F32"));
            assert!(cuda.linear(&a, &float, None).is_err());
        }
    }
}

#[test]
fn rotations_agree() {
    for case in Case::all() {
        let (heads, half, tokens) = (3, 16, 17);
        let angles = noise(tokens, half, 5);
        let table = |f: fn(f32) -> f32| {
            Matrix::new(tokens, half, angles.data().iter().map(|&angle| f(angle)).collect()).unwrap()
        };
        let rotary = Rotary { cos: table(f32::cos), sin: table(f32::sin) };
        let up = |x: &Matrix| case.cuda.upload(x.clone()).unwrap();
        let there = Rotary { cos: up(&rotary.cos), sin: up(&rotary.sin) };
        for transposed in [false, true] {
            let mut expected = numbers(tokens, heads * 2 * half, 6);
            let mut x = case.up(&expected);
            case.cuda.rotate(&mut x, &there, transposed).unwrap();
            Cpu.rotate(&mut expected, &rotary, transposed).unwrap();
            case.check("rotation", &x, &expected);
        }
        let mut x = case.up(&numbers(tokens, 33, 6));
        assert!(case.cuda.rotate(&mut x, &there, false).is_err());
    }
}

#[test]
fn attention_agrees_forward_and_backward() {
    let own = |lengths: &[usize]| {
        let mut start = 0;
        let next = |&length: &usize| {
            start += length;
            Span::own(start - length..start)
        };
        lengths.iter().map(next).collect::<Vec<_>>()
    };
    let shape = |heads, kv_heads, head_dim, causal| AttentionShape { heads, kv_heads, head_dim, causal };
    let cases = [
        (shape(4, 2, 16, true), own(&[1, 17, 40])),
        (shape(2, 2, 64, false), own(&[33, 5])),
        (shape(2, 1, 80, true), vec![Span { q: 0..1, k: 0..40 }, Span { q: 1..2, k: 40..41 }]),
    ];
    for case in Case::all() {
        for (shape, spans) in &cases {
            let queries = spans.iter().map(|span| span.q.end).max().unwrap();
            let keys = spans.iter().map(|span| span.k.end).max().unwrap();
            let q = numbers(queries, shape.heads * shape.head_dim, 1);
            let k = numbers(keys, shape.kv_heads * shape.head_dim, 2);
            let v = numbers(keys, shape.kv_heads * shape.head_dim, 3);
            let d_out = numbers(queries, shape.heads * shape.head_dim, 4);
            let [a, b, c, d] = [&q, &k, &v, &d_out].map(|x| case.up(x));
            let there = AttentionOperands { q: &a, k: &b, v: &c, spans, shape: *shape };
            let here = AttentionOperands { q: &q, k: &k, v: &v, spans, shape: *shape };
            let found = case.cuda.attention(&there).unwrap();
            let expected = Cpu.attention(&here).unwrap();
            // Probabilities are rounded to the model's type before they meet the values: a second rounding.
            case.check_norm(&format!("{shape:?}"), &found, &expected, 2.0 * tolerance(case.precision));
            let found = case.cuda.attention_backward(&there, &d).unwrap();
            let expected = Cpu.attention_backward(&here, &d_out).unwrap();
            let pairs = [(&found.0, &expected.0), (&found.1, &expected.1), (&found.2, &expected.2)];
            for (name, (found, expected)) in ["dq", "dk", "dv"].into_iter().zip(pairs) {
                case.check_norm(&format!("{name} of {shape:?}"), found, expected, 3.0 * tolerance(case.precision));
            }
        }
        let (shape, spans) = &cases[0];
        let x = case.up(&numbers(58, 64, 1));
        let narrow = case.up(&numbers(58, 16, 1));
        let attends = |kv| case.cuda.attention(&AttentionOperands { q: &x, k: kv, v: kv, spans, shape: *shape });
        assert!(attends(&narrow).is_err());
        assert!(attends(&case.up(&numbers(40, 32, 1))).is_err());
    }
}

#[test]
fn statistics_agree() {
    for case in Case::all() {
        let (cuda, features) = (&case.cuda, 129);
        let (u, f) = (numbers(70, features, 1), numbers(70, features, 2));
        let g: Vec<f32> = (0..70).map(|i| (i % 5) as f32 / 2.0).collect();
        let (mut h, mut c) = (Matrix::zeros(features, features), Matrix::zeros(features, features));
        let (mut h_there, mut c_there) =
            (cuda.zeros(features, features).unwrap(), cuda.zeros(features, features).unwrap());
        let (u_there, f_there) = (case.up(&u), case.up(&f));
        for g in [Some(&g[..]), None] {
            Cpu.accumulate_statistics(&mut h, Some(&mut c), &LayerInputs { u: &u, f: Some(&f), g }).unwrap();
            cuda.accumulate_statistics(
                &mut h_there,
                Some(&mut c_there),
                &LayerInputs { u: &u_there, f: Some(&f_there), g },
            )
            .unwrap();
        }
        // Without a cross term, too.
        Cpu.accumulate_statistics(&mut h, None, &LayerInputs { u: &u, f: None, g: None }).unwrap();
        cuda.accumulate_statistics(&mut h_there, None, &LayerInputs { u: &u_there, f: None, g: None }).unwrap();
        check_hessian(&case, &h_there, &h);
        case.check_norm("C", &c_there, &c, 1e-6);
        let diagonal: Vec<f32> = (0..features).map(|i| case.down(&h_there).row(i)[i]).collect();
        assert_eq!(cuda.diagonal(&h_there).unwrap(), diagonal);
        assert!(
            cuda.accumulate_statistics(&mut h_there, None, &LayerInputs { u: &u_there, f: Some(&f_there), g: None })
                .is_err()
        );
        assert!(
            cuda.accumulate_statistics(&mut h_there, None, &LayerInputs { u: &u_there, f: None, g: Some(&g[1..]) })
                .is_err()
        );
    }
}

/// As many tokens as are summed in two parts.
#[test]
fn statistics_of_many_tokens_agree() {
    for case in Case::all() {
        let (cuda, features, many) = (&case.cuda, 129, numbers(2100, 129, 3));
        let (mut h, mut h_there) = (Matrix::zeros(features, features), cuda.zeros(features, features).unwrap());
        Cpu.accumulate_statistics(&mut h, None, &LayerInputs { u: &many, f: None, g: None }).unwrap();
        cuda.accumulate_statistics(&mut h_there, None, &LayerInputs { u: &case.up(&many), f: None, g: None }).unwrap();
        check_hessian(&case, &h_there, &h);
    }
}

/// The upper triangle is all that is written.
fn check_hessian(case: &Case, found: &CudaTensor, expected: &Matrix) {
    let upper = |x: &Matrix| {
        let mut x = x.clone();
        (0..x.cols()).for_each(|i| x.row_mut(i)[..i].fill(0.0));
        x
    };
    let off = norm_error(&upper(&case.down(found)), &upper(expected));
    assert!(off <= 1e-6, "H in {:?} is {off:e} off", case.precision);
}

/// H and C of some noise, and blocks over its columns.
fn statistics(n: usize) -> (Matrix, Matrix, Vec<std::ops::Range<usize>>) {
    let (u, f) = (noise(3 * n, n, 1), noise(3 * n, n, 2));
    let (mut h, mut c) = (Matrix::zeros(n, n), Matrix::zeros(n, n));
    Cpu.accumulate_statistics(&mut h, Some(&mut c), &LayerInputs { u: &u, f: Some(&f), g: None }).unwrap();
    let blocks = (0..n).step_by(BLOCK).map(|first| first..(first + BLOCK).min(n)).collect();
    (h, c, blocks)
}

#[test]
fn factors_agree() {
    let cuda = device(Float::Bf16);
    let up = |x: &Matrix| cuda.upload(x.clone()).unwrap();
    let down = |x: &CudaTensor| cuda.download(x).unwrap();
    let n = 300;
    let (h, c, blocks) = statistics(n);
    let order: Vec<u32> = (0..n as u32).map(|i| (i * 7) % n as u32).collect();
    let diagonal: Vec<f32> = (0..n).map(|i| h.row(i)[i] * 1.01).collect();
    let how = PermuteSymmetric { order: &order, diagonal: &diagonal };
    let permuted = Cpu.permute_symmetric(&h, how).unwrap();
    let there = cuda.permute_symmetric(&up(&h), how).unwrap();
    assert_eq!(down(&there), permuted);
    let cross = Cpu.permute(&c, &order).unwrap();
    let cross_there = cuda.permute(&up(&c), &order).unwrap();
    assert_eq!(down(&cross_there), cross);

    let Factored::Done(expected) = Cpu.factor(permuted.clone(), &blocks).unwrap() else { panic!("the CPU") };
    let Factored::Done(found) = cuda.factor(there, &blocks).unwrap() else { panic!("the kernels") };
    let term = Cpu.cross_factor(cross, &expected, &blocks, 0.25).unwrap();
    let term_there = cuda.cross_factor(cross_there, &found, &blocks, 0.25).unwrap();
    for (name, found, expected) in [
        ("root", &found.root, &expected.root),
        ("inverses", &found.inverses, &expected.inverses),
        ("diagonal", &found.diagonal, &expected.diagonal),
        ("M", &term_there.scaled, &term.scaled),
        ("P", &term_there.blocks, &term.blocks),
    ] {
        let off = norm_error(&down(found), expected);
        assert!(off < 1e-5, "{name} is {off:e} off");
    }

    let mut broken = permuted;
    broken.row_mut(40)[40] = -1.0;
    let Factored::NotPositive { pivot } = cuda.factor(up(&broken), &blocks).unwrap() else {
        panic!("a negative pivot")
    };
    assert_eq!(pivot, 40);
    assert!(cuda.factor(up(&broken), &blocks[1..]).is_err());
    assert!(cuda.factor(up(&broken), std::slice::from_ref(&(0..n))).is_err());
    assert!(cuda.permute(&up(&c), &order[1..]).is_err());
}

#[test]
fn products_and_norms_of_the_solver_agree() {
    let cuda = device(Float::Bf16);
    let up = |x: &Matrix| cuda.upload(x.clone()).unwrap();
    let (a, b, c) = (noise(33, 200, 1), noise(200, 160, 2), noise(33, 70, 3));
    for (inner, columns, target) in [(0..200, 20..90, 0), (7..130, 0..33, 37), (5..5, 0..3, 0)] {
        let range = ProductRange { inner, columns, target };
        let (mut expected, mut found) = (c.clone(), up(&c));
        Cpu.add_product(&mut expected, &a, &b, &range).unwrap();
        cuda.add_product(&mut found, &up(&a), &up(&b), &range).unwrap();
        let off = norm_error(&cuda.download(&found).unwrap(), &expected);
        assert!(off < 1e-6, "{range:?} is {off:e} off");
    }
    let wide = ProductRange { inner: 0..200, columns: 0..71, target: 0 };
    assert!(cuda.add_product(&mut up(&c), &up(&a), &up(&b), &wide).is_err());
    let (h, _, _) = statistics(200);
    let ratio = cuda.squared_norm(&up(&a)).unwrap() / Cpu.squared_norm(&a).unwrap();
    assert!((ratio - 1.0).abs() < 1e-6, "{ratio}");
    let ratio = cuda.weighted_squared_norm(&up(&a), &up(&h)).unwrap() / Cpu.weighted_squared_norm(&a, &h).unwrap();
    assert!((ratio - 1.0).abs() < 1e-5, "{ratio}");
}

/// Quantizes a layer on both, and compares codes and errors.
fn same_codes(cuda: &Cuda, w: &Matrix, [u, f]: [&Matrix; 2], g: &[f32], settings: &SolverSettings) {
    let expected = quantize_layer(&Cpu, w, &LayerInputs { u, f: Some(f), g: Some(g) }, settings).unwrap();
    let found = quantize_layer(cuda, w, &LayerInputs { u, f: Some(f), g: Some(g) }, settings).unwrap();
    assert_eq!(found.order, expected.order);
    Layer::new(w, [u, f], g, settings, &expected).compare(&found.linear, &expected.linear);
    let ratio = found.report.relative_error / expected.report.relative_error;
    assert!((ratio - 1.0).abs() < 1e-3, "errors {ratio} apart with {settings:?}");
}

/// All kernels of a solve within what a sanitizer takes minutes for.
#[test]
fn a_narrow_layer_gets_the_same_codes() {
    let cuda = device(Float::Bf16);
    let (tokens, cols) = (400, 320);
    let (u, f, w) = (noise(tokens, cols, 1), noise(tokens, cols, 2), noise(8, cols, 3));
    let g: Vec<f32> = (0..tokens).map(|i| (i % 5) as f32 / 2.0).collect();
    let base = SolverSettings { group_size: Some(64), ..SolverSettings::default() };
    for settings in [
        SolverSettings { grid: Grid::Mse, solver: Solver::Gptq, ..base.clone() },
        // Groups of more than a block, the second of them behind columns that have their codes.
        SolverSettings { group_size: Some(160), ..base.clone() },
        SolverSettings { group_size: Some(160), grid: Grid::Minmax, ..base.clone() },
        base,
    ] {
        same_codes(&cuda, &w, [&u, &f], &g, &settings);
    }
}

#[test]
fn weights_are_rounded_to_nearest_alike() {
    let cuda = device(Float::Bf16);
    let w = noise(9, 96, 1);
    let rule = GridRule { bits: 3, symmetric: false, grid: Grid::Minmax, scale_type: Float::Bf16, smallest_zero: 0 };
    fn rounded<D: SolveOps>(device: &D, w: &Matrix, rule: GridRule) -> Vec<BlockCodes> {
        let residual = device.upload(w.clone()).unwrap();
        let error = device.zeros(w.rows(), 0).unwrap();
        let mut state = SolveState { residual, carried: None, shift: None, error, cross: None };
        let mut codes = device.room_for_codes(w.rows(), &[BlockShape { columns: 96, groups: 3 }]).unwrap();
        let block = ColumnBlock { columns: 0..96, span: 0, group: 32, grid: None, rule, factor: None, cross: None };
        device.quantize_block(&block, &mut state, &mut codes).unwrap();
        device.take_codes(codes, &rule).unwrap()
    }
    let (found, expected) = (rounded(&cuda, &w, rule), rounded(&Cpu, &w, rule));
    assert_eq!((&found[0].codes, &found[0].grid), (&expected[0].codes, &expected[0].grid));
    assert!((found[0].error / expected[0].error - 1.0).abs() < 1e-9, "{} and {}", found[0].error, expected[0].error);
}

#[test]
#[ignore = "slow: wide layers on the emulator"]
fn layers_get_the_same_codes() {
    let cuda = device(Float::Bf16);
    let (rows, cols) = (40, 640);
    let (u, f, w) = (noise(900, cols, 1), noise(900, cols, 2), noise(rows, cols, 3));
    let g: Vec<f32> = (0..900).map(|i| (i % 5) as f32 / 2.0).collect();
    let base = SolverSettings::default();
    let gptq = SolverSettings { solver: Solver::Gptq, ..base.clone() };
    for settings in [
        base.clone(),
        SolverSettings { grid: Grid::Minmax, ..base.clone() },
        SolverSettings { cross_term: CrossTerm::Quantized, group_size: Some(32), ..base.clone() },
        SolverSettings { order: Order::Act, grid: Grid::Mse, bits: 2, ..base.clone() },
        SolverSettings { group_size: Some(320), symmetric: true, bits: 4, grid: Grid::Minmax, ..base.clone() },
        SolverSettings { group_size: Some(320), bits: 2, ..base.clone() },
        SolverSettings { group_size: None, ..base },
        SolverSettings { group_size: None, bits: 8, scale_type: Float::F32, grid: Grid::Minmax, ..gptq.clone() },
        SolverSettings { group_size: Some(64), smallest_zero: 1, bits: 4, scale_type: Float::F16, ..gptq },
    ] {
        same_codes(&cuda, &w, [&u, &f], &g, &settings);
    }
    // The same words for the same failure.
    let mut huge = w;
    huge.row_mut(17)[5] = 1e30;
    let settings = SolverSettings { scale_type: Float::F16, ..SolverSettings::default() };
    let expected = message(quantize_layer(&Cpu, &huge, &LayerInputs { u: &u, f: Some(&f), g: Some(&g) }, &settings));
    assert!(expected.contains("row 17"), "{expected}");
    assert_eq!(
        message(quantize_layer(&cuda, &huge, &LayerInputs { u: &u, f: Some(&f), g: Some(&g) }, &settings)),
        expected
    );
}

#[test]
fn what_is_missing_is_said() {
    let error = message(Cuda::emulated(std::path::Path::new("no-such-library.so"), Float::F32));
    assert!(error.contains("no-such-library.so"), "{error}");
    // On a machine with a GPU this one opens.
    if let Err(error) = Cuda::open(0, Float::F32) {
        let error = format!("{error:#}");
        assert!(["VLMQ_CUDA=require", "driver", "cuBLAS"].iter().any(|part| error.contains(part)), "{error}");
    }
    let error = message(Cuda::open(1000, Float::F32));
    assert!(!error.contains("panicked") && error != "no error", "{error}");
}

#[test]
fn devices_do_not_share_tensors() {
    let (one, other) = (own_device(Float::F32), own_device(Float::F32));
    let x = one.upload(noise(4, 4, 1)).unwrap();
    let y = other.upload(noise(4, 4, 2)).unwrap();
    let error = message(one.scaled_difference(&x, &y, 1.0).map(|_| ()));
    assert!(error.contains("another device"), "{error}");
    assert!(one.matmul(&x, &y).is_err() && one.first_non_finite_row(&y).is_err());
    // The same device in another precision is the same device.
    assert!(one.with_precision(Float::Bf16).scaled_difference(&x, &x, 1.0).is_ok());
}
