"""Receptive fields of maps whose channels' gradients cancel: they are named, and measured channel by channel."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.oracles.receptive_fields import images, oracle, probe_of
from vitscope.core.undefined_values import NullWarning

pytestmark = pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")


class NormedStream(nn.Module):
    """A stem with a LayerNorm, and a branch with a factor: the sum of the channels depends on the branch alone."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.branch, self.scale = nn.Conv2d(8, 8, 5, padding=2), scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).movedim(1, -1)).movedim(-1, 1)
        return x + self.scale * self.branch(x)


def _fields_by_channel(model: nn.Module, x: Tensor) -> np.ndarray:
    """Return the mean over images of the sum over channels of squared gradients, by one gradient a channel in float64."""
    total = np.zeros(x.shape[-2:])
    for image in x.double():
        leaf = image[None].requires_grad_()
        output = model(leaf)
        for value in output[0, :, output.shape[2] // 2, output.shape[3] // 2]:
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            total += gradient[0].square().sum(0).numpy()
    return total / total.sum()


def test_gradients_of_channels_that_cancel_are_named_and_measured_by_channels() -> None:
    torch.manual_seed(0)
    model = NormedStream(1e-3).double()
    x = images(64, 9)
    probe = probe_of(model, x.double(), batch=16, tap=model)
    with pytest.warns(UserWarning, match="the gradients of the channels cancel at last.*pass contribution=channels"):
        summed = vs.effective_receptive_field(probe, taps="last")
    assert summed.channel_coherence is not None
    assert summed.channel_coherence[0] < 1e-4  # of the order of the squared scale
    np.testing.assert_allclose(summed.field[0], oracle(model, model, x), rtol=1e-9, atol=1e-15)
    assert summed.radius_50[0] > 1.5  # the branch's window, while nearly all of the map is its own pixel
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", NullWarning)
        by_channel = vs.effective_receptive_field(probe, taps="last", contribution="channels")
    assert by_channel.channel_coherence is None
    assert by_channel.field[0, 4, 4] == pytest.approx(_fields_by_channel(model, x)[4, 4], abs=1e-4)
    assert by_channel.field[0, 4, 4] > 0.999


def test_random_signs_estimate_the_sum_over_channels_without_bias() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1)).double()
    x = images(1, 7, seed=3).expand(600, -1, -1, -1)
    expected = _fields_by_channel(model, x[:1])
    parts = [
        vs.effective_receptive_field(
            probe_of(model, part.double(), batch=30, tap=model), taps="last", contribution="channels"
        )
        for part in (x[:300], x)
    ]
    errors = [np.abs(result.field[0] - expected).max() for result in parts]
    # a squared gradient of signed channels has a standard deviation of at most sqrt(2) of its mean, at a pixel and in total
    for n, error in zip((300, 600), errors):
        assert error < 4 * 2 * np.sqrt(2 / n) * expected.max()


def test_signs_do_not_matter_where_channels_see_different_pixels() -> None:
    model = nn.Conv2d(1, 9, 3, padding=1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(9).reshape(9, 1, 3, 3) * torch.arange(1.0, 10).reshape(9, 1, 1, 1))
    result = vs.effective_receptive_field(
        probe_of(model, images(2, 7, channels=1), tap=model), taps="last", contribution="channels"
    )
    squares = np.arange(1.0, 10).reshape(3, 3) ** 2
    np.testing.assert_allclose(result.field[0, 2:5, 2:5], squares / squares.sum(), rtol=1e-6)


def test_the_first_stage_of_a_swin_is_named() -> None:
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=3
    )
    with pytest.warns(UserWarning, match=r"the channels cancel at layers\.0\.blocks\.1\.mlp, as after a LayerNorm"):
        result = vs.effective_receptive_field(probe_of(model, images(4, 32)))
    assert result.channel_coherence is not None
    assert result.channel_coherence[0] < 0.05 < 0.25 < result.channel_coherence[1]
