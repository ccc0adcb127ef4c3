"""A checkpoint of real width with few blocks and random weights, to measure memory and time on before a long run.

    python benches/wide_checkpoint.py OUT [--hidden 1536 --intermediate 8960 --heads 12 --kv-heads 2 --blocks 3]

The default is Qwen2-VL-2B's block. Tokenizer, processor and vision tower are the small checkpoint's, its merger's output widened.
Weights are bfloat16, normal with variance 1/in, so that activations keep their size. Needs NumPy only.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

SMALL = Path(__file__).resolve().parent.parent / "tests/data/tiny-qwen2-vl"


def bfloat16(values):
    """float32 to the upper halves of its words, rounded to nearest even."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def small_tensors():
    raw = (SMALL / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name.startswith("visual."):
            start, end = entry["data_offsets"]
            words = np.frombuffer(raw[8 + length + start : 8 + length + end], np.uint16)
            yield name, words.reshape(entry["shape"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for flag, default in [("hidden", 1536), ("intermediate", 8960), ("heads", 12), ("kv-heads", 2), ("blocks", 3)]:
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    hidden, inner, blocks = arguments.hidden, arguments.intermediate, arguments.blocks
    head_dim = hidden // arguments.heads
    random = np.random.default_rng(0)

    def weight(rows, cols):
        return bfloat16(random.standard_normal((rows, cols), np.float32) / np.sqrt(cols))

    config = json.loads((SMALL / "config.json").read_text())
    text = config["text_config"]
    text.update(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, head_dim=head_dim,
                num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads)
    text["layer_types"] = ["full_attention"] * blocks
    text["rope_parameters"]["mrope_section"] = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    config["vision_config"]["hidden_size"] = hidden

    tensors = dict(small_tensors())
    merged = tensors["visual.merger.mlp.2.weight"].shape[1]
    tensors["visual.merger.mlp.2.weight"] = weight(hidden, merged)
    tensors["visual.merger.mlp.2.bias"] = bfloat16(np.zeros(hidden))
    ones = bfloat16(np.ones(hidden))
    keys = arguments.kv_heads * head_dim
    for block in range(blocks):
        at = f"model.layers.{block}."
        tensors |= {at + "input_layernorm.weight": ones, at + "post_attention_layernorm.weight": ones}
        for name, rows in [("q", hidden), ("k", keys), ("v", keys)]:
            tensors[f"{at}self_attn.{name}_proj.weight"] = weight(rows, hidden)
            tensors[f"{at}self_attn.{name}_proj.bias"] = bfloat16(np.zeros(rows))
        tensors[at + "self_attn.o_proj.weight"] = weight(hidden, hidden)
        tensors[at + "mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[at + "mlp.down_proj.weight"] = weight(hidden, inner)
    tensors["model.norm.weight"] = ones
    tensors["model.embed_tokens.weight"] = weight(text["vocab_size"], hidden)
    tensors["lm_head.weight"] = weight(text["vocab_size"], hidden)

    arguments.out.mkdir(parents=True)
    for file in SMALL.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, arguments.out / file.name)
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    header, end = {}, 0
    for name, words in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(words.shape), "data_offsets": [end, end + words.nbytes]}
        end += words.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(arguments.out / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for words in tensors.values():
            file.write(words.tobytes())


if __name__ == "__main__":
    main()
