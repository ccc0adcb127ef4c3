//! The packer against a bit-by-bit one, exhaustively in the small, and the layouts of both formats against golden files.

use crate::support::checkpoint::*;
use crate::support::{golden, message};
use safetensors::SafeTensors;
use std::fs;
use vlmq::checkpoint::{Checkpoint, Format, LinearSpec};
use vlmq::codes::QuantizedLinear;
use vlmq::codes::pack::{PackedRun, pack, packed_words, unpack};
use vlmq::device::WIDTHS;
use vlmq::quantize::settings::{Order, SolverSettings};

const GPTQ: Format = Format::GPTQ_V1;
const GPTQ_2: Format = Format::GPTQ_V2;

/// Bit `n` of the stream is bit `n % bits` of code `n / bits`.
fn bit_by_bit(codes: &[u8], bits: u32) -> Vec<u32> {
    let mut words = vec![0; packed_words(codes.len(), bits)];
    for n in 0..codes.len() * bits as usize {
        let bit = u32::from(codes[n / bits as usize]) >> (n % bits as usize) & 1;
        words[n / 32] |= bit << (n % 32);
    }
    words
}

/// Codes without pattern or period, from a linear congruential generator.
fn codes(count: usize, bits: u32) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64 ^ count as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8 & ((1u32 << bits) - 1) as u8
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn all_lengths_widths_and_strides_pack_and_unpack() {
    for bits in 1..=8 {
        for count in 0..=100 {
            let codes = codes(count, bits);
            let expected = bit_by_bit(&codes, bits);
            for code_stride in [1, 3] {
                for word_stride in [1, 2, 5] {
                    let mut spread = vec![0; count * code_stride];
                    for (place, &code) in spread.iter_mut().step_by(code_stride).zip(&codes) {
                        *place = code;
                    }
                    // What was there before must go, what lies between must stay.
                    let mut words = vec![0xdead_beef; expected.len() * word_stride];
                    let run = PackedRun { bits, count, code_stride, word_stride };
                    pack(&spread, &mut words, run);
                    let taken: Vec<u32> = words.iter().copied().step_by(word_stride).collect();
                    assert_eq!(taken, expected, "{bits} bits, {count} codes, strides {code_stride} {word_stride}");
                    let between = words.iter().enumerate().filter(|(place, _)| place % word_stride != 0);
                    assert!(between.into_iter().all(|(_, &word)| word == 0xdead_beef));

                    let mut back = vec![0; spread.len()];
                    unpack(&words, &mut back, run);
                    assert_eq!(back, spread);
                }
            }
        }
    }
}

#[test]
fn every_code_at_every_place_of_a_block() {
    for bits in WIDTHS {
        for place in 0..32 {
            for code in 0..1u32 << bits {
                let mut codes = vec![0; 32];
                codes[place] = code as u8;
                let mut words = vec![0; bits as usize];
                pack(&codes, &mut words, PackedRun::dense(bits, 32));
                assert_eq!(words, bit_by_bit(&codes, bits));
                let mut back = vec![9; 32];
                unpack(&words, &mut back, PackedRun::dense(bits, 32));
                assert_eq!(back, codes);
            }
        }
    }
}

/// A layer of a golden file, and settings that fit it.
fn case(file: &SafeTensors, name: &str, format: Format) -> (LinearSpec, SolverSettings, QuantizedLinear) {
    let tensor = |key: &str| file.tensor(&format!("{name}/{key}")).unwrap();
    let bits = name[1..2].parse().unwrap();
    let symmetric = name.contains("-sym");
    let shape = tensor("codes").shape().to_vec();
    let groups = tensor("scales").shape()[1];
    let group_size = (groups > 1).then(|| shape[1] / groups);
    let order = if name.ends_with("-act") { Order::Act } else { Order::None };
    let settings = settings(format, bits, group_size, symmetric, order);
    let group_index = (order == Order::Act)
        .then(|| tensor("g_idx").data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect());
    let quantized = QuantizedLinear {
        out_features: shape[0],
        in_features: shape[1],
        bits,
        group_columns: shape[1] / groups,
        symmetric,
        codes: tensor("codes").data().to_vec(),
        scales: tensor("scales").data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        zeros: tensor("zeros").data().to_vec(),
        group_index,
    };
    let linear = LinearSpec { module: "m".to_owned(), out_features: shape[0], in_features: shape[1] };
    (linear, settings, quantized)
}

