"""Networks that take images by a name, behind another argument."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vitscope as vs


class Named(nn.Module):
    """A residual network whose first argument is a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, mask: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Return logits ``(B, 3)`` of images ``(B, 3, H, W)``."""
        assert mask is None
        assert image is not None
        x = self.stem(image)
        return self.head((x + self.branch(x.relu()).tanh()).mean((2, 3)))


def test_taps_are_found_with_the_images_under_their_name() -> None:
    torch.manual_seed(0)
    batch = {"image": torch.rand(2, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([0, 1])}
    probe = vs.Probe(Named().double(), [batch])
    assert [tap.name for tap in probe.taps] == ["stem", "branch"]
    assert vs.tap_table(probe).units == ("branch",)
