"""SGLang's own classes load a folder on this CPU; the weights that humming's conversion makes of what they loaded are compared with the
folder's, read by plain bit arithmetic.

    python tests/servers/sglang_load.py FOLDER        prints {"not_loaded": [names], "layers": N, "worst": largest relative difference}

As with `--quantization humming`. What is proven: configuration, names, patterns of what is left alone, fused layers, codes, scales and zeros. No
kernel is run, and no answer made.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}

import sglang_stubs  # noqa: E402, F401
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
UNTOUCHED = -123456789


def unpack(words, bits):
    """Codes along the last dimension of int32 words: a little-endian stream of bits."""
    words, codes = words.to(torch.int64) & 0xFFFFFFFF, []
    for place in range(words.shape[-1] * 32 // bits):
        at, offset = divmod(place * bits, 32)
        code = words[..., at] >> offset
        if offset + bits > 32:
            code = code | (words[..., at + 1] << (32 - offset))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, -1)


def weight(code, scale, zero):
    run = code.shape[1] // scale.shape[1]
    return (code - zero.repeat_interleave(run, 1)) * scale.repeat_interleave(run, 1)


class Stored:
    """The folder's tensors, and the weights that they stand for."""

    def __init__(self, folder):
        self.folder = folder
        self.tensors = dict(self.stream())
        self.config = json.loads((folder / "config.json").read_text())["quantization_config"]

    def stream(self):
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)

    def layers(self):
        return sorted({name.rsplit(".", 1)[0] for name in self.tensors if name.endswith((".weight_packed", ".qweight"))})

    def dense(self, layer, dtype):
        """In float32, GPTQ's scales rounded to the model's type, in which SGLang keeps them."""
        tensor = lambda suffix: self.tensors[f"{layer}.{suffix}"]
        if self.config["quant_method"] == "compressed-tensors":
            kind = self.config["config_groups"]["group_0"]["weights"]
            bits, scale = kind["num_bits"], tensor("weight_scale").float()
            zero = torch.full_like(scale, 1 << (bits - 1))
            if not kind["symmetric"]:
                zero = unpack(tensor("weight_zero_point").t().contiguous(), bits).t().float()[: scale.shape[0]]
            return weight(unpack(tensor("weight_packed"), bits).float(), scale, zero)
        bits, less = self.config["bits"], {"gptq": 1, "gptq_v2": 0}[self.config["checkpoint_format"]]
        scale = tensor("scales").to(dtype).float().t()
        zero = unpack(tensor("qzeros"), bits).t().float() + less
        return weight(unpack(tensor("qweight").t().contiguous(), bits).float(), scale, zero)


def load(folder, stored):
    """SGLang's model with the folder's tensors in it, and the names that got none."""
    import sglang.srt.distributed.parallel_state as parallel
    import sglang.srt.server_args as server_args
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
    from sglang.srt.runtime_context import get_parallel

    arguments = server_args.ServerArgs(
        model_path=str(folder), device="cpu", quantization="humming", attention_backend="torch_native", mm_attention_backend="sdpa",
        disable_cuda_graph=True,
    )
    server_args.set_global_server_args_for_scheduler(arguments)
    config = ModelConfig(model_path=str(folder), quantization="humming")
    model_class, _ = get_model_architecture(config)
    meeting = "file://" + tempfile.mktemp()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=meeting)
    parallel.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method=meeting + "-2")
    parallel.initialize_model_parallel()
    for rank in ("tp", "pp", "attn_tp", "attn_dp", "moe_tp", "moe_ep", "dp", "attn_cp", "moe_dp"):
        with contextlib.suppress(Exception):
            get_parallel().override_permanently(**{f"{rank}_rank": 0})
    initialize_dp_attention(server_args=arguments)
    quantization = get_quantization_config(config.quantization).from_config(stored.config)
    quantization.packed_modules_mapping = getattr(model_class, "packed_modules_mapping", None) or {}
    mapper = getattr(model_class, "hf_to_sglang_mapper", None)
    if mapper is not None:
        quantization.apply_weight_name_mapper(mapper)
    with set_default_torch_dtype(config.dtype):
        model = model_class(config=config.hf_config, quant_config=quantization)
    for parameter in model.parameters():
        if parameter.dtype == torch.int32:
            parameter.data.fill_(UNTOUCHED)
        elif parameter.dtype.is_floating_point:
            parameter.data.fill_(float("nan"))
    model.load_weights(stored.stream())

    def untouched(parameter):
        return bool((parameter == UNTOUCHED).all() if parameter.dtype == torch.int32 else torch.isnan(parameter.data.float()).all())

    return model, [name for name, parameter in model.named_parameters() if untouched(parameter)]


def compare(model, stored):
    """How many fused layers there are, and the largest relative difference of a weight."""
    # humming asks for a device before it converts, on whichever one.
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    layers, worst = 0, 0.0
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if type(method).__name__ != "HummingLinearMethod" or module.is_fallback:
            continue
        schema, tensors = method.weight_schema.convert_humming(
            tensors=module.state_dict(), shape_n_stacks=module.output_partition_sizes, shape_k_stacks=[module.input_size_per_partition],
            param_dtype=module.param_dtype,
        )
        bits, scale = schema.b_dtype.num_bits, tensors["weight_scale"].float()
        zero = torch.full_like(scale, 1 << (bits - 1))
        if schema.has_zero_point:
            zero = unpack(tensors["zero_point"].t().contiguous(), bits).t().float()
        theirs = weight(unpack(tensors["weight"], bits).float(), scale, zero)
        block, leaf = re.search(r"layers\.\d+\.", name)[0], name.rsplit(".", 1)[1]
        parts = [next(x for x in stored.layers() if block in x and x.endswith(part)) for part in FUSED.get(leaf, [leaf])]
        ours = torch.cat([stored.dense(part, module.param_dtype) for part in parts])
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
        layers += 1
    return layers, worst


def main():
    folder = Path(sys.argv[1])
    stored = Stored(folder)
    model, left = load(folder, stored)
    layers, worst = compare(model, stored)
    print(json.dumps({"not_loaded": left, "layers": layers, "worst": worst}))


main()
