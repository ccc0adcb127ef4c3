"""Importance factors and statistics of one decoder block, from their definitions, by PyTorch autograd.

Per sample, with block inputs X_F (float path) and X_U (quantized path) and Attn(X) = X + o_proj(attention(rmsnorm(X))):
L = ‖Attn(X_F) − Attn(X_U)‖²_F, and g_n of a projection is the mean over its output channels of |∂L/∂Z|, Z being the
projection's output with its bias, before the rotary embedding.

Nothing of the backward pass is written by hand: the modules are those of transformers and autograd gives the gradients.
Choices where the definition leaves one:

* float64 means that weights, activations, norms and attention are float64 (transformers' norm and eager attention would
  fall back to float32 inside, so the norm is replaced by one that does not, and the attention is PyTorch's). The cosines
  and sines of the rotary embedding stay those that transformers computes in float32: they define the model.
* Inputs that are stored are rounded to float32 first and used as stored.
* Factors of samples are stored unnormalised, one sample after the other.
"""

import copy

import torch
from safetensors.torch import save_file
from torch import nn

from families.base import MODEL
from model_grid import round_to_nearest

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCK = 1
MOST_TOKENS = 80


class Norm(nn.Module):
    """RMSNorm in the precision of its input."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def layer_in(layer, dtype):
    """A copy of a decoder layer whose whole arithmetic is of `dtype`, attention by PyTorch."""
    layer = copy.deepcopy(layer)
    for owner in (layer, layer.self_attn):
        for name, module in list(owner.named_children()):
            if hasattr(module, "variance_epsilon"):
                setattr(owner, name, Norm(module))
    layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    layer.self_attn.config._attn_implementation = "sdpa"
    return layer.to(dtype).requires_grad_(False)


def attention(layer, x, cos_sin):
    """Attn(X) of one sample [tokens, hidden]; without a mask PyTorch's attention is causal here."""
    normed = layer.input_layernorm(x[None])
    return x + layer.self_attn(normed, attention_mask=None, position_embeddings=cos_sin)[0][0]


def run(layer, x, cos_sin):
    """The whole block on one sample [tokens, hidden]."""
    return layer(x[None], attention_mask=None, position_embeddings=cos_sin)[0]


def leave(x, levels, index):
    """What leaves block `index` on either path: DeepStack's features are added behind the first blocks."""
    return x + levels[index].to(x.dtype) if index < len(levels) else x


def importance(layer, x_float, x_quantized, cos_sin):
    """Unnormalised factors {projection: [tokens]} and the loss of one sample."""
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, out):
            out.retain_grad()
            outputs[name] = out

        return hook

    with torch.no_grad():
        target = attention(layer, x_float, cos_sin)
    hooks = [getattr(layer.self_attn, name).register_forward_hook(keep(name)) for name in PROJECTIONS]
    leaf = x_quantized.clone().requires_grad_()
    loss = (target - attention(layer, leaf, cos_sin)).pow(2).sum()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: outputs[name].grad[0].abs().mean(-1) for name in PROJECTIONS}, loss.detach()


def normalise(g):
    """mean(g²) = 1 over the calibration set; all zero means that every token counts alike."""
    return torch.ones_like(g) if not g.any() else g / g.pow(2).mean().sqrt()


def linear_inputs(layer, x, cos_sin, names):
    """Inputs [tokens, in] of the named linears while the block runs on one sample."""
    found = {}
    hooks = []
    for name in names:
        owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        hook = lambda _module, inputs, key=name: found.__setitem__(key, inputs[0][0].detach())
        hooks.append(getattr(owner, name).register_forward_pre_hook(hook))
    with torch.no_grad():
        run(layer, x, cos_sin)
    for hook in hooks:
        hook.remove()
    return found


def hessian(u, g):
    """H = Σ g² u uᵀ."""
    return (u * g[:, None].pow(2)).T @ u


def cross(u, f, g):
    """C = Σ g² (f − u) uᵀ."""
    return ((f - u) * g[:, None].pow(2)).T @ u


