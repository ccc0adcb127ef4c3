"""What the kernels are held against: what this machine reaches, and what people run today."""

import statistics
import time

import torch

from .api import Call
from .harness import Item, relative
from .times import well_conditioned

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GROUP, BITS, BLOCK, ALPHA, DAMP = 128, 3, 128, 0.25, 0.01


# ---- what this machine reaches ----


def ceilings(probe):
    """Plain products and copies; lines are named as the times name them."""
    n = probe.pick(8192, 64)
    for name, kind, tf32 in (
        ("bf16", BF16, False),
        ("f16", F16, False),
        ("tf32", F32, True),
        ("fp32", F32, False),
        ("f64", F64, False),
    ):
        a, b = probe.noise(n, n, seed=1).to(kind), probe.noise(n, n, seed=2).to(kind)
        with allowing_tf32(tf32):
            probe.timed(
                name, lambda: a @ b, 2 * n**3, bytes=0, kind="ceiling", seconds=0.25, note=f"{n}^3, random numbers, cuBLAS"
            )
    size = probe.pick(2 << 30, 1 << 16)
    source, target = (torch.empty(size, dtype=torch.uint8, device=probe.device).fill_(i) for i in range(2))
    probe.timed("copy", lambda: target.copy_(source), bytes=2 * size, kind="ceiling", note="on the device, read and written")


def transfers(probe):
    size = probe.pick(1 << 30, 1 << 16)
    device = torch.empty(size, dtype=torch.uint8, device=probe.device)
    for pinned in (True, False):
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned and not probe.small)
        for name, run in (
            ("to the device", lambda: device.copy_(host, non_blocking=pinned)),
            ("to the host", lambda: host.copy_(device, non_blocking=pinned)),
        ):
            times = wall(probe, run, 3)
            probe.time_line(
                f"copy {name}, {'pinned' if pinned else 'pageable'}", times, bytes=size, kind="ceiling", note="by the clock"
            )


def launches(probe):
    """What a call costs the host, and the device when calls follow one another."""
    x, out = probe.noise(1, 8), torch.empty(1, 8, device=probe.device)
    call = Call(probe.api, "convert", x=x, out=out, count=8, **{"from": "VLMQ_F32", "to": "VLMQ_F32"})
    count = probe.pick(500, 3)

    def many():
        for _ in range(count):
            call()

    enqueued = wall(probe, many, 3, wait=False)
    probe.time_line("launch, on the host", enqueued and [t / count for t in enqueued], kind="ceiling", note="through ctypes")
    times = probe.samples(many, ahead_ms=10, least=3, most=3)
    probe.time_line(
        "launch, on the device",
        times and [t / count for t in times],
        kind="ceiling",
        note="one behind the other, smallest kernel",
    )
    one = wall(probe, call, 20)
    probe.time_line("launch, there and back", one, kind="ceiling", note="one call and a synchronization")


def wall(probe, run, count, wait=True):
    """Milliseconds by the clock; None under the emulator."""
    times = []
    for turn in range(count + 1):
        probe.synchronize()
        begun = time.perf_counter()
        run()
        if wait:
            probe.synchronize()
        if turn:
            times.append(1e3 * (time.perf_counter() - begun))
        probe.synchronize()
    return None if probe.api.emulated else times


class allowing_tf32:
    def __init__(self, allowed):
        self.allowed = allowed

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allowed

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32 = self.before


# ---- what people run today ----


def gram(probe, tokens, features):
    """float32 X.T @ X, TF32 off: the published code's statistics."""
    x = probe.noise(tokens, features)
    least = 1 if tokens * features**2 > 1e13 else 3
    probe.timed(
        f"X.T @ X {tokens}x{features}",
        lambda: x.T @ x,
        tokens * features**2,
        2 * tokens * features**2,
        4 * tokens * features + 4 * features**2,
        kind="reference",
        least=least,
        note="float32, TF32 off",
        tokens=tokens,
        features=features,
    )


