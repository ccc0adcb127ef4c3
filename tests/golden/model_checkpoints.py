"""Random tiny Qwen2-VL checkpoints, one per generation of config keys, tensor names, storage type and processor files.

Every tensor is drawn from one seeded generator in the order of its name, so a rerun writes the same bytes. Sizes of the
random weights are chosen so that nothing is degenerate: linear layers keep the variance of their input, norm weights lie
around 1 with a few large channels (as trained language models have), every bias is non-zero.

`load` proves that a folder is a valid checkpoint: transformers must report no missing, unexpected or mismatched tensor,
every tensor it holds must equal the one in the file, and the config values that generations spell differently (rotary
base, sections, tied embeddings, vision defaults) must arrive as meant.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

GOLDEN = Path(__file__).resolve().parent
MODEL = GOLDEN / "model"
DATA = GOLDEN.parent / "data"
TEMPLATE = DATA / "tiny-qwen2-vl"
IDS = {"image_token_id": 613, "video_token_id": 614, "vision_start_token_id": 610, "vision_end_token_id": 611}

VARIANTS = {
    "flat-tied-bf16": dict(
        dtype=torch.bfloat16, seed=101, hidden=32, inter=64, layers=2, heads=4, kv=4, section=[2, 1, 1], theta=1e6,
        eps=1e-6, embed=64, vision_heads=16, depth=2, tied=True, shards=1, language="model.", vision="visual.",
    ),
    "nested-f16-sharded": dict(
        dtype=torch.float16, seed=102, hidden=64, inter=96, layers=2, heads=4, kv=2, section=[2, 3, 3], theta=1e6,
        eps=1e-5, embed=32, vision_heads=2, depth=2, tied=False, shards=3, language="model.", vision="visual.",
    ),
    "rope-parameters-f32": dict(
        dtype=torch.float32, seed=103, hidden=64, inter=96, layers=3, heads=4, kv=1, section=[4, 2, 2], theta=1e4,
        eps=1e-6, embed=32, vision_heads=2, depth=2, tied=True, shards=1, language="model.language_model.",
        vision="model.visual.",
    ),
}
VOCABULARY = 640
# Largest number of tokens an image may take: small to keep sequences short, different so that they have to be read.
LIMITS = {"flat-tied-bf16": 12, "nested-f16-sharded": 25, "rope-parameters-f32": 16}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def text_keys(v):
    """Keys of the language model that all generations spell alike."""
    return {
        "attention_dropout": 0.0, "bos_token_id": 607, "eos_token_id": 609, "hidden_act": "silu",
        "hidden_size": v["hidden"], "initializer_range": 0.02, "intermediate_size": v["inter"],
        "max_position_embeddings": 4096, "max_window_layers": v["layers"], "num_attention_heads": v["heads"],
        "num_hidden_layers": v["layers"], "num_key_value_heads": v["kv"], "rms_norm_eps": v["eps"], "use_cache": True,
        "use_sliding_window": False, "vocab_size": VOCABULARY,
    }


def config(name, v):
    """config.json of a variant."""
    root = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **IDS}
    if name == "flat-tied-bf16":
        # As the first hub checkpoints: text keys at the root; the vision config leaves out what equals the class
        # defaults (16 heads, MLP ratio 4, patch 14, merge 2, temporal 2, quick_gelu), and keeps two dead keys.
        return root | text_keys(v) | {
            "rope_scaling": {"type": "mrope", "mrope_section": v["section"]}, "rope_theta": v["theta"],
            "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.41.2", "vision_token_id": 612,
            "vision_config": {
                "depth": v["depth"], "embed_dim": v["embed"], "hidden_size": v["hidden"], "in_chans": 3,
                "model_type": "qwen2_vl", "spatial_patch_size": 14,
            },
        }
    vision = {
        "depth": v["depth"], "embed_dim": v["embed"], "hidden_act": "quick_gelu", "hidden_size": v["hidden"],
        "in_channels": 3, "initializer_range": 0.02, "mlp_ratio": 4, "model_type": "qwen2_vl_vision",
        "num_heads": v["vision_heads"], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }
    text = text_keys(v) | {"model_type": "qwen2_vl_text", "layer_types": ["full_attention"] * v["layers"]}
    if name == "nested-f16-sharded":
        text |= {
            "rope_scaling": {"mrope_section": v["section"], "rope_type": "default", "type": "default"},
            "rope_theta": v["theta"], "sliding_window": None, "torch_dtype": "float16",
        }
        return root | {
            "text_config": text, "vision_config": vision, "tie_word_embeddings": False, "torch_dtype": "float16",
            "transformers_version": "4.52.4",
        }
    # The tie flag stands in text_config alone.
    text |= {
        "rope_parameters": {
            "mrope_section": v["section"], "rope_theta": v["theta"], "rope_type": "default", "type": "mrope",
        },
        "dtype": "float32", "sliding_window": None, "tie_word_embeddings": True,
    }
    vision |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}, "dtype": "float32"}
    return root | {"text_config": text, "vision_config": vision, "dtype": "float32", "transformers_version": "5.23.0"}


def tensors(v):
    """Random tensors of a variant under their names on disk, float32."""
    generator = torch.Generator().manual_seed(v["seed"])

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    def linear(name, out, inner, bias, gain=1.0):
        made[name + ".weight"] = normal(out, inner, std=gain * inner**-0.5)
        if bias:
            made[name + ".bias"] = normal(out, std=0.3)

    def norm(name, width, bias=False):
        weight = 1.0 + normal(width, std=0.2)
        weight[torch.randperm(width, generator=generator)[: max(1, width // 32)]] *= 3.0
        made[name + ".weight"] = weight
        if bias:
            made[name + ".bias"] = normal(width, std=0.2)

    made = {}
    d, language, vision = v["hidden"], v["language"], v["vision"]
    made[language + "embed_tokens.weight"] = normal(VOCABULARY, d, std=0.6)
    for layer in range(v["layers"]):
        at = f"{language}layers.{layer}."
        head = d // v["heads"]
        norm(at + "input_layernorm", d)
        norm(at + "post_attention_layernorm", d)
        # A gain above 1 on queries and keys: attention that prefers some tokens to others.
        linear(at + "self_attn.q_proj", d, d, bias=True, gain=1.4)
        linear(at + "self_attn.k_proj", v["kv"] * head, d, bias=True, gain=1.4)
        linear(at + "self_attn.v_proj", v["kv"] * head, d, bias=True)
        linear(at + "self_attn.o_proj", d, d, bias=False)
        linear(at + "mlp.gate_proj", v["inter"], d, bias=False)
        linear(at + "mlp.up_proj", v["inter"], d, bias=False)
        linear(at + "mlp.down_proj", d, v["inter"], bias=False)
    norm(language + "norm", d)
    if not v["tied"]:
        linear("lm_head", VOCABULARY, d, bias=False, gain=1.5)
    e = v["embed"]
    # Normalised pixels have a standard deviation near 1, and 1176 of them.
    made[vision + "patch_embed.proj.weight"] = normal(e, 3, 2, 14, 14, std=1176**-0.5)
    for block in range(v["depth"]):
        at = f"{vision}blocks.{block}."
        norm(at + "norm1", e, bias=True)
        norm(at + "norm2", e, bias=True)
        linear(at + "attn.qkv", 3 * e, e, bias=True, gain=1.2)
        linear(at + "attn.proj", e, e, bias=True)
        linear(at + "mlp.fc1", 4 * e, e, bias=True)
        linear(at + "mlp.fc2", e, 4 * e, bias=True)
    norm(vision + "merger.ln_q", e, bias=True)
    linear(vision + "merger.mlp.0", 4 * e, 4 * e, bias=True)
    linear(vision + "merger.mlp.2", d, 4 * e, bias=True, gain=1.5)
    return made


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_processor(name, folder):
    """Tokenizer, processor and chat-template files, in the style of the variant's generation."""
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TEMPLATE / file, folder / file)
    base = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
        "image_std": STD, "merge_size": 2, "patch_size": 14, "resample": 3, "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
    }
    old = base | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    if name == "flat-tied-bf16":
        write_json(folder / "preprocessor_config.json", old | {"min_pixels": 3136, "max_pixels": LIMITS[name] * 784})
        template = (TEMPLATE / "chat_template.jinja").read_text()
        write_json(folder / "chat_template.json", {"chat_template": template})
        return
    shutil.copyfile(TEMPLATE / "chat_template.jinja", folder / "chat_template.jinja")
    if name == "nested-f16-sharded":
        size = {"shortest_edge": 3136, "longest_edge": LIMITS[name] * 784}
        write_json(folder / "preprocessor_config.json", old | {"size": size})
        return
    processor = json.loads((TEMPLATE / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": 3136, "longest_edge": LIMITS[name] * 784}
    write_json(folder / "processor_config.json", processor)


def write(name):
    """Write one variant's folder and return its stored tensors."""
    v, folder = VARIANTS[name], MODEL / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(name, v))
    write_processor(name, folder)
    stored = {key: value.to(v["dtype"]).contiguous() for key, value in tensors(v).items()}
    if v["shards"] == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return stored
    keys, weight_map = list(stored), {}
    for shard in range(v["shards"]):
        file = f"model-{shard + 1:05}-of-{v['shards']:05}.safetensors"
        # Cut between tensors wherever it falls: a block's tensors may lie in two shards, as on the hub.
        part = keys[shard * len(keys) // v["shards"] : (shard + 1) * len(keys) // v["shards"]]
        save_file({key: stored[key] for key in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return stored


def load(folder, attention="eager"):
    """The float32 model in eval mode and the processor of a checkpoint folder; every tensor must be accounted for."""
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (folder.name, kind, info[kind])
    state = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            key = key.removeprefix("model.").removeprefix("language_model.")
            key = key if key.startswith(("visual.", "lm_head.")) else "language_model." + key
            key = key if key.startswith("lm_head.") else "model." + key
            assert torch.equal(state[key], value.float()), (folder.name, key)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def check_config(name, model, processor):
    """Values that the generations spell differently arrive in transformers as this script means them."""
    v, text, vision = VARIANTS[name], model.config.text_config, model.config.vision_config
    assert text.rope_parameters["rope_theta"] == v["theta"], text.rope_parameters
    assert list(text.rope_parameters["mrope_section"]) == v["section"], text.rope_parameters
    assert text.rms_norm_eps == v["eps"] and text.num_key_value_heads == v["kv"]
    assert vision.num_heads == v["vision_heads"] and vision.mlp_ratio == 4 and vision.patch_size == 14
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == v["tied"]
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, LIMITS[name] * 784), size
