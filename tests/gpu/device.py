"""Device of the tests marked ``gpu``; ``VITSCOPE_TEST_DEVICE=cpu`` rehearses them on a machine without one."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("VITSCOPE_TEST_DEVICE", "cuda"))
#: what `trainer=` selects the device
TRAINER = "gpu" if DEVICE.type == "cuda" else "cpu"
needs_a_gpu = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA GPU"
)
