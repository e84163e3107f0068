"""Blocks of the Hessian by kind and by stage against slices of the dense matrix in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks.small_networks import Part, data_of, model_of
from tests.fixtures.oracles.hessian_oracle import by_magnitude

#: where the parameters of the small AlterNet belong: two stages of a convolution and an attention block
KINDS = {"stem": ("stem.",), "conv": ("stages.0.0.", "stages.1.0."), "msa": ("stages.0.1.", "stages.1.1.")}
STAGES = {"0": ("stem.",), "1": ("stages.0.",), "2": ("stages.1.",)}


@cache
def dense_alternet() -> tuple[Part, np.ndarray]:
    """Return the small AlterNet's parameters and the whole Hessian of its loss."""
    part = Part("small alternet")
    return part, part.hessian(vs.Objective())


@pytest.mark.parametrize(("by", "prefixes", "last"), [("kind", KINDS, "head"), ("stage", STAGES, "3")])
def test_blocks_are_slices_of_the_dense_hessian(by: str, prefixes: dict[str, tuple[str, ...]], last: str):
    part, dense = dense_alternet()
    owners = []
    for name, p in part.named.items():
        owner = next((group for group, starts in prefixes.items() if name.startswith(starts)), last)
        owners += [owner] * p.numel()
    batches = [tuple(torch.cat(parts) for parts in zip(*data_of("small alternet")))]
    result = vs.hessian_by_kind(vs.Probe(model_of("small alternet"), batches), by=by, n_top=3)
    assert result.groups == (*prefixes, last)
    for group, size, values in zip(result.groups, result.n_parameters, result.eigenvalues):
        rows = [i for i, owner in enumerate(owners) if owner == group]
        assert size == len(rows)
        expected = by_magnitude(np.linalg.eigvalsh(dense[np.ix_(rows, rows)]), 3)
        # the tolerance of Lanczos, relative to each value or to a thousandth of the largest
        np.testing.assert_allclose(values[0], expected, rtol=1e-3, atol=1e-6 * abs(expected[0]))
    whole = np.linalg.eigvalsh(dense)
    assert whole[0] <= result.eigenvalues.min()
    assert result.eigenvalues.max() <= whole[-1] * (1 + 1e-6)
    assert result.scalars()[f"nep_{last}"] == result.nep[-1]
    assert result.card is not None
    assert result.card.parameters == f"by {by}"


def test_refusals():
    probe = vs.Probe(model_of("small alternet"), data_of("small alternet"))
    with pytest.raises(ValueError, match="by to be kind or stage, received 'layer'"):
        vs.hessian_by_kind(probe, by="layer")
