"""Times of the calls at the sizes of a 7B model, each with the work that the method needs and what the kernels do for it."""

import functools

import torch

from . import oracles
from .api import Call
from .harness import Item, relative
from .solving import RULE, Factored, Layer, block_arguments, ends_of

BF16, F32 = torch.bfloat16, torch.float32
GPTAQ_TERMS = 2  # products of a solve: with root, and with M
SPLIT = 3  # TF32 products that make up one of float32's accuracy
HIGH_AND_LOW = 2  # float16 products of a weighted operand


def statistics(probe, tokens, features, cross, keep=False):
    """vlmq_weighted_hessian as the pipeline calls it: bfloat16, importance given."""
    u = probe.noise(tokens, features, dtype=BF16)
    f = u + 0.05 * probe.noise(tokens, features, seed=1, dtype=BF16) if cross else None
    g = probe.noise(tokens, seed=2).abs() + 0.5
    h = torch.zeros(features, features, device=probe.device)
    c = torch.zeros_like(h) if cross else None
    call = Call(
        probe.api,
        "weighted_hessian",
        u=u,
        f=f,
        g=g,
        hessian=h,
        cross=c,
        tokens=tokens,
        features=features,
        u_stride=features,
        f_stride=features,
        dtype="VLMQ_BF16",
        fast=0,
    )
    if keep:
        return call

    def errors():
        """Of some rows, from zero."""
        h.zero_()
        if cross:
            c.zero_()
        call()
        rows = torch.arange(0, features, max(features // 48, 1), device=probe.device)
        exact_h = torch.zeros(len(rows), features, dtype=torch.float64, device=probe.device)
        exact_c, norms, delta = torch.zeros_like(exact_h), 0, 0
        for first in range(0, tokens, 4096):
            part = g[first : first + 4096].double().unsqueeze(1) * u[first : first + 4096].double()
            exact_h += part[:, rows].T @ part
            norms = norms + part.square().sum(0)
            if cross:
                away = g[first : first + 4096].double().unsqueeze(1) * (
                    f[first : first + 4096].double() - u[first : first + 4096].double()
                )
                exact_c += away[:, rows].T @ part
                delta = delta + away.square().sum(0)
        above = rows.unsqueeze(1) <= torch.arange(features, device=probe.device)
        found = [
            (
                "H, of an entry against its columns",
                oracles.entrywise(h[rows] * above, exact_h * above, norms[rows].sqrt(), norms.sqrt()),
                1e-6,
            )
        ]
        if cross:
            found.append(
                (
                    "C, of an entry against its columns",
                    oracles.entrywise(c[rows], exact_c, delta[rows].sqrt(), norms.sqrt()),
                    1e-6,
                )
            )
        return found

    square = features * features
    flop = tokens * square * (3 if cross else 1)
    moved = 2 * tokens * features * (2 if cross else 1) + 4 * square * (3 if cross else 1)
    probe.timed(
        f"weighted_hessian {'H+C' if cross else 'H'} {tokens}x{features}",
        call,
        flop,
        HIGH_AND_LOW * flop,
        moved,
        "f16",
        errors=errors,
        tokens=tokens,
        features=features,
    )


def well_conditioned(probe, n):
    """Eigenvalues between 0.4 and 1.6; below the diagonal nothing is read."""
    h = probe.noise(n, n, seed=3) * (0.5 / n**0.5)
    h.diagonal().fill_(1)
    return h


def factors(probe, n):
    """vlmq_factor and vlmq_cross_factor."""
    h, system = well_conditioned(probe, n), Factored(probe, n, 128, True)
    c = probe.noise(n, n, seed=4)
    rows = torch.arange(0, n, max(n // 48, 1), device=probe.device)
    above = rows.unsqueeze(1) <= torch.arange(n, device=probe.device)

    def errors_of_factor():
        exact = h[rows].double() * above
        # Rows of R R^T, on and above the diagonal, in pieces of R.
        got, some = torch.empty_like(exact), system.root[rows].double() * system.diagonal.double() ** 2
        for first in range(0, n, 2048):
            got[:, first : first + 2048] = some @ system.root[first : first + 2048].double().T
        return [("status", abs(system.pivot() + 1), 0), ("rows of R R^T against H", relative(got * above, exact), 1e-6)]

    cube = n**3 / 3
    probe.timed(
        f"factor {n}",
        system.factor,
        cube,
        SPLIT * cube,
        8 * n * n,
        "tf32",
        errors=errors_of_factor,
        reset=lambda: system.root.copy_(h),
        ahead_ms=3,
        n=n,
    )

    def errors_of_cross():
        # M diag(R) R^T = alpha triu(C R^-T, 1) R^T: above the diagonal alpha C less what the diagonal of C R^-T adds.
        some = system.cross[rows].double() * system.diagonal.double() ** 2
        got = torch.empty(len(rows), n, dtype=torch.float64, device=probe.device)
        for first in range(0, n, 2048):
            got[:, first : first + 2048] = some @ system.root[first : first + 2048].double().T
        beyond = rows.unsqueeze(1) < torch.arange(n, device=probe.device)
        exact = 0.25 * c[rows].double() * beyond
        return [("rows of M D R^T against alpha C", relative(got * beyond, exact), 1e-5)]

    probe.timed(
        f"cross_factor {n}",
        system.cross_factor,
        cube,
        SPLIT * cube,
        12 * n * n,
        "tf32",
        errors=errors_of_cross,
        reset=lambda: system.cross.copy_(c),
        ahead_ms=3,
        n=n,
    )


def inverse(probe, n):
    h, work = well_conditioned(probe, n), torch.empty(n, n, device=probe.device)
    status = torch.zeros(1, dtype=torch.int32, device=probe.device)
    call = Call(probe.api, "cholesky_inverse", h=work, damp=0.01, n=n, status=status)
    flop = 2 * n**3 / 3
    probe.timed(
        f"cholesky_inverse {n}",
        call,
        flop,
        SPLIT * flop,
        8 * n * n,
        "tf32",
        reset=lambda: work.copy_(h),
        errors=lambda: [("status", abs(int(status.item()) + 1), 0)],
        ahead_ms=3,
        n=n,
    )


def solve(probe, rows, n):
    """A whole layer from the factor on, GPTQ and GPTAQ, all grids: W3 in groups of 128."""
    h, c = well_conditioned(probe, n), probe.noise(n, n, seed=5) * 0.05
    weight, order = probe.noise(rows, n, seed=6, dtype=BF16), torch.arange(n, dtype=torch.int32, device=probe.device)
    for gptaq in (True, False):
        system = Factored(probe, n, 128, gptaq)
        system.permuted(h, c if gptaq else None, order, h.diagonal().contiguous())
        system.run()
        for grid in ("VLMQ_MINMAX", "VLMQ_LOSS", "VLMQ_MSE"):
            layer = Layer(probe, system, rows, 128, RULE | {"grid": grid})
            flop = rows * n * n * (GPTAQ_TERMS if gptaq else 1)
            moved = rows * n * (2 + 4 + 4 + 1) + 4 * n * n * (GPTAQ_TERMS if gptaq else 1) // 2

            def errors():
                left = layer.residual.double()
                rounded = float(left.square().mean().sqrt())
                return [
                    ("status", float(layer.status.item() != 2**31 - 1) + abs(system.pivot() + 1), 0),
                    ("rms of W - W_hat", rounded, None),
                ]

            name = f"solve {'GPTAQ' if gptaq else 'GPTQ'} {grid[5:].lower()} {rows}x{n}"
            probe.timed(
                name,
                layer.run,
                flop,
                SPLIT * flop,
                moved,
                "tf32",
                reset=lambda: layer.reset(weight, order),
                errors=errors,
                ahead_ms=25,
                rows=rows,
                features=n,
            )


def block(probe, rows, n, gptaq, grid, keep=False):
    """vlmq_quantize_block alone: one block of 128 columns, groups of 128, the third of its span."""
    width, first, span = 128, probe.pick(256, 0), probe.pick(512, 128)
    h = well_conditioned(probe, n)
    system = Factored(probe, n, width, gptaq)
    order = torch.arange(n, dtype=torch.int32, device=probe.device)
    system.permuted(h, probe.noise(n, n, seed=5) * 0.05 if gptaq else None, order, h.diagonal().contiguous())
    system.run()
    weight = probe.noise(rows, n, seed=7)
    error = probe.noise(rows, span, seed=8) * 0.02
    new = lambda *shape, dtype=F32: torch.zeros(*shape, dtype=dtype, device=probe.device)
    status = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=probe.device)
    residual, work = weight.clone(), error.clone()
    more = {"cross": error.clone(), "carried": new(rows, n), "products": system.products} if gptaq else {}
    out = {
        "codes": new(rows, width, dtype=torch.uint8),
        "scales": new(rows, 1),
        "zeros": new(rows, 1, dtype=torch.uint8),
        "row_errors": new(rows, dtype=torch.float64),
    }
    arguments = block_arguments(
        residual,
        work,
        system.root,
        system.inverses,
        system.diagonal,
        first,
        width,
        0,
        width,
        RULE | {"grid": grid},
        status=status,
        **more,
        **out,
    )
    call = Call(probe.api, "quantize_block", **arguments)
    if keep:
        return call

    def reset():
        residual.copy_(weight)
        work.copy_(error)

    flop = rows * width * width * (4 if gptaq else 3)
    moved = rows * width * (8 + 8 + (8 if gptaq else 0) + 1)
    probe.timed(
        f"quantize_block {'GPTAQ' if gptaq else 'GPTQ'} {grid[5:].lower()} {rows}",
        call,
        flop,
        flop,
        moved,
        "fp32",
        reset=reset,
        errors=lambda: [("status", float(status.item() != 2**31 - 1), 0)],
        rows=rows,
        columns=width,
    )


def blocks(probe, rows):
    n = probe.pick(3584, 256)
    for gptaq in (True, False):
        for grid in ("VLMQ_MINMAX", "VLMQ_MSE"):
            block(probe, rows, n, gptaq, grid)


def trailing(probe, n, inner, keep=False):
    """vlmq_product as the factorization's trailing update is, but on the whole square."""
    a, b, c = probe.noise(n, inner), probe.noise(n, inner, seed=1), probe.noise(n, n, seed=2)
    call = Call(
        probe.api,
        "product",
        a=a,
        b=b,
        c=c,
        rows=n,
        cols=n,
        inner=inner,
        a_stride=inner,
        b_stride=inner,
        c_stride=n,
        alpha=-1.0,
        beta=1.0,
        transposed=1,
    )
    if keep:
        return call

    def errors():
        rows = torch.arange(0, n, max(n // 48, 1), device=probe.device)
        before = c[rows].double()
        call()
        product = a[rows].double() @ b.double().T
        # Of the product: C has grown with each sample.
        return [("c", float((c[rows].double() - (before - product)).norm() / (before.norm() + product.norm())), 1e-6)]

    flop = 2 * n * n * inner
    probe.timed(
        f"product trailing {n}x{n}x{inner}", call, flop, SPLIT * flop, 8 * n * n + 8 * n * inner, "tf32", errors=errors, n=n
    )


def norm_in_h(probe, rows, cols):
    x, h = probe.noise(rows, cols), probe.noise(cols, cols, seed=1)
    norm = torch.zeros(1, dtype=torch.float64, device=probe.device)
    call = Call(probe.api, "squared_norm", x=x, h=h, norm=norm, rows=rows, cols=cols)
    flop = rows * cols * cols
    probe.timed(
        f"squared_norm in H {rows}x{cols}",
        call,
        flop,
        SPLIT * flop,
        4 * rows * cols + 2 * cols * cols,
        "tf32",
        rows=rows,
        cols=cols,
    )
    call = Call(probe.api, "squared_norm", x=x, norm=norm, rows=rows, cols=cols)
    probe.timed(f"squared_norm {rows}x{cols}", call, bytes=4 * rows * cols, rows=rows, cols=cols)


def attend(probe, sequences, length, heads, kv_heads, dim, keep=False):
    rows = sequences * length
    q, d_out = (probe.noise(rows, heads * dim, seed=seed, dtype=BF16) for seed in (0, 3))
    k, v = (probe.noise(rows, kv_heads * dim, seed=seed, dtype=BF16) for seed in (1, 2))
    out, log_sum = torch.empty_like(q), torch.empty(rows, heads, device=probe.device)
    spans = torch.tensor([[i * length, (i + 1) * length] * 2 for i in range(sequences)], dtype=torch.int32, device=probe.device)
    common = {
        "q": q,
        "k": k,
        "v": v,
        "spans": spans,
        "span_count": sequences,
        "longest_q": length,
        "q_rows": rows,
        "k_rows": rows,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "causal": 1,
        "dtype": "VLMQ_BF16",
    }
    forward = Call(probe.api, "attention", out=out, log_sum=log_sum, **common)
    if keep:
        return forward
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    backward = Call(
        probe.api,
        "attention_backward",
        out=out,
        log_sum=log_sum,
        d_out=d_out,
        d_q=d_q,
        d_k=d_k,
        d_v=d_v,
        longest_k=length,
        **common,
    )
    flop = 2 * sequences * length**2 * heads * dim
    moved = 2 * rows * dim * (2 * heads + 2 * kv_heads)
    what = f"{sequences}x{length} {heads}/{kv_heads} heads of {dim}"
    probe.timed(f"attention {what}", forward, flop, flop, moved, "bf16", tokens=rows)
    probe.timed(
        f"attention_backward {what}",
        backward,
        2.5 * flop,
        3.5 * flop,
        2 * moved,
        "bf16",
        note="7 products where 5 are needed",
        tokens=rows,
    )


def attention(probe):
    for sequences, length in probe.pick([(16, 512), (2, 4096)], [(2, 40)]):
        attend(probe, sequences, length, *probe.pick((28, 4, 128), (2, 1, 128)))


def row_norm(probe, rows, cols, keep=False):
    x, weight, y = (
        probe.noise(rows, cols, dtype=BF16),
        probe.noise(cols, seed=1, dtype=BF16),
        torch.empty(rows, cols, dtype=BF16, device=probe.device),
    )
    call = Call(probe.api, "norm", x=x, weight=weight, y=y, rows=rows, cols=cols, eps=1e-6, dtype="VLMQ_BF16")
    if keep:
        return call
    probe.timed(f"norm {rows}x{cols}", call, bytes=4 * rows * cols, rows=rows, cols=cols)
    call = Call(probe.api, "norm_backward", x=x, weight=weight, d_y=x, d_x=y, rows=rows, cols=cols, eps=1e-6, dtype="VLMQ_BF16")
    probe.timed(f"norm_backward {rows}x{cols}", call, bytes=6 * rows * cols, rows=rows, cols=cols)


def rows_and_elements(probe):
    """What else calibration runs, by its bytes."""
    rows, cols = probe.pick((8192, 3584), (40, 256))
    row_norm(probe, rows, cols)
    count, what = rows * cols, f"{rows}x{cols}"
    x, y = probe.noise(rows, cols, dtype=BF16), torch.empty(rows, cols, dtype=BF16, device=probe.device)
    call = functools.partial(Call, probe.api)
    probe.timed(
        f"activate silu gated {what}",
        call("activate", x=x, up=x, y=y, count=count, activation="VLMQ_SILU", dtype="VLMQ_BF16"),
        bytes=6 * count,
    )
    probe.timed(
        f"add {what}",
        call("add", a=x, b=x, out=y, rows=rows, b_rows=rows, cols=cols, sign=1.0, factor=1.0, dtype="VLMQ_BF16", float_a=0),
        bytes=6 * count,
    )
    index = probe.order(rows)
    probe.timed(
        f"gather_rows {what}",
        call("gather_rows", table=x, indices=index, out=y, rows=rows, row_bytes=2 * cols, scatter=0),
        bytes=4 * count,
    )
    means = torch.empty(rows, device=probe.device)
    probe.timed(
        f"mean_abs_rows {what}",
        call("mean_abs_rows", x=x, means=means, rows=rows, cols=cols, dtype="VLMQ_BF16"),
        bytes=2 * count,
    )
    scales = torch.ones(cols, device=probe.device)
    probe.timed(
        f"scaled_squares_rows {what}",
        call("scaled_squares_rows", x=x, scales=scales, sums=means, rows=rows, cols=cols, dtype="VLMQ_BF16"),
        bytes=2 * count,
    )
    row = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=probe.device)
    probe.timed(
        f"first_non_finite_row {what}",
        call("first_non_finite_row", x=x, row=row, rows=rows, cols=cols, dtype="VLMQ_BF16"),
        bytes=2 * count,
    )
    wide = torch.empty(rows, cols, device=probe.device)
    probe.timed(
        f"convert bf16 to f32 {what}",
        call("convert", x=x, out=wide, count=count, **{"from": "VLMQ_BF16", "to": "VLMQ_F32"}),
        bytes=6 * count,
    )
    cos, sin = probe.noise(rows, 64, seed=1), probe.noise(rows, 64, seed=2)
    probe.timed(
        f"rotate {what}",
        call("rotate", x=y, cos=cos, sin=sin, tokens=rows, heads=cols // 128, head_dim=128, transposed=0, dtype="VLMQ_BF16"),
        bytes=4 * count + 512 * rows,
    )


def packing(probe):
    rows, cols = probe.pick((18944, 3584), (40, 256))
    bits, count, what = 3, rows * cols, f"{rows}x{cols}"
    codes, words = probe.bits(rows, cols, high=8), torch.empty(rows, cols * bits // 32, dtype=torch.int32, device=probe.device)
    strides = {
        "runs": rows,
        "count": cols,
        "code_stride": 1,
        "code_run_stride": cols,
        "word_stride": 1,
        "word_run_stride": cols * bits // 32,
        "bits": bits,
    }
    moved = count + count * bits // 8
    probe.timed(f"pack 3 bits {what}", Call(probe.api, "pack", codes=codes, words=words, subtract=0, **strides), bytes=moved)
    probe.timed(f"unpack 3 bits {what}", Call(probe.api, "unpack", codes=codes, words=words, add=0, **strides), bytes=moved)
    turned = {
        "runs": rows,
        "count": cols,
        "code_stride": 1,
        "code_run_stride": cols,
        "word_stride": rows,
        "word_run_stride": 1,
        "bits": bits,
    }
    probe.timed(
        f"pack 3 bits, as GPTQ's files {what}",
        Call(probe.api, "pack", codes=codes, words=words, subtract=0, **turned),
        bytes=moved,
    )
    groups = cols // 128
    scales, zeros = probe.noise(rows, groups), probe.bits(rows, groups, high=8, seed=1)
    out = torch.empty(rows, cols, dtype=BF16, device=probe.device)
    call = Call(
        probe.api,
        "dequantize",
        codes=codes,
        scales=scales,
        zeros=zeros,
        out=out,
        rows=rows,
        cols=cols,
        groups=groups,
        dtype="VLMQ_BF16",
    )
    probe.timed(f"dequantize {what}", call, bytes=3 * count + 5 * rows * groups)


def in_order(probe, n, rows):
    """Into processing order: H, and a weight; and the range of a group that is a span."""
    order = probe.order(n)
    x, out = probe.noise(n, n), torch.empty(n, n, device=probe.device)
    call = Call(probe.api, "permute", x=x, order=order, diagonal=x.diagonal().contiguous(), out=out, n=n, symmetric=1)
    probe.timed(f"permute {n}", call, bytes=6 * n * n)
    weight, out = probe.noise(rows, n, dtype=BF16), torch.empty(rows, n, device=probe.device)
    call = Call(probe.api, "permute_columns", x=weight, order=order, out=out, rows=rows, cols=n, dtype="VLMQ_BF16")
    probe.timed(f"permute_columns {rows}x{n}", call, bytes=6 * rows * n)
    scales, zeros = torch.empty(rows, 1, device=probe.device), torch.empty(rows, 1, dtype=torch.uint8, device=probe.device)
    status = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=probe.device)
    for grid in ("VLMQ_MINMAX", "VLMQ_MSE"):
        call = Call(
            probe.api,
            "group_grid",
            residual=out,
            block_count=0,
            scales=scales,
            zeros=zeros,
            status=status,
            rows=rows,
            features=n,
            first=0,
            columns=n,
            rule=RULE | {"grid": grid},
        )
        probe.timed(f"group_grid {grid[5:].lower()} {rows}x{n}", call, bytes=4 * rows * n, least=1)


def items(probe):
    """The most valuable first. Under the emulator the same lines, in miniature."""
    wide, narrow = probe.pick((18944, 3584), (256, 128))
    # In miniature no more tokens than the shortest call has.
    tokens = probe.pick((2048, 8192, 65536), (48, 64, 80))
    plan = [
        (f"weighted_hessian H+C {tokens[0]}x{wide}", lambda p: statistics(p, tokens[0], wide, True), 1.5),
        (f"weighted_hessian H+C {tokens[0]}x{narrow}", lambda p: statistics(p, tokens[0], narrow, True), 0.7),
        (f"factor and cross_factor {narrow}", lambda p: factors(p, narrow), 1.5),
        (f"factor and cross_factor {wide}", lambda p: factors(p, wide), 3),
        (f"solve {probe.pick(18944, 40)}x{narrow}", lambda p: solve(p, p.pick(18944, 40), narrow), 5),
        (f"solve {narrow}x{wide}", lambda p: solve(p, narrow, wide), 8),
        (f"weighted_hessian H {tokens[2]}x{narrow}", lambda p: statistics(p, tokens[2], narrow, False), 1),
        (f"weighted_hessian H {tokens[2]}x{wide}", lambda p: statistics(p, tokens[2], wide, False), 3),
        (f"weighted_hessian H+C {tokens[1]}x{wide}", lambda p: statistics(p, tokens[1], wide, True), 1.5),
        (f"weighted_hessian H+C {tokens[1]}x{narrow}", lambda p: statistics(p, tokens[1], narrow, True), 1),
        (f"quantize_block {probe.pick(18944, 40)}", lambda p: blocks(p, p.pick(18944, 40)), 2),
        (f"quantize_block {narrow}", lambda p: blocks(p, narrow), 2),
        ("attention", attention, 2),
        (f"product trailing {probe.pick(18432, 256)}", lambda p: trailing(p, *p.pick((18432, 512), (256, 64))), 1.5),
        ("rows and elements", rows_and_elements, 3),
        ("packing", packing, 2),
        (f"cholesky_inverse {probe.pick(4096, 130)}", lambda p: inverse(p, p.pick(4096, 130)), 1),
        (f"squared_norm {narrow}x{wide}", lambda p: norm_in_h(p, narrow, wide), 1.5),
        (f"in order {narrow}x{wide}", lambda p: in_order(p, wide, narrow), 2),
        (f"cholesky_inverse {wide}", lambda p: inverse(p, wide), 2),
    ]
    return [Item(f"time {name}", "time", run, seconds, False) for name, run, seconds in plan]


def profiled(probe):
    """One call of each hot kernel, by name; some with what must be done before each run."""
    wide, narrow = probe.pick((18944, 3584), (256, 128))
    return {
        "hessian": lambda: statistics(probe, probe.pick(2048, 48), wide, True, keep=True),
        "hessian-long": lambda: statistics(probe, probe.pick(65536, 80), narrow, False, keep=True),
        "product": lambda: trailing(probe, *probe.pick((18432, 512), (256, 64)), keep=True),
        "diagonal": lambda: one_block(probe, probe.pick(128, 96)),
        "quantize-many": lambda: block(probe, probe.pick(18944, 40), probe.pick(3584, 256), True, "VLMQ_MINMAX", keep=True),
        "quantize": lambda: block(probe, narrow, probe.pick(3584, 256), True, "VLMQ_MINMAX", keep=True),
        "attention": lambda: attend(probe, *probe.pick((16, 512, 28, 4, 128), (1, 40, 2, 1, 128)), keep=True),
        "norm": lambda: row_norm(probe, *probe.pick((8192, 3584), (40, 256)), keep=True),
    }


def one_block(probe, n):
    """The factor of a single block: one launch of diagonal_kernel."""
    h, system = well_conditioned(probe, n), Factored(probe, n, 128, False)
    return system.factor, lambda: system.root.copy_(h)
