"""Counter-based random numbers: a value is a pure function of (seed, stream, epoch, index).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorised over
indices. Nothing here has a state, so neither workers, nor batch sizes, nor the order of reading change a draw.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Streams keep draws of one (seed, epoch, index) for different purposes apart.
ORDER, AUGMENT, PROBE, SUBSET, LABELS, PIXELS = range(6)

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Key(NamedTuple):
    """Counters from which the random numbers of a batch are computed.

    Attributes:
        indices: Index of each image in its split, `(B,)`.
        epoch: Epoch, or any other counter below 2^32.
        stream: `AUGMENT` in training, `PROBE` for frozen batches.
        seed: The run's seed.
    """

    indices: NDArray[np.int64]
    epoch: int
    stream: int
    seed: int


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Return the Philox4x32-10 blocks of `counter` `(..., 4)`: four 32-bit words each, held in 64 bits."""
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _WORD
        c2, c3 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def uniforms(index: ArrayLike, n: int, *, seed: int, stream: int, epoch: int = 0) -> NDArray[np.float64]:
    """Draw `n` uniforms on the open interval (0, 1) for each index.

    Args:
        index: Indices `(B,)`, each below 2^32.
        n: Draws an index; a longer request begins with the draws of a shorter one.
        seed: Any integer in [0, 2^64).
        stream: One of this module's streams.
        epoch: A second counter below 2^32.

    Returns:
        Array `(B, n)`, on a grid of 2^-32.

    Raises:
        ValueError: An argument is out of its range.
    """
    index = np.asarray(index, dtype=np.int64)
    _check_range("seed", seed, 2**64)
    _check_range("epoch", epoch, 2**32)
    if index.size and not 0 <= index.min() <= index.max() < 2**32:
        raise ValueError(f"Expected indices in [0, 2**32), received {index.min()} to {index.max()}.")
    blocks = -(-n // 4)
    counter = np.empty((len(index), blocks, 4), dtype=np.uint64)
    counter[..., 0] = index[:, None]  # (B, 1) over (B, blocks)
    counter[..., 1] = epoch
    counter[..., 2] = stream
    counter[..., 3] = np.arange(blocks)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))  # (B, blocks, 4)
    return (words.reshape(len(index), -1)[:, :n].astype(np.float64) + 0.5) * 2.0**-32


def permutation(n: int, *, seed: int, stream: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return a random order of `range(n)`: the ranking of one draw an index, ties by index."""
    draws = uniforms(np.arange(n), 2, seed=seed, stream=stream, epoch=epoch)
    return np.lexsort((draws[:, 1], draws[:, 0]))


def _check_range(name: str, value: int, bound: int) -> None:
    if not 0 <= value < bound:
        raise ValueError(f"Expected {name} in [0, {bound}), received {value}.")
