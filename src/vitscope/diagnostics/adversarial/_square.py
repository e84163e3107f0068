"""Square Attack: random search over squares of pixels that looks at logits alone (Andriushchenko et al. 2020)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.adversarial._attacks import AttackResult, Ball, Forward, looked_at
from vitscope.diagnostics.adversarial._losses import carlini_wagner

#: share of the pixels that the first squares cover
P_INIT = 0.8

#: iterations of 10,000 from which on the share is halved once more
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    forward: Forward,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    *,
    queries: int,
    generators: list[np.random.Generator],
) -> AttackResult:
    """Attack every image; a proposal is taken where it raises the margin loss max_{k != y} z_k - z_y.

    Images whose class is wrong are not asked for again.

    Args:
        forward: Pixels to logits; never differentiated.
        pixels: ``(B, C, H, W)``.
        labels: ``(B,)``.
        ball: Set of allowed images.
        queries: The most that an image is shown to the model.
        generators: Each image's.
    """
    draws = [_Draws(rng, queries, pixels.shape[1:]) for rng in generators]
    best, margin = looked_at(forward, pixels, _initial(ball, pixels, draws), labels, carlini_wagner)
    propose = _proposal_linf if ball.norm == "linf" else _proposal_l2
    for query in range(1, queries):
        active = torch.nonzero(best.right).squeeze(1)
        if not len(active):
            break
        active_draws = [draws[i] for i in active.tolist()]
        side = _side(share(query, queries), pixels.shape[1:], ball.norm)
        change = propose(ball, pixels[active], best.change[active], active_draws, query, side)
        result, value = looked_at(forward, pixels[active], change, labels[active], carlini_wagner)
        better = (value > margin[active]) | ~result.right
        margin = margin.index_copy(0, active[better], value[better])
        best = best.replaced(active[better], result.at(better))
    return best


def share(query: int, queries: int) -> float:
    """Return the share of pixels of a query's square: `P_INIT`, halved at the places of `HALVINGS` rescaled to ``queries``."""
    scaled = int(query / queries * 10000)
    return P_INIT / 2 ** sum(scaled > place for place in HALVINGS)


def _side(covered: float, shape: torch.Size, norm: str) -> int:
    _, height, width = shape
    side = max(round((covered * height * width) ** 0.5), 1)
    if norm == "l2":  # a window has a center
        side = max(side, 3)
        side += side % 2 == 0
    return min(side, height, width)


class _Draws:
    """All random numbers of one image, drawn at once: where squares lie and the signs of their channels."""

    def __init__(self, rng: np.random.Generator, queries: int, shape: torch.Size) -> None:
        channels, height, width = shape
        self.stripes = _signs(rng, (channels, width))
        self.tiles = _signs(rng, (channels, height, width))
        self.places = rng.random((queries, 4))
        self.signs = _signs(rng, (queries, channels))
        self.turned = rng.random((queries, 2)) > 0.5


class _Windows:
    """A square window in each image, as indices into ``(B, C, H, W)``."""

    def __init__(self, draws: list[_Draws], query: int, shape: torch.Size, side: int, second: bool = False) -> None:
        places = np.stack([d.places[query, 2 * second : 2 * second + 2] for d in draws])  # (B, 2)
        corners = torch.from_numpy((places * [shape[-2] - side + 1, shape[-1] - side + 1]).astype(np.int64))
        along = torch.arange(side)
        self._images = torch.arange(len(draws))[:, None, None]
        self._rows, self._columns = corners[:, :1, None] + along[:, None], corners[:, 1:, None] + along

    def of(self, change: Tensor) -> Tensor:
        """Return the windows' content ``(B, C, side, side)``."""
        # (B, C, H, W) to (B, H, W, C), whose first three axes are indexed: (B, side, side, C)
        return change.movedim(1, -1)[self._images, self._rows, self._columns].movedim(-1, 1)

    def put(self, change: Tensor, content: Tensor | float) -> None:
        """Write ``content (B, C, side, side)``, or one number, into the windows."""
        view = change.movedim(1, -1)
        view[self._images, self._rows, self._columns] = (
            content.movedim(1, -1) if isinstance(content, Tensor) else content
        )


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(2, size=shape) * 2.0 - 1.0


