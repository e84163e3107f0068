"""Layout of AlterNet: positions of attention blocks, the build-up path, and the window sizes that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vitscope.runtime.value_ranges import ImageSize

Placement = Literal["stage_end", "stage_start", "late", "alternating", "official"]
Stem = Literal["cifar", "imagenet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 4), 50: (3, 4, 6, 4), 101: (3, 4, 23, 4), 152: (3, 8, 36, 4)}
"""Blocks a stage of AlterNet by depth (one more in the last stage than a ResNet of that depth)."""

DEFAULT_MSA = {18: (0, 1, 1, 1), 34: (0, 1, 3, 2), 50: (0, 1, 3, 2), 101: (0, 1, 3, 2), 152: (0, 1, 3, 2)}
"""Attention blocks a stage in the official code; the paper's Figure 11 for CIFAR is (0, 1, 1, 2)."""


def stage_blocks(blocks: Sequence[int], n_msa: Sequence[int], placement: Placement = "stage_end") -> tuple[str, ...]:
    """The sequence of blocks of each stage as a string of ``C`` (convolution) and ``M`` (attention).

    The first block of a stage changes resolution and width and stays a convolution, so every placement
    of the same counts a stage has the same number of parameters.

    ``stage_end``: convolutions, then ``CM`` pairs (the paper's AlterNet). ``stage_start``: the ``CM`` pairs
    first. ``late``: all attention in the last blocks of the model, a convolutional backbone before it.
    ``alternating``: every other block, counted back from the model's end. ``official``: as ``stage_end``,
    but too many attention blocks are cut off in silence as the official code does (3 blocks, 2 of them
    attention: ``CMC``).

    Args:
        blocks: Number of blocks of each stage.
        n_msa: Number of attention blocks of each stage; ``late`` and ``alternating`` use the sum only.
        placement: One of the rules above.

    Raises:
        ValueError: If a stage cannot hold its attention blocks, or the placement is unknown.
    """
    if len(n_msa) != len(blocks) or any(m < 0 for m in n_msa):
        raise ValueError(f"Expected n_msa of {len(blocks)} counts of at least 0, received {tuple(n_msa)}.")
    if placement in ("late", "alternating"):
        return _attention_from_the_end(blocks, sum(n_msa), step=1 if placement == "late" else 2)
    stages = list(zip(blocks, n_msa))
    if placement == "official":
        return tuple((_convolutions(n, m) + "CM" * m)[:n] for n, m in stages)
    if placement not in ("stage_end", "stage_start"):
        raise ValueError(
            f"Expected placement to be stage_end, stage_start, late, alternating or official, received {placement!r}."
        )
    for stage, (n, m) in enumerate(stages, start=1):
        if 2 * m > n:
            raise ValueError(f"Expected n_msa of at most {n // 2} for the {n} blocks of stage {stage}, received {m}.")
    if placement == "stage_start":
        return tuple("CM" * m + _convolutions(n, m) for n, m in stages)
    return tuple(_convolutions(n, m) + "CM" * m for n, m in stages)


def _convolutions(n_blocks: int, n_msa: int) -> str:
    """Return the blocks of a stage that are in no pair ``CM``."""
    return "C" * (n_blocks - 2 * n_msa)


def _attention_from_the_end(blocks: Sequence[int], n_msa: int, step: int) -> tuple[str, ...]:
    """Return the stages with attention in every block, or every second one, from the last block of the model on."""
    places = [(stage, place) for stage, n in enumerate(blocks) for place in range(n)]
    # the first block of a stage subsamples
    attention_places = [(stage, place) for stage, place in places[::-step] if place > 0][:n_msa]
    if len(attention_places) < n_msa:
        raise ValueError(
            f"Expected n_msa with a sum of at most {len(attention_places)} for {sum(blocks)} blocks, received {n_msa}."
        )
    letters = dict.fromkeys(attention_places, "M")
    return tuple("".join(letters.get((stage, place), "C") for place in range(n)) for stage, n in enumerate(blocks))


