"""Every measure states its options on its result's card, and results that differ in them are not overlaid unasked."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.analyses import runner
from vitscope.core.measure_options import INCIDENTAL, options_of
from vitscope.core.objective_card import INCIDENTAL_FACTS
from vitscope.runs import result_store


def probe() -> vs.Probe:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)).double()
    batches = [(torch.rand(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    return vs.Probe(model, batches, about={"mean": (0.0,) * 3, "std": (1.0,) * 3})


@pytest.mark.parametrize("name", vs.measures())
def test_every_measure_records_its_options(name: str) -> None:
    measure = getattr(vs, name)
    assert measure.__wrapped__.__name__ == name, f"decorate {name} with vitscope.core.measure_options.record_options"
    assert inspect.signature(measure) == inspect.signature(measure.__wrapped__)


def test_options_are_on_the_card_with_defaults_and_survive_the_disk(tmp_path: Path) -> None:
    found = vs.hessian_max_eigenvalue_spectrum(probe(), n_top=2, seed=3)
    options = dict(found.card.options)
    names = set(inspect.signature(vs.hessian_max_eigenvalue_spectrum).parameters) - INCIDENTAL
    assert set(options) == names >= {"n_top", "solver", "operator", "tol", "parameters", "bn"}
    assert (options["n_top"], options["solver"], options["operator"], options["tol"]) == (2, "lanczos", "hessian", 1e-3)
    again = result_store.load(result_store.save(tmp_path, "end-0badcafe", found))
    assert again.card.differences(found.card) == []
    assert again.card.conditions() == found.card.conditions()


@pytest.mark.parametrize(
    ("measure", "base", "changes"),
    [
        ("hessian_max_eigenvalue_spectrum", {"n_top": 1},
         {"n_top": 2, "solver": "power", "operator": "ggn", "tol": 1e-2, "parameters": "0.*"}),
        ("hessian_eigenvalues", {"k": 1}, {"k": 2, "which": "SA", "solver": "power", "operator": "ggn"}),
        ("hessian_trace", {"n_vectors": 3}, {"n_vectors": 4, "method": "hutch++", "operator": "ggn"}),
        ("loss_slice", {"n": 3}, {"n": 5, "span": 0.5, "normalization": "layer", "n_directions": 2}),
        ("adversarial", {"steps": 1, "epsilons": (1,)}, {"epsilons": (2,), "norm": "l2", "attacks": ("fgsm",), "steps": 2}),
        ("feature_map_variance", {}, {"level": 0.9}),
        ("calibration", {}, {"n_bins": 5, "binning": "official", "cutoff": 0.5}),
    ],
)  # fmt: skip
def test_results_of_other_options_are_refused_unless_asked(measure: str, base: dict, changes: dict) -> None:
    first = getattr(vs, measure)(probe(), **base)
    same = getattr(vs, measure)(probe(), **base, **({"seed": 5} if "seed" in first.card.solver else {}))
    vs.check_comparable({"a": first.card, "b": same.card})
    for key, value in changes.items():
        other = getattr(vs, measure)(probe(), **{**base, key: value})
        assert f"options.{key}" in first.card.differences(other.card)
        with pytest.raises(ValueError, match=f"options.{key}: "):
            vs.plot({"a": first, "b": other})
    assert vs.plot({"a": first, "b": same}) is not None


def test_what_an_open_option_came_to_is_compared() -> None:
    card = vs.hessian_trace(probe(), n_vectors=3).card
    one, other = (
        dataclasses.replace(card, options={"preconditioner": "auto"}, solver={"preconditioner": chosen, "seed": 0})
        for chosen in ("adamw", "identity")
    )
    assert one.differences(other) == ["solver.preconditioner"]


def test_options_that_hold_models_and_tensors_are_named_by_their_kind() -> None:
    one = probe()
    given = options_of(vs.cka, one, other=one)
    assert given["other"] == {"data": "unknown", "split": "unknown", "augmentation": "unknown", "n_images": 8}
    state = {"w": torch.zeros(2, 3)}
    plain = options_of(vs.loss_slice, one, directions=[state, torch.zeros(4)], checkpoints={"a": state})
    assert plain["directions"] == ["1 tensors", "tensor of shape (4,)"]
    assert not {"checkpoints", "seed", "partial", "dtype"} & set(plain)


def test_one_pass_records_the_options_of_each_measure() -> None:
    found = vs.one_pass(probe(), {"feature_map_variance": {"level": 0.9}, "effective_rank": {"positions": 4}})
    alone = vs.feature_map_variance(probe(), level=0.9)
    assert found["feature_map_variance"].card.options == alone.card.options == {"level": 0.9}
    assert found["effective_rank"].card.options == {"positions": 4}


def test_a_stored_result_without_options_is_measured_again(tmp_path: Path) -> None:
    found = vs.hessian_trace(probe(), n_vectors=2)
    weights = found.card.checkpoint
    path = result_store.save(tmp_path, "end-0badcafe", found)
    assert runner._earlier(path, weights) is not None
    old = dataclasses.replace(found, card=dataclasses.replace(found.card, options=None))
    path = result_store.save(tmp_path, "end-0badcafe", old)
    with pytest.warns(UserWarning, match="did not record options; measured again"):
        assert runner._earlier(path, weights) is None


def test_the_incidental_names_are_those_that_leave_the_number_alone() -> None:
    meaningful = {"solver", "operator", "n_top", "k", "which", "root", "normalization", "tol", "parameters", "bn", "mean", "std",
                  "radii", "attacks", "epsilons", "norm", "steps", "restarts", "n_images", "classes", "types"}  # fmt: skip
    assert not meaningful & INCIDENTAL
    assert not (meaningful - {"std"}) & INCIDENTAL_FACTS


def test_the_number_of_eigenvalues_has_either_name() -> None:
    whole = vs.hessian_eigenvalues(probe(), k=2)
    other = vs.hessian_eigenvalues(probe(), n_top=2)
    torch.testing.assert_close(other.eigenvalues, whole.eigenvalues)
    assert other.card.options == whole.card.options
    assert whole.card.options["k"] == 2
    spectrum = vs.hessian_max_eigenvalue_spectrum(probe(), k=1)
    assert spectrum.card.options["n_top"] == 1
    assert "k" not in spectrum.card.options
    with pytest.raises(TypeError, match="Expected k or n_top, which are the same argument, received both"):
        vs.hessian_eigenvalues(probe(), k=2, n_top=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_top'"):
        vs.feature_map_variance(probe(), n_top=2)
