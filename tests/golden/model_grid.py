"""The grid of a group of weights and the column loop in the precision of the input, one column at a time.

The inverse of H is formed explicitly and nothing is blocked, as the method is written down.

Choices where the method leaves one:

* Rounding is half to even (`torch.round`), of w/s first; the zero is added after it.
* The zero is computed with the scale as stored. Scales are stored in float32 here (the checkpoint's type).
* Ties in H_ii keep the lower column first.
* The term of the float path carries the weight just before rounding (not the rounded one) to every later column.
* The mean of H's diagonal for damping is taken after dead inputs have been set to 1.
"""

import torch


def parameters(w, bits):
    """Scale and zero [rows] of asymmetric min-max groups [rows, columns]."""
    largest = 2**bits - 1
    low, high = w.amin(1).clamp(max=0.0), w.amax(1).clamp(min=0.0)
    empty = high == low
    scale = ((high - low) / largest).float().to(w.dtype)
    scale = torch.where(empty, 1.0, scale)
    zero = torch.round(-low / scale).clamp(0, largest)
    return scale, torch.where(empty, float(2 ** (bits - 1)), zero)


def encode(w, scale, zero, bits):
    """Codes of weights: nearest grid point, clamped."""
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def round_to_nearest(weight, bits, group):
    """Weights [out, in] on their grid, each by itself."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part = weight[:, start : start + group]
        scale, zero = (p[:, None] for p in parameters(part, bits))
        out[:, start : start + group] = scale * (encode(part, scale, zero, bits) - zero)
    return out


def act_group_order(diagonal, group):
    """Columns by falling H_ii inside each group, whole groups by their largest H_ii."""
    groups = diagonal.reshape(-1, group)
    inner = torch.sort(groups, dim=1, descending=True, stable=True).indices
    outer = torch.sort(groups.amax(1), descending=True, stable=True).indices
    return (inner + torch.arange(len(groups))[:, None] * group)[outer].reshape(-1)


def solve(weight, h, c, bits, group, damp, alpha):
    """Codes [out, in], scales and zeros [out, groups], original column order; C absent means GPTQ."""
    w, h = weight.clone(), h.clone()
    c = torch.zeros_like(h) if c is None else c.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead], c[:, dead] = 0.0, 0.0
    order = act_group_order(h.diagonal(), group)
    w, h, c = w[:, order], h[order][:, order], c[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    p = alpha * torch.triu(c @ u.T, 1) @ u
    rows, columns = w.shape
    codes = torch.empty(rows, columns, dtype=w.dtype)
    scales, zeros = (torch.empty(rows, columns // group, dtype=w.dtype) for _ in range(2))
    for i in range(columns):
        if i % group == 0:
            scale, zero = parameters(w[:, i : i + group], bits)
            home = order[i] // group
            scales[:, home], zeros[:, home] = scale, zero
        column = w[:, i].clone()
        codes[:, order[i]] = code = encode(column, scale, zero, bits)
        error = (column - scale * (code - zero)) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :] - column[:, None] * p[i, i + 1 :]
    return codes, scales, zeros


def dequantize(codes, scales, zeros, group):
    """Weights [out, in] that codes stand for."""
    wide = [t.repeat_interleave(group, 1) for t in (scales, zeros)]
    return wide[0] * (codes - wide[1])
