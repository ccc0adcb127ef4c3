//! Importance factors and statistics against PyTorch autograd in float64 (tests/golden/make_model.py).

use crate::support::golden::{Golden, RANDOM, largest_error, relative_error};
use vlmq::checkpoint::Checkpoint;
use vlmq::device::{Device, cpu::Cpu};
use vlmq::model::decoder::Block;
use vlmq::model::families;
use vlmq::model::source::Weights;
use vlmq::quantize::importance::{BlockInputs, Magnitudes, attention_importance};
use vlmq::quantize::statistics::Statistics;

#[test]
fn factors_equal_autograd() {
    let mut checked = 0;
    for name in RANDOM {
        let golden = Golden::read(&format!("model/{name}.importance.safetensors"));
        let checkpoint = Checkpoint::open(&crate::support::golden("model").join(name)).unwrap();
        let config = families::of::<Cpu>(&checkpoint).unwrap().config(&checkpoint).unwrap();
        let block = Block::load(&Weights::new(&Cpu, &checkpoint), &config.decoder, &config.names, 1).unwrap();

        let layout = golden.layout(&config.decoder);
        let x_float = golden.matrix("x_float");
        for kind in ["structured", "rounded"] {
            let x_quantized = golden.matrix(&format!("{kind}.x_quantized"));
            let inputs = BlockInputs { x_float: &x_float, x_quantized: &x_quantized, layout: &layout };
            let Magnitudes { projections, scale } =
                attention_importance(&Cpu, &config.decoder, &block, &inputs).unwrap();
            for (magnitudes, letter) in projections.iter().zip("qkvo".chars()) {
                let expected = golden.values(&format!("{kind}.g_{letter}"));
                let got: Vec<f32> = magnitudes.data().iter().map(|g| g / scale).collect();
                let (norm, worst) = (relative_error(&got, &expected), largest_error(&got, &expected));
                assert!(norm < 1e-4 && worst < 1e-4, "{name} {kind} g_{letter}: {norm:e}, {worst:e}");
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 8 * RANDOM.len());
}

#[test]
fn statistics_equal_float64() {
    for name in &RANDOM[..3] {
        let golden = Golden::read(&format!("model/{name}.statistics.safetensors"));
        let (u, f) = (golden.matrix("q_proj.u"), golden.matrix("q_proj.f"));
        let g: Vec<f32> = golden.values("q_proj.g").iter().map(|&g| g as f32).collect();
        let mut statistics = Statistics::new(&Cpu, u.cols(), true).unwrap();
        statistics.accumulate(&Cpu, &u, Some(&f), Some(&g)).unwrap();
        let hessian = statistics.full_hessian(&Cpu).unwrap();
        let cross = Cpu.download(statistics.cross.as_ref().unwrap()).unwrap();
        for (got, expected) in [(hessian, "q_proj.h"), (cross, "q_proj.c")] {
            let error = relative_error(got.data(), &golden.values(expected));
            assert!(error < 1e-5, "{name} {expected}: {error:e}");
        }
    }
}
