"""Every call against float64, on small and odd sizes, and on a GPU on a middling one."""

import itertools

import torch

from . import oracles
from .api import Call
from .harness import TYPES, Case, Item, Out, different, relative
from .solving import RULE, Factored, Layer, block_arguments, ends_of

F32, F64, U8, I32 = torch.float32, torch.float64, torch.uint8, torch.int32
ROUNDED = {"VLMQ_F32": 2e-6, "VLMQ_BF16": 2.5e-3, "VLMQ_F16": 3e-4}  # one rounding to the type, ||d|| / ||exact||
WIDE = 128  # VLMQ_BLOCK


def short(dtype):
    return dtype[5:].lower()


def weighted_hessian(probe):
    sizes = [(33, 129, 7, 1), (130, 72, 8, 0), (1, 1, 0, 0)] + probe.pick(
        [(300, 257, 0, 0), (2048, 3584, 0, 0), (2049, 1031, 1, 1)], []
    )
    for (tokens, features, gap, shift), dtype in itertools.product(sizes, TYPES):
        u = probe.noise(tokens, features, seed=1) * (1 + torch.arange(features, device=probe.device) % 5)
        f = u + 0.1 * probe.noise(tokens, features, seed=2)
        u, f = u.to(TYPES[dtype]), f.to(TYPES[dtype])
        g = probe.noise(tokens, seed=3).abs() + 0.1
        if tokens > 2:
            # A token of no weight is not read into a sum.
            g[1], u[1], f[1] = 0, torch.nan, torch.nan
        upper = torch.ones(features, features, dtype=torch.bool, device=probe.device).triu()
        old_h, old_c = probe.noise(features, features, seed=4), probe.noise(features, features, seed=5)
        h, c, norms, delta = oracles.weighted(u, f, g)
        strided = lambda x: probe.input(x, stride=features + gap, shift=shift)
        hessian = Out(F32, features, features, initial=old_h, written=upper, shift=shift)
        cross = Out(F32, features, features, initial=old_c, shift=shift)
        common = {
            "tokens": tokens,
            "features": features,
            "u_stride": features + gap,
            "f_stride": features + gap,
            "dtype": dtype,
        }
        what, shape = f"{short(dtype)} {tokens}x{features}", {"tokens": tokens, "features": features, "dtype": dtype}

        def errors(out, h=h, c=c):
            found = [
                (
                    "H, of an entry against its columns",
                    oracles.entrywise(out["hessian"].triu(), (h + old_h).triu(), norms, norms, old_h),
                    1e-6,
                )
            ]
            if "cross" in out:
                found.append(
                    (
                        "C, of an entry against its columns",
                        oracles.entrywise(out["cross"], c + old_c, delta, norms, old_c),
                        1e-6,
                    )
                )
            return found

        probe.correct(
            f"weighted_hessian H+C {what}",
            Case(
                probe,
                "weighted_hessian",
                {"hessian": hessian, "cross": cross},
                u=strided(u),
                f=strided(f),
                g=g,
                fast=0,
                **common,
            ),
            errors,
            **shape,
        )
        probe.correct(
            f"weighted_hessian H {what}",
            Case(probe, "weighted_hessian", {"hessian": hessian}, u=strided(u), g=g, fast=0, **common),
            errors,
            **shape,
        )
        # Without weights, from zero; and the fast way.
        clean = torch.nan_to_num(u.float()).to(u.dtype)
        plain, _, norms_1, _ = oracles.weighted(clean, None, None)
        zero = Out(F32, features, features, initial=torch.zeros_like(old_h), written=upper)
        if dtype != "VLMQ_F32":
            probe.correct(
                f"weighted_hessian H without g {what}",
                Case(probe, "weighted_hessian", {"hessian": zero}, u=clean, fast=0, **(common | {"u_stride": features})),
                lambda out: [
                    (
                        "H, of an entry against its columns",
                        oracles.entrywise(out["hessian"].triu(), plain.triu(), norms_1, norms_1),
                        1e-6,
                    )
                ],
                **shape,
            )
        fast = Case(
            probe,
            "weighted_hessian",
            {"hessian": Out(F32, features, features, initial=torch.zeros_like(old_h), written=upper)},
            u=strided(u),
            g=g,
            fast=1,
            **common,
        )
        probe.correct(
            f"weighted_hessian fast {what}", fast, lambda out: [("H", relative(out["hessian"].triu(), h.triu()), 1e-3)], **shape
        )


def permute(probe):
    for n in [1, 33, 130] + probe.pick([3584], []):
        x, order, diagonal = probe.noise(n, n), probe.order(n), probe.noise(n, seed=1)
        index = order.long()
        for symmetric in (0, 1):
            full = x.triu() + x.triu(1).T if symmetric else x
            exact = full[index][:, index]
            if symmetric:
                exact = exact.clone()
                exact.diagonal().copy_(diagonal[index])
            case = Case(
                probe,
                "permute",
                {"out": Out(F32, n, n)},
                x=x,
                order=order,
                diagonal=diagonal if symmetric else None,
                n=n,
                symmetric=symmetric,
            )
            probe.correct(
                f"permute {'symmetric' if symmetric else 'general'} {n}",
                case,
                lambda out: [("elements that differ", different(out["out"], exact.triu()), 0)],
                n=n,
            )


def product(probe):
    sizes = [(1, 1, 1, 0, 0), (33, 130, 77, 3, 1), (129, 128, 260, 0, 0), (17, 40, 0, 0, 0)] + probe.pick(
        [(3584, 512, 3072, 0, 0), (1000, 1000, 1001, 1, 0)], []
    )
    for (rows, cols, inner, gap, shift), transposed in itertools.product(sizes, (0, 1)):
        a = probe.input(probe.noise(rows, inner), stride=inner + gap, shift=shift)
        b = probe.noise(*((cols, inner) if transposed else (inner, cols)), seed=1)
        b = probe.input(b, stride=b.shape[1] + gap, shift=shift)
        c = probe.noise(rows, cols, seed=2)
        exact = a.double() @ (b.double().T if transposed else b.double())
        for alpha, beta in ((-1.0, 1.0), (0.5, 0.0)):
            out = Out(F32, rows, cols, stride=cols + gap, shift=shift, initial=c if beta else None)
            case = Case(
                probe,
                "product",
                {"c": out},
                a=a,
                b=b,
                rows=rows,
                cols=cols,
                inner=inner,
                a_stride=inner + gap,
                b_stride=b.stride(0) if b.shape[0] > 1 else b.shape[1] + gap,
                c_stride=cols + gap,
                alpha=alpha,
                beta=beta,
                transposed=transposed,
            )
            expected = alpha * exact + (beta * c.double() if beta else 0)
            name = f"product {'A B^T' if transposed else 'A B'} beta {beta:g} {rows}x{cols}x{inner}"
            probe.correct(
                name, case, lambda out: [("c", relative(out["c"], expected), 1e-6)], rows=rows, cols=cols, inner=inner
            )


