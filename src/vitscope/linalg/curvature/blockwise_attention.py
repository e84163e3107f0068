"""Scaled dot-product attention that is differentiated twice by blocks, without a matrix of tokens by tokens in the graph.

With S = s Q K^T + B, P = softmax(S), O = P V and the output's gradient G, the first derivatives are, with dP = G V^T and
dS = P (dP - rowsum(P dP)),

    Q: s dS K,   K: s dS^T Q,   V: P^T G,   B: dS.

The scalar <U_Q, s dS K> + <U_K, s dS^T Q> + <U_V, P^T G> + <U_B, dS> has, with T = s (U_Q K^T + Q U_K^T) + U_B, t = rowsum(P T),
C = P (T - t), W = (dP - rowsum(P dP)) (T - t) + G U_V^T and Z = P (W - rowsum(P W)), the derivatives

    Q: s (dS U_K + Z K),   K: s (dS^T U_Q + Z^T Q),   V: C^T G,   G: C V + P U_V,   B: Z.

W is exact up to a number a row, which Z does not depend on.

PyTorch's math attention keeps several such matrices of each layer for the second derivative. Here the graph holds Q, K, V, B and
G alone, and P is computed again for some heads and rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: keys from which on attention is taken by blocks; below, the matrices are small and kept
FEWEST_KEYS = 128
#: entries of a block of the matrix: of a few megabytes, for a CPU's cache, and enough for a GPU
CPU_ENTRIES, GPU_ENTRIES = 1 << 20, 1 << 24


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Return what `torch.nn.functional.scaled_dot_product_attention` does, or NotImplemented.

    Args:
        query: (B, H, N, D).
        key: (B, H, M, D).
        value: (B, H, M, E).
        attn_mask: A mask or a bias that broadcasts to (B, H, N, M); None for none.
        dropout_p: Not supported where it is not 0.
        is_causal: Not supported.
        scale: None for one over the root of D.
        enable_gqa: Not supported.
    """
    tensors = (query, key, value)
    is_supported = (
        all(type(t) is Tensor and t.ndim == 4 and t.is_floating_point() for t in tensors)
        and len({(t.dtype, t.device, t.shape[:2]) for t in tensors}) == 1
        and not (dropout_p or is_causal or enable_gqa)
    )
    if not is_supported or key.shape[2] < FEWEST_KEYS or not torch.is_grad_enabled():
        return NotImplemented
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        elif isinstance(attn_mask, Tensor) and attn_mask.dtype == query.dtype:
            bias = attn_mask
        if bias is None or bias.ndim > 4:
            return NotImplemented
        bias = bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))  # four axes, which broadcast to (B, H, N, M)
    return _Attention.apply(query, key, value, bias, query.shape[-1] ** -0.5 if scale is None else scale)


class _Block(NamedTuple):
    """Heads and rows of one image: an index for tensors of queries, one for those of keys, one for the bias."""

    queries: tuple[int, slice, slice]
    keys: tuple[int, slice]
    bias: tuple[slice, ...] | None


