"""Entropies of attention weights from terms that several measures of one pass need: computed once for a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitscope.core.shared_values.sharing import computed_once


@computed_once
def entropy_terms(p: Tensor) -> Tensor:
    """Return ``p ln p`` of probabilities of any shape, 0 where p is 0 and NaN where it is NaN.

    ``-torch.special.entr(p)`` is the same and takes twice as long on a CPU, since its logarithm is of one number at a time.
    """
    p = p.detach()
    return p.log().clamp_min_(math.log(torch.finfo(p.dtype).tiny)).mul_(p)


def row_entropies(terms: Tensor) -> Tensor:
    """Return the entropies (..., queries) in float64 from terms (..., queries, keys).

    All terms of a row have one sign, so that their sum in single precision is off by a few units in the last place, as each
    logarithm is. A copy of all terms in float64 would take longer than the logarithms.
    """
    return -terms.sum(-1).double()