def build_up(depth: int = 50, *, overshoot: bool = False) -> list[tuple[int, int, int, int]]:
    """The paper's build-up path for Figure 12a: attention blocks a stage, from none to AlterNet.

    Rules (docs/paper.md section 2): convolutions are replaced by attention alternately from the end of the
    model until the last stage is full, then at the end of each earlier stage up to the second.
    Depth 50 gives 0000, 0001, 0002, 0012, 0112. Build each with ``alternet(depth, n_msa=...)``.

    Args:
        depth: One of the depths of AlterNet.
        overshoot: Whether to also append the step that no longer helps, a second attention block in stage 3 (0122).

    Raises:
        ValueError: If the depth is unknown.
    """
    blocks = blocks_of(depth)
    path = [(0, 0, 0, m) for m in range(blocks[3] // 2 + 1)]
    last = path[-1][3]
    path += [(0, 0, 1, last), (0, 1, 1, last)]
    if overshoot and blocks[2] >= 4:
        path.append((0, 1, 2, last))
    return path


def blocks_of(depth: int) -> tuple[int, int, int, int]:
    """Blocks a stage of AlterNet of that depth; a ValueError names the depths there are."""
    if depth not in BLOCKS:
        raise ValueError(f"Expected depth of AlterNet to be one of {', '.join(map(str, BLOCKS))}, received {depth}.")
    return BLOCKS[depth]


def feature_map_sizes(image_size: ImageSize, stem: Stem = "cifar") -> tuple[tuple[int, int], ...]:
    """Height and width of the feature map of each of the four stages.

    Every halving (the ImageNet stem's two, one at the start of stages 2, 3 and 4) rounds up, as convolutions
    and pooling with symmetric padding do.

    Raises:
        ValueError: If the stem is unknown or the image has no pixels.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"Expected stem to be cifar or imagenet, received {stem!r}.")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"Expected image_size of at least 1, received {image_size}.")
    n_halvings_of_stem = 2 if stem == "imagenet" else 0
    for _ in range(n_halvings_of_stem):
        height, width = _halved(height), _halved(width)
    sizes = [(height, width)]
    for _ in range(3):
        height, width = _halved(height), _halved(width)
        sizes.append((height, width))
    return tuple(sizes)


def _halved(side: int) -> int:
    return (side + 1) // 2


def valid_window_sizes(
    image_size: ImageSize, stem: Stem = "cifar", n_msa: Sequence[int] = (0, 1, 1, 1)
) -> tuple[int, ...]:
    """Windows of at least 2 that divide the map of every stage with attention, in ascending order.

    Args:
        image_size: Height and width of the image, or one number for both.
        stem: ``cifar`` (no subsampling) or ``imagenet`` (by 4).
        n_msa: Attention blocks a stage; stages without any set no condition.
    """
    sizes = [size for size, m in zip(feature_map_sizes(image_size, stem), n_msa) if m > 0]
    largest = min((min(size) for size in sizes), default=0)
    return tuple(p for p in range(2, largest + 1) if all(h % p == 0 and w % p == 0 for h, w in sizes))


def check_window(image_size: ImageSize, stem: Stem, n_msa: Sequence[int], window_size: int) -> None:
    """Refuse a window that does not divide the map of a stage with attention.

    Raises:
        ValueError: With the stage, its map, and the window sizes that fit.
    """
    if window_size < 1:
        raise ValueError(f"Expected window_size of at least 1, received {window_size}.")
    for stage, ((h, w), m) in enumerate(zip(feature_map_sizes(image_size, stem), n_msa), start=1):
        if m > 0 and (h % window_size or w % window_size):
            fitting = valid_window_sizes(image_size, stem, n_msa)
            names = f"window sizes that do: {', '.join(map(str, fitting))}; or" if fitting else "no window does;"
            raise ValueError(
                f"Expected window_size to divide the {h}x{w} map of stage {stage}, received {window_size}; {names} set pad=True."
            )