def _blocks(q: Tensor, k: Tensor, bias: Tensor | None) -> Iterator[_Block]:
    n_images, n_heads, n, _ = q.shape
    m = k.shape[2]
    entries = GPU_ENTRIES if q.is_cuda else CPU_ENTRIES
    heads, rows = max(1, min(n_heads, entries // (n * m))), max(1, min(n, entries // m))
    for image, head, row in itertools.product(range(n_images), range(0, n_heads, heads), range(0, n, rows)):
        of_heads, of_rows = slice(head, head + heads), slice(row, row + rows)
        place = None
        if bias is not None:
            places = (slice(image, image + 1), of_heads, of_rows)
            # an axis of size 1 is the same for all
            place = tuple(part if size > 1 else slice(0, 1) for part, size in zip(places, bias.shape))
        yield _Block((image, of_heads, of_rows), (image, of_heads), place)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block: _Block) -> Tensor:
    """Return P of a block ``(heads, rows, M)``; a row that is masked everywhere is 0."""
    scores = (q[block.queries] * scale) @ k[block.keys].transpose(-1, -2)
    if bias is not None and block.bias is not None:
        scores += bias[block.bias][0]
    return torch.ops.aten._safe_softmax(scores, -1)


def _centered(p: Tensor, x: Tensor) -> Tensor:
    """Return P (x - rowsum(P x)), the derivative of a softmax ``p`` applied to ``x``, in the place of ``x``."""
    return x.sub_((p * x).sum(-1, keepdim=True)).mul_(p)


def _propagated_scores(
    uq: Tensor | None,
    uk: Tensor | None,
    ub: Tensor | None,
    q_part: Tensor,
    k: Tensor,
    scale: float,
    block: _Block,
    like: Tensor,
) -> Tensor:
    """Return T = s (U_Q K^T + Q U_K^T) + U_B of a block ``(heads, rows, M)``; ``q_part`` is s Q, and ``like`` has its shape."""
    t = None if uq is None else (uq[block.queries] * scale) @ k[block.keys].transpose(-1, -2)
    if uk is not None:
        uk_part = uk[block.keys].transpose(-1, -2)
        t = q_part @ uk_part if t is None else t.baddbmm_(q_part, uk_part)
    t = torch.zeros_like(like) if t is None else t
    if ub is not None and block.bias is not None:
        t += ub[block.bias][0]
    return t


def _add_to_bias(total: Tensor, part: Tensor, block: _Block) -> None:
    """Add a block ``(heads, rows, M)`` to the bias's derivative, summed where the bias is broadcast."""
    assert block.bias is not None
    place = total[block.bias]
    place += part[None].sum_to_size(place.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for block in _blocks(q, k, bias):
            out[block.queries] = _probabilities(q, k, bias, scale, block) @ v[block.keys]
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        q, k, v, bias = ctx.saved_tensors
        return (*_Backward.apply(g, q, k, v, bias, ctx.scale, ctx.needs_input_grad[3]), None)


class _Backward(torch.autograd.Function):
    """The derivatives by Q, K, V and B."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, needs_bias: bool
    ) -> Any:
        ctx.save_for_backward(g, q, k, v, bias)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        db = torch.zeros_like(bias) if bias is not None and needs_bias else None
        for block in _blocks(q, k, bias):
            p = _probabilities(q, k, bias, scale, block)  # (heads, rows, M), and so ds
            g_part = g[block.queries]  # (heads, rows, E)
            dv[block.keys] += p.transpose(-1, -2) @ g_part
            ds = _centered(p, g_part @ v[block.keys].transpose(-1, -2))
            if db is not None:
                _add_to_bias(db, ds, block)
            dq[block.queries] = (ds @ k[block.keys]) * scale
            dk[block.keys] += ds.transpose(-1, -2) @ (q[block.queries] * scale)
        return dq, dk, dv, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, uq: Tensor | None, uk: Tensor | None, uv: Tensor | None, ub: Tensor | None) -> Any:
        """Take what is propagated to the derivatives by Q, K, V and B; None for zeros."""
        g, q, k, v, bias = ctx.saved_tensors
        scale = ctx.scale
        dg, dq, dk, dv = torch.empty_like(g), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        db = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[4] else None
        for block in _blocks(q, k, bias):
            rows, keys = block.queries, block.keys
            q_part, g_part = q[rows] * scale, g[rows]  # (heads, rows, D) and (heads, rows, E)
            p = _probabilities(q, k, bias, scale, block)  # (heads, rows, M), and so dp, t, w, z, c and ds
            dp = g_part @ v[keys].transpose(-1, -2)
            dp.sub_((p * dp).sum(-1, keepdim=True))
            t = _propagated_scores(uq, uk, ub, q_part, k, scale, block, p)
            t.sub_((p * t).sum(-1, keepdim=True))
            w = dp * t
            if uv is not None:
                w.baddbmm_(g_part, uv[keys].transpose(-1, -2))
            z, c, ds = _centered(p, w), t.mul_(p), dp.mul_(p)
            dg[rows] = c @ v[keys]
            dv[keys] += c.transpose(-1, -2) @ g_part
            if uv is not None:
                dg[rows] += p @ uv[keys]
            dq[rows] = (z @ k[keys]) * scale
            dk[keys] += z.transpose(-1, -2) @ q_part
            if uk is not None:
                dq[rows] += (ds @ uk[keys]) * scale
            if uq is not None:
                dk[keys] += ds.transpose(-1, -2) @ (uq[rows] * scale)
            if db is not None:
                _add_to_bias(db, z, block)
        return dg, dq, dk, dv, db, None, None
