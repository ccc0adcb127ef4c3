"""Qwen3-VL, dense: norms of queries and keys, interleaved M-RoPE, interpolated position embeddings, DeepStack on two levels.

One variant as the hub's checkpoints are, one sharded with an output head of its own, one in float32 for the run of the whole
method.
"""

import json

import torch
from transformers import Qwen3VLForConditionalGeneration

from .base import Draw, write_json
from .qwen import Qwen

# Like the hub's: no default system prompt, contents as text or as parts, images counted where that is asked for.
TEMPLATE = """\
{%- set images = namespace(count=0) %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set images.count = images.count + 1 %}
                {%- if add_vision_id %}Picture {{ images.count }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class Qwen3VL(Qwen):
    """Keys of a variant beside those of Qwen: `vision_inter`, `side` (of the grid of learned positions), `deepstack`."""

    model_type = "qwen3_vl"
    model_class = Qwen3VLForConditionalGeneration
    processor_class = "Qwen3VLProcessor"
    patch = 16
    variants = {
        "qwen3_vl-tied-bf16": dict(
            generation="parameters", dtype=torch.bfloat16, seed=301, hidden=64, inter=96, layers=3, heads=6, kv=2, head=16,
            section=[4, 2, 2], theta=5e6, eps=1e-6, embed=32, vision_heads=2, vision_inter=48, depth=3, side=7,
            deepstack=[0, 2], tied=True, shards=1, language="model.language_model.", vision="model.visual.", limit=12,
            brief=True, pixels=True, greedy=True,
        ),
        "qwen3_vl-f16-sharded": dict(
            generation="nested", dtype=torch.float16, seed=302, hidden=64, inter=96, layers=3, heads=4, kv=4, head=24,
            section=[6, 4, 2], theta=1e4, eps=1e-5, embed=48, vision_heads=4, vision_inter=64, depth=3, side=5,
            deepstack=[1, 2], tied=False, shards=3, language="model.language_model.", vision="model.visual.", limit=16,
            brief=True,
        ),
        "qwen3_vl-f32": dict(
            generation="parameters", dtype=torch.float32, seed=303, hidden=64, inter=96, layers=2, heads=6, kv=2, head=16,
            section=[4, 2, 2], theta=5e6, eps=1e-6, embed=16, vision_heads=1, vision_inter=24, depth=2, side=6,
            deepstack=[0, 1], tied=True, shards=1, language="model.language_model.", vision="model.visual.", limit=12,
            brief=True,
        ),
    }

    def config(self, name):
        made, v = super().config(name), self.variants[name]
        text = made["text_config"]
        for key in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
            text.pop(key, None)
        rope = text.get("rope_parameters") or text["rope_scaling"]
        rope.pop("type")
        rope["mrope_interleaved"] = True
        # For this family transformers takes the tie flag at the root alone; the one in text_config is dead.
        text |= {"attention_bias": False, "head_dim": v["head"], "tie_word_embeddings": True}
        return made | {"tie_word_embeddings": v["tied"]}

    def vision_config(self, v, flat):
        # Patch 16, merge 2, temporal 2, three channels and gelu_pytorch_tanh are defaults, which a diffed config leaves out.
        keys = {
            "deepstack_visual_indexes": v["deepstack"], "depth": v["depth"], "hidden_size": v["embed"],
            "intermediate_size": v["vision_inter"], "model_type": "qwen3_vl", "num_heads": v["vision_heads"],
            "num_position_embeddings": v["side"] ** 2, "out_hidden_size": v["hidden"],
        }
        if v["generation"] == "nested":
            return keys
        return keys | {
            "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }

    def write_processor(self, name, folder):
        super().write_processor(name, folder)
        for path in folder.glob("*processor_config.json"):
            made = json.loads(path.read_text())
            made["processor_class"] = self.processor_class
            for part in (made.get("image_processor", made), made.get("video_processor", {})):
                part |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": self.patch}
            if "video_processor" in made:
                made["video_processor"]["video_processor_type"] = "Qwen3VLVideoProcessor"
            write_json(path, made)
        (folder / "chat_template.jinja").write_text(TEMPLATE)

    def check_config(self, name, model, processor):
        super().check_config(name, model, processor)
        v, text, vision = self.variants[name], model.config.text_config, model.config.vision_config
        assert text.head_dim == v["head"] and list(vision.deepstack_visual_indexes) == v["deepstack"]
        assert text.rope_parameters["mrope_interleaved"] and vision.num_position_embeddings == v["side"] ** 2
        assert list(processor.image_processor.image_mean) == [0.5] * 3

    def tensors(self, v):
        draw = Draw(v["seed"])
        draw.decoder(v, qkv_bias=False, qk_norm=True)
        d, e, inner, vision = v["hidden"], v["embed"], v["vision_inter"], v["vision"]
        # Normalised pixels have a standard deviation near 1, and 1536 of them.
        draw.made[vision + "patch_embed.proj.weight"] = draw.normal(e, 3, 2, 16, 16, std=1536**-0.5)
        draw.made[vision + "patch_embed.proj.bias"] = draw.normal(e, std=0.3)
        draw.made[vision + "pos_embed.weight"] = draw.normal(v["side"] ** 2, e, std=0.7)
        for block in range(v["depth"]):
            at = f"{vision}blocks.{block}."
            draw.norm(at + "norm1", e, bias=True)
            draw.norm(at + "norm2", e, bias=True)
            draw.linear(at + "attn.qkv", 3 * e, e, bias=True, gain=1.2)
            draw.linear(at + "attn.proj", e, e, bias=True)
            draw.linear(at + "mlp.linear_fc1", inner, e, bias=True)
            draw.linear(at + "mlp.linear_fc2", e, inner, bias=True)
        mergers = {"merger": e} | {f"deepstack_merger_list.{level}": 4 * e for level in range(len(v["deepstack"]))}
        for merger, normed in mergers.items():
            draw.norm(f"{vision}{merger}.norm", normed, bias=True)
            draw.linear(f"{vision}{merger}.linear_fc1", 4 * e, 4 * e, bias=True)
            draw.linear(f"{vision}{merger}.linear_fc2", d, 4 * e, bias=True, gain=1.5)
        return draw.made

    def features(self, model, inputs):
        vision = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.cat(list(vision.pooler_output)), [torch.cat(list(level)) for level in vision.deepstack_features]
