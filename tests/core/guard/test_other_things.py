"""What is passed in place of probes, batches, losses and taps; tensors that are no parameters, and copies of a batch."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import vitscope as vs
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning

IMAGES, LABELS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
BATCHES = [(IMAGES, LABELS)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


class WithList(nn.Module):
    """Keeps its first layer in a Python list, where `nn.Module` does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = [nn.Linear(6, 5)], nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[0](x).tanh())


class WithBuffer(nn.Module):
    """Has a buffer that requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("scale", torch.ones(3, requires_grad=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


@pytest.mark.parametrize(("model", "shapes"), [(WithList(), "(5, 6)"), (WithBuffer(), "(3,)")])
@pytest.mark.parametrize("measure", ["derivatives", "moves"])
def test_tensors_that_are_no_parameters_are_noticed(model: nn.Module, shapes: str, measure: str) -> None:
    probe = vs.Probe(model, BATCHES)
    text = f"are no parameters of the model, of shapes .*{re.escape(shapes)}.*: no derivative"
    with (
        pytest.warns(UnlikelyInputWarning, match=text),
        probe.guard(second_order=measure == "derivatives", moves_weights=measure == "moves"),
    ):
        pass


def test_copies_of_a_batch_are_noticed_once() -> None:
    probe = vs.Probe(network(), [*BATCHES, (IMAGES + 1, LABELS), *BATCHES, *BATCHES])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(probe.iter_batches())) == len(list(probe.iter_batches())) == 4
    (notice,) = caught
    assert "batches 0 and 2 hold the same images and targets" in str(notice.message)


def test_a_measure_names_what_it_was_given_in_place_of_a_probe() -> None:
    for thing in (network(), BATCHES, "runs/x"):
        with pytest.raises(
            ValueError, match=rf"probe of vs.hessian_trace to be a vs.Probe, received {type(thing).__name__}"
        ):
            vs.hessian_trace(thing)
    with pytest.raises(
        ValueError, match=r"other of vs.cka to be a vs.Probe, received Sequential: .* of the same images"
    ):
        vs.cka(vs.Probe(network(), BATCHES), other=network())


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (TensorDataset(IMAGES, LABELS), "needs a loader, torch.utils.data.DataLoader"),
        ((IMAGES, LABELS), r"received a Tensor \(4, 6\): pass a list of pairs, \[\(x, y\)\]"),
        ([([IMAGES, IMAGES], LABELS)], r"torch.stack\(list\(...\)\)"),
        ([(IMAGES, [0, 1, 2, 0])], "use torch.as_tensor"),
    ],
)
def test_batches_of_another_form_are_refused_with_the_way_out(batches: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        list(vs.Probe(network(), batches).iter_batches())


def test_names_and_modules_are_no_taps() -> None:
    model = network()
    for tap in ("0", model[0], vs.Tap("0", "mlp", 1, 0.0, "0")):
        with pytest.raises(ValueError, match=r"choose some of vs.taps\(model\)"):
            vs.Probe(model, BATCHES, taps=[tap])


def test_losses_that_are_not_of_the_outputs_alone_are_refused() -> None:
    model = network()

    def decayed(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + 0.1 * model[0].weight.square().sum()

    with (
        pytest.raises(ValueError, match=r"uses the model's '0.weight': an L2 term is vs.Objective\(weight_decay"),
        vs.Probe(model, BATCHES, vs.Objective(loss=decayed)).guard(),
    ):
        pass


def test_a_loss_module_may_have_parameters_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * outputs, y, reduction="none")

    with vs.Probe(network(), BATCHES, vs.Objective(loss=Scaled())).guard() as model:
        model(IMAGES)


def test_logits_are_no_log_probabilities() -> None:
    for loss in (F.nll_loss, nn.NLLLoss()):
        objective = vs.Objective(loss=loss)
        with pytest.raises(ValueError, match=r"log probabilities .* return z.log_softmax\(1\)"):
            vs.Probe(network(), BATCHES, objective).guard().__enter__()
        with vs.Probe(nn.Sequential(network(), nn.LogSoftmax(1)), BATCHES, objective).guard() as model:
            model(IMAGES)


def test_an_objective_takes_numbers_and_objects() -> None:
    with pytest.raises(
        ValueError, match=r"received the class CrossEntropyLoss: pass an object of it, CrossEntropyLoss\(\)"
    ):
        vs.Objective(loss=nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match=r"weight_decay to be a number, received the text '0\.1'"):
        vs.Objective(weight_decay="0.1")


def test_an_exported_network_is_refused_by_name() -> None:
    model = network()
    model.eval = model.train = lambda mode=True: (_ for _ in ()).throw(
        NotImplementedError("Calling eval() is not supported")
    )
    with pytest.raises(ValueError, match=r"whose mode cannot be set .* torch.export: pass the nn.Module"):
        vs.Probe(model, BATCHES).guard().__enter__()