fn cases(file: &SafeTensors) -> Vec<String> {
    let mut names: Vec<String> =
        file.names().iter().filter_map(|n| Some(n.strip_suffix("/codes")?.to_owned())).collect();
    names.sort();
    names
}

/// Encodes every case, compares each tensor with the golden one, and reads the golden ones back.
fn check_layout(file_name: &str, format: Format, golden_key: impl Fn(&str) -> String, expected_cases: usize) {
    let bytes = fs::read(golden(&format!("formats/{file_name}"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let names = cases(&file);
    assert_eq!(names.len(), expected_cases);
    for name in names {
        let (linear, settings, quantized) = case(&file, &name, format);
        let specs = format.specs(&linear, &settings.layout());
        let tensors = format.encode(&linear, &settings.layout(), &quantized).unwrap();
        assert_eq!(specs.len(), tensors.len());
        let mut stored = Vec::new();
        for (spec, tensor) in specs.iter().zip(&tensors) {
            let key = spec.name.strip_prefix("m.").unwrap();
            let expected = file.tensor(&format!("{name}/{}", golden_key(key))).unwrap();
            assert_eq!((spec.dtype, spec.shape.as_slice()), (expected.dtype(), expected.shape()), "{name} {key}");
            assert!(tensor == expected.data(), "{name} {key}");
            stored.push((spec.clone(), expected.data().to_vec()));
        }

        let config = serde_json::json!({
            "quantization_config": format.quantization_config(std::slice::from_ref(&linear), &[], &settings.layout()).unwrap()
        });
        let weights = safetensors::serialize(
            stored.iter().map(|(spec, data)| {
                let view = safetensors::tensor::TensorView::new(spec.dtype, spec.shape.clone(), data).unwrap();
                (spec.name.as_str(), view)
            }),
            None,
        )
        .unwrap();
        let files = folder(&[("config.json", config.to_string().into_bytes()), ("model.safetensors", weights)]);
        let checkpoint = Checkpoint::open(files.path()).unwrap();
        let read = checkpoint.packed("m", linear.out_features, linear.in_features).unwrap();
        assert!(read == quantized, "{name}");
        let weight = checkpoint.linear("m", linear.out_features, linear.in_features).unwrap();
        assert!(weight == quantized.dequantize().unwrap(), "{name}");
    }
}

#[test]
fn compressed_tensors_files_are_those_of_the_package() {
    check_layout("compressed_tensors.safetensors", Format::COMPRESSED_TENSORS, str::to_owned, 16);
}

#[test]
fn gptq_files_are_those_of_a_layout_written_bit_by_bit() {
    let key = |key: &str| if key == "scales" { "scales16".to_owned() } else { key.to_owned() };
    check_layout("gptq.safetensors", GPTQ, key, 16);
    check_layout("gptq_v2.safetensors", GPTQ_2, key, 16);
}

#[test]
fn symmetric_zeros_are_the_words_that_gptq_loaders_know() {
    for (bits, word) in [(2, 0x5555_5555u32), (4, 0x7777_7777), (8, 0x7f7f_7f7f)] {
        let bytes = fs::read(golden("formats/gptq.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (linear, settings, quantized) = case(&file, &format!("w{bits}-sym-none"), GPTQ);
        let tensors = GPTQ.encode(&linear, &settings.layout(), &quantized).unwrap();
        assert!(tensors[1].chunks_exact(4).all(|b| b == word.to_le_bytes()), "{bits} bits");
    }
}

#[test]
fn a_zero_that_gptq_cannot_hold_is_refused_in_and_out() {
    let bytes = fs::read(golden("formats/gptq.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (linear, settings, mut quantized) = case(&file, "w3-asym-none", GPTQ);
    quantized.zeros[7] = 0;
    let error = message(GPTQ.encode(&linear, &settings.layout(), &quantized));
    assert!(error.contains("m has a zero of 0"), "{error}");
}

#[test]
fn a_symmetric_gptq_file_tells_its_version_whatever_it_is_called() {
    for (made, called) in [(GPTQ, GPTQ), (GPTQ, GPTQ_2), (GPTQ_2, GPTQ), (GPTQ_2, GPTQ_2)] {
        for symmetric in [true, false] {
            let settings = settings(made, 4, Some(32), symmetric, Order::None);
            let linear = LinearSpec { module: "m".to_owned(), out_features: 32, in_features: 64 };
            let zeros: Vec<u8> = (0..64).map(|i| if symmetric { 8 } else { 3 + i % 5 }).collect();
            let quantized = QuantizedLinear {
                out_features: 32,
                in_features: 64,
                bits: 4,
                group_columns: 32,
                symmetric,
                codes: codes(32 * 64, 4),
                scales: vec![0.5; 64],
                zeros: zeros.clone(),
                group_index: None,
            };
            let tensors = made.encode(&linear, &settings.layout(), &quantized).unwrap();
            let names = ["m.qweight", "m.qzeros", "m.scales", "m.g_idx"];
            let stored: Vec<Made> = made
                .specs(&linear, &settings.layout())
                .into_iter()
                .zip(names)
                .zip(&tensors)
                .map(|((spec, name), bytes)| {
                    let dtype = if name == "m.scales" { "F16" } else { "I32" };
                    Made { name, dtype, shape: spec.shape, bytes: bytes.clone() }
                })
                .collect();
            let config = called.quantization_config(std::slice::from_ref(&linear), &[], &settings.layout()).unwrap();
            let config = serde_json::json!({"quantization_config": config}).to_string().into_bytes();
            let write = |stored: &[Made]| {
                folder(&[("config.json", config.clone()), ("model.safetensors", safetensors(stored))])
            };
            let files = write(&stored);
            let read = Checkpoint::open(files.path()).unwrap().packed("m", 32, 64).unwrap();
            assert_eq!(
                read.zeros == zeros,
                symmetric || made == called,
                "{made:?} called {called:?}, symmetric: {symmetric}"
            );

            // One field of another value is neither version.
            if symmetric {
                let mut odd: Vec<Made> = stored.iter().map(copy).collect();
                odd[1].bytes[5] ^= 1;
                let files = write(&odd);
                let error = message(Checkpoint::open(files.path()).unwrap().packed("m", 32, 64));
                assert!(
                    error.contains("m.qzeros in") && error.contains("not all 7 (GPTQ version 1) or all 8"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn packed_tensors_of_wrong_shape_dtype_or_content_are_named() {
    let config = |format: Format, symmetric| {
        let settings = settings(format, 4, Some(32), symmetric, Order::None);
        let linear = LinearSpec { module: "m".to_owned(), out_features: 32, in_features: 64 };
        let config = format.quantization_config(&[linear], &[], &settings.layout()).unwrap();
        serde_json::json!({"quantization_config": config}).to_string().into_bytes()
    };
    let made = |name, dtype, shape: &[usize], size: usize, byte| Made {
        name,
        dtype,
        shape: shape.to_vec(),
        bytes: vec![byte; shape.iter().product::<usize>() * size],
    };
    let gptq = |qweight: &[usize], zeros, index| {
        vec![
            made("m.qweight", "I32", qweight, 4, 1),
            made("m.qzeros", "I32", &[2, 4], 4, zeros),
            made("m.scales", "F16", &[2, 32], 2, 1),
            made("m.g_idx", "I32", &[64], 4, index),
        ]
    };
    let shape = |values: [i64; 2]| Made {
        name: "m.weight_shape",
        dtype: "I64",
        shape: vec![2],
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    let packed = |dtype| made("m.weight_packed", dtype, &[32, 8], 4, 1);
    let scale = || made("m.weight_scale", "BF16", &[32, 2], 2, 1);
    let cases = [
        (GPTQ, gptq(&[8, 31], 1, 0), "m.qweight in"),
        (GPTQ, gptq(&[8, 32], 0xff, 0), "wrapped around"),
        (GPTQ, gptq(&[8, 32], 1, 0xff), "column 0 into group -1, but there are 2"),
        (GPTQ, gptq(&[8, 32], 1, 0)[..3].iter().map(copy).collect(), "no tensor m.g_idx"),
        (Format::COMPRESSED_TENSORS, vec![packed("F32"), shape([32, 64]), scale()], "m.weight_packed in"),
        (Format::COMPRESSED_TENSORS, vec![packed("I32"), shape([64, 32]), scale()], "is not [32, 64]"),
        (Format::COMPRESSED_TENSORS, vec![packed("I32"), shape([32, 64]), scale()], "no tensor m.weight_zero_point"),
    ];
    for (format, tensors, cause) in cases {
        let files = folder(&[("config.json", config(format, false)), ("model.safetensors", safetensors(&tensors))]);
        let error = message(Checkpoint::open(files.path()).unwrap().linear("m", 32, 64));
        assert!(error.contains(cause), "wanted {cause:?}, got {error:?}");
    }
}

fn copy(tensor: &Made) -> Made {
    Made { name: tensor.name, dtype: tensor.dtype, shape: tensor.shape.clone(), bytes: tensor.bytes.clone() }
}
