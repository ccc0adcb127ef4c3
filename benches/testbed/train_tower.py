#!/usr/bin/env python3
"""Trains the vision tower: each merged token is to be the language model's own embedding of the word under it.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/testbed/train_tower.py MODEL OUT.safetensors [--steps 450] [--start TOWER.safetensors]

MODEL is a checkpoint that make.py made, whose embeddings and tokenizer are used. Half an hour on one core. tower.safetensors was
trained in two goes, the first with a class for each digit and word, so that this makes a tower like it, not the same bytes.
"""

import argparse
import math
import time
from pathlib import Path

import model as checkpoint
import numpy as np
import pictures
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

BATCH = 8
# Pictures that were held out, and two goes of training: none of data.py's seeds.
HELD_OUT, FIRST, SECOND = 8, 7, 17
# The first classes are grounds.
GROUNDS = len(pictures.GROUNDS)


def attention(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """The tower's attention over pictures of one size, as one batch: transformers' takes them one by one."""
    n, length = hidden_states.shape[0], int(cu_seqlens[1])
    a, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    cos, sin = (p.unsqueeze(-2) for p in position_embeddings)
    a, k = (x * cos + qwen.rotate_half(x) * sin for x in (a, k))
    a, k, v = (x.reshape(n // length, length, self.num_heads, -1).transpose(1, 2) for x in (a, k, v))
    return self.proj(F.scaled_dot_product_attention(a, k, v).transpose(1, 2).reshape(n, -1))


def new_tower(width):
    qwen.VisionAttention.forward = attention
    # A convolution whose stride is its kernel is a product.
    qwen.PatchEmbed.forward = lambda self, x: F.linear(x, self.proj.weight.reshape(self.embed_dim, -1))
    config = Qwen2VLVisionConfig(**checkpoint.VISION, hidden_size=width, initializer_range=0.02)
    tower = qwen.Qwen2VisionTransformerPretrainedModel._from_config(config)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.dim() > 1:
                share = 0.1 if name == "merger.mlp.2.weight" else 1
                torch.nn.init.trunc_normal_(weight, std=share / math.sqrt(weight[0].numel()))
    return tower


def patches(image):
    """As Qwen2-VL's image processor makes them of a picture that needs no resizing."""
    a = ((np.asarray(image, np.float32) / 255 - np.float32(checkpoint.MEAN)) / np.float32(checkpoint.STD)).transpose(2, 0, 1)
    h, w = a.shape[1] // 28, a.shape[2] // 28
    a = a[None].repeat(2, 0).reshape(1, 2, 3, h, 2, 14, w, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return a.reshape(h * w * 4, -1)


def batch(r):
    size = pictures.SIZES[r.choice(len(pictures.SIZES), p=pictures.SHARES)]
    made = [pictures.picture(r, size) for _ in range(BATCH)]
    grid = torch.tensor([[1, 2 * size[1], 2 * size[0]]] * BATCH)
    x = torch.tensor(np.concatenate([patches(image) for image, _, _ in made]))
    return x, grid, torch.tensor(np.concatenate([labels for _, labels, _ in made]))


def word_targets(folder):
    """What each class of token is to become: `[classes, hidden]`."""
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [words.encode(" " + word).ids for word in pictures.VOCABULARY]
    assert all(len(i) == 1 for i in ids), "a word is of several tokens"
    table = checkpoint.read_safetensors(folder / "model.safetensors")["model.embed_tokens.weight"]
    table = torch.tensor(checkpoint.from_bf16(table))
    targets = table[[i[0] for i in ids]]
    # A bare ground is a comma with a trace of its color: fifty times "white" makes SmolLM say nothing but "white".
    targets[:GROUNDS] = table[words.encode(",").ids[0]] + 0.25 * targets[:GROUNDS]
    return targets


def run(tower, x, grid):
    result = tower(x, grid_thw=grid)
    return result.pooler_output if hasattr(result, "pooler_output") else result


def judge(y, labels, targets):
    """Loss, and the class whose target is nearest."""
    unit = F.normalize(targets, dim=1)
    cosines = F.normalize(y, dim=1) @ unit.T
    weight = torch.where(labels < GROUNDS, 0.3, 1.0)
    error = (y - targets[labels]).pow(2).mean(1) / targets.pow(2).mean()
    loss = error + F.cross_entropy(cosines * 20, labels, reduction="none")
    return (loss * weight).sum() / weight.sum(), cosines.argmax(1)


def held_out(tower, targets):
    """How often the nearest word is right, by kind of word."""
    kinds = dict(ground=pictures.GROUNDS, color=pictures.COLORS, shape=pictures.SHAPES)
    hits, errors, r = {}, [], np.random.RandomState(HELD_OUT)
    with torch.no_grad():
        for _ in range(8):
            x, grid, labels = batch(r)
            y = run(tower, x, grid)
            _, guess = judge(y, labels, targets)
            wrong = (y - targets[labels]).pow(2).mean(1) / targets[labels].pow(2).mean(1)
            errors.append(wrong[labels >= GROUNDS].mean().item())
            for right, found in zip(labels.tolist(), guess.tolist()):
                word = pictures.VOCABULARY[right]
                kind = next((kind for kind, members in kinds.items() if word in members), word)
                hits.setdefault(kind, []).append(right == found)
    shares = ", ".join(f"{kind} {100 * np.mean(hit):.0f} %" for kind, hit in hits.items())
    print(f"held out: relative squared error of things {np.mean(errors):.3f}; nearest word right: {shares}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--start", type=Path, help="a tower to go on from")
    options = parser.parse_args()
    torch.manual_seed(0)
    targets = word_targets(options.model)
    tower, rate, r = new_tower(targets.shape[1]), 2.5e-3, np.random.RandomState(FIRST)
    if options.start:
        start = checkpoint.read_safetensors(options.start)
        tower.load_state_dict({name.removeprefix("visual."): torch.tensor(checkpoint.from_bf16(t)) for name, t in start.items()})
        rate, r = 1.2e-3, np.random.RandomState(SECOND)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    begun = time.time()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        x, grid, labels = batch(r)
        loss, guess = judge(run(tower, x, grid), labels, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            right = (guess == labels)[labels >= GROUNDS].float().mean()
            print(f"{step}, {time.time() - begun:.0f} s: loss {loss.item():.3f}, of things {100 * right:.0f} % right", flush=True)
        if step % 50 == 49 or step == options.steps - 1:
            weights = {f"visual.{name}": checkpoint.to_bf16(p.detach().numpy()) for name, p in tower.named_parameters()}
            checkpoint.write_safetensors(options.out, weights)
    held_out(tower.eval(), targets)


main()
