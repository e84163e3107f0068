"""What differs between the releases of timm that are allowed."""

from __future__ import annotations

import pytest
import timm
from packaging.version import Version


def named(*names: str) -> list[object]:
    """Return parameters of a test, one for each model; those that the installed timm does not have are skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(not timm.is_model(name), reason=f"this timm has no {name}"))
        for name in names
    ]


#: for tests that compare mixed images with those of timm's own class
compares_mixed_images = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.29"),
    reason="before 1.0.29 timm's CutMix boxes of odd sides were one pixel smaller",
)
