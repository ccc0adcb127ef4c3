"""Goldens of the solver: the textbook column-by-column loop with the explicit inverse, in float64.

    python3 tests/golden/make_solver.py        (needs numpy and safetensors)

Writes tests/golden/solver/solver.safetensors and cases.json. Inputs are exact in float16 and stored once:
`u`, `f` [tokens, 256], `g` [tokens], `w` [rows, 256] and `w_wide` [24, 768]. The wide layer's inputs are three
copies of `u` (of `f`) side by side, copy c rolled down by 7c tokens. `codes` is one little-endian bit stream a case,
each starting on a byte; `scales` (float32) and `zeros` (uint8) follow case after case, [rows, groups].
"""
import itertools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent / "solver"
ALPHA, DAMP, BLOCK = 0.25, 0.01, 128


def inputs():
    rng = np.random.default_rng(20250803)
    tokens, n, rows = 320, 256, 20
    mix = rng.standard_normal((n, n)) * (np.arange(1, n + 1) ** -0.6)[:, None]
    u = rng.standard_normal((tokens, n)) @ mix * 0.3 + 0.2 * rng.standard_normal((tokens, n))
    u[:, [5, 77, 200]] *= 12
    f = u + 0.15 * np.abs(u).mean() * rng.standard_normal((tokens, n)) + 0.05 * u[:, ::-1]
    f[:, [5, 77, 200]] *= 0.97
    u[:, 31] = 0
    g = np.exp(0.8 * rng.standard_normal(tokens))
    g[[3, 100, 101, 319]] = 0
    w = 0.05 * rng.standard_t(5, (rows, n))
    w[2, 64:128] = 0
    w[3, :64] = np.abs(w[3, :64])
    w_wide = 0.05 * rng.standard_t(5, (24, 3 * n))
    half = lambda x: x.astype(np.float16)
    return half(u), half(f), g.astype(np.float32), half(w), half(w_wide)


def to_storage(s, kind):
    if kind == "f16":
        return s.astype(np.float16).astype(np.float64)
    bits = s.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def on_range(lo, hi, empty, p, case):
    """Scale and zero of each row's range, shrunk to the share p."""
    top, mid = 2 ** case["bits"] - 1, 2 ** (case["bits"] - 1)
    r = 2 * np.maximum(p * hi, -p * lo) if case["symmetric"] else p * hi - p * lo
    s = np.where(empty, 1.0, to_storage(r / top, case["scale_type"]))
    z = np.full(len(lo), float(mid))
    if not case["symmetric"]:
        z = np.where(empty, mid, np.clip(np.round(-p * lo / s), case["smallest_zero"], top))
    return s, z


def candidates(lo, hi, empty, case, best):
    """Scales and zeros [rows] that the loss is found of; those that move the zero start from `best`, told when they come."""
    for k in range(16):
        yield on_range(lo, hi, empty, 1 - 3 * k / 64, case)
    if not case["symmetric"]:
        s, z = best()
        for stretch, step in itertools.product([0.875, 1.0, 1.125, 1.25], [-1, 1]):
            yield to_storage(s * stretch, case["scale_type"]), np.clip(z + step, case["smallest_zero"], 2 ** case["bits"] - 1)


def loss_of(w, s, z, upper, p, case):
    """What each row's columns lose on a grid: their errors, carried on among them, in units of H's inverse factor."""
    w, total = w.copy(), np.zeros(len(w))
    for i in range(w.shape[1]):
        column = w[:, i].copy()
        e = (column - s * (np.clip(np.round(column / s) + z, 0, 2 ** case["bits"] - 1) - z)) / upper[i, i]
        total += e * e
        w[:, i + 1 :] -= np.outer(e, upper[i, i + 1 :]) - np.outer(column, p[i, i + 1 :])
    return total


