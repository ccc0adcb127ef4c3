"""Qwen2-VL: one variant per generation of config keys, tensor names, storage type and processor files."""

import torch
from transformers import Qwen2VLForConditionalGeneration

from .base import Draw
from .qwen import Qwen


class Qwen2VL(Qwen):
    model_type = "qwen2_vl"
    model_class = Qwen2VLForConditionalGeneration
    processor_class = "Qwen2VLProcessor"
    variants = {
        "flat-tied-bf16": dict(
            generation="flat", dtype=torch.bfloat16, seed=101, hidden=32, inter=64, layers=2, heads=4, kv=4,
            section=[2, 1, 1], theta=1e6, eps=1e-6, embed=64, vision_heads=16, depth=2, tied=True, shards=1,
            language="model.", vision="visual.", limit=12, pixels=True,
        ),
        "nested-f16-sharded": dict(
            generation="nested", dtype=torch.float16, seed=102, hidden=64, inter=96, layers=2, heads=4, kv=2,
            section=[2, 3, 3], theta=1e6, eps=1e-5, embed=32, vision_heads=2, depth=2, tied=False, shards=3,
            language="model.", vision="visual.", limit=25,
        ),
        "rope-parameters-f32": dict(
            generation="parameters", dtype=torch.float32, seed=103, hidden=64, inter=96, layers=3, heads=4, kv=1,
            section=[4, 2, 2], theta=1e4, eps=1e-6, embed=32, vision_heads=2, depth=2, tied=True, shards=1,
            language="model.language_model.", vision="model.visual.", limit=16,
        ),
    }

    def vision_config(self, v, flat):
        if flat:
            # 16 heads, MLP ratio 4, patch 14, merge 2, temporal 2 and quick_gelu are defaults.
            return {
                "depth": v["depth"], "embed_dim": v["embed"], "hidden_size": v["hidden"], "in_chans": 3,
                "model_type": "qwen2_vl", "spatial_patch_size": 14,
            }
        return {
            "depth": v["depth"], "embed_dim": v["embed"], "hidden_act": "quick_gelu", "hidden_size": v["hidden"],
            "in_channels": 3, "initializer_range": 0.02, "mlp_ratio": 4, "model_type": "qwen2_vl_vision",
            "num_heads": v["vision_heads"], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }

    def tensors(self, v):
        draw = Draw(v["seed"])
        draw.decoder(v)
        d, e, vision = v["hidden"], v["embed"], v["vision"]
        # Normalised pixels have a standard deviation near 1, and 1176 of them.
        draw.made[vision + "patch_embed.proj.weight"] = draw.normal(e, 3, 2, 14, 14, std=1176**-0.5)
        for block in range(v["depth"]):
            at = f"{vision}blocks.{block}."
            draw.norm(at + "norm1", e, bias=True)
            draw.norm(at + "norm2", e, bias=True)
            draw.linear(at + "attn.qkv", 3 * e, e, bias=True, gain=1.2)
            draw.linear(at + "attn.proj", e, e, bias=True)
            draw.linear(at + "mlp.fc1", 4 * e, e, bias=True)
            draw.linear(at + "mlp.fc2", e, 4 * e, bias=True)
        draw.norm(vision + "merger.ln_q", e, bias=True)
        draw.linear(vision + "merger.mlp.0", 4 * e, 4 * e, bias=True)
        draw.linear(vision + "merger.mlp.2", d, 4 * e, bias=True, gain=1.5)
        return draw.made

    def check_config(self, name, model, processor):
        super().check_config(name, model, processor)
        assert model.config.vision_config.mlp_ratio == 4
