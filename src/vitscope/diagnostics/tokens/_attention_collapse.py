"""Similarity of attention among queries, heads and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean
from vitscope.core.shared_values.entropy_terms import entropy_terms, row_entropies
from vitscope.models.structure.attention_units import AttentionUnit

#: images whose attention is compared among layers at once
_CHUNK = 8


class AttentionCollapse:
    """Means over images of one unit; positions alone count, prefix tokens and padding are left out and rows sum to 1 again.

    Attributes:
        head_nmi: Normalized mutual information of query and key positions, of each head.
        nmi: Mean over heads of the normalized mutual information.
        head_similarity: Mean cosine of the attention of each pair of heads.
    """

    def __init__(self, unit: AttentionUnit) -> None:
        self.unit = unit
        self.head_nmi, self.nmi, self.head_similarity = (RunningMean() for _ in range(3))
        self._queries, self._keys = (side[..., 0] >= 0 for side in (unit.queries, unit.keys))  # (n_windows, tokens)
        #: queries and keys with a position, the same in every window; None where windows have paddings of their own
        self._common: tuple[Tensor, ...] | None = None
        masks = (self._queries, self._keys)
        if all(bool((mask == mask[0]).all()) for mask in masks):
            self._common = tuple(mask[0].nonzero()[:, 0] for mask in masks)

    def add(self, weights: Tensor) -> Tensor:
        """Add a batch's weights ``(B * n_windows, heads, queries, keys)`` and return their mean over heads, a row an image."""
        p, of_rows = self._on_positions(weights)  # (B, n_windows, heads, queries, keys), (B, n_windows, heads, queries)
        counts = self._queries.sum(1).to(p.device)  # (n_windows,)
        several = counts > 1
        if bool(several.any()):
            nmi = _normalized_information(p.sum(-2), of_rows, counts[:, None])[:, several].mean(1)  # (B, heads)
        else:
            nmi = of_rows.new_full((len(p), p.shape[2]), torch.nan)
        self.head_nmi.add(nmi)
        self.nmi.add(nmi.mean(1))
        heads = p.transpose(1, 2).flatten(2)  # (B, heads, n_windows * queries * keys)
        self.head_similarity.add(_mean_off_diagonal(_cosines(heads)))
        return heads.mean(1)

    def _on_positions(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights p between positions, divided by their sum over keys, and the entropies of their rows in float64.

        Both are zero in the rows of padding. Of weights w with the sum s over some of the keys, the entropy of ``p = w / s`` is
        ``-sum w ln w / s + ln s``: the logarithms are those of the weights as they are, which other measures need too.
        """
        windows = weights.unflatten(0, (-1, self.unit.n_windows))  # (B, n_windows, heads, queries, keys)
        if self._common is None:
            p = self._without_padding(windows)
            return p, row_entropies(entropy_terms(p))
        terms = entropy_terms(weights).unflatten(0, (-1, self.unit.n_windows))
        queries, keys = (side.to(weights.device) for side in self._common)
        if len(queries) == weights.shape[-2] and len(keys) == weights.shape[-1]:
            return windows, row_entropies(terms)
        windows, terms = (_selected(_selected(part, queries, 3), keys, 4) for part in (windows, terms))
        sums = windows.sum(-1, keepdim=True)
        wide = sums[..., 0].double()
        return windows / sums, row_entropies(terms) / wide + wide.log()

    def _without_padding(self, windows: Tensor) -> Tensor:
        """Return weights ``(B, n_windows, heads, queries, keys)`` likewise where windows have paddings of their own."""
        queries, keys = (mask.to(windows.device) for mask in (self._queries, self._keys))
        pairs = queries[:, None, :, None] & keys[:, None, None, :]
        windows = torch.where(pairs, windows, 0.0)  # rows of padding may be NaN
        sums = windows.sum(-1, keepdim=True)
        return torch.where(queries[:, None, :, None], windows / sums, 0.0)


def _selected(weights: Tensor, numbers: Tensor, dim: int) -> Tensor:
    """Return the entries with these numbers, as a view where they are neighbors."""
    if not len(numbers):
        return weights.narrow(dim, 0, 0)
    if bool((numbers.diff() == 1).all()):
        return weights.narrow(dim, int(numbers[0]), len(numbers))
    return weights.index_select(dim, numbers)


def normalized_mutual_information(p: Tensor, n_queries: Tensor) -> Tensor:
    """Return ``I(q, k) / sqrt(H(q) H(k))`` of attention ``p (..., queries, keys)``, with equal probability of all queries.

    ``I = H(k) - H(k|q)``; ``H(q) = ln n_queries``. 1 where each query attends to a key of its own, 0 where all queries attend
    alike, also where they attend to a single key. NaN for one query.

    Args:
        p: Rows sum to 1, or to 0 for queries that do not count.
        n_queries: Queries that count, of the leading shape of p or to be broadcast to it.
    """
    return _normalized_information(p.sum(-2), row_entropies(entropy_terms(p)), n_queries)


def _normalized_information(key_sums: Tensor, of_rows: Tensor, n_queries: Tensor) -> Tensor:
    """Return `normalized_mutual_information` from the sums of p over queries (..., keys) and entropies (..., queries).

    The information is a small difference of entropies, so that it is computed in float64.
    """
    n = n_queries.double()
    of_keys = torch.special.entr(key_sums.double() / n[..., None]).sum(-1)
    information = of_keys - of_rows.sum(-1) / n
    both = (n.log() * of_keys).sqrt()
    nmi = torch.where(both > 0, information / both, 0.0)
    return torch.where((n > 1) & of_keys.isfinite(), nmi, torch.nan)


def _cosines(vectors: Tensor) -> Tensor:
    """Return the cosines of all pairs of ``vectors (B, n, d)``: ``(B, n, n)``."""
    products = vectors @ vectors.transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    return products / (norms[:, :, None] * norms[:, None, :])


def _mean_off_diagonal(matrices: Tensor) -> Tensor:
    """Return the mean of ``(B, n, n)`` off the diagonal; NaN for n = 1."""
    n = matrices.shape[1]
    sums = matrices.sum((1, 2)) - matrices.diagonal(dim1=1, dim2=2).sum(1)
    return sums / (n * (n - 1)) if n > 1 else torch.full_like(sums, torch.nan)


def comparable_groups(units: Sequence[AttentionUnit]) -> list[list[int]]:
    """Return groups of units whose queries and keys have the same positions in the same windows."""
    groups: list[list[int]] = []
    for index, unit in enumerate(units):
        for group in groups:
            first = units[group[0]]
            if torch.equal(first.queries, unit.queries) and torch.equal(first.keys, unit.keys):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def layer_cosines(attention: Mapping[int, Tensor], groups: Sequence[Sequence[int]], n_units: int) -> Tensor:
    """Return the cosines of the attention of units ``(B, n_units, n_units)``; NaN between those of different groups.

    Args:
        attention: Each unit's attention, mean over heads, ``(B, n)``.
        groups: Units that can be compared.
        n_units: Number of units.
    """
    first = next(iter(attention.values()))
    cosines = first.new_full((len(first), n_units, n_units), torch.nan)
    for group in groups:
        members = torch.tensor([index for index in group if index in attention])
        for start in range(0, len(first), _CHUNK):
            stacked = torch.stack([attention[int(index)][start : start + _CHUNK] for index in members], dim=1)
            places = (slice(start, start + _CHUNK), members[:, None], members[None, :])
            cosines[places] = _cosines(stacked)
    return cosines