def grid_of_least_loss(w, upper, p, case):
    """Of a group that is wider than a block, errors are carried on inside its blocks."""
    lo, hi = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    least, best = np.full(len(w), np.inf), None
    for s, z in candidates(lo, hi, (lo == 0) & (hi == 0), case, lambda: best):
        parts = [slice(b, b + BLOCK) for b in range(0, w.shape[1], BLOCK)]
        loss = sum(loss_of(w[:, b], s, z, upper[b, b], p[b, b], case) for b in parts)
        if best is None:
            best = s, z
        better = loss < least
        best = np.where(better, s, best[0]), np.where(better, z, best[1])
        least = np.where(better, loss, least)
    return best


def grid(w, case):
    """Scale and zero of each row of w [rows, group], by the weights alone."""
    top = 2 ** case["bits"] - 1
    lo, hi = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    empty = (lo == 0) & (hi == 0)
    best, out = np.full(len(w), np.inf), None
    for k in range(80 if case["grid"] == "mse" else 1):
        s, z = on_range(lo, hi, empty, 1 - k / 100, case)
        q = s[:, None] * (np.clip(np.round(w / s[:, None]) + z[:, None], 0, top) - z[:, None])
        loss = (np.abs(w - q) ** 2.4).sum(1)
        if out is None:
            out = s, z
        better = loss < best
        out = np.where(better, s, out[0]), np.where(better, z, out[1])
        best = np.where(better, loss, best)
    return out


def order_of(d, group, kind):
    n = len(d)
    if kind == "none":
        return np.arange(n)
    if kind == "act":
        return np.argsort(-d, kind="stable")
    local = [g0 + np.argsort(-d[g0 : g0 + group], kind="stable") for g0 in range(0, n, group)]
    tops = np.array([d[p[0]] for p in local])
    return np.concatenate([local[i] for i in np.argsort(-tops, kind="stable")])


