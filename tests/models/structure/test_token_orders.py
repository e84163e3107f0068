"""Maps of tokens in another order than that of rows: windows, blocks of pixels, tokens that are unrolled for pooling."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.tap import TokenOrder
from vitscope.models.structure.feature_maps import prefix_tokens
from vitscope.models.structure.residual_units import known_units, reading_branches, zeroed
from vitscope.models.structure.taps import reading, taps
from vitscope.runtime.errors import StructureError

C = 8


def maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    found = taps(model, x)
    with torch.no_grad(), reading(model, found, lambda i, tap, value: read.update({tap.name: value.clone()})):
        model(x)
    return read


def changed_cells(model: nn.Module, size: tuple[int, int], pixel: tuple[int, int]) -> dict[str, list[list[int]]]:
    """Return the cells of each tap's map, and its size, that one pixel of the second image changes without any branch."""
    x = torch.rand(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[1, :, pixel[0], pixel[1]] += 1
    with ExitStack() as stack:
        for unit in known_units(model, x):
            stack.enter_context(zeroed(unit))
        before, after = maps(model, x), maps(model, y)
    cells = {}
    for name, value in before.items():
        differs = (value != after[name]).any(1)
        assert not differs[0].any()
        assert not differs[2].any()
        cells[name] = [list(value.shape[2:]), *differs[1].nonzero().tolist()]
    return cells


@pytest.mark.parametrize("patch", [(1, 6), pytest.param((15, 22), marks=pytest.mark.slow)])
def test_the_tokens_of_hiera_lie_where_a_hot_pixel_of_the_image_arrives(patch: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=(64, 96), num_classes=3).double().eval()
    row, column = patch
    # the kernels of 7x7 with stride 4 overlap; pixel 4r lies in that of patch r alone
    cells = changed_cells(model, (64, 96), (4 * row, 4 * column))
    strides = {
        "stem": 1,
        "blocks.0.mlp": 1,
        "blocks.1.attn": 2,
        "blocks.2.mlp": 2,
        "blocks.3.attn": 4,
        "blocks.11.mlp": 8,
    }
    for name, stride in strides.items():
        expected = [[16 // stride, 24 // stride], [row // stride, column // stride]]
        assert cells[name] == expected, name


def embedding() -> nn.Module:
    return nn.Conv2d(3, C, 2, 2)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Tokens(nn.Module):
    """A patch embedding of 2x2 pixels, an order of the tokens, two MLPs and a head."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embedding(), nn.Sequential(Mlp(), Mlp()), nn.Linear(C, 2)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.order(self.embed(x)))
        return self.head(x.flatten(0, -2).unflatten(0, (len(x), -1)).mean(1)) if x.ndim < 5 else x


def windows(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B * windows, tokens of 2x2 patches, C)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)


def unfolded(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B * blocks, pixels, C) by `torch.nn.functional.unfold`."""
    b, c = x.shape[:2]
    return F.unfold(x, 2, stride=2).reshape(b, c, 4, -1).permute(0, 3, 2, 1).reshape(-1, 4, c)


def blocks(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, windows, tokens, C), as in NesT."""
    return windows(x).unflatten(0, (len(x), -1))


def by_columns(x: Tensor) -> Tensor:
    return x.permute(0, 3, 2, 1).flatten(1, 2)


def fixed_order(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(1))]


def with_class_token(x: Tensor) -> Tensor:
    tokens = by_columns(x)
    return torch.cat((tokens, tokens.new_zeros(len(x), 1, C)), 1)


def written(x: Tensor) -> Tensor:
    """Even columns, then odd ones, written into a tensor."""
    half = x.shape[3] // 2
    out = torch.zeros(len(x), C, x.shape[2], x.shape[3], dtype=x.dtype)
    out[..., :half], out[..., half:] = x[..., 0::2], x[..., 1::2]
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def padded_windows(x: Tensor) -> Tensor:
    """Windows of 4x4 patches of a map that is padded at its border."""
    x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)


ORDERS = (windows, unfolded, blocks, by_columns, fixed_order, with_class_token, written, padded_windows)


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_in_any_fixed_order_become_the_map_they_were(order: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Tokens(order).double().eval()
    x = torch.rand(3, 3, 12, 20, dtype=torch.float64)  # maps of 6x10
    read = maps(model, x)
    expected = model.embed(x)
    assert torch.equal(read["stem"], expected)
    for i, block in enumerate(model.blocks):
        expected = block(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (read[f"blocks.{i}"] - expected).abs().max() < 1e-12


def test_branches_are_read_in_the_order_of_the_map() -> None:
    model = Tokens(windows).double().eval()
    x = torch.rand(2, 3, 12, 20, dtype=torch.float64)
    read: dict[str, Tensor] = {}
    units = known_units(model, x)
    with (
        torch.no_grad(),
        reading_branches(model, units, lambda i, unit, side, value: read.update({side: value.clone()})),
    ):
        model(x)
    block = model.blocks[1]
    stream = model.blocks[0](model.embed(x).permute(0, 2, 3, 1))
    branch = block(stream) - stream
    assert isinstance(block, Mlp)
    assert (read["input"] - block.norm(stream).permute(0, 3, 1, 2)).abs().max() < 1e-12
    assert (read["output"] - branch.permute(0, 3, 1, 2)).abs().max() < 1e-12


def by_brightness(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return tokens.gather(1, tokens.mean(2, keepdim=True).argsort(1).expand_as(tokens))


def interleaved(x: Tensor) -> Tensor:
    """Tokens of all images in turn."""
    return by_columns(x).transpose(0, 1).flatten(0, 1).unflatten(0, (len(x), -1))


def flipped_sum(x: Tensor) -> Tensor:
    return by_columns(x + x.flip(3))


def upper_half(x: Tensor) -> Tensor:
    return by_columns(x[:, :, : x.shape[2] // 2])


REFUSED: dict[Callable[[Tensor], Tensor], str] = {
    by_brightness: "cannot be followed",
    interleaved: "images one after the other",
    flipped_sum: "mix several positions",
    upper_half: "do not cover the image evenly",
}


@pytest.mark.parametrize("order", REFUSED)
def test_an_order_that_is_not_certain_is_refused_with_its_reason(order: Callable[[Tensor], Tensor]) -> None:
    model = Tokens(order).double().eval()
    with pytest.raises(StructureError, match=REFUSED[order]) as error:
        maps(model, torch.rand(2, 3, 12, 20, dtype=torch.float64))
    assert "\n" not in str(error.value)


def test_an_order_holds_for_images_of_its_size_alone() -> None:
    model = Tokens(windows).double().eval()
    found = taps(model, torch.rand(1, 3, 12, 20, dtype=torch.float64))
    with (
        pytest.raises(StructureError, match="found for images of 12x20, received 20x12; find taps for them"),
        torch.no_grad(),
        reading(model, found[1:], lambda *_: None),
    ):
        model(torch.rand(1, 3, 20, 12, dtype=torch.float64))


def test_fourier_of_tokens_in_windows_equals_that_of_the_map() -> None:
    torch.manual_seed(0)
    model, plain = Tokens(windows).double(), Tokens(lambda x: x.flatten(2).transpose(1, 2)).double()
    plain.load_state_dict(model.state_dict())
    batches = [(torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))]
    ours, expected = (vs.relative_log_amplitude(vs.Probe(m, batches)) for m in (model, plain))
    assert ours.taps == expected.taps
    for a, b in zip(ours.log_amplitude, expected.log_amplitude):
        assert abs(a - b).max() < 1e-9


def test_pixels_of_mobilevit_without_branches_are_the_map_of_the_layer_before() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs", num_classes=3).double().eval()
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    before: list[Tensor] = []
    model.get_submodule("stages.2.1.conv_1x1").register_forward_hook(
        lambda _m, _a, output: before.append(output.detach().clone())
    )
    with zeroed(*known_units(model, x)):
        read = maps(model, x)
    for i in range(2):
        assert torch.equal(read[f"stages.2.1.transformer.{i}.attn"], before[-1])
        assert torch.equal(read[f"stages.2.1.transformer.{i}.mlp"], before[-1])


def test_prefix_tokens_of_an_observed_order_are_those_before_the_first_position() -> None:
    order = TokenOrder(2, 6, torch.tensor([[4, 2], [5, 3]]), (8, 8))
    value = torch.arange(2 * 6 * 3, dtype=torch.float64).reshape(2, 6, 3)
    assert torch.equal(prefix_tokens(value, "unknown", 0, order), value[:, :2])
    channels_first = TokenOrder(1, 6, order.index, (8, 8))
    assert torch.equal(prefix_tokens(value.transpose(1, 2), "unknown", 0, channels_first), value[:, :2])
    assert torch.equal(prefix_tokens(value.transpose(1, 2), "NCL", 2), value[:, :2])
    assert prefix_tokens(value, "unknown", 0, TokenOrder(2, 6, torch.arange(6).reshape(2, 3), (8, 8))) is None
    assert prefix_tokens(value, "NLC", 0) is None
    assert prefix_tokens(value[None], "NCHW", 0) is None