def correlated(probe, n, damp=1e-2):
    """H of inputs that lean on one another, damped, C of the same, both float32; condition number about 5e3 at any size."""
    tokens = 2 * n + 3
    x = probe.noise(tokens, n, dtype=F64)
    x = (x + 0.7 * min(1, 200 / n) ** 0.5 * x[:, :1]) * (1 + torch.arange(n, device=probe.device) % 7 / 4)
    f = x + 0.1 * probe.noise(tokens, n, seed=1, dtype=F64)
    h, c = x.T @ x / tokens, (f - x).T @ x / tokens
    h.diagonal().add_(damp * h.diagonal().mean())
    return h.float(), c.float()


def factor(probe):
    for n, width in [(1, 128), (40, 16), (200, 128), (130, 96)] + probe.pick([(700, 128), (3584, 128)], []):
        h, c = correlated(probe, n)
        ends = ends_of(n, width)
        hidden = h.triu() + torch.full_like(h, torch.nan).tril(-1)
        r = oracles.root_of(h.double())
        root = r / r.diagonal()
        status = Out(I32, 1, 1)
        outputs = {
            "h": Out(F32, n, n, initial=hidden),
            "inverses": Out(F32, n, WIDE),
            "diagonal": Out(F32, 1, n),
            "status": status,
        }

        def errors(out):
            got = out["h"].double() * out["diagonal"].double()
            full = h.double().triu() + h.double().triu(1).T
            return [
                ("status", abs(int(out["status"].item()) + 1), 0),
                ("R R^T against H", relative(got @ got.T, full), 1e-6),
                ("root", relative(out["h"], root), 1e-5),
                ("diag(R)", relative(out["diagonal"][0], r.diagonal()), 1e-5),
                ("inverses", relative(out["inverses"], oracles.block_inverses(root, ends, WIDE)), 1e-5),
            ]

        blocks = {"blocks": ends, "block_count": len(ends), "n": n}
        probe.correct(f"factor {n} by {width}", Case(probe, "factor", outputs, **blocks), errors, n=n)

        # The kernel's own inputs, in float32, are what the exact result is of.
        root32, diagonal32 = root.float(), r.diagonal().float()
        inverses32 = oracles.block_inverses(root, ends, WIDE).float()
        m = oracles.cross_of(c.double(), root32.double() * diagonal32.double(), 0.25)
        p = oracles.in_blocks(m @ oracles.inverse_of_upper(root32.double()), ends, WIDE)
        hidden_c = c.triu() + torch.full_like(c, torch.nan).tril(-1)
        case = Case(
            probe,
            "cross_factor",
            {"c": Out(F32, n, n, initial=hidden_c), "products": Out(F32, n, WIDE)},
            root=root32,
            inverses=inverses32,
            diagonal=diagonal32,
            alpha=0.25,
            **blocks,
        )
        probe.correct(
            f"cross_factor {n} by {width}",
            case,
            lambda out: [("M", relative(out["c"], m), 1e-5), ("P of the blocks", relative(out["products"], p), 1e-5)],
            n=n,
        )
    # The pivot that is not positive, found from the last on.
    for n, pivot in [(200, 130), (200, 0)]:
        h = torch.eye(n, device=probe.device)
        h[pivot, pivot] = -1
        ends = ends_of(n, 128)
        case = Case(
            probe,
            "factor",
            {
                "h": Out(F32, n, n, initial=h),
                "inverses": Out(F32, n, WIDE, initial=torch.zeros(n, WIDE)),
                "diagonal": Out(F32, 1, n, initial=torch.zeros(1, n)),
                "status": Out(I32, 1, 1),
            },
            blocks=ends,
            block_count=len(ends),
            n=n,
        )
        probe.correct(
            f"factor of what is not positive, {pivot} of {n}",
            case,
            lambda out: [("status", abs(int(out["status"].item()) - pivot), 0)],
            n=n,
        )


def cholesky_inverse(probe):
    for n in [1, 33, 200] + probe.pick([700, 2048], []):
        h, _ = correlated(probe, n, 0.0)
        damped = h.double().clone()
        damped = damped.triu() + damped.triu(1).T
        damped.diagonal().add_(float(torch.tensor(0.01, dtype=F32)) * damped.diagonal().mean())
        exact = oracles.inverse_of_upper(oracles.root_of(damped))
        hidden = h.triu() + torch.full_like(h, torch.nan).tril(-1)
        case = Case(probe, "cholesky_inverse", {"h": Out(F32, n, n, initial=hidden), "status": Out(I32, 1, 1)}, damp=0.01, n=n)

        def errors(out):
            u = out["h"].double()
            eye = torch.eye(n, dtype=F64, device=probe.device)
            return [
                ("status", abs(int(out["status"].item()) + 1), 0),
                ("U", relative(u, exact), 1e-5),
                ("U H U^T against I", relative(u @ damped @ u.T, eye), 1e-5),
            ]

        probe.correct(f"cholesky_inverse {n}", case, errors, n=n)


