"""What the calls must compute, in float64, from the documentation of vlmq.h and the published method: none of our code."""

import typing

import torch

F64 = torch.float64


# ---- statistics ----


def weighted(u, f, g):
    """H and C in full, and the norms that an entry's error is held against: of H's rows, of C's rows, of the columns."""
    u = u.to(F64)
    if g is not None:
        alive = g != 0
        u, g = u[alive], g[alive].to(F64).unsqueeze(1)
    else:
        g = torch.ones(u.shape[0], 1, dtype=F64, device=u.device)
    scaled = g * u
    h, norms = scaled.T @ scaled, scaled.norm(dim=0)
    if f is None:
        return h, None, norms, None
    f = f.to(F64) if f.shape[0] == u.shape[0] else f[alive].to(F64)
    delta = g * (f - u)
    return h, delta.T @ scaled, norms, delta.norm(dim=0)


def entrywise(got, exact, rows, columns, old=None):
    """The largest error of an entry against the norms of its row and its column."""
    scale = rows.unsqueeze(1) * columns.unsqueeze(0)
    if old is not None:
        scale = scale + old.to(F64).abs()
    error = (got.to(F64) - exact).abs() / scale.clamp(min=torch.finfo(F64).tiny)
    # max() passes a NaN on.
    return float(error.max()) if error.numel() else 0.0


# ---- factor ----


def root_of(h):
    """R upper triangular with H = R R^T: Cholesky of the matrix turned around."""
    return torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1).contiguous()


def in_blocks(matrix, ends, width):
    """Rows of each block holding its diagonal block of the matrix, zeros beyond."""
    out = torch.zeros(matrix.shape[0], width, dtype=matrix.dtype, device=matrix.device)
    start = 0
    for end in ends:
        out[start:end, : end - start] = matrix[start:end, start:end]
        start = end
    return out


def inverse_of_upper(matrix):
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(matrix, eye, upper=True)


def block_inverses(root, ends, width):
    out = torch.zeros(root.shape[0], width, dtype=root.dtype, device=root.device)
    start = 0
    for end in ends:
        out[start:end, : end - start] = inverse_of_upper(root[start:end, start:end])
        start = end
    return out


def cross_of(c, r, alpha):
    """M = alpha triu(C R^-T, 1) diag(R)^-1, C by its upper triangle."""
    # C R^-T = X with X R^T = C, and of C's lower triangle nothing reaches what is above X's diagonal.
    x = torch.linalg.solve_triangular(r.T, c.triu(), upper=False, left=False)
    return alpha * x.triu(1) / r.diagonal()


# ---- grids and the column loop ----


def rounded_scale(scale, dtype):
    """Rounded to its storage type, the smallest positive number of it instead of 0."""
    stored = scale.float().to(dtype)
    smallest = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    stored = stored.to(F64)
    return torch.where(stored == 0, torch.full_like(stored, smallest), stored)


def grid_of_range(low, high, rule, dtype):
    top, middle = 2 ** rule["bits"] - 1, 2 ** (rule["bits"] - 1)
    # Each operation in float32, as vlmq.h has it: a range that is rounded first may make another scale. A tensor for the divisor,
    # since on a GPU PyTorch multiplies by the inverse of a number.
    spread = (2 * torch.maximum(high, -low) if rule["symmetric"] else high - low).float()
    scale = rounded_scale((spread / torch.full_like(spread, top)).to(F64), dtype)
    if rule["symmetric"]:
        zero = torch.full_like(scale, middle)
    else:
        zero = torch.round(-low / scale).clamp(rule["smallest_zero"], top)
    empty = (low == 0) & (high == 0)
    return torch.where(empty, torch.ones_like(scale), scale), torch.where(empty, torch.full_like(zero, middle), zero)


def codes_of(w, scale, zero, bits):
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def wrong_codes(got, w, scale, zero, bits, tie):
    """How many codes are not those of w; so near to a tie (in steps) either neighbour is right."""
    steps = w / scale
    near = ((steps - steps.floor()) - 0.5).abs() <= tie
    distance = (codes_of(w, scale, zero, bits) - got.to(F64)).abs()
    return int((distance > near.to(F64)).sum())


def loss_of(w, scale, zero, bits):
    q = scale * (codes_of(w, scale, zero, bits) - zero)
    return (w - q).abs().pow(2.4).sum(-1, keepdim=True)


