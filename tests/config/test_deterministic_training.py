"""``trainer.deterministic=true``: layers without deterministic gradients on a GPU are refused, max-pooling stems work."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.fixtures.configs.configurations import composed
from vitscope.config import dry_run
from vitscope.models.alternet import alternet
from vitscope.runtime.errors import ConfigError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def check(network: nn.Module, *overrides: str) -> None:
    dry_run._deterministic(composed("train", "trainer.deterministic=true", *overrides), network)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "layer",
    [
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(1),
        nn.ReflectionPad2d(1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
)
def test_a_layer_without_deterministic_gradients_is_named(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    text = r"trainer\.deterministic=True: .* '1' of the model .*; set trainer\.deterministic=warn"
    with pytest.raises(ConfigError, match=text):
        check(network)
    check(network, "trainer.accelerator=cpu")
    check(network, "trainer.deterministic=warn")


@pytest.mark.usefixtures("gpu")
def test_the_cross_entropy_of_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="every pixel"):
        check(nn.Conv2d(3, 3, 1), "objective.loss=dense_cross_entropy")


@pytest.mark.usefixtures("gpu")
def test_stems_with_max_pooling_and_means_over_all_positions_pass() -> None:
    check(alternet(depth=18, num_classes=4, image_size=128, stem="imagenet"))
    check(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1))))


def test_without_a_gpu_everything_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(nn.AdaptiveAvgPool2d(2))


def test_a_stem_with_max_pooling_is_differentiated_under_deterministic_algorithms() -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 8, 8)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(network(x).square().sum(), list(network.parameters())) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_torch_states_the_layers_that_are_refused() -> None:
    """The documentation of the installed version lists each of them, and not `nn.MaxPool2d` on a CUDA device."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    refused = text[text.index("will throw a") :]
    for layer in dry_run.NONDETERMINISTIC_LAYERS:
        assert f"torch.nn.{layer.__name__}`" in refused
    assert not re.search(r"torch\.nn\.MaxPool2d`[^*]*CUDA", refused)
