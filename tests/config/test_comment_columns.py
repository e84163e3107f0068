"""Comments at the ends of lines in ``conf/`` and ``sweeps/`` begin at one column within each block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscope.config.keys.key_comments import comment_column

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("sweeps/*.yaml")])
#: a value that is longer has its comment two columns behind it, so that it does not push those of its block away
LONGEST_VALUE = 36


def blocks(text: str) -> Iterator[list[tuple[int, int]]]:
    """Yield the (end of the value, column of the comment) pairs of each block; blank and comment lines end a block."""
    pairs: list[tuple[int, int]] = []
    for line in [*text.splitlines(), ""]:
        if not line.strip() or line.lstrip().startswith("#"):
            yield pairs
            pairs = []
        elif (column := comment_column(line)) is not None:
            pairs.append((len(line[:column].rstrip()), column))


def misaligned(text: str) -> list[list[tuple[int, int]]]:
    """Return the blocks whose comments do not begin two columns behind the longest value."""
    result = []
    for pairs in blocks(text):
        longest = max([end for end, _ in pairs if end <= LONGEST_VALUE], default=max([e for e, _ in pairs], default=0))
        if any(column != max(longest, end) + 2 for end, column in pairs):
            result.append(pairs)
    return result


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_comments_are_aligned(file: Path) -> None:
    assert misaligned(file.read_text()) == []


def test_a_comment_at_another_column_is_found() -> None:
    assert misaligned("a: 1   # x\nlonger: 2  # y\n") == [[(4, 7), (9, 11)]]
    assert misaligned("a: 1       # x\nlonger: 2  # y\n\nb: '#'  # z\n") == []
