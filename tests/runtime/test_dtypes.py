"""Floating-point types by name."""

from __future__ import annotations

import pytest
import torch

from vitscope.runtime.dtypes import DERIVATIVE_DTYPE_NAMES, parse_float_dtype


def test_names_and_types_are_read() -> None:
    assert parse_float_dtype(None) is None
    for name in ("float64", "float32", "bfloat16", "float16"):
        expected = getattr(torch, name)
        assert parse_float_dtype(name) is parse_float_dtype(f"torch.{name}") is parse_float_dtype(expected) is expected


@pytest.mark.parametrize("dtype", ["float17", "int64", "nn", torch.int64, torch.complex64, "float16"])
def test_other_types_are_refused(dtype: str | torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"Expected dtype to be float32, float64 or None, received '{name}'"):
        parse_float_dtype(dtype, DERIVATIVE_DTYPE_NAMES)
    if name != "float16":
        with pytest.raises(ValueError, match="Expected dtype to be float64, float32, bfloat16, float16 or None"):
            parse_float_dtype(dtype)
