from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from vitscope.data import philox


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_test_vectors(words, key, expected):
    block = philox.philox(np.array([words], dtype=np.uint64), key)[0]
    assert " ".join(f"{int(word):08x}" for word in block) == expected


def test_uniforms_are_a_function_of_the_index_alone():
    every = philox.uniforms(np.arange(100), 7, seed=3, stream=philox.AUGMENT, epoch=2)
    some = philox.uniforms([42, 7], 5, seed=3, stream=philox.AUGMENT, epoch=2)
    np.testing.assert_array_equal(some, every[[42, 7], :5])


@pytest.mark.parametrize("other", [{"seed": 4}, {"seed": 3 + 2**32}, {"epoch": 3}, {"stream": philox.PROBE}])
def test_seed_epoch_and_stream_each_change_every_draw(other):
    arguments = {"seed": 3, "stream": philox.AUGMENT, "epoch": 2}
    first = philox.uniforms(np.arange(50), 4, **arguments)
    second = philox.uniforms(np.arange(50), 4, **{**arguments, **other})
    assert (first != second).all()


def test_uniforms_are_uniform_and_open():
    draws = philox.uniforms(np.arange(20_000), 4, seed=0, stream=philox.AUGMENT)
    assert draws.min() > 0
    assert draws.max() < 1
    # a fixed sample, so the test cannot flicker; 0.001 is what a defect of the construction would fall far below
    assert kstest(draws.ravel(), "uniform").pvalue > 0.001
    correlations = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(20_000)  # four standard errors of a zero correlation


def test_permutation_has_each_index_once_and_changes_with_the_epoch():
    orders = [philox.permutation(1000, seed=0, stream=philox.ORDER, epoch=epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[1] != orders[2]).mean() > 0.9


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 2**64}, {"seed": 0, "epoch": 2**32}])
def test_counters_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"Expected (seed|epoch) in"):
        philox.uniforms([0], 1, stream=philox.AUGMENT, **arguments)
    with pytest.raises(ValueError, match="Expected indices"):
        philox.uniforms([2**32], 1, seed=0, stream=philox.AUGMENT)
