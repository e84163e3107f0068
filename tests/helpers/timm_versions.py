"""What differs between the releases of timm that are allowed."""

from __future__ import annotations

import pytest
import timm
from packaging.version import Version

#: for tests that compare mixed images with those of timm's own class
compares_mixed_images = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.29"),
    reason="before 1.0.29 timm's CutMix boxes of odd sides were one pixel smaller",
)
