"""The measures of representations give the same numbers on two ranks as on one, also where a rank has no batch of its own."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer

import vitscope as vs
from tests.fixtures.programs.processes import on_ranks


def measured(n_batches: int) -> dict:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, num_classes=4, embed_dim=16, depth=2, num_heads=2).double()
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    about = {"mean": [0.5] * 3, "std": [0.2] * 3, "texture": [1, 2, 3, 0, 1, 2]}
    probe = vs.Probe(model, list(zip(x.chunk(n_batches), y.chunk(n_batches))), about=about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chance level of an untrained model
        return {
            "fourier": vs.relative_log_amplitude(probe),
            "transfer": vs.branch_transfer(probe, n_resamples=8),
            "receptive field": vs.effective_receptive_field(probe, taps="all"),
            "patch PCA": vs.patch_pca(probe, taps="all", images=5, foreground=0.0),
            "variance": vs.feature_map_variance(probe),
            "tokens": vs.token_norms(probe, norm_images=5),
            "smoothing": vs.oversmoothing(probe),
            "taps": vs.tap_table(probe),
            "noise": vs.frequency_noise_robustness(probe, n_bands=2),
            "filter": vs.input_filter(probe, cutoffs=(0.5,)),
            "heat": vs.fourier_heatmap(probe, n=3),
            "shape": vs.shape_bias(probe),
            "evaluation": vs.evaluation(probe),
            "attention": vs.attention_maps(probe, images=4),
        }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({n: measured(n) for n in (3, 1)}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def assert_equal(one, other, rtol: float) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "card":
            continue
        pairs = zip(a, b) if isinstance(a, tuple) and a and isinstance(a[0], np.ndarray) else [(a, b)]
        for left, right in pairs:
            if isinstance(left, np.ndarray | float):
                np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol, err_msg=field.name)
            else:
                assert left == right, field.name


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("n_batches", [3, 1])
def test_two_ranks_agree_with_each_other_and_with_one(ranks: list[dict], n_batches: int):
    alone = measured(n_batches)
    for name, result in alone.items():
        assert_equal(ranks[0][n_batches][name], ranks[1][n_batches][name], rtol=0)
        # sums in another order (float64); sums of squares cancel to about the root of that in the intervals
        assert_equal(result, ranks[0][n_batches][name], rtol=1e-6)
