"""Needs of timm and the hub's client beyond their documented interface: `vitscope.models.timm_internals`.

Each test names one need. A failure after an upgrade means that the function it names has to be changed for the new release.
"""

from __future__ import annotations

from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch.overrides import TorchFunctionMode

from tests.fixtures.networks.timm_versions import compares_mixed_images
from vitscope.data.augment import mixup
from vitscope.models import timm_internals
from vitscope.models.structure.attention_weights import AttentionCall, AttentionMode


class FusedCalls(TorchFunctionMode):
    """Counts calls of ``scaled_dot_product_attention``."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_one_call_or_a_softmax_that_is_multiplied_with_values(fused: bool) -> None:
    """`models.structure.attention_weights` notices both; the attribute ``fused_attn`` chooses."""
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=1).eval()
    attention, images = model.blocks[0].attn, torch.zeros(1, 3, 32, 32)
    attention.fused_attn = fused
    with FusedCalls() as calls:
        model(images)
    assert calls.count == fused
    noticed: list[AttentionCall] = []
    with AttentionMode(noticed.append):
        model(images)
    assert [call.softmax is None for call in noticed] == [fused]
    assert noticed[0].weights().shape == (1, 1, 5, 5)


def test_the_hub_s_client_reads_the_switch_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with timm_internals.offline_hub(True):
        assert huggingface_hub.constants.is_offline_mode()
        with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
            huggingface_hub.hf_hub_download("timm/none", "none.safetensors")
    assert not huggingface_hub.constants.is_offline_mode()
    assert timm_internals.hub_address().startswith("http")


@compares_mixed_images
@pytest.mark.parametrize("step", range(8))
def test_mixing_has_the_numbers_of_timm_s(step: int) -> None:
    x, y = torch.randn(6, 3, 9, 11, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    np.random.seed(np.random.SeedSequence((step,)).generate_state(8))
    images, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)(x.clone(), y)
    received = mixup.mix(x, y, num_classes=5, mixup=0.8, cutmix=1.0, label_smoothing=0.1, seed=(step,))
    assert torch.equal(received[0], images)
    assert torch.equal(received[1], targets)
