"""Terms of the entropy of attention weights, which several measures of one pass need: computed once for a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vitscope.core.shared_values.sharing import computed_once


@computed_once
def entropy_terms(p: Tensor) -> Tensor:
    """Return ``-p ln p`` of probabilities of any shape, 0 where p is 0 and NaN where it is NaN.

    It is ``torch.special.entr``, whose logarithm of single numbers takes three times as long on a CPU.
    """
    return p.detach().clamp_min(torch.finfo(p.dtype).tiny).log_().mul_(p.detach()).neg_()
