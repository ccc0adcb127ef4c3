"""Other people's software loads what vlmq-run writes, and computes what vlmq computes.

    python tests/interop/check.py --float MODEL --output DIR --dump FILE [--output DIR --dump FILE ...]

MODEL is the float checkpoint that every DIR was quantized from. FILE is what dump_logits.rs beside this script writes for DIR:

    sample.N.input_ids       I64 [tokens]
    sample.N.positions       I64 [3, tokens]
    sample.N.NAME            whatever the model's forward takes besides, as it takes it; for images of their own resolution
                             pixel_values F32 [patches, values] and image_grid_thw I64 [images, 3], for tiles
                             pixel_values F32 [images, crops, 3, side, side], image_sizes I64 [images, 2] and
                             batch_num_images I64 [1]
    sample.N.logits          F32 [tokens, vocabulary] ours, in float32
    codes.MODULE             U8  [out, in]            ours; these four for packed formats only, MODULE as in the file
    scales.MODULE            F32 [out, groups]
    zeros.MODULE             U8  [out, groups]
    groups.MODULE            I32 [in]                 group of every column

Checked for every DIR:
 1. packed files, unpacked here by plain bit arithmetic, hold exactly our codes, scales, zeros and groups;
 2. the float model in float32 with the weights that these stand for gives our logits;
 3. every call of transformers that vlmq-run names for the file (report.json) loads it, all of it, and gives our logits:
    with compressed-tensors (asymmetric files with dequantize=True), with gptqmodel, plainly for dequantized files;
 4. what the output says of itself holds (record.py): checksums, errors of weights, and the programs of its model card.

Relative difference of logits: |a - b| / |b| over all tokens of all samples, at most 1e-3. With dequantize=True the package
multiplies in the dtype of the scales, which rounds each weight once more; that this is all it does is checked to the bit.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""
# gptqmodel compiles a forward pass for every layer, for minutes, where one pass is wanted.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import record
import torch
from record import Mismatch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig, GPTQConfig

TOLERANCE = 1e-3


def read(folder):
    """All tensors of a folder as torch tensors."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def unpack(words, bits, count):
    """int32 [words, columns] to [count, columns]: element k is bits k*bits .. k*bits+bits-1 of its column's stream."""
    words = words.view(np.uint32)
    stream = ((words[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1).reshape(-1, words.shape[1])
    fields = stream[: count * bits].reshape(count, bits, -1)
    return (fields << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(axis=1).astype(np.int64)


def gptq_layers(tensors, config):
    """Codes, scales, zeros and groups of every layer of a GPTQ file."""
    bits, less = config["bits"], {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    for name in [name[: -len(".qweight")] for name in tensors if name.endswith(".qweight")]:
        groups = tensors[f"{name}.g_idx"].numpy().astype(np.int64)
        scales = tensors[f"{name}.scales"].float().numpy().T
        codes = unpack(tensors[f"{name}.qweight"].numpy(), bits, len(groups)).T
        packed = np.ascontiguousarray(tensors[f"{name}.qzeros"].numpy().T)
        yield name, codes, scales, unpack(packed, bits, len(codes)) + less, groups


def compressed_layers(tensors, config):
    """The same of a compressed-tensors file."""
    (group,) = config["config_groups"].values()
    bits, symmetric = group["weights"]["num_bits"], group["weights"]["symmetric"]
    for name in [name[: -len(".weight_packed")] for name in tensors if name.endswith(".weight_packed")]:
        out, inputs = tensors[f"{name}.weight_shape"].tolist()
        scales = tensors[f"{name}.weight_scale"].float().numpy()
        packed = np.ascontiguousarray(tensors[f"{name}.weight_packed"].numpy().T)
        codes = unpack(packed, bits, inputs).T
        if symmetric:
            zeros = np.full(scales.shape, 2 ** (bits - 1))
        else:
            zeros = unpack(tensors[f"{name}.weight_zero_point"].numpy(), bits, out)
        if f"{name}.weight_g_idx" in tensors:
            groups = tensors[f"{name}.weight_g_idx"].numpy().astype(np.int64)
        else:
            groups = np.arange(inputs) // (inputs // scales.shape[1])
        yield name, codes, scales, zeros, groups


def check_codes(layers, dump):
    """Compares the layers with the dumped ones to the bit; returns their weights by name."""
    weights = {}
    for name, codes, scales, zeros, groups in layers:
        for key, found in (("codes", codes), ("scales", scales), ("zeros", zeros), ("groups", groups)):
            ours = dump[f"{key}.{name}"].numpy()
            if not np.array_equal(found, ours):
                raise Mismatch(f"{key} of {name} differ in {np.mean(found != ours):.3%} of places")
        weight = scales[:, groups] * (codes - zeros[:, groups]).astype(np.float32)
        weights[f"{name}.weight"] = torch.from_numpy(weight)
    dumped = {f"{name[len('codes.'):]}.weight" for name in dump if name.startswith("codes.")}
    if not weights or dumped != set(weights):
        raise Mismatch(f"the file holds {len(weights)} quantized layers, the dump {len(dumped)}")
    return weights


def load(folder, **arguments):
    """Loads a model in float32 on the CPU; no tensor may be missing, left over or of another shape."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **arguments
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise Mismatch(f"{kind}: {sorted(info[kind])[:5]}")
    return model.eval()


def difference(model, dump):
    """Relative difference of logits over all dumped samples."""
    samples = sorted({name.split(".")[1] for name in dump if name.startswith("sample.")}, key=int)
    if not samples:
        raise Mismatch("the dump holds no samples")
    apart = size = 0.0
    for sample in samples:
        at = f"sample.{sample}."
        inputs = {name[len(at):]: value for name, value in dump.items() if name.startswith(at)}
        ours, positions = inputs.pop("logits").double(), inputs.pop("positions")
        # Three axes where the model has them.
        positions = positions[:, None] if hasattr(model.model, "get_rope_index") else positions[:1]
        inputs |= {"input_ids": inputs["input_ids"][None], "position_ids": positions}
        with torch.no_grad():
            theirs = model(**inputs).logits[0].double()
        apart += (theirs - ours).square().sum().item()
        size += ours.square().sum().item()
    return (apart / size) ** 0.5


def named_calls(folder):
    """Keyword arguments of the calls of transformers that vlmq-run prints for a folder, by the loader's name."""
    loaders = json.loads((Path(folder) / "report.json").read_text())["loaders"]
    names = {
        "AutoModelForImageTextToText": SimpleNamespace(from_pretrained=lambda folder, **arguments: arguments),
        "CompressedTensorsConfig": CompressedTensorsConfig,
        "GPTQConfig": GPTQConfig,
    }
    return {
        loader["name"]: eval(loader["command"], names)
        for loader in loaders
        if loader["name"].startswith("transformers")
    }


def parameter_of(model, name):
    """The parameter that the file calls `name`; files and classes differ in the prefix."""
    tail = name[name.index("layers.") :]
    (found,) = [value for key, value in model.named_parameters() if key.endswith(f"language_model.{tail}")]
    return found.data


def check(float_folder, folder, dump):
    """Runs all checks of one output; returns lines that say what was found."""
    config = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config")
    method = config["quant_method"] if config else None
    found = []

    def compare(what, model):
        apart = difference(model, dump)
        if not apart <= TOLERANCE:
            raise Mismatch(f"{what}: logits differ by {apart:.1e}, more than {TOLERANCE}")
        found.append(f"{what}: logits differ by {apart:.1e}")

    calls, weights = named_calls(folder), {}
    if method is not None:
        layers = {"gptq": gptq_layers, "compressed-tensors": compressed_layers}[method]
        tensors = read(folder)
        weights = check_codes(layers(tensors, config), dump)
        found.append(f"{len(weights)} layers unpack to exactly our codes, scales, zeros and groups")
        model = load(float_folder)
        for name, weight in weights.items():
            parameter_of(model, name).copy_(weight)
        compare("weights by bit arithmetic, in transformers", model)

    # The one file that transformers does not load: compressed-tensors 0.20 refuses a weight_g_idx.
    index = method == "compressed-tensors" and any(name.endswith(".weight_g_idx") for name in tensors)
    if bool(calls) == index:
        raise Mismatch(f"vlmq-run names {sorted(calls) or 'no call of transformers'}")
    for loader, arguments in calls.items():
        model = load(folder, **arguments)
        dequantized = getattr(arguments.get("quantization_config"), "dequantize", False)
        for name, weight in weights.items() if dequantized else ():
            rounded = weight.to(tensors[f"{name}_scale"].dtype).float()
            if not torch.equal(parameter_of(model, name), rounded):
                raise Mismatch(f"dequantize=True does not load {name} as our weight in the dtype of its scales")
        compare(f"{loader}{', dequantize=True' if dequantized else ''}", model)
    if index:
        found.append("vlmq-run names no call of transformers: compressed-tensors 0.20 refuses weight_g_idx")
    return found + record.check(folder, float_folder, weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float", required=True, help="the float checkpoint")
    parser.add_argument("--output", action="append", required=True, help="a folder that vlmq-run wrote")
    parser.add_argument("--dump", action="append", required=True, help="what dump_logits wrote for it, in this order")
    arguments = parser.parse_args()
    if len(arguments.output) != len(arguments.dump):
        parser.error("as many --dump as --output, please")
    torch.set_num_threads(1)
    # Loaders talk on stdout; that is for results.
    results, sys.stdout = sys.stdout, sys.stderr

    failed = 0
    for folder, dump in zip(arguments.output, arguments.dump):
        with safe_open(dump, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        try:
            for line in check(arguments.float, folder, tensors):
                print(f"ok      {Path(folder).name}: {line}", file=results, flush=True)
        # Whatever a loader raises is this check's failure, and the other outputs are still worth a look.
        except Exception as error:
            failed += 1
            print(f"FAILED  {Path(folder).name}: {type(error).__name__}: {error}", file=results, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
