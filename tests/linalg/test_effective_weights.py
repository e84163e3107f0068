"""Directions are those of the network, not of what it is wrapped in; norms are those of the weights that layers use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import vitscope as vs
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.directions import filter_parameters, moving, normalize, random_direction
from vitscope.linalg.weights.effective_weights import (
    canonical_names,
    made_weights,
    masked,
    pruning_masks,
    refuse_made_weights,
)
from vitscope.linalg.weights.weight_space_walk import points_in_plane


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 4)]
    return nn.Sequential(*parts).double()


class Normalized(nn.Module):
    """A user's wrapper: a normalization, then the network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.backbone = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x - self.mean)


def compiled_part(model: nn.Sequential) -> nn.Sequential:
    model[3] = torch.compile(model[3], backend="eager")  # 3._orig_mod.0.weight
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "user": Normalized,
    "several": lambda model: nn.DataParallel(Normalized(model)),
    "sequence": lambda model: nn.Sequential(nn.Identity(), model),
    "average": torch.optim.swa_utils.AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled part": compiled_part,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_does_not_change_the_surface(wrapper: str, mlp_batches: list) -> None:
    wrapped = WRAPPERS[wrapper](network())
    plain = network()
    assert list(canonical_names(wrapped).values()) == list(canonical_names(plain).values())
    for options in ({}, {"directions": "gradient"}):
        want = vs.loss_slice(vs.Probe(plain, mlp_batches), n=3, **options).nll
        found = vs.loss_slice(vs.Probe(wrapped, mlp_batches), n=3, **options).nll
        np.testing.assert_array_equal(found, want)
    radii = {"radii": (0.1,), "n_pairs": 1, "n_steps": 1}
    want, found = (vs.sharpness(vs.Probe(model, mlp_batches), **radii) for model in (plain, wrapped))
    assert found.rise.tolist() == want.rise.tolist()
    assert found.worst_rise.tolist() == want.worst_rise.tolist()


def test_names_stay_where_they_are_a_network_s_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)  # no wrapper: it has a sibling, and a name without it would be ambiguous
            self.head = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.zeros(2, 2))

    names = canonical_names(Two())
    assert len(set(names.values())) == len(names)
    assert names == {name: name for name in names}


def pruned(model: nn.Sequential) -> nn.Sequential:
    prune.random_unstructured(model[1], "weight", amount=0.5)
    prune.ln_structured(model[5], "weight", amount=2, n=2, dim=0)
    return model


def test_pruned_entries_do_not_move_and_count_in_no_norm(mlp_batches: list) -> None:
    model = pruned(network())
    masks = pruning_masks(model)
    assert set(masks) == {"1.weight_orig", "5.weight_orig"}
    assert {"1.weight_orig", "5.weight_orig"} <= filter_parameters(model)
    parameters = dict(model.named_parameters())
    names = canonical_names(model)
    drawn = random_direction(moving(parameters), 0, 0, names)
    found = normalize(drawn, parameters, "filter", filter_parameters(model), masks)
    for layer in ("1", "5"):
        d, mask = found[f"{layer}.weight_orig"], masks[f"{layer}.weight_orig"]
        used = parameters[f"{layer}.weight_orig"].detach() * mask
        assert bool((d[mask == 0] == 0).all())
        # sums of up to six squares in float64
        torch.testing.assert_close(d.norm(dim=1), used.norm(dim=1), rtol=1e-14, atol=0)
    # the same network with its zeros made permanent: equal but for the noise that its zeros are moved by
    permanent = pruned(network())
    for layer in (1, 5):
        prune.remove(permanent[layer], "weight")
    assert set(names.values()) == set(canonical_names(permanent).values())
    own = {names[name]: d for name, d in found.items()}
    probe = vs.Probe(model, mlp_batches)
    surface = vs.loss_slice(probe, n=3).nll
    points = []
    with guarded_evaluation(vs.Probe(permanent, mlp_batches)) as (inside, here):
        order = {name: own[short] for name, short in canonical_names(inside).items() if short in own}
        with points_in_plane(dict(inside.named_parameters()), None, order) as move:
            for at in (-1.0, 0.0, 1.0):
                move(0.0, at)
                points.append(here()["nll"])
    np.testing.assert_allclose(surface, points, rtol=1e-13)


def test_the_scaled_hessian_leaves_pruned_entries_out(mlp_batches: list) -> None:
    options = {"k": 2, "tol": 1e-8, "normalization": "filter"}
    model = pruned(network())
    found = vs.normalized_hessian(vs.Probe(model, mlp_batches), **options).eigenvalues
    with torch.no_grad():
        for name, mask in pruning_masks(model).items():
            dict(model.named_parameters())[name].add_(100 * (1 - mask))  # entries that no layer uses
    moved = vs.normalized_hessian(vs.Probe(model, mlp_batches), **options).eigenvalues
    np.testing.assert_allclose(moved, found, rtol=1e-6)  # twice the solver's tolerance and some


MADE = {
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "older weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m),
    "older spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_weights_that_are_made_from_parameters_have_no_filter_norm(kind: str, mlp_batches: list) -> None:
    model = network()
    model[1] = MADE[kind](model[1])
    assert set(made_weights(model).values()) == {"1.weight"}
    for measure in (
        lambda probe: vs.loss_landscape(probe, n=3),
        lambda probe: vs.loss_slice(probe, n=3, normalization="layer"),
        lambda probe: vs.loss_slice(probe, n=3, directions="gradient"),
        lambda probe: vs.sharpness(probe, n_pairs=1, n_steps=1),
        lambda probe: vs.normalized_hessian(probe, k=1),
    ):
        with pytest.raises(ValueError, match=r"received '1\.weight', which is made from '1\."):
            measure(vs.Probe(model, mlp_batches))
    # without a scale, or where that layer stays, there is nothing to misread
    assert np.isfinite(vs.loss_slice(vs.Probe(model, mlp_batches), n=3, normalization="none").nll).all()
    assert np.isfinite(vs.loss_slice(vs.Probe(model, mlp_batches), n=3, ignore=["one_dim", r"^1\."]).nll).all()


def test_plain_weights_are_made_from_nothing() -> None:
    model = pruned(network())
    assert made_weights(model) == {}
    refuse_made_weights(model, dict(model.named_parameters()), "filter")
    direction = {"a": torch.ones(3)}
    assert masked(direction, {"a": torch.tensor([1.0, 0.0, 1.0])})["a"].tolist() == [1.0, 0.0, 1.0]
