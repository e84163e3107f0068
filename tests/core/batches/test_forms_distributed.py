"""Two ranks give the numbers of one under every form of loss, output and batch, with uneven shares of images and labels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import vitscope as vs
from tests.fixtures.networks import forms_of_batches as forms
from tests.fixtures.programs.processes import on_ranks

NAMES = ("mse", "dense", "own loss", "dict batch", "triple")


def numbers(form: str) -> dict[str, np.ndarray]:
    probe = forms.probe(form, size=3)  # batches of 3, 3 and 2 images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined accuracies
        slices = vs.loss_slice(probe, n=3)
        eigenvalues = vs.hessian_eigenvalues(probe, k=2, parameters="*head*", tol=1e-9).eigenvalues
        operator = "fisher_empirical" if form == "own loss" else "fisher_mc"
        fisher = vs.hessian_eigenvalues(probe, k=1, parameters="*head*", tol=1e-9, operator=operator).eigenvalues
    return {"nll": slices.nll, "hessian": eigenvalues, "fisher": fisher}


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({form: numbers(form) for form in NAMES}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    on_ranks(_rank, str(tmp_path))  # before this process differentiates anything: its threads would be lost in a fork
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for form in NAMES:
        for name, value in numbers(form).items():
            np.testing.assert_array_equal(ranks[0][form][name], ranks[1][form][name])
            np.testing.assert_allclose(ranks[0][form][name], value, rtol=1e-9, err_msg=f"{form} {name}")
