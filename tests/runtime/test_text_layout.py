"""Texts for terminals."""

from __future__ import annotations

import pytest

from vitscope.runtime.text_layout import aligned, count_text, duration_text, size_text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "n", ""), ("a", "1000", "x"), ("long name", "2", "")]
    assert aligned(rows, right={1}) == ["name          n", "a          1000  x", "long name     2"]
    assert aligned([]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1e-5, "0.001 s"),
        (0.04, "0.04 s"),
        (0.42, "0.4 s"),
        (9.7, "10 s"),
        (12.3, "12 s"),
        (119, "119 s"),
        (119.7, "2 min"),
        (200, "3 min"),
        (7190, "2 h"),
        (12_300, "3.4 h"),
        (100_000, "28 h"),
        (260_000, "3 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**20 - 1, "1.0 MiB"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_sizes(n_bytes: int, text: str) -> None:
    assert size_text(n_bytes) == text


def test_counts() -> None:
    assert [count_text(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert count_text(3, "batch", "batches") == "3 batches"