def _initial(ball: Ball, pixels: Tensor, draws: list[_Draws]) -> Tensor:
    """Return vertical stripes of the whole radius (linf), or tiles that each rise and fall (l2)."""
    if ball.norm == "linf":
        stripes = torch.from_numpy(np.stack([d.stripes for d in draws])).to(pixels)[:, :, None, :]  # (B, C, 1, W)
        return ball.into(ball.radius * stripes.expand_as(pixels), pixels)
    _, height, width = pixels.shape[1:]
    side = max(min(height, width) // 5, 1)
    change = torch.zeros_like(pixels)
    for i, drawn in enumerate(draws):
        tile = _rise_and_fall(side, bool(drawn.turned[0, 0])).to(pixels)
        for row in range((height % side) // 2, height - side + 1, side):
            for column in range((width % side) // 2, width - side + 1, side):
                signs = torch.from_numpy(drawn.tiles[:, row, column]).to(pixels)
                # (C, 1, 1) * (side, side)
                change[i, :, row : row + side, column : column + side] = signs[:, None, None] * tile
    return ball.into(_scaled(ball, change), pixels)


def _proposal_linf(ball: Ball, pixels: Tensor, change: Tensor, draws: list[_Draws], query: int, side: int) -> Tensor:
    """Return the changes with one square each set to the radius, signs by channel."""
    new, window = change.clone(), _Windows(draws, query, pixels.shape, side)
    # twice the radius added and clipped, as published: the square ends at the border of the ball
    window.put(new, window.of(new) + 2 * ball.radius * _channel_signs(draws, query, pixels))
    return ball.into(new, pixels)


def _proposal_l2(ball: Ball, pixels: Tensor, change: Tensor, draws: list[_Draws], query: int, side: int) -> Tensor:
    """Return the changes with the energy of one window, and what is left of the ball, moved into another one."""
    new = change.clone()
    target, source = (_Windows(draws, query, pixels.shape, side, second) for second in (False, True))
    union = torch.zeros_like(new)
    target.put(union, 1.0)
    source.put(union, 1.0)
    unused = (ball.radius**2 - new.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0.0)
    energy = (new * union).square().sum(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    shapes = torch.stack([_rise_and_fall(side, bool(d.turned[query, 1])) for d in draws]).to(pixels)[:, None]
    content = _unit(_channel_signs(draws, query, pixels) * shapes + _unit(target.of(new)))
    source.put(new, 0.0)
    target.put(new, content * (unused / pixels.shape[1] + energy).sqrt())
    return ball.into(_scaled(ball, new), pixels)


def _channel_signs(draws: list[_Draws], query: int, pixels: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([d.signs[query] for d in draws])).to(pixels)[:, :, None, None]  # (B, C, 1, 1)


def _unit(windows: Tensor) -> Tensor:
    """Return windows ``(B, C, side, side)`` of norm 1 in each channel."""
    return windows / (1e-12 + windows.square().sum(dim=(2, 3), keepdim=True).sqrt())


def _scaled(ball: Ball, change: Tensor) -> Tensor:
    return ball.radius * change / ball.length(change).clamp_min(1e-12)


@cache
def _rise_and_fall(side: int, turned: bool) -> Tensor:
    """Return the window of the l2 attack: a pyramid above its negative, of norm 1."""
    window = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
    window = window / window.norm()
    return window.T if turned else window


def _pyramid(height: int, width: int) -> Tensor:
    """Return nested rectangles around a center, the k-th adding 1 / k^2, of norm 1."""
    grown = torch.zeros(height, width, dtype=torch.float64)
    if not grown.numel():
        return grown
    row, column = height // 2, width // 2
    for k in range(max(height // 2, width // 2) + 1):
        rows = slice(max(row - k, 0), min(row + k + 1, height))
        grown[rows, max(column - k, 0) : min(column + k + 1, width)] += 1 / (k + 1) ** 2
    return grown / grown.norm()
