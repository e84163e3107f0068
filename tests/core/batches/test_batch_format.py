"""Forms of batches and outputs: guards, splits and one line for what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.forms_of_batches import ModelOutput
from vitscope.core.batches.batch_inputs import BatchInputs

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=G, dtype=torch.float64)
SCALE = torch.rand(6, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Network(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.form = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), form

    def forward(self, features: Tensor, scale: Tensor | None = None) -> Any:
        return self.form(self.layers(features if scale is None else features * scale[:, None]))


def scaled(model: nn.Module, batch: Any) -> Any:
    return model(batch[0], scale=batch[1])


def expected(scale: bool) -> np.ndarray:
    x = X * SCALE[:, None] if scale else X
    return vs.hessian_eigenvalues(vs.Probe(Network(), [(x, Y)]), k=3, tol=1e-9).eigenvalues


def entries(size: int) -> list[dict[str, Tensor]]:
    return [
        {"features": x, "scale": s, "labels": y} for x, s, y in zip(X.split(size), SCALE.split(size), Y.split(size))
    ]


FORMS: dict[str, tuple[bool, Callable[[], vs.Probe]]] = {
    "mapping": (False, lambda: vs.Probe(Network(), [{"features": X, "labels": Y}])),
    "mapping of more": (True, lambda: vs.Probe(Network(), entries(4))),
    "named targets": (
        False, lambda: vs.Probe(Network(), [{"features": X, "class": Y}], targets="class"),
    ),
    "triple": (True, lambda: vs.Probe(Network(), [(X, SCALE, Y)], forward=scaled, targets=-1)),
    "triple with targets in front": (
        True, lambda: vs.Probe(Network(), [(Y, X, SCALE)], forward=lambda m, b: m(b[1], b[2]), targets=0),
    ),
    "function of the batch": (
        True, lambda: vs.Probe(Network(), [(X, SCALE, 2 * Y)], forward=scaled, targets=lambda b: b[2] // 2),
    ),
    "pair with forward": (
        False, lambda: vs.Probe(Network(), [(X, Y)], forward=lambda m, b: m.layers(b[0])),
    ),
    "forward that reads an output": (
        True, lambda: vs.Probe(Network(ModelOutput), entries(3), forward=lambda m, b: m(b["features"], b["scale"]).logits),
    ),
    "output by key": (False, lambda: vs.Probe(Network(lambda z: {"a": -z, "b": z}), [(X, Y)], output="b")),
    "output by index": (False, lambda: vs.Probe(Network(lambda z: (-z, z)), [(X, Y)], output=1)),
    "output by attribute": (False, lambda: vs.Probe(Network(lambda z: ModelOutput(-z, z)), [(X, Y)], output="hidden_states")),
    "output by function": (False, lambda: vs.Probe(Network(lambda z: (-z, z)), [(X, Y)], output=lambda out: out[1])),
    "mapping with logits": (False, lambda: vs.Probe(Network(lambda z: {"logits": z}), [(X, Y)])),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_numbers_are_those_of_pairs(name: str) -> None:
    has_scale, make = FORMS[name]
    probe = make()
    for micro_batch in (None, 2):
        result = vs.hessian_eigenvalues(probe, k=3, tol=1e-9, micro_batch=micro_batch)
        np.testing.assert_allclose(result.eigenvalues, expected(has_scale), rtol=1e-8)
    assert "forward" not in vars(probe.model)
    assert not probe.model._forward_hooks
    fisher = vs.hessian_eigenvalues(probe, k=1, operator="ggn", product="reverse")
    assert fisher.eigenvalues[0] > 0


def test_a_network_that_is_half_cast_gets_its_entries_in_its_type() -> None:
    probe = vs.Probe(Network().float(), entries(4))
    assert vs.loss_slice(probe, n=3).nll[1] == pytest.approx(
        vs.loss_slice(vs.Probe(Network(), entries(4)), n=3).nll[1], rel=1e-5
    )


REFUSED: dict[str, tuple[Callable[[], vs.Probe], str]] = {
    "triple": (lambda: vs.Probe(Network(), [(X, SCALE, Y)]), r"a tuple of 3 .*pass forward=.* and targets=.*-1"),
    "targets not said": (
        lambda: vs.Probe(Network(), [(X, SCALE, Y)], forward=scaled), r"a tuple of 3 .*targets=\(the index of the targets",
    ),
    "no labels": (lambda: vs.Probe(Network(), [{"features": X, "class": Y}]), r"mapping with 'labels'.*pass targets="),
    "no such targets": (
        lambda: vs.Probe(Network(), [{"features": X, "labels": Y}], targets="class"),
        r"Expected targets='class' to name an entry of batch 0, .*pass one of 'features', 'labels'",
    ),
    "no such index": (lambda: vs.Probe(Network(), [(X, Y)], targets=5), r"Expected targets=5 .*pass one of 0, 1"),
    "other names": (
        lambda: vs.Probe(Network(), [{"image": X, "labels": Y}]), r"on which it fails \(TypeError: .*'image'",
    ),
    "nested": (
        lambda: vs.Probe(Network(), [((X, SCALE), Y)], forward=lambda m, b: m(*b[0])),
        r"Expected entry 0 of batch 0 to be a tensor, a number or a text, received a tuple of 2",
    ),
    "rows": (lambda: vs.Probe(Network(), [{"features": X, "scale": SCALE, "labels": Y[:4]}]), r"with one row for each of its 4"),
    "no such output": (
        lambda: vs.Probe(Network(lambda z: {"a": z}), [(X, Y)], output="b"), r"an entry 'b', received a dict with keys a",
    ),
    "output of a tensor": (lambda: vs.Probe(Network(), [(X, Y)], output="b"), r"received a tensor: leave output='b' out"),
    "failing forward": (
        lambda: vs.Probe(Network(), [(X, Y)], forward=lambda m, b: m(b[7])), r"entries 0 to 1, on which it fails \(Ind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text) as error:
        vs.hessian_trace(make(), n_vectors=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"output": 1.5}, {"targets": True}, {"forward": "model"}])
def test_options_of_another_type_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected {next(iter(options))} to be"):
        vs.Probe(Network(), [(X, Y)], **options)


def test_entries_that_change_between_passes_are_named() -> None:
    class Shuffled:
        passes = 0

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([{"features": X, "scale": SCALE + self.passes, "labels": Y}])

    with pytest.raises(ValueError, match="received other entry 'scale' in batch 0"):
        vs.hessian_trace(vs.Probe(Network(), Shuffled()), n_vectors=1)


def test_slices_keep_what_has_no_row_an_image() -> None:
    inputs = BatchInputs({"x": X, "table": torch.ones(3, 3), "name": "a"}, 6)
    part = inputs[1:3]
    assert len(part) == 2
    assert part.shape == ((2, 5), (3, 3))
    assert dict(part.entries)["name"] == "a"


def test_a_second_probe_of_the_same_batches_reads_them_alike() -> None:
    first = FORMS["triple"][1]()
    second = vs.Probe(first.model, first.batches)
    assert vs.hessian_trace(second, n_vectors=1).trace == vs.hessian_trace(first, n_vectors=1).trace


def test_a_card_states_output_and_forward() -> None:
    texts = {
        make().card().loss
        for name, (_, make) in FORMS.items()
        if name.startswith(("output", "triple", "pair", "mapping"))
    }
    assert len(texts) == 8  # all mappings have the default's text


class TwoOutputs(NamedTuple):
    """As the outputs of torchvision's GoogLeNet in training."""

    logits: Tensor
    aux_logits: Tensor


def test_the_logits_of_a_named_tuple_are_measured() -> None:
    named = vs.Probe(Network(lambda z: TwoOutputs(z, 2 * z)), [(X, Y)])
    expected = vs.hessian_eigenvalues(vs.Probe(Network(), [(X, Y)]), k=1).eigenvalues
    assert np.array_equal(vs.hessian_eigenvalues(named, k=1).eigenvalues, expected)
    second = vs.Probe(Network(lambda z: TwoOutputs(2 * z, z)), [(X, Y)], output=1)
    assert np.array_equal(vs.hessian_eigenvalues(second, k=1).eigenvalues, expected)


@pytest.mark.parametrize(
    ("form", "shapes"), [("mapping", "5"), ("mapping of more", "5, scalar"), ("triple", "5, scalar, scalar")]
)
def test_the_card_has_the_shape_of_each_input(form: str, shapes: str) -> None:
    assert FORMS[form][1]().card().input_shape == shapes
