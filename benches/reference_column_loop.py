"""One 4096x4096 layer, GPTAQ W3 g128 asymmetric, statistics given: this crate against the published column loop.

    python3 benches/reference_column_loop.py        (needs torch and cargo; run in the repository)

The loop is what the GPTQ and GPTAQ code does, in PyTorch float32: cholesky, cholesky_inverse, cholesky(upper), the
cross term by two dense products, then a handful of operations a column with a block size of 128. Both sides use all
cores of the machine, one after the other.
"""
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch

N, ROWS, GROUP, BITS, BLOCK, ALPHA, DAMP = 4096, 4096, 128, 3, 128, 0.25, 0.01
ROOT = pathlib.Path(__file__).parent.parent


def find_params(w):
    top = 2**BITS - 1
    lo, hi = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    empty = (lo == 0) & (hi == 0)
    lo, hi = torch.where(empty, -torch.ones_like(lo), lo), torch.where(empty, torch.ones_like(hi), hi)
    scale = (hi - lo) / top
    return scale.unsqueeze(1), torch.round(-lo / scale).unsqueeze(1)


def quantize(w, scale, zero):
    if not torch.all(scale != 0):
        return w
    q = torch.clamp(torch.round(w / scale) + zero, 0, 2**BITS - 1)
    return scale * (q - zero)


def column_loop(w, h, c):
    w, h, c = w.clone(), h.clone(), c.clone()
    d = h.diagonal()
    perm = torch.argsort(d, descending=True)
    w, h, c = w[:, perm], h[perm][:, perm], c[perm][:, perm]
    damp = DAMP * h.diagonal().mean()
    h.diagonal().add_(damp)
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    u = torch.linalg.cholesky(h, upper=True)
    p = ALPHA * ((c @ u.T).triu_(1)) @ u
    q, losses = torch.zeros_like(w), torch.zeros_like(w)
    for i1 in range(0, N, BLOCK):
        i2 = min(i1 + BLOCK, N)
        w1, u1, p1 = w[:, i1:i2].clone(), u[i1:i2, i1:i2], p[i1:i2, i1:i2]
        q1, e1, losses1 = torch.zeros_like(w1), torch.zeros_like(w1), torch.zeros_like(w1)
        for i in range(i2 - i1):
            if (i1 + i) % GROUP == 0:
                scale, zero = find_params(w[:, i1 + i : i1 + i + GROUP])
            col = w1[:, i]
            rounded = quantize(col.unsqueeze(1), scale, zero).flatten()
            q1[:, i] = rounded
            losses1[:, i] = (col - rounded) ** 2 / u1[i, i] ** 2
            e = (col - rounded) / u1[i, i]
            w1[:, i:] -= e.unsqueeze(1) @ u1[i, i:].unsqueeze(0) - col.unsqueeze(1) @ p1[i, i:].unsqueeze(0)
            e1[:, i] = e
        q[:, i1:i2], losses[:, i1:i2] = q1, losses1 / 2
        w[:, i2:] -= e1 @ u[i1:i2, i2:] - w1 @ p[i1:i2, i2:]
    return q[:, torch.argsort(perm)], losses.sum().item()


def ours():
    command = ["cargo", "bench", "--bench", "solve", "--", "gptaq_w3g128_4096", "--noplot"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    estimates = ROOT / "target/criterion/solve/gptaq_w3g128_4096/new/estimates.json"
    return json.loads(estimates.read_text())["median"]["point_estimate"] * 1e-9


def main():
    torch.manual_seed(0)
    x = torch.rand(2 * N, N) * 2 - 1
    x /= 1 + (torch.arange(N) % 97) / 16
    f = x + 0.1 * torch.randn_like(x) * x.abs().mean()
    h, c = x.T @ x, (f - x).T @ x
    w = torch.rand(ROWS, N) * 2 - 1
    times = []
    for _ in range(3):
        start = time.perf_counter()
        column_loop(w, h, c)
        times.append(time.perf_counter() - start)
    loop, crate = statistics.median(times), ours()
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}")
    print(f"PyTorch column loop: {loop:.2f} s (median of {', '.join(f'{t:.2f}' for t in times)})")
    print(f"vlmq: {crate:.2f} s")
    print(f"ratio: {loop / crate:.1f}")


main()