def solve(weight, h0, c0, case):
    rows, n = weight.shape
    group = case["group"] or n
    top = 2 ** case["bits"] - 1
    w, h = weight.copy(), h0.copy()
    if case["solver"] == "rtn":
        perm = np.arange(n)
        upper = np.eye(n)
    else:
        dead = np.diag(h) == 0
        h[dead, dead] = 1
        w[:, dead] = 0
        perm = order_of(np.diag(h), group, case["order"])
        w, h = w[:, perm], h[perm][:, perm]
        h += DAMP * np.diag(h).mean() * np.eye(n)
        upper = np.linalg.cholesky(np.linalg.inv(h)).T
    p = np.zeros((n, n))
    if case["solver"] == "gptaq":
        c = c0.copy()
        c[:, dead] = 0
        p = ALPHA * np.triu(c[perm][:, perm] @ upper.T, 1) @ upper
    codes, scales, zeros = np.zeros((rows, n), int), [], []
    out = np.zeros_like(w)
    # Blocks matter only to what the reference implementations carry across their edges.
    block = BLOCK if case["cross_term"] == "quantized" else n
    for b0 in range(0, n, block):
        b1 = min(b0 + block, n)
        err, carried = np.zeros((rows, b1 - b0)), np.zeros((rows, b1 - b0))
        for i in range(b0, b1):
            if i % group == 0:
                now = w[:, i : i + group].copy()
                if case["grid"] == "loss":
                    inside = slice(i, i + group)
                    s, z = grid_of_least_loss(now, upper[inside, inside], p[inside, inside], case)
                else:
                    s, z = grid(now, case)
                scales.append(s)
                zeros.append(z)
            col = w[:, i].copy()
            codes[:, i] = np.clip(np.round(col / s) + z, 0, top)
            q = s * (codes[:, i] - z)
            out[:, i] = q
            e = (col - q) / upper[i, i]
            w[:, i + 1 : b1] -= np.outer(e, upper[i, i + 1 : b1]) - np.outer(col, p[i, i + 1 : b1])
            err[:, i - b0] = e
            carried[:, i - b0] = q if case["cross_term"] == "quantized" else col
        w[:, b1:] -= err @ upper[b0:b1, b1:] - carried @ p[b0:b1, b1:]
    scales, zeros = np.stack(scales, 1), np.stack(zeros, 1)
    inverse = np.argsort(perm)
    codes, out = codes[:, inverse], out[:, inverse]
    if case["solver"] != "rtn" and case["order"] == "act-group":
        home = np.argsort(perm[::group] // group)
        scales, zeros = scales[:, home], zeros[:, home]
    d = out - weight
    norm = (lambda x: (x * x).sum()) if case["solver"] == "rtn" else (lambda x: np.einsum("ri,ij,rj->", x, h0, x))
    return codes, scales, zeros, norm(d) / norm(weight), perm


def bits_of(codes, width):
    bits = ((codes.reshape(-1, 1) >> np.arange(width)) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(-1), bitorder="little")


def cases():
    keys = ["solver", "cross_term", "order", "grid", "bits", "group", "symmetric", "scale_type", "smallest_zero", "wide"]
    out = []

    def add(*values):
        i = len(out)
        out.append(dict(zip(keys, (*values[:7], ["f16", "bf16"][i * 5 // 3 % 2], int(i % 3 == 2), values[7]))))

    grids, widths, groups, both = ["minmax", "mse"], [2, 3, 4, 8], [32, 64, 128, None], [False, True]
    for x in itertools.product(grids, widths, groups, both):
        add("rtn", "unquantized", "none", *x, False)
    for solver in ["gptq", "gptaq"]:
        for x in itertools.product(["none", "act-group", "act"], grids, widths, groups, both):
            add(solver, "unquantized", *x, False)
    for order, bits, group in itertools.product(["none", "act-group", "act"], widths, groups):
        add("gptaq", "quantized", order, "minmax", bits, group, False, False)
    for order, group, grid_name in itertools.product(["none", "act-group", "act"], [96, 192, 256, 384, None], grids):
        add("gptq", "unquantized", order, grid_name, 3, group, False, True)
        add("gptaq", "unquantized", order, grid_name, 3, group, False, True)
    for order, group in itertools.product(["none", "act-group", "act"], [128, 256, 384]):
        add("gptaq", "quantized", order, "minmax", 3, group, False, True)
    # The grid of least loss, without every order.
    for x in itertools.product(widths, [32, None], both):
        add("rtn", "unquantized", "none", "loss", *x, False)
    for solver in ["gptq", "gptaq"]:
        for x in itertools.product(widths, groups, both):
            add(solver, "unquantized", "act-group", "loss", *x, False)
    for order, groups in [("act-group", [128, 256, 384]), ("act", [96, 192, 256, 384, None])]:
        for group in groups:
            add("gptaq", ["quantized", "unquantized"][order == "act"], order, "loss", 3, group, False, True)
    return out


def statistics(u, f, g):
    u, f, g = (x.astype(np.float64) for x in (u, f, g))
    scaled = (g * g)[:, None] * u
    return u.T @ scaled, (f - u).T @ scaled


def main():
    u, f, g, w, w_wide = inputs()
    wide = lambda x: np.concatenate([np.roll(x, 7 * c, axis=0) for c in range(3)], axis=1)
    small, large = statistics(u, f, g), statistics(wide(u), wide(f), g)
    codes, scales, zeros, listed = [], [], [], cases()
    for case in listed:
        weight, stats = (w_wide, large) if case["wide"] else (w, small)
        c, s, z, error, perm = solve(weight.astype(np.float64), *stats, case)
        case["error"] = error
        codes.append(bits_of(c, case["bits"]))
        scales.append(s.astype(np.float32).ravel())
        zeros.append(z.astype(np.uint8).ravel())
    picked = np.arange(0, 256, 17)
    HERE.mkdir(exist_ok=True)
    save_file(
        {
            "u": u, "f": f, "g": g, "w": w, "w_wide": w_wide,
            "codes": np.concatenate(codes), "scales": np.concatenate(scales), "zeros": np.concatenate(zeros),
            "h_rows": small[0][picked], "c_rows": small[1][picked],
        },
        HERE / "solver.safetensors",
    )
    (HERE / "solver.safetensors").chmod(0o644)
    lines = ",\n".join(json.dumps(case) for case in listed)
    (HERE / "cases.json").write_text(f"[\n{lines}\n]\n")
    print(len(listed), "cases")


main()
