"""Floating-point types by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[str, ...] = get_args(DtypeName)

#: types whose rounding a derivative bears
DerivativeDtypeName = Literal["float32", "float64"]
DERIVATIVE_DTYPE_NAMES: tuple[str, ...] = get_args(DerivativeDtypeName)


def parse_float_dtype(dtype: str | torch.dtype | None, names: Sequence[str] = DTYPE_NAMES) -> torch.dtype | None:
    """Return the torch type of a name such as ``float32`` or ``torch.float32``; None stays None.

    Args:
        dtype: A name, a torch type, or None for the model's own type.
        names: The types that are allowed.

    Raises:
        ValueError: A type that is not among ``names``.
    """
    if dtype is None:
        return None
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not any(resolved is getattr(torch, name) for name in names):
        received = str(dtype).removeprefix("torch.")
        raise ValueError(f"Expected dtype to be {', '.join(names)} or None, received {received!r}.")
    return resolved
