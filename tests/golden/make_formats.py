"""Golden files for the packed formats: tests/golden/formats/*.safetensors.

    python tests/golden/make_formats.py        (torch, compressed-tensors, safetensors, numpy)

compressed_tensors.safetensors comes from the compressor of the compressed-tensors package itself. gptq.safetensors (version 1) and
gptq_v2.safetensors come from a layout written out here bit by bit: element k of a run is bits k*b .. k*b+b-1 of one
little-endian stream.

Each case NAME holds NAME/codes, NAME/zeros (uint8), NAME/scales (float32), and every tensor of the file under its own name.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

FOLDER = Path(__file__).parent / "formats"


def layer(seed, out, inputs, group, bits, symmetric, smallest_zero, scale_type):
    """Random codes, zeros and scales; every extreme code occurs."""
    random = np.random.default_rng(seed)
    groups = inputs // group
    codes = random.integers(0, 2**bits, (out, inputs), dtype=np.uint8)
    codes[0, :2] = 0, 2**bits - 1
    zeros = random.integers(smallest_zero, 2**bits, (out, groups), dtype=np.uint8)
    zeros[0, 0], zeros[1, 0] = smallest_zero, 2**bits - 1
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = torch.tensor(random.uniform(0.001, 0.1, (out, groups))).to(scale_type).float().numpy()
    return codes, zeros, scales


def compressed_tensors():
    tensors = {}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            # The second size fills no word and no block of 32 evenly, and has one group for the whole row.
            for out, inputs, group in ((40, 96, 32), (5, 37, 37)):
                name = f"w{bits}-{'sym' if symmetric else 'asym'}-{out}x{inputs}"
                codes, zeros, scales = layer(len(tensors), out, inputs, group, bits, symmetric, 0, torch.bfloat16)
                grouped = {"strategy": "group", "group_size": group} if group < inputs else {"strategy": "channel"}
                arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, type="int", **grouped)
                scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
                middle = 2 ** (bits - 1)
                zero = torch.tensor(zeros.astype(np.int32) - middle)
                scale = torch.tensor(scales)
                signed = torch.tensor(codes.astype(np.int32) - middle)
                weight = (signed - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
                state = {"weight": weight, "weight_scale": scale}
                if not symmetric:
                    state["weight_zero_point"] = zero.to(torch.int8)
                packed = PackedQuantizationCompressor.compress(state, scheme)
                packed["weight_scale"] = packed["weight_scale"].to(torch.bfloat16)
                for key, value in packed.items():
                    tensors[f"{name}/{key}"] = value.contiguous()
                tensors[f"{name}/codes"] = torch.tensor(codes)
                tensors[f"{name}/zeros"] = torch.tensor(zeros)
                tensors[f"{name}/scales"] = scale
    save_torch(tensors, FOLDER / "compressed_tensors.safetensors")


def words(values, bits):
    """Packs the first dimension of `values` [n, m] into int32 [n * bits / 32, m], one bit at a time."""
    length, columns = values.shape
    stream = np.zeros((length * bits, columns), dtype=np.uint64)
    for bit in range(bits):
        stream[bit::bits] = (values >> bit) & 1
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
    packed = (stream.reshape(-1, 32, columns) * weights[None, :, None]).sum(axis=1)
    return packed.astype(np.uint32).view(np.int32)


def gptq(file, stored_less):
    tensors = {}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for order in ("none", "act"):
                out, inputs, group = 32, 96, 32
                name = f"w{bits}-{'sym' if symmetric else 'asym'}-{order}"
                codes, zeros, scales = layer(len(tensors), out, inputs, group, bits, symmetric, stored_less, torch.float16)
                index = np.arange(inputs, dtype=np.int32) // group
                if order == "act":
                    index = index[np.random.default_rng(bits).permutation(inputs)]
                tensors[f"{name}/qweight"] = words(codes.T.astype(np.uint64), bits)
                tensors[f"{name}/qzeros"] = np.ascontiguousarray(words(zeros.astype(np.uint64) - np.uint64(stored_less), bits).T)
                tensors[f"{name}/scales16"] = np.ascontiguousarray(scales.T.astype(np.float16))
                tensors[f"{name}/g_idx"] = index
                tensors[f"{name}/codes"] = codes
                tensors[f"{name}/zeros"] = zeros
                tensors[f"{name}/scales"] = scales
    save_numpy(tensors, FOLDER / file)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    compressed_tensors()
    gptq("gptq.safetensors", 1)
    gptq("gptq_v2.safetensors", 0)