class Terms(typing.NamedTuple):
    """What the loss of a group's solve is made of: the factor on the group's columns."""

    root: torch.Tensor  # [columns, columns]
    cross: torch.Tensor | None  # M [columns, columns], or None: GPTQ
    diagonal: torch.Tensor  # [columns] of R


def terms_of(root, m, diagonal, group, ends):
    """Of a group, a slice of columns in a layer whose blocks end at `ends`: from block to block nothing is carried."""
    columns = torch.arange(group.start, group.stop, device=root.device)
    block = torch.bucketize(columns, torch.tensor(ends, device=root.device), right=True)
    same = block.unsqueeze(1) == block.unsqueeze(0)
    return Terms(root[group, group] * same, None if m is None else m[group, group] * same, diagonal[group])


def solve_loss(w, scale, zero, bits, terms):
    """sum (e_j R_jj)^2 of groups [..., columns] that are solved on grids [..., 1]; without terms sum (w - q)^2.

    No error is carried on here: what a column is before it is rounded follows from the residuals and the columns before it, in the
    factor's coordinates, x = w + (W - W_hat) (root - I) + x M."""
    if terms is None:
        return (w - scale * (codes_of(w, scale, zero, bits) - zero)).square().sum(-1, keepdim=True)
    w = w.expand(*scale.shape[:-1], w.shape[-1])
    before, residual = torch.zeros_like(w), torch.zeros_like(w)
    loss, scale, zero = 0, scale[..., 0], zero[..., 0]
    for j in range(w.shape[-1]):
        x = w[..., j] + residual[..., :j] @ terms.root[:j, j]
        if terms.cross is not None:
            x = x + before[..., :j] @ terms.cross[:j, j]
        rounded = scale * (codes_of(x, scale, zero, bits) - zero)
        before[..., j], residual[..., j] = x, w[..., j] - rounded
        loss = loss + ((x - rounded) * terms.diagonal[j]).square()
    return loss.unsqueeze(-1)


def least_of(candidates, best=None):
    """The (scale, zero, loss) of least loss, the first of equals; `best` stands before all of them."""
    for candidate in candidates:
        if best is None:
            best = candidate
        else:
            better = candidate[2] < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best))
    return best


def grid_of_least_loss(w, low, high, rule, dtype, terms):
    """VLMQ_LOSS, as grid_of: the ranges first, then what the best of them becomes with another zero."""

    def solved(grids):
        """All side by side, in a dimension before the others."""
        scales, zeros = (torch.stack(of) for of in zip(*grids))
        return zip(scales, zeros, solve_loss(w, scales, zeros, rule["bits"], terms))

    # The ends of a shrunken range are float32, too.
    low, high = low.float(), high.float()
    shrinks = [1 - 3 * k / 64 for k in range(16)]
    best = least_of(solved([grid_of_range((low * p).to(F64), (high * p).to(F64), rule, dtype) for p in shrinks]))
    if rule["symmetric"]:
        return best
    scale, zero, _ = best
    moved = [
        (rounded_scale(scale * stretch, dtype), (zero + step).clamp(rule["smallest_zero"], 2 ** rule["bits"] - 1))
        for stretch in (7 / 8, 1, 9 / 8, 5 / 4)
        for step in (-1, 1)
    ]
    return least_of(solved(moved), best)


def grid_of(w, rule, dtype, terms=None):
    """Scale and zero [rows, 1] of a group [rows, columns], and the loss of the search; `terms`: what VLMQ_LOSS solves it with."""
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    if rule["grid"] == "VLMQ_MINMAX":
        return (*grid_of_range(low, high, rule, dtype), None)
    if rule["grid"] == "VLMQ_LOSS":
        return grid_of_least_loss(w, low, high, rule, dtype, terms)

    def shrunken():
        for k in range(80):
            scale, zero = grid_of_range(low * (1 - k / 100), high * (1 - k / 100), rule, dtype)
            yield scale, zero, loss_of(w, scale, zero, rule["bits"])

    return least_of(shrunken())


