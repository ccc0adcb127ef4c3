"""Random tiny checkpoints of every family (families/), and how transformers loads a checkpoint.

Every tensor is drawn from one seeded generator per variant in the order of its name, so a rerun writes the same bytes.
`load` proves that a folder is a valid checkpoint: transformers must report no missing, unexpected or mismatched tensor, and
every tensor it holds must equal the one in the file.
"""

import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from families.base import MODEL, write_json


def write(family, name):
    """Write one variant's folder and return its stored tensors."""
    v, folder = family.variants[name], MODEL / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", family.config(name))
    family.write_processor(name, folder)
    stored = {key: value.to(v["dtype"]).contiguous() for key, value in family.tensors(v).items()}
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


def load(family, folder, attention="eager"):
    """The float32 model in eval mode and the processor of a checkpoint folder; every tensor must be accounted for."""
    model, info = family.model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (folder.name, kind, info[kind])
    state = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            assert torch.equal(state[family.state_key(key)], value.float()), (folder.name, key)
    return model.eval(), AutoProcessor.from_pretrained(folder)
