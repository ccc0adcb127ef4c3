"""The whole method on a tiny checkpoint in float64: every code of every linear of every block.

Settings: 3 bits, groups of 32, asymmetric min-max grid, act-group order, damping 0.01, α 0.25. Both paths start from the
embeddings (vision features scattered in) that transformers computes in float32. Per block, with g = 1 in block 0:
importance with the block's float weights, then {q,k,v} → {o} → {gate,up} → {down}, each set's statistics from inputs taken
with the sets before it quantized, then both paths advance.

A weight that lies nearly in the middle between two codes may flip with the last bit of float32, and what follows changes
with it: the rest of its row, later sets, later blocks. With most conversations one of 86016 weights does. The four of each
checkpoint were chosen because nothing flips when everything is computed in float32, nor with noise of 1e-6 on the embeddings;
both are asserted. A run with `refit` multiplies the scales of o and down, row by row, by what least squares would add of the layer's output to the
quantized path's stream, given the float path's behind it. The run of gptaq-vlmq also stores what enters blocks 1 and 2, so that blocks can be checked one by one.
"""

import json

import torch

import model_outputs
from families.base import MODEL
from model_grid import dequantize, solve
from model_importance import (
    PROJECTIONS, Norm, cross, hessian, importance, layer_in, leave, linear_inputs, normalise, run, save,
)
from model_outputs import copied, embed, encode, image, text, turn, vqa

SETS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SETTINGS = dict(bits=3, group=32, damp=0.01, alpha=0.25)
NOISE, NOISES = 1e-6, 8
RUNS = [("gptaq", "vlmq", ""), ("gptaq", "none", ""), ("gptq", "vlmq", ""), ("gptq", "none", "")]
# By checkpoint: how its files begin, which conversations of calib.jsonl it sees, which runs it goes through.
PIPELINES = {
    "rope-parameters-f32": ("pipeline", ["calib-0005", "calib-0069"], RUNS + [("gptaq", "vlmq", "refit")]),
    "qwen3_vl-f32": ("qwen3_vl-pipeline", ["calib-0107", "calib-0048"], RUNS[:1] + [("gptq", "vlmq", "refit")]),
}


def calibration(chosen):
    """Four conversations: the two chosen ones of one image, one of two images, one of text alone."""
    two = [
        turn("user", image(copied("images/calib-0010.png")), image("images/blocks-131x50.png"), text("what color is the ring?")),
        turn("assistant", text("yellow")),
    ]
    alone = [turn("user", text("read the digits. then describe a tall bar.")), turn("assistant", text("7 2, orange"))]
    made = [{"id": "two", "messages": two}, {"id": "text", "messages": alone}]
    return vqa("calib.jsonl", chosen) + made


def weight_of(layer, name):
    owner = layer.self_attn if name in PROJECTIONS else layer.mlp
    return getattr(owner, name).weight


def factors(solved, u, x_float, x_quantized):
    """Of each output channel, what its output y is to be multiplied by to be nearest to x_float - x_quantized, within a quarter."""
    y = torch.cat(u) @ solved.T
    wanted = torch.cat(x_float) - torch.cat(x_quantized)
    return ((y * wanted).sum(0) / (y * y).sum(0)).clamp(0.8, 1.25)