def column_loop(w, h, c, alpha, rule, dtype, group, block, quantized_cross=False):
    """The published loop: the upper factor of the inverse, one column after the other, its error carried to all later ones.

    W [rows, n], H damped and in full, C or None. With `quantized_cross` later blocks are given the rounded column for the GPTAQ
    term, as the reference code does. Codes, scales, zeros, and W - W_hat."""
    w, n = w.to(F64).clone(), w.shape[1]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    p = None if c is None else alpha * (c @ upper.T).triu(1) @ upper
    original = w.clone()
    if rule["grid"] == "VLMQ_LOSS":
        # The same factor as R: H^-1 = U^T U with U = R^-1.
        r = inverse_of_upper(upper)
        diagonal, ends = r.diagonal(), list(range(block, n + block, block))
        root, m = r / diagonal, None if c is None else alpha * (c @ upper.T).triu(1) / diagonal
    terms, codes, scales, zeros = None, torch.zeros_like(w), [], []
    q = torch.zeros_like(w)
    for i in range(n):
        if i % group == 0:
            if rule["grid"] == "VLMQ_LOSS":
                terms = terms_of(root, m, diagonal, slice(i, min(i + group, n)), ends)
            scale, zero, _ = grid_of(w[:, i : i + group], rule, dtype, terms)
            scales.append(scale)
            zeros.append(zero)
        column = w[:, i].clone()
        code = codes_of(column, scale[:, 0], zero[:, 0], rule["bits"])
        rounded = scale[:, 0] * (code - zero[:, 0])
        codes[:, i], q[:, i] = code, rounded
        error = (column - rounded) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:])
        if p is not None:
            end = (i // block + 1) * block if quantized_cross else n
            w[:, i:end] += torch.outer(column, p[i, i:end])
            if quantized_cross:
                w[:, end:] += torch.outer(rounded, p[i, end:])
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1), original - q


# ---- pack ----


def pack(codes, bits, subtract):
    """Codes [runs, count] as words [runs, words] of a little-endian stream of bits."""
    codes = (codes.long() - subtract) % 2**bits
    runs, count = codes.shape
    stream = ((codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1).reshape(runs, count * bits)
    padded = torch.zeros(runs, -(-count * bits // 32) * 32, dtype=torch.long, device=codes.device)
    padded[:, : count * bits] = stream
    words = (padded.reshape(runs, -1, 32) << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


# ---- block ----


def norm(x, weight, bias, eps):
    x = x.to(F64)
    centred = x if bias is None else x - x.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * weight.to(F64)
    return y if bias is None else y + bias.to(F64)


def rotate(x, cos, sin, heads, inverse):
    tokens, width = x.shape
    a, b = x.to(F64).reshape(tokens, heads, 2, width // heads // 2).unbind(2)
    cos, sin = cos.to(F64).unsqueeze(1), (-sin if inverse else sin).to(F64).unsqueeze(1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(tokens, width)


def attention(q, k, v, spans, heads, kv_heads, causal):
    """Output and log of the denominator; rows of no span are zero. Differentiable."""
    dim = q.shape[1] // heads
    out = torch.zeros(q.shape, dtype=F64, device=q.device)
    log_sum = torch.zeros(q.shape[0], heads, dtype=F64, device=q.device)
    for q0, q1, k0, k1 in spans:
        if q1 == q0:
            continue
        split = lambda x, n: x.to(F64).reshape(x.shape[0], n, dim).transpose(0, 1)
        queries, keys, values = split(q[q0:q1], heads), split(k[k0:k1], kv_heads), split(v[k0:k1], kv_heads)
        keys, values = (x.repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) * dim**-0.5
        if causal:
            last = torch.arange(q1 - q0, device=q.device) + (k1 - k0) - (q1 - q0)
            hidden = torch.arange(k1 - k0, device=q.device).unsqueeze(0) > last.unsqueeze(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        out[q0:q1] = (scores.softmax(-1) @ values).transpose(0, 1).reshape(q1 - q0, heads * dim)
        log_sum[q0:q1] = scores.logsumexp(-1).T
    return out, log_sum


def activated(x, kind):
    x = x.to(F64)
    return {
        "VLMQ_SILU": lambda: x * torch.sigmoid(x),
        "VLMQ_GELU": lambda: torch.nn.functional.gelu(x),
        "VLMQ_GELU_TANH": lambda: torch.nn.functional.gelu(x, approximate="tanh"),
        "VLMQ_QUICK_GELU": lambda: x * torch.sigmoid(1.702 * x),
    }[kind]()
