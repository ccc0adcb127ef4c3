"""Goldens for tests/samples/anyres.rs: what transformers' LLaVA-OneVision processor makes of images.

Run from the repository root: python tests/golden/make_anyres.py
Writes tests/golden/anyres.json:
* layouts: side of the tower's image and of a patch, resolutions, `most` of `anyres_max_N`;
* sizes: (height, width) of an image, the resolution chosen, tokens. Counted by the processor, and asserted to be the length of
  what the model's own packing returns;
* images: for a PNG of calibration/images or model/images alone (`tiled`) and with another one in its sample (`square`), one
  weighted sum over the bytes of each crop, sum of (i mod 65521 + 1) * byte, which no two crops here share, and some of the
  normalised values.
"""

import json
import pathlib

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor,
)
from transformers.image_processing_utils import select_best_resolution

torch.set_num_threads(1)
ROOT = pathlib.Path("tests/golden")
rng = np.random.default_rng(20240806)

REAL = [[h, w] for h in range(384, 2305, 384) for w in range(384, 2305, 384)]
LAYOUTS = {
    "real": dict(side=384, patch=14, resolutions=REAL, most=9),
    # The model trained on single images has the same tower and may keep less.
    "real-max-4": dict(side=384, patch=14, resolutions=REAL[:24], most=4),
    "small": dict(side=48, patch=14, resolutions=[[48, 48], [48, 96], [48, 144], [96, 48], [96, 96], [144, 48]], most=9),
    "even": dict(side=56, patch=14, resolutions=[[56, 112], [112, 56], [112, 112], [168, 168]], most=1),
    "wide": dict(side=45, patch=9, resolutions=[[135, 180], [180, 135], [45, 135], [225, 225], [90, 90]], most=2),
}
KNOWN = [
    (480, 640), (427, 640), (640, 427), (899, 1024), (333, 500), (384, 384), (1080, 1920), (2160, 3840), (100, 2000), (20, 300),
    (1, 1), (1, 200), (200, 1), (768, 768), (769, 768), (383, 385), (2304, 2304), (3000, 2304), (5000, 25), (1536, 1000),
]
IMAGES = [
    ("calibration", "noise-1x150"), ("calibration", "noise-20x300"), ("calibration", "noise-150x90"),
    ("calibration", "noise-29x31"), ("calibration", "smooth-700x420"), ("calibration", "smooth-300x1000"),
    ("model", "blocks-131x50"), ("model", "tall-40x210"), ("model", "gradient-70x42"),
]


def processor(layout):
    side = layout["side"]
    images = LlavaOnevisionImageProcessor(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        image_grid_pinpoints=layout["resolutions"],
    )
    return LlavaOnevisionProcessor(
        image_processor=images, tokenizer=AutoTokenizer.from_pretrained(ROOT / "model/llava-v5-f32"),
        video_processor=LlavaOnevisionVideoProcessor(), num_image_tokens=(side // layout["patch"]) ** 2,
        vision_feature_select_strategy="full", vision_aspect_ratio=f"anyres_max_{layout['most']}",
    )


def packing(layout):
    """The packing of a model of width 2, which has no weights."""
    vision = dict(model_type="siglip_vision_model", hidden_size=2, intermediate_size=2, num_hidden_layers=1,
                  num_attention_heads=1, image_size=layout["side"], patch_size=layout["patch"])
    text = dict(model_type="qwen2", hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1, vocab_size=700)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=layout["resolutions"],
        vision_aspect_ratio=f"anyres_max_{layout['most']}",
    )
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config).model
    newline = torch.zeros(2)

    def length(size, best):
        side, places = layout["side"], (layout["side"] // layout["patch"]) ** 2
        tiles = 1 + best[0] // side * (best[1] // side)
        features = [torch.zeros(tiles, places, 2)]
        packed, _ = model.pack_image_features(
            features, torch.tensor([size]), image_newline=newline, vision_aspect_ratio=config.vision_aspect_ratio
        )
        return len(packed[0])

    return length


def sizes(name, layout):
    made, most = processor(layout), 200 * layout["side"] // 48
    drawn = [tuple(int(n) for n in rng.integers(1, most, 2)) for _ in range(120)]
    length, out = packing(layout), []
    for size in KNOWN + [(h, w) for h, w in drawn if max(h, w) <= 200 * min(h, w)]:
        best = select_best_resolution(list(size), layout["resolutions"])
        tokens = made._get_number_of_features(*size, layout["side"], layout["side"])
        assert tokens == length(size, best), (name, size)
        out.append({"layout": name, "in": size, "best": best, "tokens": tokens})
    return out


def image(name, layout, folder, file):
    picture = Image.open(ROOT / folder / "images" / f"{file}.png").convert("RGB")
    made, row = processor(layout).image_processor, {"layout": name, "file": f"{folder}/images/{file}.png"}
    for key, images in (("tiled", [[picture]]), ("square", [[picture, picture]])):
        values = made(images, return_tensors="pt")["pixel_values"][0].numpy()
        pixels = np.round((values.astype(np.float64) * 0.5 + 0.5) * 255).astype(np.int64)
        assert np.abs((pixels / 255 - 0.5) / 0.5 - values).max() < 1e-6
        # As the bytes of an RGB image: rows, columns, channels.
        pixels = pixels.transpose(0, 2, 3, 1).reshape(len(values), -1)
        weights = np.arange(pixels.shape[1]) % 65521 + 1
        row[key] = [int(crop @ weights) for crop in pixels]
    flat = values.reshape(-1)
    row["picks"] = [[int(i), float(flat[i])] for i in rng.integers(0, flat.size, 16)]
    return row


def main():
    cases = {"layouts": LAYOUTS, "sizes": [], "images": []}
    for name, layout in LAYOUTS.items():
        cases["sizes"] += sizes(name, layout)
    for name in ("real", "small", "wide"):
        for folder, file in IMAGES:
            cases["images"].append(image(name, LAYOUTS[name], folder, file))
    known = {tuple(case["in"]): case["tokens"] for case in cases["sizes"] if case["layout"] == "real"}
    assert [known[size] for size in KNOWN[:10]] == [2929, 2709, 2727, 6551, 1836, 1485, 7269, 7317, 2196, 757]
    (ROOT / "anyres.json").write_text(json.dumps(cases, separators=(",", ":")))
    print(f"{len(cases['sizes'])} sizes, {len(cases['images'])} images")


main()