def quantize(family, model, samples, solver, weighting, dtype, refit=""):
    """Tensors of all layers, relative errors by layer, and all samples' logits on both paths."""
    tensors, errors = {}, {}
    float_path = [x.to(dtype) for _, _, x, _ in samples]
    quantized_path = list(float_path)
    cos_sin = [family.rotary(model, place, dtype) for _, place, _, _ in samples]
    for index, original in enumerate(model.model.language_model.layers):
        if (solver, weighting, refit) == RUNS[0] and index > 0:
            tensors[f"layers.{index}.x_float"] = torch.cat(float_path).float()
            tensors[f"layers.{index}.x_quantized"] = torch.cat(quantized_path).float()
        before, layer = layer_in(original, dtype), layer_in(original, dtype)
        g = {}
        if weighting == "vlmq" and index > 0:
            made = [importance(layer, *xs)[0] for xs in zip(float_path, quantized_path, cos_sin)]
            g = {name: normalise(torch.cat([sample[name] for sample in made])) for name in PROJECTIONS}
            tensors |= {f"layers.{index}.g_{name[0]}": value for name, value in g.items()}
        streams = [float_path, quantized_path]
        for names in SETS:
            u, f = (
                [linear_inputs(which, x, cs, names) for x, cs in zip(path, cos_sin)]
                for which, path in ((layer, quantized_path), (before, float_path))
            )
            solved = {}
            for name in names:
                u_name, f_name = (torch.cat([sample[name] for sample in inputs]) for inputs in (u, f))
                weights = g.get(name, torch.ones(len(u_name), dtype=dtype))
                h = hessian(u_name, weights)
                c = cross(u_name, f_name, weights) if solver == "gptaq" else None
                weight = weight_of(before, name)
                codes, scales, zeros = solve(weight, h, c, **SETTINGS)
                solved[name] = dequantize(codes, scales, zeros, SETTINGS["group"])
                difference = solved[name] - weight
                if name in ("o_proj", "down_proj"):
                    here, there = ([sample[name] for sample in inputs] for inputs in (u, f))
                    behind = [x + inputs @ weight.T for x, inputs in zip(streams[0], there)]
                    if refit:
                        factor = factors(solved[name], here, behind, streams[1])[:, None]
                        solved[name], scales = solved[name] * factor, scales * factor
                    streams = [behind, [x + inputs @ solved[name].T for x, inputs in zip(streams[1], here)]]
                key = f"layers.{index}.{'self_attn' if name in PROJECTIONS else 'mlp'}.{name}"
                errors[key] = (((difference @ h) * difference).sum() / ((weight @ h) * weight).sum()).item()
                tensors[key + ".codes"], tensors[key + ".zeros"] = codes.to(torch.uint8), zeros.to(torch.uint8)
                tensors[key + ".scales"] = scales.float()
            for name, value in solved.items():
                weight_of(layer, name).data = value
        with torch.no_grad():
            float_path, quantized_path = (
                [leave(run(which, x, cs), levels, index) for x, cs, (*_, levels) in zip(path, cos_sin, samples)]
                for which, path in ((before, float_path), (layer, quantized_path))
            )
    norm, head = Norm(model.model.language_model.norm), model.lm_head.weight.to(dtype)
    norm.weight = torch.nn.Parameter(norm.weight.to(dtype))
    with torch.no_grad():
        logits = [[norm(x) @ head.T for x in path] for path in (float_path, quantized_path)]
    tensors["logits"] = logits[1][-1][-8:].float()
    return tensors, errors, logits


def noisy(samples, seed):
    """The samples with relative noise on their embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def shake(x):
        return x.double() * (1 + NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64))

    return [(key, place, shake(x), levels) for key, place, x, levels in samples]


def write(family, name, model, processor):
    """Write `<files>.jsonl`, `<files>.json` and one `<files>.<solver>-<importance>.safetensors` a run."""
    files, chosen, runs = PIPELINES[name]
    rows, samples, expected = calibration(chosen), [], []
    (MODEL / f"{files}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        inputs = encode(processor, row["messages"])
        samples.append((row["id"], family.positions(model, inputs), *embed(family, model, inputs)[1:]))
        expected.append(model_outputs.forward(model, inputs)[1])
    tokens = [len(x) for _, _, x, _ in samples]
    report = {"checkpoint": name, "tokens": tokens, "settings": SETTINGS, "relative_error": {}}
    lines = []
    for solver, weighting, refit in runs:
        tensors, errors, logits = quantize(family, model, samples, solver, weighting, torch.float64, refit)
        off = max(((x - y).norm() / y.norm()).item() for x, y in zip(logits[0], expected))
        assert off < 1e-5, f"float path differs from transformers by {off}"
        codes = [key for key in tensors if key.endswith(".codes")]
        total = sum(tensors[key].numel() for key in codes)
        others = [quantize(family, model, samples, solver, weighting, torch.float32, refit)[0]]
        others += [
            quantize(family, model, noisy(samples, n), solver, weighting, torch.float64, refit)[0] for n in range(NOISES)
        ]
        for other in others:
            flipped = sum((tensors[key] != other[key]).sum().item() for key in codes)
            assert flipped == 0, f"{solver}-{weighting}: {flipped} of {total} codes flip; choose other conversations"
        key = "-".join(filter(None, (solver, weighting, refit)))
        if refit:
            # What is refitted shows in the scales, and in those of all layers behind.
            tensors = {name: value for name, value in tensors.items() if name.endswith(".scales")}
        save(tensors, f"{files}.{key}.safetensors")
        report["relative_error"][key] = errors
        moved = (logits[1][-1] - logits[0][-1]).norm() / logits[0][-1].norm()
        lines.append(f"{name:22} pipeline {key:10} {total} codes, none flips in float32 or under noise, "
                     f"logits moved by {moved:.3f}")
    (MODEL / f"{files}.json").write_text(json.dumps(report, indent=2) + "\n")
    return lines
