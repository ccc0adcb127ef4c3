//! The loaders named after a run are those of the table this crate was built against.

use crate::support::checkpoint::settings;
use std::path::Path;
use vlmq::checkpoint::Format;
use vlmq::checkpoint::formats::FamilySupport;
use vlmq::codes::Order;

const TF: &str = "transformers + compressed-tensors";
const TG: &str = "transformers + optimum + gptqmodel";
const VLLM: &str = "vLLM";
const VLLM_31: &str = "vLLM 0.31 or newer";
const VLLM_HUMMING: &str = "vLLM with Humming kernels";
const SGLANG: &str = "SGLang";
const SGLANG_HUMMING: &str = "SGLang 0.5.18 or newer with Humming kernels";

#[test]
fn each_kind_of_file_names_exactly_its_loaders() {
    const CT: Format = Format::COMPRESSED_TENSORS;
    const V1: Format = Format::GPTQ_V1;
    const V2: Format = Format::GPTQ_V2;
    let g128 = Some(128);
    for (format, bits, group, symmetric, order, expected) in [
        (CT, 4, g128, true, Order::ActGroup, vec![TF, VLLM, SGLANG]),
        (CT, 8, None, true, Order::Act, vec![TF, VLLM, SGLANG]),
        (CT, 3, g128, true, Order::None, vec![TF, VLLM, SGLANG_HUMMING]),
        (CT, 3, g128, false, Order::ActGroup, vec![TF, VLLM_31, SGLANG_HUMMING]),
        (CT, 2, Some(16), false, Order::None, vec![TF, VLLM_31, SGLANG_HUMMING]),
        (CT, 2, Some(8), false, Order::None, vec![TF]),
        (CT, 3, None, true, Order::None, vec![TF, VLLM]),
        (CT, 3, None, false, Order::None, vec![TF, VLLM_31]),
        (CT, 4, g128, false, Order::None, vec![TF, VLLM, SGLANG]),
        (CT, 8, g128, false, Order::None, vec![TF, VLLM, SGLANG_HUMMING]),
        (CT, 4, Some(256), true, Order::None, vec![TF, VLLM, SGLANG_HUMMING]),
        (CT, 4, g128, true, Order::Act, vec![SGLANG]),
        (CT, 3, g128, true, Order::Act, vec![]),
        (V1, 4, g128, true, Order::ActGroup, vec![TG, VLLM, SGLANG]),
        (V1, 4, None, true, Order::None, vec![TG, VLLM, SGLANG]),
        (V1, 4, g128, true, Order::Act, vec![TG, SGLANG]),
        (V1, 8, Some(256), true, Order::None, vec![TG, VLLM_HUMMING, SGLANG_HUMMING]),
        (V1, 3, g128, true, Order::None, vec![TG, VLLM_HUMMING, SGLANG_HUMMING]),
        (V1, 3, g128, true, Order::Act, vec![TG]),
        (V1, 2, None, true, Order::None, vec![TG]),
        (V1, 3, Some(8), true, Order::None, vec![]),
        (V1, 4, g128, false, Order::None, vec![TG]),
        (V1, 3, g128, false, Order::None, vec![TG]),
        (V2, 3, g128, false, Order::None, vec![TG, VLLM_HUMMING, SGLANG_HUMMING]),
        (V2, 4, g128, false, Order::None, vec![TG, VLLM_HUMMING, SGLANG_HUMMING]),
        (V2, 4, None, false, Order::None, vec![TG]),
        (V2, 3, g128, false, Order::Act, vec![TG]),
        (V2, 4, Some(2048), false, Order::None, vec![VLLM_HUMMING, SGLANG_HUMMING]),
        (Format::DEQUANTIZED, 2, Some(8), false, Order::Act, vec!["transformers", VLLM, SGLANG]),
    ] {
        let what = format!("{format:?} {bits} {group:?} {symmetric} {order:?}");
        let settings = settings(format, bits, group, symmetric, order);
        let usual = FamilySupport::default();
        let loaders_of = |family| format.loaders(&settings.layout(), family, Path::new("out/w"));
        let loaders = loaders_of(usual);
        assert!(loaders.iter().all(|loader| loader.command.contains("out/w")));
        let names: Vec<&str> = loaders.iter().map(|loader| loader.name).collect();
        assert_eq!(names[0], "vlmq");
        assert_eq!(names[1..], expected, "{what}");
        for loader in &loaders {
            let asks = loader.command.ends_with(" --quantization humming");
            assert_eq!(asks, loader.name.ends_with("Humming kernels"), "{}", loader.command);
            let dequantizes = loader.command.contains("CompressedTensorsConfig(dequantize=True)");
            assert_eq!(dequantizes, loader.name == TF && !symmetric, "{}", loader.command);
            let chooses = loader.command.contains("GPTQConfig(bits=4, backend=\"torch\")");
            assert_eq!(chooses, loader.name == TG && bits == 4 && group != g128, "{}", loader.command);
        }

        // A server that is not among them is told of, with what to choose instead.
        let shut_out = format.shut_out(&settings.layout(), usual);
        for server in ["vLLM", "SGLang"] {
            let told = shut_out.iter().filter(|reason| reason.starts_with(server)).count();
            let takes = names.iter().any(|name| name.starts_with(server));
            assert_eq!(told, usize::from(!takes), "{what}: {shut_out:?}");
        }

        // Where the weights must be dequantized the same programs take the file, and only one of them otherwise.
        let dequantized = loaders_of(FamilySupport { must_dequantize: true, ..usual });
        for (loader, other) in loaders.iter().zip(&dequantized) {
            assert_eq!(loader.name, other.name);
            assert_eq!(other.command.contains("dequantize=True"), other.name == TF, "{}", other.command);
            assert!(loader.name == TF || loader == other, "{}", other.command);
        }
        // And a server that does not know the model is not asked.
        let unknown = FamilySupport { unknown_to_sglang: true, ..usual };
        let others: Vec<&str> = loaders_of(unknown).iter().map(|loader| loader.name).collect();
        let expected: Vec<&str> = names.iter().copied().filter(|name| !name.starts_with(SGLANG)).collect();
        assert_eq!(others, expected, "{what}");
        assert!(format.shut_out(&settings.layout(), unknown).iter().all(|reason| reason.starts_with("vLLM")), "{what}");
    }
}

#[test]
fn gptq_files_are_of_the_version_that_servers_read_rightly() {
    assert_eq!(Format::gptq(true), Format::GPTQ_V1);
    assert_eq!(Format::gptq(false), Format::GPTQ_V2);
    for format in Format::ALL {
        let name = serde_json::to_value(format).unwrap();
        assert_eq!(serde_json::from_value::<Format>(name).unwrap(), format);
    }
    let error = serde_json::from_value::<Format>("awq".into()).unwrap_err().to_string();
    assert!(error.contains("no format \"awq\"") && error.contains("gptq_v2"), "{error}");
}
