"""What users have today, on the GPU of this machine: seconds by line of benches/kernels.rs, as JSON.

    python3 gpu_reference.py OUT.json        (needs torch with CUDA)

Statistics: float32 `X.T @ X` of the published code, TF32 off. Preparation: cholesky, cholesky_inverse, cholesky(upper), the
cross term by two dense products. Solve: the published column loop, block size 128. Compare only figures of one run.
"""

import json
import statistics
import sys
import time

import torch

TOKENS, GROUP, BITS, BLOCK, ALPHA, DAMP = 32768, 128, 3, 128, 0.25, 0.01


def seconds(run, runs=3):
    run()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prepare(h, c):
    h = h.clone()
    h.diagonal().add_(DAMP * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return u, ALPHA * ((c @ u.T).triu_(1)) @ u


def column_loop(w, u, p):
    w, n = w.clone(), w.shape[1]
    q, losses = torch.zeros_like(w), torch.zeros_like(w)
    for i1 in range(0, n, BLOCK):
        i2 = min(i1 + BLOCK, n)
        w1, u1, p1 = w[:, i1:i2].clone(), u[i1:i2, i1:i2], p[i1:i2, i1:i2]
        q1, e1, losses1 = torch.zeros_like(w1), torch.zeros_like(w1), torch.zeros_like(w1)
        for i in range(i2 - i1):
            if (i1 + i) % GROUP == 0:
                group = w[:, i1 + i : i1 + i + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / (2**BITS - 1)
                zero = torch.round(-low / scale)
            column = w1[:, i]
            rounded = scale * (torch.clamp(torch.round(column / scale) + zero, 0, 2**BITS - 1) - zero)
            q1[:, i] = rounded
            losses1[:, i] = (column - rounded) ** 2 / u1[i, i] ** 2
            error = (column - rounded) / u1[i, i]
            w1[:, i:] -= error.unsqueeze(1) @ u1[i, i:].unsqueeze(0) - column.unsqueeze(1) @ p1[i, i:].unsqueeze(0)
            e1[:, i] = error
        q[:, i1:i2], losses[:, i1:i2] = q1, losses1 / 2
        w[:, i2:] -= e1 @ u[i1:i2, i2:] - w1 @ p[i1:i2, i2:]
    return q


def main():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    figures = {}
    for rows, n in [(4096, 4096), (3584, 18944), (18944, 3584)]:
        layer = f"{rows}x{n}"
        x = torch.rand(TOKENS, n, device="cuda") * 2 - 1
        f = x + 0.1 * torch.randn_like(x)
        figures[f"hessian {layer}"] = seconds(lambda: x.T @ x)
        figures[f"statistics {layer}"] = seconds(lambda: (x.T @ x, (f - x).T @ x))
        h, c = x.T @ x, (f - x).T @ x
        del x, f
        figures[f"prepare {layer}"] = seconds(lambda: prepare(h, c))
        u, p = prepare(h, c)
        del h, c
        w = torch.rand(rows, n, device="cuda") * 2 - 1
        figures[f"solve {layer}"] = seconds(lambda: column_loop(w, u, p), runs=1)
        del u, p, w
    with open(sys.argv[1], "w") as file:
        json.dump(figures, file, indent=1)
    print(json.dumps(figures, indent=1))


main()
