"""Qwen2.5-VL: attention inside windows that the images do not divide, and full attention in one block."""

import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from .base import Draw
from .qwen import Qwen


class Qwen25VL(Qwen):
    """Further keys of a variant: `vision_inter`, `window` (pixels), `full` (blocks with full attention)."""

    model_type = "qwen2_5_vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = "Qwen2_5_VLProcessor"
    variants = {
        # 8x5 image tokens in windows of 3x3.
        "qwen2_5_vl-flat-bf16": dict(
            generation="flat", dtype=torch.bfloat16, seed=201, hidden=64, inter=96, layers=2, heads=4, kv=2,
            section=[2, 3, 3], theta=1e6, eps=1e-6, embed=64, vision_heads=16, depth=3, tied=True, shards=1,
            language="model.", vision="visual.", limit=45, vision_inter=100, window=84, full=[1], brief=True, pixels=True,
        ),
        # 5x5 image tokens in windows of 4x4, the default.
        "qwen2_5_vl-nested-f16": dict(
            generation="nested", dtype=torch.float16, seed=202, hidden=64, inter=96, layers=2, heads=4, kv=2,
            section=[4, 2, 2], theta=1e6, eps=1e-6, embed=32, vision_heads=2, depth=2, tied=False, shards=3,
            language="model.", vision="visual.", limit=30, vision_inter=36, window=112, full=[1], brief=True,
        ),
    }

    def vision_config(self, v, flat):
        config = {
            "depth": v["depth"], "fullatt_block_indexes": v["full"], "hidden_size": v["embed"],
            "intermediate_size": v["vision_inter"], "out_hidden_size": v["hidden"], "tokens_per_second": 2,
        }
        if flat:
            # 16 heads, patch 14, merge 2, temporal 2 and silu are defaults.
            return config | {
                "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14, "window_size": v["window"],
            }
        return config | {
            "hidden_act": "silu", "in_channels": 3, "initializer_range": 0.02, "model_type": "qwen2_5_vl_vision",
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
            draw.norm(at + "norm1", e)
            draw.norm(at + "norm2", e)
            draw.linear(at + "attn.qkv", 3 * e, e, bias=True, gain=1.2)
            draw.linear(at + "attn.proj", e, e, bias=True)
            draw.linear(at + "mlp.gate_proj", v["vision_inter"], e, bias=True)
            draw.linear(at + "mlp.up_proj", v["vision_inter"], e, bias=True)
            draw.linear(at + "mlp.down_proj", e, v["vision_inter"], bias=True)
        draw.norm(vision + "merger.ln_q", e)
        draw.linear(vision + "merger.mlp.0", 4 * e, 4 * e, bias=True)
        draw.linear(vision + "merger.mlp.2", d, 4 * e, bias=True, gain=1.5)
        return draw.made

    def check_config(self, name, model, processor):
        super().check_config(name, model, processor)
        v, vision = self.variants[name], model.config.vision_config
        assert vision.window_size == v["window"] and list(vision.fullatt_block_indexes) == v["full"]
        assert vision.hidden_size == v["embed"] and vision.out_hidden_size == v["hidden"]

    def draw_images(self, folder):
        """A tall image, several windows high and wide."""
        tall = Image.new("RGB", (200, 330))
        tall.putdata([((x * 5 + y) % 256, (y * y // 40) % 256, (x // 13 * 29 + y // 17 * 41) % 256)
                      for y in range(330) for x in range(200)])
        tall.save(folder / "tall-200x330.png", optimize=True)

    def conversations(self, name):
        image = {"type": "image", "image": "images/tall-200x330.png"}
        question = {"type": "text", "text": "how many digits are there?"}
        return [{"id": "windows", "messages": [
            {"role": "user", "content": [image, question]},
            {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        ]}]
