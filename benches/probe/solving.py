"""A layer's solve, its calls sequenced as the program does: products over all earlier columns once a span of four blocks, and
within the span once a block."""

import torch

from .api import Call

BLOCKS_OF_A_SPAN = 4
RULE = {"bits": 3, "symmetric": 0, "grid": "VLMQ_MINMAX", "scale_type": "VLMQ_F16", "smallest_zero": 0}


def ends_of(n, width):
    return [min(start + width, n) for start in range(0, n, width)]


def block_arguments(residual, error, root, inverses, diagonal, first, columns, span_first, group, rule, **more):
    """Numbers and inputs of vlmq_quantize_block; `more` adds or replaces."""
    return {
        "residual": residual,
        "error": error,
        "root": root,
        "inverses": inverses,
        "diagonal": diagonal,
        "rows": residual.shape[0],
        "features": residual.shape[1],
        "first": first,
        "columns": columns,
        "span_first": span_first,
        "span": columns if error is None else error.shape[1],
        "group": group,
        "given_grid": 0,
        "rule": rule,
        **more,
    }


class Factored:
    """Statistics in processing order, factored by the kernels. H damped and C are given in that order, or permuted here."""

    def __init__(self, probe, n, block, cross):
        device, width = probe.device, probe.api.header.constants["VLMQ_BLOCK"]
        self.probe, self.n, self.block, self.ends = probe, n, block, ends_of(n, block)
        new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=device)
        self.root, self.inverses, self.diagonal = new(n, n), new(n, width), new(n)
        self.status = new(1, dtype=torch.int32)
        self.cross, self.products = (new(n, n), new(n, width)) if cross else (None, None)
        blocks = {"blocks": self.ends, "block_count": len(self.ends), "n": n}
        self.factor = Call(
            probe.api, "factor", h=self.root, inverses=self.inverses, diagonal=self.diagonal, status=self.status, **blocks
        )
        if cross:
            factor = {"root": self.root, "inverses": self.inverses, "diagonal": self.diagonal}
            self.cross_factor = Call(
                probe.api, "cross_factor", c=self.cross, products=self.products, alpha=0.25, **factor, **blocks
            )

    def permuted(self, h, c, order, damped):
        """Fills in H and C from original order, with this diagonal."""
        api = self.probe.api
        Call(api, "permute", x=h, order=order, diagonal=damped, out=self.root, n=self.n, symmetric=1)()
        if c is not None:
            Call(api, "permute", x=c, order=order, out=self.cross, n=self.n, symmetric=0)()

    def run(self):
        self.factor()
        if self.cross is not None:
            self.cross_factor()

    def pivot(self):
        """-1, or the pivot that is not positive."""
        return int(self.status.item())


class Layer:
    """The solve of `rows` outputs over a factor: made once, run any number of times after `reset`. `grid`: scales and zeros
    [rows, groups] that are given, where a group is a block."""

    def __init__(self, probe, factored, rows, group, rule, shift=False, grid=None):
        self.probe, self.factored, self.group = probe, factored, group
        n, device, api = factored.n, probe.device, probe.api
        gptaq = factored.cross is not None
        new = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device=device)
        self.residual = new(rows, n)
        self.carried = new(rows, n) if gptaq else None
        self.shift = new(rows, n) if gptaq and shift else None
        self.status = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)
        self.outputs, self.calls = [], []
        root, f = factored.root, factored
        starts = [0] + f.ends[:-1]
        blocks = list(zip(starts, f.ends))
        for at in range(0, len(blocks), BLOCKS_OF_A_SPAN):
            span = blocks[at : at + BLOCKS_OF_A_SPAN]
            first, end = span[0][0], span[-1][1]
            error, cross = new(rows, end - first), new(rows, end - first) if gptaq else None
            self.calls.append(error.zero_)
            if gptaq:
                self.calls.append(cross.zero_)
            self.carry(error, cross, 0, first, first, end, 0)
            for start, stop in span:
                self.carry(error, cross, first, start, start, stop, start - first)
                columns, groups = stop - start, (stop - start) // group
                out = {
                    "codes": new(rows, columns, dtype=torch.uint8),
                    "scales": new(rows, groups),
                    "zeros": new(rows, groups, dtype=torch.uint8),
                    "row_errors": new(rows, dtype=torch.float64),
                }
                if grid is not None:
                    at_group = slice(start // group, start // group + 1)
                    out |= {name: of[:, at_group].contiguous() for name, of in zip(("scales", "zeros"), grid)}
                self.outputs.append(out)
                arguments = block_arguments(
                    self.residual,
                    error,
                    root,
                    f.inverses,
                    f.diagonal,
                    start,
                    columns,
                    first,
                    group,
                    rule,
                    cross=cross,
                    carried=self.carried,
                    shift=self.shift,
                    products=f.products,
                    status=self.status,
                    given_grid=int(grid is not None),
                    **out,
                )
                self.calls.append(Call(api, "quantize_block", **arguments))

    def carry(self, error, cross, inner_first, inner_end, first, end, target):
        """Columns first..end brought up to date with the columns inner_first..inner_end."""
        if inner_first == inner_end:
            return
        n = self.factored.n

        def product(a, b, c):
            self.calls.append(
                Call(
                    self.probe.api,
                    "product",
                    a=a[:, inner_first:],
                    b=b[inner_first:, first:],
                    c=c[:, target:],
                    rows=a.shape[0],
                    cols=end - first,
                    inner=inner_end - inner_first,
                    a_stride=n,
                    b_stride=n,
                    c_stride=c.shape[1],
                    alpha=1.0,
                    beta=1.0,
                    transposed=0,
                )
            )

        product(self.residual, self.factored.root, error)
        if cross is not None:
            product(self.carried, self.factored.cross, cross)
            if self.shift is not None:
                product(self.shift, self.factored.root, cross)

    def reset(self, weight, order):
        """The weight [rows, n] in processing order."""
        rows, n = weight.shape
        dtype = {torch.float32: "VLMQ_F32", torch.bfloat16: "VLMQ_BF16", torch.float16: "VLMQ_F16"}[weight.dtype]
        Call(self.probe.api, "permute_columns", x=weight, order=order, out=self.residual, rows=rows, cols=n, dtype=dtype)()
        self.status.fill_(2**31 - 1)

    def run(self):
        for call in self.calls:
            call()

    def result(self, name):
        return torch.cat([out[name] for out in self.outputs], 1)

    def bits(self):
        """All that the solve wrote, as bytes."""
        parts = [out[name] for out in self.outputs for name in sorted(out)] + [self.residual, self.status]
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
