//! The loaders named after a run are those of the table this crate was built against.

mod support;

use std::path::Path;
use support::checkpoint::settings;
use vlmq::checkpoint::Format;
use vlmq::checkpoint::formats::Loader;
use vlmq::quantize::settings::Order;

#[test]
fn each_kind_of_file_names_exactly_its_loaders() {
    use Format::{CompressedTensors as Ct, Dequantized, Gptq};
    let tf = "transformers + compressed-tensors";
    let tg = "transformers + optimum + gptqmodel";
    let humming = "vLLM with Humming kernels";
    let g128 = Some(128);
    for (format, bits, group, symmetric, order, expected) in [
        (Ct, 4, g128, true, Order::ActGroup, vec![tf, "vLLM", "SGLang"]),
        (Ct, 8, None, true, Order::Act, vec![tf, "vLLM", "SGLang"]),
        (Ct, 3, g128, true, Order::None, vec![tf, "vLLM"]),
        (Ct, 2, g128, false, Order::None, vec![tf]),
        (Ct, 4, g128, false, Order::None, vec![tf, "vLLM", "SGLang"]),
        (Ct, 4, g128, true, Order::Act, vec!["vLLM"]),
        (Ct, 3, g128, true, Order::Act, vec![]),
        (Ct, 4, Some(256), true, Order::None, vec![tf]),
        (Gptq, 4, g128, true, Order::ActGroup, vec![tg, "vLLM", "SGLang"]),
        (Gptq, 4, g128, true, Order::Act, vec![tg, "vLLM", "SGLang"]),
        (Gptq, 4, g128, false, Order::None, vec![tg, humming, "SGLang"]),
        (Gptq, 3, g128, false, Order::None, vec![tg, humming, "SGLang"]),
        (Gptq, 3, g128, false, Order::Act, vec![tg]),
        (Gptq, 4, g128, false, Order::Act, vec![tg, "SGLang"]),
        (Gptq, 4, None, true, Order::None, vec![tg, "vLLM", "SGLang"]),
        (Gptq, 8, Some(256), true, Order::None, vec![tg]),
        (Gptq, 3, Some(8), false, Order::None, vec![]),
        (Gptq, 4, Some(2048), false, Order::None, vec![]),
        (Dequantized, 2, Some(8), false, Order::Act, vec!["transformers", "vLLM", "SGLang"]),
    ] {
        let settings = settings(format, bits, group, symmetric, order);
        let [loaders, dequantized] = [false, true].map(|must| format.loaders(&settings, must, Path::new("out/w")));
        assert!(loaders.iter().all(|loader| loader.command.contains("out/w")));
        let names: Vec<&str> = loaders.iter().map(|loader| loader.name).collect();
        assert_eq!(names[0], "vlmq");
        assert_eq!(names[1..], expected, "{format:?} {bits} {group:?} {symmetric} {order:?}");
        // The same programs take what must be dequantized, and only one of them otherwise.
        assert!(dequantized.iter().map(|loader| loader.name).eq(loaders.iter().map(|loader| loader.name)));
        let dequantizes = |loader: &Loader| loader.command.contains("CompressedTensorsConfig(dequantize=True)");
        for (loader, other) in loaders.iter().zip(&dequantized) {
            assert_eq!(dequantizes(loader), loader.name == tf && !symmetric, "{}", loader.command);
            assert_eq!(dequantizes(other), other.name == tf, "{}", other.command);
            assert!(loader.name == tf || loader == other, "{}", other.command);
            let chooses = loader.command.contains("GPTQConfig(bits=4, backend=\"torch\")");
            assert_eq!(chooses, loader.name == tg && bits == 4 && group != g128, "{}", loader.command);
        }
    }
}
