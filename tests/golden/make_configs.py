"""What a checkpoint of every published size holds: `python tests/golden/make_configs.py`; half a minute, no weights.

Writes tests/data/configs/<name>/config.json, in the generation of keys that the published one has, and configs.json: of
every model the names and shapes of the tensors on disk and the number of its parameters, as transformers makes them of that
config.json on the meta device. Blocks that are alike are written once, `#` standing for their number.
"""

import json
import re

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from families.base import DATA, GOLDEN, write_json

QWEN_IDS = {
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
}
SQUARES = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]


def qwen_text(hidden, inter, layers, heads, kv, tied, vocabulary):
    """Text keys at the root."""
    return {
        "attention_dropout": 0.0, **QWEN_IDS, "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": inter, "max_position_embeddings": 32768, "max_window_layers": layers,
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": vocabulary,
    }


def qwen2_vl(*text, vision):
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **qwen_text(*text),
        "transformers_version": "4.41.2", "vision_config": vision | {"in_chans": 3, "spatial_patch_size": 14},
    }


def qwen2_5_vl(*text, vision_inter):
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **qwen_text(*text),
        "transformers_version": "4.41.2",
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": vision_inter, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": text[0], "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def qwen3_vl(hidden, inter, layers, heads, kv):
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": hidden,
            "initializer_range": 0.02, "intermediate_size": inter, "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text", "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv, "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000, "use_cache": True, "vocab_size": 151936,
        },
        "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4304, "model_type": "qwen3_vl",
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": hidden, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }


def llava_onevision(hidden, inter, layers, heads, kv, tied, vocabulary):
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "ignore_index": -100,
        "image_grid_pinpoints": SQUARES, "image_token_index": 151646, "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": {
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": hidden, "intermediate_size": inter,
            "max_window_layers": layers, "model_type": "qwen2", "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv, "rope_theta": 1000000.0, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
            "use_sliding_window": False, "vocab_size": vocabulary,
        },
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.45.0.dev0",
        "use_image_newline_parameter": True, "video_token_index": 151647, "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }


# hidden, intermediate, layers, heads, key/value heads, tied, vocabulary.
SMALL, MIDDLE, LARGE = (1536, 8960, 28, 12, 2), (3584, 18944, 28, 28, 4), (8192, 29568, 80, 64, 8)
CONFIGS = {
    "llava-onevision-qwen2-0.5b-ov-hf": llava_onevision(896, 4864, 24, 14, 2, True, 152000),
    "llava-onevision-qwen2-7b-ov-hf": llava_onevision(*MIDDLE, False, 152128),
    "llava-onevision-qwen2-72b-ov-hf": llava_onevision(*LARGE, False, 152128),
    "Qwen2-VL-2B-Instruct": qwen2_vl(*SMALL, True, 151936, vision={
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }),
    # All else is the class's default.
    "Qwen2-VL-7B-Instruct": qwen2_vl(*MIDDLE, False, 152064, vision={"model_type": "qwen2_vl"}),
    "Qwen2-VL-72B-Instruct": qwen2_vl(*LARGE, False, 152064, vision={"model_type": "qwen2_vl", "hidden_size": 8192}),
    "Qwen2.5-VL-3B-Instruct": qwen2_5_vl(2048, 11008, 36, 16, 2, True, 151936, vision_inter=3420),
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl(*MIDDLE, False, 152064, vision_inter=3420),
    "Qwen2.5-VL-32B-Instruct": qwen2_5_vl(5120, 27648, 64, 40, 8, False, 152064, vision_inter=3456),
    "Qwen2.5-VL-72B-Instruct": qwen2_5_vl(*LARGE, False, 152064, vision_inter=3456),
    "Qwen3-VL-8B-Instruct": qwen3_vl(4096, 12288, 36, 32, 8),
    "Qwen3-VL-32B-Instruct": qwen3_vl(5120, 25600, 64, 64, 8),
}


def collapse(shapes):
    """[[name with # for the block's number, shape, blocks], ...]; 0 blocks: the name as it is."""
    found = {}
    for name, shape in shapes.items():
        pattern = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.#.", name)
        known, count = found.setdefault(pattern, (shape, 0))
        assert known == shape, (name, shape, known)
        found[pattern] = shape, count + ("#" in pattern)
    return [[pattern, shape, count] for pattern, (shape, count) in found.items()]


def main():
    made = {}
    for name, config in CONFIGS.items():
        folder = DATA / "configs" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        # A tied head is a parameter once.
        parameters = dict(model.named_parameters())
        linears = sum(
            value.numel() for key, value in parameters.items()
            if "language_model" in key and key.endswith("_proj.weight")
        )
        on_disk = revert_weight_conversion(model, parameters)
        # The published LLaVA-OneVision files are older than the name that transformers 5 gives back.
        on_disk = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key): value for key, value in on_disk.items()}
        made[name] = {
            "parameters": sum(value.numel() for value in parameters.values()), "decoder_linears": linears,
            "tensors": collapse({key: list(value.shape) for key, value in on_disk.items()}),
        }
        print(f"{name:34} {made[name]['parameters']:14,} parameters, {linears:14,} in the decoder's linears, "
              f"{len(on_disk)} tensors in {len(made[name]['tensors'])} lines")
    lines = []
    for name, model in made.items():
        tensors = ",\n".join("    " + json.dumps(tensor) for tensor in model["tensors"])
        head = "".join(f'   "{key}": {model[key]},\n' for key in ("parameters", "decoder_linears"))
        lines.append(f' "{name}": {{\n{head}   "tensors": [\n{tensors}\n   ]\n }}')
    (GOLDEN / "configs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
