"""U-Nets that users write: which of their sums are units, and a notice where plain convolutions hold the parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import B, C, X, check
from vitscope.models.structure.parameter_groups import parameter_kinds


class Conv(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(n, n, 3, 1, 1), nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + B(self.two(F.relu(self.norm(self.one(x))))))


class Mixing(nn.Module):
    """Attention of pixels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.three, self.back = nn.Conv2d(n, 3 * n, 1), nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.three(x).flatten(2).chunk(3, 1)
        return x + B(self.back((v @ (q.mT @ k).softmax(-1).mT).view_as(x)))


class UNet(nn.Module):
    """A U-Net that adds its skips, with attention on the smallest map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, C, 2, 2), nn.ConvTranspose2d(C, C, 2, 2)
        self.first, self.second, self.middle, self.third = Conv(C), Conv(C), Mixing(C), Conv(C)
        self.classifier = nn.Conv2d(C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(self.stem(x))
        return self.classifier(self.third(wide + self.up(self.middle(self.second(self.down(wide))))))


def test_the_skips_of_a_u_net_are_no_units() -> None:
    places = {"first.*": "conv", "second.*": "conv", "middle.*": "msa", "third.*": "conv", "up.*": "conv"}
    check(UNet(), ["conv", "conv", "msa", "conv"], {**places, "stem.*": "stem", "classifier.*": "head"})


class PlainUNet(nn.Module):
    """A U-Net of plain convolutions that concatenates its skips; its attention alone is residual."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.second, self.third = self.pair(3, n), self.pair(n, n), self.pair(2 * n, n)
        self.middle, self.classifier = Mixing(n), nn.Conv2d(n, 4, 1)

    @staticmethod
    def pair(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 1, 1), nn.ReLU(), nn.Conv2d(n_out, n_out, 3, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x)
        narrow = F.interpolate(self.middle(self.second(F.max_pool2d(wide, 2))), scale_factor=2)
        return self.classifier(self.third(torch.cat((wide, narrow), 1)))


def test_an_encoder_and_a_decoder_outside_of_residual_units_are_named() -> None:
    model = PlainUNet(C).double().eval()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shares = [
        sum(n for name, n in sizes.items() if name.startswith(places)) / sum(sizes.values())
        for places in (("first.", "second."), "third.")
    ]
    message = rf"hold most of the parameters: 4 of stem \({shares[0]:.0%}\) and 2 of head \({shares[1]:.0%}\)"
    for read in (lambda: vs.structure(model, X), lambda: vs.taps(model, X), lambda: parameter_kinds(model, X)):
        with pytest.warns(UserWarning, match=message) as notices:
            read()
        assert len(notices) == 1