def squared_norm(probe):
    for rows, cols in [(1, 1), (17, 33), (130, 200)] + probe.pick([(3584, 3584)], []):
        x, h = probe.noise(rows, cols), probe.noise(cols, cols, seed=1)
        h = (h @ h.T).triu() + torch.full_like(h, torch.nan).tril(-1)
        full = torch.nan_to_num(h).double().triu() + torch.nan_to_num(h).double().triu(1).T
        wide = x.double()
        for given, exact, limit in ((None, (wide * wide).sum(), 1e-12), (h, ((wide @ full) * wide).sum(), 1e-6)):
            case = Case(probe, "squared_norm", {"norm": Out(F64, 1, 1)}, x=x, h=given, rows=rows, cols=cols)
            name = f"squared_norm {'in H ' if given is not None else ''}{rows}x{cols}"
            probe.correct(name, case, lambda out: [("norm", relative(out["norm"][0, 0], exact), limit)], rows=rows, cols=cols)


def permute_columns(probe):
    for (rows, cols), dtype in itertools.product([(1, 1), (17, 133)] + probe.pick([(1000, 3584)], []), TYPES):
        x, order = probe.noise(rows, cols, dtype=TYPES[dtype]), probe.order(cols)
        if cols > 2:
            order[2] = -1
        exact = torch.where(order >= 0, x[:, order.long().clamp(min=0)].float(), 0.0)
        case = Case(
            probe,
            "permute_columns",
            {"out": Out(F32, rows, cols, shift=1)},
            x=x,
            order=order,
            rows=rows,
            cols=cols,
            dtype=dtype,
        )
        probe.correct(
            f"permute_columns {short(dtype)} {rows}x{cols}",
            case,
            lambda out: [("elements that differ", different(out["out"], exact), 0)],
            rows=rows,
            cols=cols,
        )


def rules():
    """Bits, grids and types of scales that between them name each value once and more."""
    for number, (bits, grid) in enumerate(itertools.product((2, 3, 4, 8), ("VLMQ_MINMAX", "VLMQ_MSE"))):
        yield {
            "bits": bits,
            "symmetric": number // 2 % 2,
            "grid": grid,
            "scale_type": list(TYPES)[number % 3],
            "smallest_zero": number // 4,
        }


def loss_rules():
    """The same of VLMQ_LOSS: all numbers of bits, the zero fixed and free, and free down to 0 and to 1."""
    plan = [(2, 0, "VLMQ_F32", 1), (3, 1, "VLMQ_BF16", 0), (4, 0, "VLMQ_F16", 1), (8, 1, "VLMQ_F32", 1), (3, 0, "VLMQ_F16", 0)]
    names = ("bits", "symmetric", "scale_type", "smallest_zero")
    return [dict(zip(names, one)) | {"grid": "VLMQ_LOSS"} for one in plan]


def varied(rule, w):
    """For VLMQ_LOSS the weights with rows of none to long tails, so that the best range may be any, and every third row positive:
    zeros move there as far down as they may."""
    if rule["grid"] == "VLMQ_LOSS":
        w = w * w.abs() ** (torch.arange(w.shape[0], device=w.device) % 5).unsqueeze(1)
        w[::3] = w[::3].abs()
    return w


def name_of(rule):
    return f"W{rule['bits']}{' symmetric' if rule['symmetric'] else ''} {rule['grid'][5:].lower()} {short(rule['scale_type'])}"


def block_outputs(rows, columns, groups):
    return {
        "codes": Out(U8, rows, columns),
        "scales": Out(F32, rows, groups),
        "zeros": Out(U8, rows, groups),
        "row_errors": Out(F64, 1, rows),
        "status": Out(I32, 1, 1, initial=torch.tensor([[2**31 - 1]])),
    }


def grid_errors(weights, scales, zeros, rule, corrected=False):
    """Of a grid that was chosen for weights [rows, groups, columns], from the range or by the least loss. Corrected weights are
    known to float32 only: now and then a scale falls on the other side of a tie of its type."""
    if rule["grid"] == "VLMQ_LOSS":
        return least_loss_errors([least_loss(weights, scales, zeros, rule, None)], False)
    dtype = TYPES[rule["scale_type"]]
    scale, zero, loss = oracles.grid_of(weights, rule, dtype)
    scales, zeros = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    few = max(1e-3, 1.5 / scales.numel()) if corrected else 0.0
    if loss is None:
        other = ((scales - scale).abs() > 0.01 * scale) | ((zeros - zero).abs() > 1)
        differ = (scales != scale) | (zeros != zero)
        return [("scales that differ", float(differ.double().mean()), few), ("scales that are others", float(other.sum()), 0)]
    # Two candidates may be as good as alike.
    above = (oracles.loss_of(weights, scales, zeros, rule["bits"]) - loss) / loss.clamp(min=1e-30)
    found = [("loss above the least", float(above.max()), 1e-2 if corrected else 1e-4)]
    return found + [("groups with another loss", float((above > 1e-4).double().mean()), few)] if corrected else found


def least_loss(weights, scales, zeros, rule, terms):
    """Of VLMQ_LOSS: whether each group's grid is another than the oracle's, and how far its loss is off the least, either way."""
    scale, zero, loss = oracles.grid_of(weights, rule, TYPES[rule["scale_type"]], terms)
    scales, zeros = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    off = (oracles.solve_loss(weights, scales, zeros, rule["bits"], terms) - loss).abs() / loss.clamp(min=1e-30)
    # Where nothing is lost, as in a group of zeros, candidates are equals, and only the first is right.
    return ~((scales - scale).abs() <= 1e-6 * scale) | (zeros != zero), torch.where(loss == 0, 1.0, off)


def least_loss_errors(found, solved):
    """Of what least_loss found. Another grid is right where it is as good. A candidate that groups are solved with may have a
    column so near to a tie that it falls the other way in float32, and all columns behind it: now and then another is the best."""
    other, off = (torch.cat([part.flatten() for part in of]) for of in zip(*found))
    worse = other & ~(off <= 1e-4)
    few = max(1e-3, 1.5 / off.numel()) if solved else 0.0
    return [
        ("groups with another grid and loss", float(worse.double().mean()), few),
        ("groups with another grid", float(other.double().mean()), None),
        ("loss off the least", float((off * other).max()), None),
    ]


def least_loss_of_all(probe, name, found):
    """One line for what least_loss found in all cases of a call: a case by itself has too few groups to miss a candidate that is
    seldom the best."""
    probe.verdict(f"{name} loss, groups of all cases", least_loss_errors(found, True), True, [])