def structured(x, seed):
    """A perturbation as quantization makes them: of low rank, larger in a few channels and at a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = x.shape
    left = torch.randn(tokens, 3, generator=generator)
    right = torch.randn(3, width, generator=generator)
    right[:, torch.randperm(width, generator=generator)[:3]] *= 5.0
    left[torch.randperm(tokens, generator=generator)[:2]] *= 6.0
    return x + (0.01 * left @ right).to(x.dtype)


def write(family, name, model, sequences):
    """Write `<name>.importance.safetensors` and, unless the variant is brief, `<name>.statistics.safetensors`; returns lines
    for the summary."""
    samples = [s for s in sequences if s[0] in ("eval-0002", "two-images", "tiny-image")]
    layers = model.model.language_model.layers
    rounded = layer_in(layers[0], torch.float64)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = round_to_nearest(module.weight, bits=3, group=32)
    before, block = layer_in(layers[0], torch.float64), layer_in(layers[BLOCK], torch.float64)
    block32 = layer_in(layers[BLOCK], torch.float32)
    tensors = {"lengths": torch.tensor([len(x) for _, _, x, _ in samples], dtype=torch.int32)}
    tensors["position_ids"] = torch.cat([place for _, place, _, _ in samples], 1).int()
    inputs = {"x_float": [], "structured": [], "rounded": []}
    for index, (_, place, embeddings, levels) in enumerate(samples):
        assert len(embeddings) <= MOST_TOKENS
        cos_sin, x = family.rotary(model, place, torch.float64), embeddings.double()
        with torch.no_grad():
            for path, layer in (("x_float", before), ("rounded", rounded)):
                inputs[path].append(leave(run(layer, x, cos_sin), levels, 0).float())
        inputs["structured"].append(structured(inputs["x_float"][-1], seed=index))
    tensors["x_float"] = torch.cat(inputs["x_float"])
    lines = []
    for kind in ("structured", "rounded"):
        tensors[f"{kind}.x_quantized"] = torch.cat(inputs[kind])
        results = {torch.float64: [], torch.float32: []}
        for (_, place, _, _), x_float, x_quantized in zip(samples, inputs["x_float"], inputs[kind]):
            for dtype, layer in ((torch.float64, block), (torch.float32, block32)):
                pair = x_float.to(dtype), x_quantized.to(dtype)
                results[dtype].append(importance(layer, *pair, family.rotary(model, place, dtype)))
        tensors[f"{kind}.loss"] = torch.stack([loss for _, loss in results[torch.float64]])
        worst = 0.0
        for projection in PROJECTIONS:
            g, g32 = (torch.cat([made[projection] for made, _ in results[t]]) for t in results)
            tensors[f"{kind}.g_{projection[0]}"], tensors[f"{kind}.g_{projection[0]}_f32"] = g, g32
            worst = max(worst, ((g32 - g).abs().max() / g.abs().max()).item())
        lines.append(f"{name:22} importance {kind:10} loss {tensors[f'{kind}.loss'].sum():9.3f}  "
                     f"float32 off by {worst:.1e} of the largest")
    save(tensors, f"{name}.importance.safetensors")
    if not family.variants[name].get("brief"):
        write_statistics(family, name, model, block, samples, inputs, tensors)
    return lines


def write_statistics(family, name, model, block, samples, inputs, made):
    """Statistics of block 1 with float weights in every linear, both paths' inputs being X_F and the rounded X_U."""
    names = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    found = {"u": [], "f": []}
    for (_, place, _, _), x_float, x_quantized in zip(samples, inputs["x_float"], inputs["rounded"]):
        cos_sin = family.rotary(model, place, torch.float64)
        found["u"].append(linear_inputs(block, x_quantized.double(), cos_sin, names))
        found["f"].append(linear_inputs(block, x_float.double(), cos_sin, names))
    tensors = {}
    for linear in names:
        u, f = (torch.cat([sample[linear] for sample in found[path]]) for path in ("u", "f"))
        attention_side = linear in PROJECTIONS
        g = normalise(made[f"rounded.g_{linear[0]}"]) if attention_side else torch.ones(len(u), dtype=torch.float64)
        if linear == "q_proj":
            u, f, g = (t.float().double() for t in (u, f, g))
            tensors |= {"q_proj.u": u.float(), "q_proj.f": f.float(), "q_proj.g": g.float()}
        h, c = hessian(u, g), cross(u, f, g)
        if linear == "q_proj":
            tensors |= {"q_proj.h": h, "q_proj.c": c}
        tensors[f"{linear}.h_diagonal"], tensors[f"{linear}.c_row_sums"] = h.diagonal(), c.sum(1)
        tensors[f"{linear}.norms"] = torch.stack([h.norm(), c.norm()])
    save(tensors, f"{name}.statistics.safetensors")


def save(tensors, file):
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, MODEL / file)
