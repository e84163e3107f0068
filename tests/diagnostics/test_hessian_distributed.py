"""Two ranks give the numbers of one, with an uneven share of batches each and with none for one of them."""

from __future__ import annotations

import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import make
from tests.fixtures.programs.processes import on_ranks
from vitscope.runtime import progress

#: batches of the whole sequence: three on two ranks, one on two ranks
SPLITS = {"three": (5, 5, 2), "one": (12,)}


def curvatures(sizes: tuple[int, ...]) -> dict:
    model, x, y = make("conv")
    scale = {name: 0.5 + p.detach().abs() for name, p in model.named_parameters()}
    data = list(zip(x.split(sizes), y.split(sizes)))
    probe = vs.Probe(model, data, vs.Objective(weight_decay=0.1))
    adamw = vs.Probe(model, data, vs.Objective(weight_decay=0.1, l2="adamw", decay_scale=scale))
    return {
        "eigenvalues": vs.hessian_eigenvalues(probe, k=3),
        "both ends": vs.hessian_eigenvalues(probe, k=2, which="both", eigenvectors=True, tol=1e-8),
        "restarted": vs.hessian_eigenvalues(probe, k=2, max_memory=12 * 8 * 118, tol=1e-8),
        "power": vs.hessian_eigenvalues(adamw, k=2, solver="power"),
        "gauss-newton": vs.hessian_eigenvalues(probe, k=3, operator="ggn"),
        "fisher": vs.hessian_eigenvalues(probe, k=3, operator="fisher_mc"),
        "micro-batches": vs.hessian_eigenvalues(adamw, k=3, micro_batch=2, parameters="layer:head"),
        "spectrum": vs.hessian_max_eigenvalue_spectrum(probe, n_top=3, n_ends=1),
        "density": vs.spectral_density(probe, n_vectors=2, n_steps=8),
        "trace": vs.hessian_trace(probe, n_vectors=4),
        "diagonal": vs.hessian_diagonal(probe, method="exact", operator="ggn", parameters="layer:head"),
        "hutch++": vs.hessian_trace(probe, n_vectors=9, method="hutch++"),
        "critical point": vs.critical_point(adamw, n_points=5),
        "rayleigh": vs.rayleigh_split(probe, k=2, n_ends=1),
        "normalized": vs.normalized_hessian(probe, k=2),
        "preconditioned": vs.preconditioned_sharpness(adamw, lr=1e-3, k=1),
        "nep": vs.nep_stability(probe, ks=(1, 2), batch_sizes=(5, 10), tols=(1e-1, 1e-3), k=2),
        "bn": vs.bn_policy(probe, n_top=2),
    }


def others(sizes: tuple[int, ...]) -> dict:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, num_classes=4, embed_dim=8, depth=2, num_heads=2).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # attention is uniform at initialization, and what varies between images is rounding
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (12,), generator=generator)
    data = list(zip(x.split(sizes), y.split(sizes)))
    probe = vs.Probe(model, data, vs.Objective(weight_decay=0.1), about={"mean": [0.5] * 3, "std": [0.2] * 3})
    return {
        "cka": vs.cka(probe),
        "lesion": vs.lesion(probe),
        "calibration": vs.calibration(probe, validation=_mostly_right(model, x, sizes)),
        "corruption": vs.corruption(probe, types=("gaussian_noise", "contrast"), severities=(1, 5), baseline="none"),
        "landscape": vs.loss_landscape(probe, n=3),
        "sharpness": vs.sharpness(probe, radii=(0.05,), n_pairs=2, n_steps=2),
        "fourier": vs.relative_log_amplitude(probe),
        "variance": vs.feature_map_variance(probe),
        "noise": vs.frequency_noise_robustness(probe, n_bands=2),
        "rank": vs.effective_rank(probe),
        "attention": vs.attention_distance(probe),
        "adversarial": vs.adversarial(probe, epsilons=(2,), steps=2),
    }


def _mostly_right(model: torch.nn.Module, x: torch.Tensor, sizes: tuple[int, ...]) -> vs.Probe:
    """Return a probe whose labels are the model's own answers but for every fourth image: its temperature is finite."""
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    y[::4] = (y[::4] + 1) % 4
    return vs.Probe(model, list(zip(x.split(sizes), y.split(sizes))))


def measured(split: str) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images, chance level of an untrained model
        return curvatures(SPLITS[split]) | others(SPLITS[split])


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    progress.enabled = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({split: measured(split) for split in SPLITS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal(one: object, other: object, rtol: float, name: str) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        message = f"{name}.{field.name}"
        if field.name == "card":
            assert a.to_dict() == b.to_dict(), message
            continue
        pairs = zip(a, b) if isinstance(a, tuple) and a and isinstance(a[0], np.ndarray) else [(a, b)]
        for left, right in pairs:
            if isinstance(left, np.ndarray | float) and np.asarray(left).dtype.kind == "f":
                size = float(np.abs(np.asarray(left)[np.isfinite(left)]).max(initial=0.0))
                np.testing.assert_allclose(left, right, rtol=0, atol=rtol * max(size, 1.0), err_msg=message)
            elif isinstance(left, np.ndarray):
                np.testing.assert_array_equal(left, right, err_msg=message)
            else:
                np.testing.assert_equal(left, right, err_msg=message)  # NaN, for no interval, equals NaN


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_agree_with_each_other_and_with_one(ranks: list[dict], split: str):
    torch.set_num_threads(1)
    for name, result in measured(split).items():
        assert_equal(ranks[0][split][name], ranks[1][split][name], 0.0, name)
        # sums over images in another order, float64
        assert_equal(result, ranks[0][split][name], 1e-10, name)
