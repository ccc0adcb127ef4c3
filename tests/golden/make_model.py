"""Make the goldens of the model and of the whole method: `python tests/golden/make_model.py`.

Random tiny checkpoints of every family (families/, model_checkpoints.py), what transformers computes for them and for the two trained checkpoints in
tests/data (model_outputs.py), importance factors and statistics by autograd (model_importance.py), and a float64 run of
the whole method (model_pipeline.py). Everything lands in tests/golden/model; README.md beside this script names every
tensor. Seeded and on one thread: a rerun on one machine writes the same bytes.
"""

import os
import time

import torch

import model_importance
import model_outputs
import model_pipeline
import families
from families.base import DATA, MODEL
from model_checkpoints import load, write

TRAINED = ["tiny-qwen2-vl", "tiny-qwen2-vl-narrow"]


def main():
    started, lines = time.time(), []
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model_outputs.draw_images()
    for family in families.FAMILIES:
        for name in family.variants:
            write(family, name)
            model, processor = load(family, MODEL / name)
            family.check_config(name, model, processor)
            sequences = model_outputs.write(family, name, model, processor, trained=False)
            lines.append(f"{name:22} tokens {[len(x) for _, _, x, _ in sequences]}")
            lines += model_importance.write(family, name, model, sequences)
            if name in model_pipeline.PIPELINES:
                lines += model_pipeline.write(family, name, model, processor)
    for name in TRAINED:
        family = families.of("qwen2_vl")
        model, processor = load(family, DATA / name)
        sequences = model_outputs.write(family, name, model, processor, trained=True)
        lines.append(f"{name:22} tokens {[len(x) for _, _, x, _ in sequences]}")
    print("\n".join(lines))
    total = 0
    for path in sorted(p for p in MODEL.rglob("*") if p.is_file()):
        # safetensors writes files that only their owner may read.
        os.chmod(path, 0o644)
        size = path.stat().st_size
        total += size
        assert size < 1_000_000, (path, size)
        if size > 50_000:
            print(f"{size:9} {path.relative_to(MODEL)}")
    assert total < 6_000_000 * len(families.FAMILIES), total
    print(f"{total:9} bytes in all, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