def prepare(h, c):
    """The published preparation: three factorizations, the cross term by two dense products."""
    h = h.clone()
    h.diagonal().add_(DAMP * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return u, None if c is None else ALPHA * ((c @ u.T).triu_(1)) @ u


def column_loop(w, u, p):
    """The published solve, block size 128, 3 bits in groups of 128."""
    w, n = w.clone(), w.shape[1]
    q, losses = torch.zeros_like(w), torch.zeros_like(w)
    for i1 in range(0, n, BLOCK):
        i2 = min(i1 + BLOCK, n)
        w1, u1 = w[:, i1:i2].clone(), u[i1:i2, i1:i2]
        p1 = None if p is None else p[i1:i2, i1:i2]
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
            change = error.unsqueeze(1) @ u1[i, i:].unsqueeze(0)
            if p is not None:
                change -= column.unsqueeze(1) @ p1[i, i:].unsqueeze(0)
            w1[:, i:] -= change
            e1[:, i] = error
        q[:, i1:i2], losses[:, i1:i2] = q1, losses1 / 2
        w[:, i2:] -= e1 @ u[i1:i2, i2:] if p is None else e1 @ u[i1:i2, i2:] - w1 @ p[i1:i2, i2:]
    return q


def symmetric(probe, n):
    h = well_conditioned(probe, n).triu_()
    return h + h.triu(1).T


def preparation(probe, n):
    h = symmetric(probe, n)
    probe.timed(
        f"cholesky, inverse, cholesky {n}",
        lambda: prepare(h, None),
        n**3 / 3,
        n**3 / 3 * 4,
        kind="reference",
        least=1,
        most=3,
        note="float32; FLOP of one factorization",
        n=n,
    )
    c = probe.noise(n, n, seed=5) * 0.05
    probe.timed(
        f"cholesky, inverse, cholesky, cross {n}",
        lambda: prepare(h, c),
        2 * n**3 / 3,
        kind="reference",
        least=1,
        most=2,
        note="float32; FLOP of two triangular solves",
        n=n,
    )


def columns(probe, rows, n):
    u, p = prepare(symmetric(probe, n), probe.noise(n, n, seed=5) * 0.05)
    w = probe.noise(rows, n, seed=6)
    for term in (p, None):
        probe.timed(
            f"column loop {'GPTQ' if term is None else 'GPTAQ'} {rows}x{n}",
            lambda: column_loop(w, u, term),
            rows * n * n * (1 if term is None else 2),
            kind="reference",
            least=1,
            most=1,
            note="PyTorch float32, block size 128",
            rows=rows,
            features=n,
        )


# ---- yardsticks: plain products of 16-bit numbers ----


def add_gram(out, a, b):
    """out += a^T b with 16-bit operands and float32 sums, as cuBLAS does it; on a CPU in float32."""
    if out.device.type == "cpu":
        out += a.T.float() @ b.float()
        return
    try:
        torch.addmm(out, a.T, b, out_dtype=F32, out=out)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        out += torch.mm(a.T, b, out_dtype=F32)


def strips(probe, tokens, features, kind):
    """H through cuBLAS: the weighted operand in a high and a low part, eight strips of columns, each down to its diagonal."""
    x = probe.noise(tokens, features, dtype=kind)
    g = probe.noise(tokens, seed=2).abs() + 0.5
    square = (g * g).unsqueeze(1)
    h = torch.zeros(features, features, device=probe.device)
    parts = {}

    def split():
        a = square * x
        parts["high"] = a.to(kind)
        parts["low"] = (a - parts["high"].float()).to(kind)

    width = -(-features // 8 // 128) * 128 if not probe.small else features

    def products():
        for first in range(0, features, width):
            end = min(first + width, features)
            for part in (parts["low"], parts["high"]):
                add_gram(h[:end, first:end], part[:, :end], x[:, first:end])

    split()
    h.zero_()
    products()
    rows = torch.arange(0, features, max(features // 48, 1), device=probe.device)
    above = rows.unsqueeze(1) <= torch.arange(features, device=probe.device)
    exact = torch.zeros(len(rows), features, dtype=F64, device=probe.device)
    for first in range(0, tokens, 4096):
        part = g[first : first + 4096].double().unsqueeze(1) * x[first : first + 4096].double()
        exact += part[:, rows].T @ part
    found = relative(h[rows] * above, exact * above)
    diagonal = h[rows, rows].double() / exact[torch.arange(len(rows), device=probe.device), rows] - 1
    name, flop = f"{'bf16' if kind == BF16 else 'f16'} strips {tokens}x{features}", tokens * features**2
    probe.timed(
        f"{name}, products",
        products,
        flop,
        2 * flop,
        kind="reference",
        errors=[("H", found, None), ("mean relative error of the diagonal", float(diagonal.mean()), None)],
        note=f"cuBLAS, high and low part; bias of the diagonal {float(diagonal.mean()):.2e}",
        tokens=tokens,
        features=features,
    )
    probe.timed(
        f"{name}, splitting",
        split,
        bytes=6 * tokens * features,
        kind="reference",
        note="what a pass of its own would do, in PyTorch",
    )


def truncation(probe):
    """Sums inside tensor cores are cut off, not rounded: by how much the diagonal falls short as the sum grows longer."""
    for power in probe.pick(range(11, 21), range(5, 7)):
        tokens, features = 2**power, 128
        x = probe.noise(tokens, features, dtype=BF16)
        h = torch.zeros(features, features, device=probe.device)
        add_gram(h, x, x)
        wide = x.double()
        exact = wide.T @ wide
        bias = h.diagonal().double() / exact.diagonal() - 1
        probe.say(
            "reference",
            f"bf16 Gram of 2^{power} tokens",
            f"mean relative error of the diagonal {float(bias.mean()):.3e}",
            error=relative(h, exact),
            limit=None,
            bias=float(bias.mean()),
            tokens=tokens,
        )


def items(probe):
    # It uses what is defined here.
    from . import packages

    wide, narrow = probe.pick((18944, 3584), (256, 128))
    tokens = probe.pick((2048, 8192, 65536), (48, 64, 80))
    plan = [
        ("yardsticks 2048", lambda p: [strips(p, tokens[0], n, kind) for n in (wide, narrow) for kind in (BF16, F16)], 3),
        ("X.T @ X short", lambda p: [gram(p, t, n) for t in tokens[:2] for n in (narrow, wide)], 4),
        ("X.T @ X long, narrow", lambda p: gram(p, tokens[2], narrow), 1),
        ("yardsticks long", lambda p: strips(p, tokens[2], narrow, BF16), 1.5),
        ("truncation", truncation, 1),
        (f"preparation {narrow}", lambda p: preparation(p, narrow), 1.5),
        (f"column loop {p_rows(probe)}x{narrow}", lambda p: columns(p, p_rows(p), narrow), 4),
        (f"preparation {wide}", lambda p: preparation(p, wide), 4),
        ("X.T @ X long, wide", lambda p: gram(p, tokens[2], wide), 3),
        (f"column loop {narrow}x{wide}", lambda p: columns(p, narrow, wide), 12),
    ]
    return [Item(f"reference {name}", "reference", run, seconds, False) for name, run, seconds in plan] + packages.items()


def p_rows(probe):
    return probe.pick(18944, 40)


def ceiling_items():
    return [
        Item("ceilings", "ceiling", ceilings, 4, False),
        Item("transfers", "ceiling", transfers, 4, False),
        Item("launches", "ceiling", launches, 1, False),
    ]


# ---- benches/kernels.rs reads these ----


def by_line_of_kernels():
    """Seconds by line of benches/kernels.rs: statistics of 32,768 tokens, preparation and solve of its layers, GPTAQ. Without a
    GPU, of one small layer."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    figures = {}

    def seconds(run, runs=3):
        run()
        times = []
        for _ in range(runs):
            if on_gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    tokens, layers = (32768, [(4096, 4096), (3584, 18944), (18944, 3584)]) if on_gpu else (256, [(40, 128)])
    for rows, n in layers:
        layer = f"{rows}x{n}"
        x = torch.rand(tokens, n, device=device) * 2 - 1
        f = x + 0.1 * torch.randn_like(x)
        figures[f"hessian {layer}"] = seconds(lambda: x.T @ x)
        figures[f"statistics {layer}"] = seconds(lambda: (x.T @ x, (f - x).T @ x))
        h, c = x.T @ x, (f - x).T @ x
        del x, f
        figures[f"prepare {layer}"] = seconds(lambda: prepare(h, c))
        u, p = prepare(h, c)
        del h, c
        w = torch.rand(rows, n, device=device) * 2 - 1
        figures[f"solve {layer}"] = seconds(lambda: column_loop(w, u, p), runs=1)
        del u, p, w
    return figures
