"""vLLM's path for Humming's kernels on a CPU: everything is vLLM's and humming's own code but the GPU kernel, in whose place stands a
product with the dense weights that humming's own conversion describes.

`install()` before an engine is made. What is proven with it: configuration, names, patterns of what is left alone, fused layers, packed codes
and zeros. What is not: the arithmetic of the kernel.
"""

import torch
import torch.nn.functional as F


def unpack(words, bits):
    """Codes of `bits` bits, low bits first, along the last dimension of int32 words, as humming's pack_weight.cuh stores them."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    assert words.shape[-1] % bits == 0, (words.shape, bits)
    runs = words.reshape(*words.shape[:-1], -1, bits)
    codes = []
    for place in range(32):
        at, offset = divmod(place * bits, 32)
        code = runs[..., at] >> offset
        if offset + bits > 32:
            code = code | (runs[..., at + 1] << (32 - offset))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, -1).reshape(*words.shape[:-1], -1).to(torch.int32)


def dense(schema, tensors, rows, columns, dtype):
    """The weights that a schema of whole codes and its tensors stand for."""
    bits = schema.b_dtype.num_bits
    schema.validate_tensors(dict(tensors), rows, columns, dtype)
    weight = unpack(tensors["weight"], bits).float()
    if schema.has_zero_point:
        zero = unpack(tensors["zero_point"].transpose(-1, -2).contiguous(), bits).transpose(-1, -2).float()
        weight = weight - zero.repeat_interleave(weight.size(-1) // zero.size(-1), -1)
    else:
        weight = weight - (1 << (bits - 1))
    scale = tensors["weight_scale"].float()
    return weight * scale.repeat_interleave(weight.size(-1) // scale.size(-1), -1)


def product(weight, x, bias):
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def install():
    import humming.schema
    import vllm.model_executor.kernels.linear as kernels
    import vllm.model_executor.kernels.linear.mixed_precision.humming as theirs
    import vllm.model_executor.layers.quantization.humming as method
    import vllm.model_executor.layers.quantization.utils.humming.linear as convert
    from vllm.platforms import current_platform
    from vllm.platforms.interface import PlatformEnum

    class Cuda:
        @staticmethod
        def is_cuda():
            return True

    class HummingOnCpu(theirs.HummingLinearKernel):
        @classmethod
        def get_min_capability(cls):
            return -1

        @classmethod
        def can_implement(cls, config):
            # The real one, told that the platform is CUDA.
            real, theirs.current_platform = theirs.current_platform, Cuda
            try:
                return theirs.HummingLinearKernel.can_implement.__func__(cls, config)
            finally:
                theirs.current_platform = real

        def process_weights_after_loading(self, layer):
            # As the real one, up to where it prepares the GPU kernel.
            names = {"weight": self.w_q_name, "weight_scale": self.w_s_name}
            if self.w_zp_name is not None and hasattr(layer, self.w_zp_name):
                names["zero_point"] = self.w_zp_name
            convert.convert_linear_layer_to_humming_standard(layer=layer, name_map=names)
            group = self.config.group_size
            schema = humming.schema.BaseWeightSchema.from_config({
                "quant_method": "humming", "dtype": f"int{self.config.weight_type.size_bits}",
                "group_size": 0 if group == -1 else group, "has_zero_point": self.config.zero_points,
            })
            columns = getattr(layer, "input_size_per_partition", None) or layer.input_size
            schema, tensors = schema._convert_humming(
                dict(layer.named_parameters(recurse=False)), layer.output_partition_sizes, [columns], layer.params_dtype
            )
            layer.dense = dense(schema, tensors, sum(layer.output_partition_sizes), columns, layer.params_dtype)

        def apply_weights(self, layer, x, bias=None):
            return product(layer.dense, x, bias)

    def after_loading(self, layer):
        if layer.is_fallback:
            return
        schema, tensors = self.weight_schema._convert_humming(
            layer.state_dict(), layer.output_partition_sizes, [layer.input_size_per_partition], layer.param_dtype
        )
        rows = layer.output_partition_sizes_sum
        layer.dense = dense(schema, tensors, rows, layer.input_size_per_partition, layer.param_dtype)

    kernels._POSSIBLE_KERNELS[PlatformEnum.CPU] = [HummingOnCpu]
    method.HummingLinearMethod.process_weights_after_loading = after_loading
    method.HummingLinearMethod.apply = lambda self, layer, x, bias=None: product(layer.dense, x, bias)
    supported = getattr(current_platform, "supported_quantization", None)
    if supported and "humming" not in supported:
        supported.append("humming")
