"""Random checkpoints of every family with hub names, wide enough for the servers' attention: heads of 64.

    python tests/servers/make_models.py DIR        (torch, transformers, pillow)

Drawn as the goldens' are (tests/golden/families), from the same seeds.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "golden"))

import model_checkpoints  # noqa: E402
import torch  # noqa: E402
from families import of  # noqa: E402

WIDE = dict(hidden=256, inter=512, heads=4, kv=2, dtype=torch.bfloat16, shards=1)
# A variant to begin with, and what is different.
MODELS = {
    "qwen2_vl": ("flat-tied-bf16", WIDE | dict(section=[8, 12, 12], embed=256)),
    "qwen2_5_vl": ("qwen2_5_vl-flat-bf16", WIDE | dict(section=[8, 12, 12], embed=256, vision_inter=320, window=112)),
    "qwen3_vl": ("qwen3_vl-tied-bf16", WIDE | dict(section=[12, 10, 10], head=64, embed=128, vision_inter=256)),
    "llava_onevision": ("llava-hub-tied-f16", WIDE | dict(dtype=torch.float16)),
}


def main():
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    model_checkpoints.MODEL = target
    for model_type, (base, changes) in MODELS.items():
        family = of(model_type)
        family.variants = {model_type: family.variants[base] | changes}
        model_checkpoints.write(family, model_type)
    shutil.copytree(Path(__file__).resolve().parent.parent / "data/vqa/images", target / "images", dirs_exist_ok=True)
    print(*MODELS)


main()