def round_to_nearest(probe):
    for number, rule in enumerate([*rules(), *loss_rules()]):
        rows, columns, group = [(5, 96, 32), (17, 384, 128), (33, 127, 127)][number % 3]
        features, first = columns + 5, 3
        w = varied(rule, probe.noise(rows, features, seed=number))
        w[2 % rows, first : first + group] = 0
        part = w[:, first : first + columns].double()
        outputs = block_outputs(rows, columns, columns // group)
        touched = torch.zeros(rows, features, dtype=torch.bool, device=probe.device)
        touched[:, first : first + columns] = True
        outputs["residual"] = Out(F32, rows, features, initial=w, written=touched)
        arguments = block_arguments(w, None, None, None, None, first, columns, first, group, rule)
        del arguments["residual"]

        def errors(out):
            groups = part.reshape(rows, -1, group)
            found = grid_errors(groups, out["scales"], out["zeros"], rule)
            scale, zero = (out[name].double().repeat_interleave(group, 1) for name in ("scales", "zeros"))
            residual = part - scale * (out["codes"].double() - zero)
            got = out["residual"][:, first : first + columns].double()
            return found + [
                ("wrong codes", oracles.wrong_codes(out["codes"], part, scale, zero, rule["bits"], 2e-5), 0),
                ("status", float(out["status"].item() != 2**31 - 1), 0),
                ("residual, of the weights", float((got - residual).norm() / part.norm()), 2e-7),
                ("row errors", relative(out["row_errors"][0], got.square().sum(1)), 1e-12),
            ]

        probe.correct(
            f"quantize_block to nearest {name_of(rule)} {rows}x{columns}",
            Case(probe, "quantize_block", outputs, **arguments),
            errors,
            rows=rows,
            columns=columns,
        )


def quantize_block(probe):
    """One block with a factor, from a state in the middle of a span: weights, error and cross as they come. From 8192 rows on
    the kernel may be another."""
    modes, groups = ("GPTQ", "GPTAQ", "GPTAQ with shift"), (32, 96, 16, 48)
    some = enumerate(itertools.product(modes, list(rules())[1:6:2] + [RULE]))
    plan = [(mode, rule, groups[number % 4]) for number, (mode, rule) in some]
    for rows in [19] + probe.pick([8200], []):
        quantize_block_of(probe, rows, plan)
    # Of VLMQ_LOSS each mode with a zero that is fixed and one that is free.
    plan = [(modes[number % 3], rule, groups[number % 4]) for number, rule in enumerate(2 * loss_rules())]
    seen = []
    for rows in [61] + probe.pick([8200], []):
        quantize_block_of(probe, rows, plan, seen)
    least_loss_of_all(probe, "quantize_block", seen)


def quantize_block_of(probe, rows, plan, seen=None):
    n, span_first, first, columns = 200, 40, 72, 96
    h, c = correlated(probe, n)
    r = oracles.root_of(h.double())
    root = (r / r.diagonal()).float()
    diagonal = r.diagonal().float()
    ends = [72, 168, 200]
    inverses = oracles.block_inverses(root.double(), ends, WIDE).float()
    m = oracles.cross_of(c.double(), r, 0.25)
    products = oracles.in_blocks(m @ oracles.inverse_of_upper(root.double()), ends, WIDE).float()
    span = 150
    touched = torch.zeros(rows, n, dtype=torch.bool, device=probe.device)
    touched[:, first : first + columns] = True
    in_span = torch.zeros(rows, span, dtype=torch.bool, device=probe.device)
    in_span[:, first - span_first : first - span_first + columns] = True
    block = slice(first, first + columns)
    local = slice(first - span_first, first - span_first + columns)
    root_bb, p_bb = root.double()[block, block], products.double()[block, :columns]
    for number, (mode, rule, group) in enumerate(plan):
        w = varied(rule, probe.noise(rows, n, seed=20 + number))
        error, cross = 0.05 * probe.noise(rows, span, seed=21), 0.05 * probe.noise(rows, span, seed=22)
        outputs = block_outputs(rows, columns, columns // group)
        outputs["residual"] = Out(F32, rows, n, initial=w, written=touched)
        outputs["error"] = Out(F32, rows, span, initial=error, written=in_span)
        given = {}
        if mode != "GPTQ":
            given = {"cross": cross, "products": products}
            outputs["carried"] = Out(F32, rows, n, written=touched)
        if mode == "GPTAQ with shift":
            outputs["shift"] = Out(F32, rows, n, written=touched)
        arguments = block_arguments(w, error, root, inverses, diagonal, first, columns, span_first, group, rule, **given)
        for name in outputs:
            arguments.pop(name, None)

        def errors(out):
            # The loop in float64 with the call's own grids, so that codes can be compared one by one.
            state = w.double()[:, block].clone()
            acc = error.double()[:, local] + (cross.double()[:, local] if given else 0)
            fixed = torch.linalg.solve_triangular(root_bb, acc, upper=True, left=False)
            inverse = oracles.inverse_of_upper(root_bb)
            current = state + fixed
            before, wrong, grids, losses = torch.zeros_like(state), 0, [], []
            for i in range(columns):
                if i % group == 0:
                    chosen = (
                        current[:, i : i + group].unsqueeze(1),
                        out["scales"][:, i // group, None],
                        out["zeros"][:, i // group, None],
                        rule,
                    )
                    if rule["grid"] == "VLMQ_LOSS":
                        m_bb = m[block, block] if given else None
                        terms = oracles.terms_of(root_bb, m_bb, diagonal.double()[block], slice(i, i + group), [columns])
                        losses.append(least_loss(*chosen, terms))
                    else:
                        grids += grid_errors(*chosen, True)
                    scale, zero = out["scales"][:, i // group].double(), out["zeros"][:, i // group].double()
                before[:, i] = current[:, i]
                wrong += oracles.wrong_codes(out["codes"][:, i], current[:, i], scale, zero, rule["bits"], 1e-3)
                # What the call chose is carried on: one tie that falls the other way must not hide the rest.
                rounded = scale * (out["codes"][:, i].double() - zero)
                difference, column = current[:, i] - rounded, before[:, i].clone()
                current -= torch.outer(difference, inverse[i])
                if given:
                    current += torch.outer(column, p_bb[i])
                current[:, i] = rounded
            left = state - current
            error_after = error.double()[:, local] + left @ root_bb
            # Each once, the worst of the groups.
            found = [(what, max(e for w_, e, _ in grids if w_ == what), limit) for what, limit in {(g[0], g[2]) for g in grids}]
            if losses:
                found += least_loss_errors(losses, True)
                seen.extend(losses)
            found += [
                ("wrong codes", wrong, 0),
                ("status", float(out["status"].item() != 2**31 - 1), 0),
                ("residual", relative(out["residual"][:, block], left), 1e-5),
                ("error", relative(out["error"][:, local], error_after), 1e-5),
                (
                    "row errors",
                    relative(
                        out["row_errors"][0], (out["error"][:, local].double() * diagonal.double()[block]).square().sum(1)
                    ),
                    1e-12,
                ),
            ]
            if given:
                found.append(
                    ("carried", relative(out["carried"][:, block], current if mode.endswith("shift") else before), 1e-5)
                )
            if mode.endswith("shift"):
                found.append(("shift", relative(out["shift"][:, block], (before - current) @ p_bb), 1e-5))
            return found

        probe.correct(
            f"quantize_block {mode} {name_of(rule)} g{group} {rows}x{columns}",
            Case(probe, "quantize_block", outputs, **arguments),
            errors,
            rows=rows,
            columns=columns,
        )


def group_grid(probe):
    n, first, columns = 300, 30, 224
    h, c = correlated(probe, n)
    r = oracles.root_of(h.double())
    root, diagonal = (r / r.diagonal()).float(), r.diagonal().float()
    ends = [first, first + 128, first + columns, n]
    inverses = oracles.block_inverses(root.double(), ends, WIDE).float()
    m = oracles.cross_of(c.double(), r, 0.25)
    products = oracles.in_blocks(m @ oracles.inverse_of_upper(root.double()), ends, WIDE).float()
    part = slice(first, first + columns)
    plan = [(21, *one, None) for one in itertools.product(list(rules())[2:6], (False, True))]
    # The loss is the layer's by the factor; without one, of the squares of what is rounded off.
    plan += [(61, rule, False, None) for rule in loss_rules()]
    given_factors = [(False, "GPTAQ"), (True, "GPTQ"), (True, "GPTAQ")]
    plan += [(61, rule, *given) for rule, given in itertools.product(loss_rules()[1:3] + loss_rules()[4:], given_factors)]
    seen = []
    for rows, rule, corrected, solved in plan:
        w = varied(rule, probe.noise(rows, n, seed=30))
        w[3, part] = 0
        error, cross = (0.05 * probe.noise(rows, columns, seed=seed) for seed in (31, 32))
        error[3] = cross[3] = 0
        given, weights, terms = {}, w.double()[:, part], None
        if corrected or solved:
            given = {"root": root, "inverses": inverses, "blocks": ends[1:3], "block_count": 2}
        if solved:
            given |= {"diagonal": diagonal, "products": products if solved == "GPTAQ" else None}
            m_given = m if solved == "GPTAQ" else None
            terms = oracles.terms_of(root.double(), m_given, diagonal.double(), part, ends)
        if corrected:
            given |= {"error": error, "cross": cross}
            weights = weights + torch.linalg.solve_triangular(
                root.double()[part, part], (error + cross).double(), upper=True, left=False
            )
        outputs = {
            "scales": Out(F32, rows, 1),
            "zeros": Out(U8, rows, 1),
            "status": Out(I32, 1, 1, initial=torch.tensor([[2**31 - 1]])),
        }
        case = Case(
            probe,
            "group_grid",
            outputs,
            residual=w,
            rows=rows,
            features=n,
            first=first,
            columns=columns,
            rule=rule,
            **({"block_count": 0} | given),
        )

        def errors(out):
            chosen = (weights.unsqueeze(1), out["scales"], out["zeros"], rule)
            if solved:
                seen.append(least_loss(*chosen, terms))
            found = least_loss_errors(seen[-1:], True) if solved else grid_errors(*chosen, corrected)
            return found + [("status", float(out["status"].item() != 2**31 - 1), 0)]

        probe.correct(
            f"group_grid {solved + ' ' if solved else ''}{name_of(rule)} {'corrected' if corrected else 'plain'} {rows}x{columns}",
            case,
            errors,
            rows=rows,
            columns=columns,
        )
    least_loss_of_all(probe, "group_grid", seen)


def layer(probe):
    """From H and C on, as the program does, against the published column loop in float64."""
    jobs = [
        (24, 160, 32, 64, False, False, RULE),
        (24, 160, 32, 64, True, False, RULE),
        (17, 160, 16, 16, True, True, RULE | {"bits": 4, "symmetric": 1}),
        (9, 96, 32, 32, True, False, RULE | {"grid": "VLMQ_MSE", "bits": 2}),
        (24, 160, 32, 64, False, False, RULE | {"grid": "VLMQ_LOSS"}),
        (24, 160, 32, 32, True, False, RULE | {"grid": "VLMQ_LOSS", "bits": 2}),
        (17, 160, 16, 32, True, True, RULE | {"grid": "VLMQ_LOSS", "bits": 4, "symmetric": 1}),
    ]
    jobs += probe.pick(
        [
            (256, 1024, 128, 128, gptaq, False, RULE | {"grid": grid})
            for gptaq in (False, True)
            for grid in ("VLMQ_MINMAX", "VLMQ_MSE", "VLMQ_LOSS")
        ],
        [],
    )
    for rows, n, group, block, gptaq, shift, rule in jobs:
        h, c = correlated(probe, n, 0.0)
        w = probe.noise(rows, n, seed=40, dtype=torch.bfloat16)
        # Whole groups in the order of their largest diagonal, columns within a group likewise.
        of_groups = h.diagonal().reshape(-1, group)
        within = of_groups.argsort(dim=1, descending=True, stable=True)
        groups = of_groups.amax(1).argsort(dim=0, descending=True, stable=True)
        order = (within + group * torch.arange(n // group, device=probe.device).unsqueeze(1))[groups].flatten()
        damped = (h.diagonal().double() + 0.01 * h.diagonal().double().mean()).float()
        system = Factored(probe, n, block, gptaq)
        solve = Layer(probe, system, rows, group, rule, shift)
        seen = []
        for turn in range(3):
            probe.api.seed(turn)
            system.permuted(h, c if gptaq else None, order.int(), damped)
            system.run()
            solve.reset(w, order.int())
            solve.run()
            probe.synchronize()
            seen.append(solve.bits())
        exact_h = h.double().triu() + h.double().triu(1).T
        exact_h.diagonal().copy_(damped.double())
        exact_h = exact_h[order][:, order]
        exact_c = c.double()[order][:, order] if gptaq else None
        codes, scales, zeros, left = oracles.column_loop(
            w.double()[:, order], exact_h, exact_c, 0.25, rule, TYPES[rule["scale_type"]], group, block, shift
        )
        energy = lambda d: float(((d @ exact_h) * d).sum())
        got = sum(float(out["row_errors"].sum()) for out in solve.outputs)
        ours, theirs = energy(solve.residual.double()), energy(left)
        errors = [
            ("status of the factor", abs(system.pivot() + 1), 0),
            ("status of the solve", float(solve.status.item() != 2**31 - 1), 0),
            ("codes that differ", float((codes != solve.result("codes")).double().mean()), 5e-3),
            ("scales that differ", float((scales != solve.result("scales").double()).double().mean()), 2e-2),
            ("the layer's error against the loop's", abs(ours / theirs - 1), 2e-3),
            ("row errors against the residual's", abs(got / ours - 1), 1e-5),
        ]
        what = ("GPTAQ" + (", rounded across blocks" if shift else "")) if gptaq else "GPTQ"
        same = all(torch.equal(seen[0], other) for other in seen[1:])
        probe.verdict(
            f"layer {what} {name_of(rule)} g{group} {rows}x{n}",
            errors,
            same,
            [],
            rows=rows,
            features=n,
            different_codes=int((codes != solve.result("codes")).sum()),
            codes=codes.numel(),
        )


def pack(probe):
    sizes = [(3, 70), (33, 128), (1, 1)] + probe.pick([(1000, 3584)], [])
    for (runs, count), bits in itertools.product(sizes, (2, 3, 4, 8)):
        codes = probe.bits(runs, count, high=2**bits)
        words_of_run = -(-count * bits // 32)
        for along, subtract in (("rows", 0), ("columns", 1)):
            words = oracles.pack(codes, bits, subtract)
            # Along columns run and element change places, as GPTQ's files have them.
            turned = along == "columns"
            stored, expected = (codes.T.contiguous(), words.T.contiguous()) if turned else (codes, words)
            strides = (
                {"code_stride": runs, "code_run_stride": 1, "word_stride": runs, "word_run_stride": 1}
                if turned
                else {"code_stride": 1, "code_run_stride": count, "word_stride": 1, "word_run_stride": words_of_run}
            )
            common = {"runs": runs, "count": count, "bits": bits, **strides}
            what, shape = f"{bits} bits along {along} {runs}x{count}", {"runs": runs, "count": count, "bits": bits}
            case = Case(probe, "pack", {"words": Out(I32, *expected.shape)}, codes=stored, subtract=subtract, **common)
            probe.correct(
                f"pack {what}", case, lambda out: [("words that differ", different(out["words"], expected), 0)], **shape
            )
            case = Case(probe, "unpack", {"codes": Out(U8, *stored.shape, shift=1)}, words=expected, add=subtract, **common)
            probe.correct(
                f"unpack {what}", case, lambda out: [("codes that differ", different(out["codes"], stored), 0)], **shape
            )


def dequantize(probe):
    for (rows, cols, groups), dtype in itertools.product(
        [(3, 96, 3), (17, 130, 5)] + probe.pick([(1000, 3584, 28)], []), TYPES
    ):
        codes, zeros = probe.bits(rows, cols, high=256), probe.bits(rows, groups, high=256, seed=1)
        scales = probe.noise(rows, groups)
        for indexed in (False, True):
            index = probe.bits(cols, high=groups, seed=2, dtype=I32) if indexed else None
            group = index.long() if indexed else torch.arange(cols, device=probe.device) // (cols // groups)
            exact = (scales[:, group] * (codes.float() - zeros.float()[:, group])).to(TYPES[dtype])
            case = Case(
                probe,
                "dequantize",
                {"out": Out(TYPES[dtype], rows, cols)},
                codes=codes,
                scales=scales,
                zeros=zeros,
                group_index=index,
                rows=rows,
                cols=cols,
                groups=groups,
                dtype=dtype,
            )
            # -0 and 0 are one number.
            probe.correct(
                f"dequantize {short(dtype)}{' by index' if indexed else ''} {rows}x{cols}",
                case,
                lambda out: [("values that differ", float((out["out"] != exact).double().mean()), 0)],
                rows=rows,
                cols=cols,
            )


def norm(probe):
    for (rows, cols, shift), dtype in itertools.product(
        [(3, 130, 1), (5, 256, 0), (1, 1, 0)] + probe.pick([(64, 3584, 0)], []), TYPES
    ):
        kind = TYPES[dtype]
        x = probe.input(probe.noise(rows, cols, dtype=kind), shift=shift)
        weight, bias, d_y = (
            probe.noise(cols, seed=1, dtype=kind),
            probe.noise(cols, seed=2, dtype=kind),
            probe.noise(rows, cols, seed=3, dtype=kind),
        )
        what, shape = f"{short(dtype)} {rows}x{cols}", {"rows": rows, "cols": cols, "dtype": dtype}
        for given in (None, bias):
            eps = 1e-5
            exact = oracles.norm(x, weight, given, eps)
            case = Case(
                probe,
                "norm",
                {"y": Out(kind, rows, cols, shift=shift)},
                x=x,
                weight=weight,
                bias=given,
                rows=rows,
                cols=cols,
                eps=eps,
                dtype=dtype,
            )
            probe.correct(
                f"norm {'RMS' if given is None else 'with a bias'} {what}",
                case,
                lambda out: [("y", relative(out["y"], exact), ROUNDED[dtype])],
                **shape,
            )
        if cols > 1:  # a single value has no gradient but for eps
            value = x.double().requires_grad_()
            oracles.norm(value, weight, None, 1e-6).backward(d_y.double())
            case = Case(
                probe,
                "norm_backward",
                {"d_x": Out(kind, rows, cols)},
                x=x,
                weight=weight,
                d_y=d_y,
                rows=rows,
                cols=cols,
                eps=1e-6,
                dtype=dtype,
            )
            probe.correct(
                f"norm_backward {what}", case, lambda out: [("d_x", relative(out["d_x"], value.grad), ROUNDED[dtype])], **shape
            )


def rotate(probe):
    for (tokens, heads, dim), dtype in itertools.product([(3, 5, 6), (7, 2, 128)] + probe.pick([(512, 28, 128)], []), TYPES):
        x = probe.noise(tokens, heads * dim, dtype=TYPES[dtype])
        angle = 3 * probe.noise(tokens, dim // 2, seed=1)
        cos, sin = angle.cos(), angle.sin()
        for inverse in (0, 1):
            exact = oracles.rotate(x, cos, sin, heads, inverse)
            case = Case(
                probe,
                "rotate",
                {"x": Out(TYPES[dtype], tokens, heads * dim, initial=x)},
                cos=cos,
                sin=sin,
                tokens=tokens,
                heads=heads,
                head_dim=dim,
                transposed=inverse,
                dtype=dtype,
            )
            probe.correct(
                f"rotate {short(dtype)}{' back' if inverse else ''} {tokens}x{heads}x{dim}",
                case,
                lambda out: [("x", relative(out["x"], exact), ROUNDED[dtype])],
                tokens=tokens,
            )


def attention(probe):
    limits = {"VLMQ_F32": (2e-6, 1e-5), "VLMQ_BF16": (5e-3, 1e-2), "VLMQ_F16": (6e-4, 1.5e-3)}
    shapes = [(2, 1, 16, [(0, 35), (37, 70)], 1), (4, 2, 128, [(1, 18)], 0), (2, 2, 80, [(0, 40)], 1)]
    shapes += probe.pick([(28, 4, 128, [(0, 512), (512, 1023)], 1), (16, 16, 80, [(0, 300)], 0), (2, 1, 256, [(0, 90)], 1)], [])
    for (heads, kv_heads, dim, ranges, causal), dtype in itertools.product(shapes, TYPES):
        rows, kind = ranges[-1][1] + 2, TYPES[dtype]
        spans = torch.tensor([[a, b, a, b] for a, b in ranges], dtype=I32, device=probe.device)
        longest = max(b - a for a, b in ranges)
        q, d_out = (probe.noise(rows, heads * dim, seed=seed, dtype=kind) for seed in (1, 4))
        k, v = (probe.noise(rows, kv_heads * dim, seed=seed, dtype=kind) for seed in (2, 3))
        exact_of = [x.double().requires_grad_() for x in (q, k, v)]
        exact, log_sum = oracles.attention(*exact_of, spans.tolist(), heads, kv_heads, causal)
        exact.backward(d_out.double())
        exact, log_sum = exact.detach(), log_sum.detach()
        common = {
            "spans": spans,
            "span_count": len(ranges),
            "longest_q": longest,
            "q_rows": rows,
            "k_rows": rows,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "causal": causal,
            "dtype": dtype,
        }
        what = f"{short(dtype)} {len(ranges)}x{longest} {heads}/{kv_heads} heads of {dim}{' causal' if causal else ''}"
        forward, backward = limits[dtype]
        own = torch.zeros(rows, dtype=torch.bool, device=probe.device)
        for a, b in ranges:
            own[a:b] = True

        def errors(out):
            return [
                ("out", relative(out["out"], exact), forward),
                (
                    "log of the denominator",
                    float(((out["log_sum"].double() - log_sum).abs() / log_sum.abs().clamp(min=1)).max()),
                    4e-6,
                ),
                ("rows of no span", float(out["out"][~own].abs().max()), 0),
            ]

        outputs = {"out": Out(kind, rows, heads * dim), "log_sum": Out(F32, rows, heads)}
        probe.correct(f"attention {what}", Case(probe, "attention", outputs, q=q, k=k, v=v, **common), errors)
        outputs = {name: Out(kind, rows, count * dim) for name, count in (("d_q", heads), ("d_k", kv_heads), ("d_v", kv_heads))}
        case = Case(
            probe,
            "attention_backward",
            outputs,
            q=q,
            k=k,
            v=v,
            out=exact.to(kind),
            log_sum=log_sum.float(),
            d_out=d_out,
            longest_k=longest,
            **common,
        )
        probe.correct(
            f"attention_backward {what}",
            case,
            lambda out: [(name, relative(out[name], of.grad), backward) for name, of in zip(("d_q", "d_k", "d_v"), exact_of)],
        )


def elementwise(probe):
    count, rows, cols = 1031, 7, 136
    for dtype, kind in TYPES.items():
        x, up = 4 * probe.noise(1, count), probe.noise(1, count, seed=1)
        x, up = x.to(kind), up.to(kind)
        for activation, given in itertools.product(probe.api.header.enums["vlmq_activation"], (None, up)):
            exact = oracles.activated(x, activation) * (1 if given is None else given.double())
            case = Case(
                probe, "activate", {"y": Out(kind, 1, count)}, x=x, up=given, count=count, activation=activation, dtype=dtype
            )
            probe.correct(
                f"activate {activation[5:].lower()}{' gated' if given is not None else ''} {short(dtype)} {count}",
                case,
                lambda out: [("y", relative(out["y"], exact), ROUNDED[dtype])],
            )
        a, b = probe.noise(rows, cols, seed=2, dtype=kind), probe.noise(rows, cols, seed=3, dtype=kind)
        sums = probe.noise(rows, cols, seed=2)
        for b_rows, shift, float_a in ((rows, 0, 0), (1, 1, 0), (1, 0, 1)):
            first = sums if float_a else a
            exact = 2.5 * (first.double() - 0.75 * b[:b_rows].double())
            case = Case(
                probe,
                "add",
                {"out": Out(kind, rows, cols, shift=shift)},
                a=first,
                b=b[:b_rows].contiguous(),
                rows=rows,
                b_rows=b_rows,
                cols=cols,
                sign=-0.75,
                factor=2.5,
                dtype=dtype,
                float_a=float_a,
            )
            probe.correct(
                f"add {short(dtype)}{' of one row' if b_rows == 1 else ''}{' of float32' if float_a else ''} {rows}x{cols}",
                case,
                lambda out: [("out", relative(out["out"], exact), ROUNDED[dtype])],
            )
        case = Case(probe, "mean_abs_rows", {"means": Out(F32, 1, rows)}, x=a, rows=rows, cols=cols, dtype=dtype)
        probe.correct(
            f"mean_abs_rows {short(dtype)} {rows}x{cols}",
            case,
            lambda out: [("means", relative(out["means"][0], a.double().abs().mean(1)), 1e-6)],
        )
        scales = b[0].float().contiguous()
        case = Case(
            probe,
            "scaled_squares_rows",
            {"sums": Out(F32, 1, rows)},
            x=a,
            scales=scales,
            rows=rows,
            cols=cols,
            dtype=dtype,
        )
        squares = (a.double() * scales.double()).square().sum(1)
        probe.correct(
            f"scaled_squares_rows {short(dtype)} {rows}x{cols}",
            case,
            lambda out: [("sums", relative(out["sums"][0], squares), 1e-6)],
        )
        for bad, value in ((None, 0), (5, torch.nan), (3, -torch.inf)):
            holed = a.clone()
            if bad is not None:
                holed[bad:, cols - 1] = value
            case = Case(
                probe,
                "first_non_finite_row",
                {"row": Out(I32, 1, 1, initial=torch.tensor([[2**31 - 1]]))},
                x=holed,
                rows=rows,
                cols=cols,
                dtype=dtype,
            )
            expected = 2**31 - 1 if bad is None else bad
            probe.correct(
                f"first_non_finite_row {short(dtype)} {'none' if bad is None else value}",
                case,
                lambda out: [("row", abs(int(out["row"].item()) - expected), 0)],
            )
        for to in TYPES:
            # Ties, subnormals, what overflows.
            values = torch.cat(
                [
                    x.float(),
                    x.float() * 1e-7,
                    x.float() * 1e5,
                    torch.tensor([[1 + 2**-9, 1 + 2**-12, 0.0, -0.0]], device=probe.device),
                ],
                1,
            ).to(kind)
            exact = values.to(TYPES[to])
            case = Case(
                probe,
                "convert",
                {"out": Out(TYPES[to], 1, values.shape[1])},
                x=values,
                count=values.shape[1],
                **{"from": dtype, "to": to},
            )
            probe.correct(
                f"convert {short(dtype)} to {short(to)} {values.shape[1]}",
                case,
                lambda out: [("elements that differ", different(out["out"], exact), 0)],
            )
    for width in (6, 16, 4098):
        table = probe.bits(11, width, high=255)
        index = probe.order(11)[:7].contiguous()
        expected = table[index.long()]
        case = Case(
            probe, "gather_rows", {"out": Out(U8, 7, width)}, table=table, indices=index, rows=7, row_bytes=width, scatter=0
        )
        probe.correct(
            f"gather_rows {width} bytes", case, lambda out: [("bytes that differ", different(out["out"], expected), 0)]
        )
        mask = torch.zeros(11, width, dtype=torch.bool, device=probe.device)
        mask[index.long()] = True
        case = Case(
            probe,
            "gather_rows",
            {"out": Out(U8, 11, width, initial=torch.full((11, width), 255, dtype=U8), written=mask)},
            table=expected,
            indices=index,
            rows=7,
            row_bytes=width,
            scatter=1,
        )
        probe.correct(
            f"gather_rows scattered {width} bytes",
            case,
            lambda out: [("bytes that differ", different(out["out"][index.long()], expected), 0)],
        )


def refusals(probe):
    """A call that is wrong says so and writes nothing; a call of nothing is right."""
    x = probe.noise(1, 8)
    out = probe.noise(1, 8, seed=1)
    before = out.clone()
    statuses = {
        "no input": (
            Call(probe.api, "convert", x=None, out=out, count=8, **{"from": "VLMQ_F32", "to": "VLMQ_F32"}).status(),
            "VLMQ_BAD_ARGUMENT",
        ),
        "a negative count": (
            Call(probe.api, "convert", x=x, out=out, count=-1, **{"from": "VLMQ_F32", "to": "VLMQ_F32"}).status(),
            "VLMQ_BAD_ARGUMENT",
        ),
        "an unknown type": (
            Call(probe.api, "convert", x=x, out=out, count=8, **{"from": 7, "to": "VLMQ_F32"}).status(),
            "VLMQ_BAD_ARGUMENT",
        ),
        "nothing": (
            Call(probe.api, "convert", x=x, out=out, count=0, **{"from": "VLMQ_F32", "to": "VLMQ_F32"}).status(),
            "VLMQ_OK",
        ),
    }
    probe.synchronize()
    errors = [(what, float(got != expected), 0) for what, (got, expected) in statuses.items()]
    probe.verdict("statuses", errors + [("output touched", float(not torch.equal(out, before)), 0)], True, [])


CALLS = [
    (weighted_hessian, 2),
    (factor, 2),
    (layer, 4),
    (quantize_block, 4),
    (product, 1),
    (permute, 1),
    (permute_columns, 1),
    (round_to_nearest, 1),
    (group_grid, 2),
    (cholesky_inverse, 1),
    (squared_norm, 1),
    (pack, 1),
    (dequantize, 1),
    (attention, 2),
    (norm, 1),
    (rotate, 1),
    (elementwise, 2),
    (refusals, 1),
]


def items():
    return [Item(f"correct {run.__name__}", "correct", run, seconds, True) for run, seconds in CALLS]
