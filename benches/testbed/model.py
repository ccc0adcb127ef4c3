"""SmolLM2-135M-Instruct behind a small vision tower, as a checkpoint in Hugging Face's Qwen2-VL format."""

import json

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ADDED = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION = dict(
    depth=2,
    embed_dim=128,
    num_heads=4,
    mlp_ratio=4,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    hidden_act="quick_gelu",
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# A head has 32 pairs of dimensions: for time, height and width of a position.
SECTIONS = [8, 12, 12]
# SmolLM2's own, with Qwen2-VL's markers around pictures.
TEMPLATE = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path):
    """Metadata and float32 tensors."""
    reader = GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    return meta, {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}


def unpermute(weight, heads):
    """llama.cpp interleaves the two halves of a head that rotary positions turn; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def language_tensors(meta, tensors):
    """Under Hugging Face's names (below `model.`) and in its layout, with rows for the tokens that are added."""
    table = tensors["token_embd.weight"]
    mean = table.astype(np.float64).mean(0, keepdims=True).astype(np.float32)
    out = {
        "embed_tokens.weight": np.concatenate([table, np.repeat(mean, len(ADDED), 0)]),
        "norm.weight": tensors["output_norm.weight"],
    }
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    for name, value in tensors.items():
        if name.startswith("blk."):
            _, block, kind, _ = name.split(".")
            if kind in heads:
                value = unpermute(value, heads[kind])
            out[f"layers.{block}.{NAMES[kind]}.weight"] = value
            # The format has biases there, the model none.
            if kind in ("attn_q", "attn_k", "attn_v"):
                out[f"layers.{block}.{NAMES[kind]}.bias"] = np.zeros(len(value), np.float32)
    return out


def tokenizer(meta):
    """SmolLM2's byte-level BPE: digits one by one, then GPT-2's pattern; the vision markers behind its tokens."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    result.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == 3]
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + ADDED])
    return result


def to_bf16(values):
    """float32 to bfloat16, nearest even, as the bits' uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path, tensors):
    """Tensors of bfloat16 (as uint16), in the order given."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.tobytes())


def read_safetensors(path):
    """Tensors of bfloat16, as uint16."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    assert all(entry["dtype"] == "BF16" for entry in header.values()), f"{path} has other types than bfloat16"
    return {
        name: np.frombuffer(data[start:], np.uint16)[entry["data_offsets"][0] // 2 : entry["data_offsets"][1] // 2].reshape(entry["shape"])
        for name, entry in header.items()
    }


def config(meta, ids, rows):
    bos, eos = ids["<|im_start|>"], ids["<|im_end|>"]
    width, theta = meta["llama.embedding_length"], float(meta["llama.rope.freq_base"])
    text = dict(
        model_type="qwen2_vl_text",
        dtype="bfloat16",
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        hidden_act="silu",
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_theta=theta,
        # Under the names of transformers 5, and of 4.
        rope_parameters={"mrope_section": SECTIONS, "rope_theta": theta, "rope_type": "default", "type": "mrope"},
        rope_scaling={"mrope_section": SECTIONS, "rope_type": "default", "type": "mrope"},
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=None,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    vision = dict(VISION, model_type="qwen2_vl_vision", dtype="bfloat16", hidden_size=width, initializer_range=0.02)
    return dict(
        architectures=["Qwen2VLForConditionalGeneration"],
        model_type="qwen2_vl",
        dtype="bfloat16",
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=text,
        vision_config=vision,
    )


def preprocessor():
    pixels = {"min_pixels": 56 * 56, "max_pixels": 256 * 28 * 28}
    return dict(
        image_processor_type="Qwen2VLImageProcessor",
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=MEAN,
        image_std=STD,
        **pixels,
        size=dict(shortest_edge=pixels["min_pixels"], longest_edge=pixels["max_pixels"]),
        merge_size=2,
        patch_size=14,
        temporal_patch_size=2,
        resample=3,
        rescale_factor=1 / 255,
        processor_class="Qwen2VLProcessor",
    )


def write(out, gguf, tower):
    """The checkpoint's folder, which must not exist. `tower`: bfloat16 tensors by name; without any, the language model alone."""
    out.mkdir(parents=True)
    meta, tensors = read_gguf(gguf)
    words = tokenizer(meta)
    ids = {token: words.token_to_id(token) for token in ["<|im_start|>", "<|im_end|>", *ADDED]}
    language = language_tensors(meta, tensors)
    rows = len(language["embed_tokens.weight"])
    # Markers stand behind all tokens that the embedding had.
    assert [ids[token] for token in ADDED] == list(range(rows - len(ADDED), rows)), ids
    weights = {f"model.{name}": to_bf16(value) for name, value in language.items()} | tower
    write_safetensors(out / "model.safetensors", dict(sorted(weights.items())))
    words.save(str(out / "tokenizer.json"))
    start, end = "<|im_start|>", "<|im_end|>"
    files = {
        "config.json": config(meta, ids, rows),
        "generation_config.json": dict(bos_token_id=ids[start], eos_token_id=[ids[end]], pad_token_id=ids[end]),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=start,
            eos_token=end,
            pad_token=end,
            unk_token="<|endoftext|>",
            model_max_length=meta["llama.context_length"],
            clean_up_tokenization_spaces=False,
            processor_class="Qwen2VLProcessor",
        ),
        "preprocessor_config.json": preprocessor(),
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE)
