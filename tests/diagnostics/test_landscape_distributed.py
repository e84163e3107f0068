"""Points split over two ranks give the surface of one rank, bit for bit, and go on from each other's rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, real, snapshot
from tests.fixtures.programs.processes import on_ranks
from vitscope.runtime import progress


def measured(partial: dict | None = None) -> dict[str, np.ndarray]:
    probe = real()
    before = snapshot(probe.model)
    other = {name: value + 0.1 for name, value in before.items()}
    far = {name: value * 2 for name, value in before.items()}
    points = [("far", far), ("other", other)]
    found = {
        "landscape": vs.loss_landscape(probe, n=3, partial=partial).nll,
        "gradient": vs.loss_landscape(probe, n=3, directions="gradient").nll,
        "slice": vs.loss_slice(probe, n=3, n_directions=3).nll_by_direction,
        "sharpness": vs.sharpness(probe, radii=(0.05, 0.1), n_pairs=2, n_steps=2).rise_by_pair,
        "worst": vs.sharpness(probe, radii=(0.05,), n_pairs=1, n_steps=2).worst_rise_by_start,
        "interpolation": vs.linear_interpolation(probe, checkpoints=points, n=5).nll,
        "trajectory": vs.trajectory(probe, checkpoints=points, n=2).plane_nll,
    }
    assert_untouched(probe.model, before)
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    progress.enabled = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows: dict = {}
    found = measured(rows)
    # what only the other rank has stored must not be computed again
    calls = []
    probe = real()
    probe.model.register_forward_hook(lambda *_: calls.append(1))
    again = vs.loss_landscape(probe, n=3, partial=rows).nll
    torch.save({"found": found, "again": again, "rows": len(rows), "calls": len(calls)}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_surface_of_one(tmp_path: Path):
    on_ranks(_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    torch.set_num_threads(1)
    alone = measured()
    for name, values in alone.items():
        assert np.array_equal(ranks[0]["found"][name], ranks[1]["found"][name], equal_nan=True), name
        if name == "gradient":  # the direction's sum over batches is made in another order
            np.testing.assert_allclose(values, ranks[0]["found"][name], rtol=1e-10)
        else:
            assert np.array_equal(values, ranks[0]["found"][name], equal_nan=True), name
    # the first batch twice, to see that the model repeats itself, and two images for what its parameters do
    assert [r["calls"] for r in ranks] == [3, 3]
    assert sum(r["rows"] for r in ranks) == 9
    assert all(np.array_equal(r["again"], alone["landscape"]) for r in ranks)
