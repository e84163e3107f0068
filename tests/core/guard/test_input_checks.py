"""A probe refuses unfit inputs in one line each, and accepts the others without a guess."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs


def network(n_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_classes))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 0])
MEASURES: tuple[Callable[[vs.Probe], Any], ...] = (
    vs.evaluation,
    vs.feature_map_variance,
    lambda probe: vs.hessian_trace(probe, n_vectors=1),
)


class Returning(nn.Module):
    """Gives the logits in the form that ``form`` makes of them."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = network(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@dataclass
class Output:
    loss: Tensor
    scores: Tensor


Named = namedtuple("Named", "scores features")

OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda z: (z, z), r"received a tuple of 2 \(Tensor, Tensor\): wrap it .* self\.model\(x\)\[0\]"),
    "named tuple": (lambda z: Named(z, z), r"received a Named of 2"),
    "list": (lambda z: [z], r"received a list of 1 \(Tensor\)"),
    "dict": (
        lambda z: {"loss": z.sum(), "scores": z},
        r"received a dict with keys loss, scores: .*\['loss'\].*output='loss'",
    ),
    "dataclass": (
        lambda z: Output(z.sum(), z),
        r"received a Output with fields loss, scores: .*self\.model\(x\)\.loss.*output='loss'",
    ),
    "None": (lambda z: None, r"received a NoneType"),
    "(B,)": (lambda z: z[:, 0], r"K at least 2, received \(4,\): for two classes return two logits"),
    "(B, 1)": (lambda z: z[:, :1], r"received \(4, 1\): for two classes return two logits"),
    "(B, 0)": (lambda z: z[:, :0], r"received \(4, 0\): the model has no classifier: build it with num_classes=K"),
    "maps": (
        lambda z: z[:, :, None, None].expand(-1, -1, 2, 2),
        r"received \(4, 3, 2, 2\): return one row of logits per image",
    ),
    "scalar": (lambda z: z.sum(), r"received \(\): return one row"),
    "fewer rows": (lambda z: z[:2], r"received \(2, 3\): there are 4 images"),
    "integers": (lambda z: z.argmax(1), r"floating-point logits \(B, K\), received int64 \(4,\)"),
}


@pytest.mark.parametrize("measure", [MEASURES[0], MEASURES[2]])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_logits_are_one_line(name: str, measure: Callable[[vs.Probe], Any]) -> None:
    form, text = OUTPUTS[name]
    with pytest.raises(ValueError, match=text) as error:
        measure(vs.Probe(Returning(form), [(images(), LABELS)]))
    assert "\n" not in str(error.value)


class ModelOutput(OrderedDict):
    """As the outputs of transformers: a mapping whose keys are attributes too."""


def test_a_mapping_without_logits_is_refused_with_the_way_to_name_one() -> None:
    model = Returning(lambda z: ModelOutput(scores=z, hidden_states=z))
    text = r"a ModelOutput with keys scores, hidden_states: .*self\.model\(x\)\['scores'\].*output='scores'"
    with pytest.raises(ValueError, match=text):
        vs.evaluation(vs.Probe(model, [(images(), LABELS)]))


@pytest.mark.parametrize("name", OUTPUTS)
def test_measures_of_feature_maps_take_any_output(name: str) -> None:
    data = [(images(), LABELS)]
    expected = vs.feature_map_variance(vs.Probe(model := Returning(lambda z: z), data))
    model.form = OUTPUTS[name][0]
    np.testing.assert_array_equal(vs.feature_map_variance(vs.Probe(model, data)).variance, expected.variance)


BATCHES: dict[str, tuple[Any, str]] = {
    "dict": ({"image": images(), "label": LABELS}, r"a dict with keys image, label: .*\[\(b\['image'\], b\['label'\]\)"),
    "triple": ((images(), LABELS, LABELS), r"a tuple of 3 \(Tensor, Tensor, Tensor\): make pairs"),
    "one tensor": (images(), r"batch 0 to be a pair \(x, y\), received a Tensor"),
    "array": ((images().numpy(), LABELS), r"images x of batch 0 to be a tensor, received a ndarray: use torch\.as_tensor"),
    "list of labels": ((images(), [0, 1, 2, 0]), r"targets y of batch 0 to be a tensor, received a list of 4"),
    "empty": ((images(0), LABELS[:0]), r"received float32 \(0, 3, 6, 6\): it is empty, leave it out"),
    "uint8 images": ((images().byte(), LABELS), r"received uint8 \(4, 3, 6, 6\): scale and normalize"),
    "int64 images": ((images().long(), LABELS), r"received int64 \(4, 3, 6, 6\): scale and normalize"),
    "complex images": ((images() + 0j, LABELS), r"received complex64 \(4, 3, 6, 6\): drop the imaginary part"),
    "one image": ((images()[0], LABELS[:3]), r"received float32 \(3, 6, 6\): add the missing axis"),
    "five axes": ((images()[None], LABELS[:1]), r"received float32 \(1, 4, 3, 6, 6\)"),
    "channels": ((images()[:, :1], LABELS), r"received float32 \(4, 1, 6, 6\), on which it fails \(RuntimeError"),
    "float labels": ((images(), LABELS.float()), r"received float32 \(4,\): use y\.long\(\) if these are class indices"),
    "bool labels": ((images(), LABELS > 0), r"received bool \(4,\): use y\.long\(\) for classes 0 and 1"),
    "column": ((images(), LABELS[:, None]), r"received int64 \(4, 1\): use y\[:, 0\]\.long\(\)"),
    "one-hot integers": ((images(), nn.functional.one_hot(LABELS, 3)), r"one-hot targets become .* y\.argmax\(1\)"),
    "masks": ((images(), LABELS[:, None, None].expand(4, 6, 6)), r"received int64 \(4, 6, 6\): give one class index per image"),
    "too high": ((images(), LABELS + 1), r"has 3 logits, received 3 in batch 0.*num_classes=4"),
    "negative": ((images(), LABELS - 1), r"at least 0 in batch 0, received -1: number the classes from 0"),
    "sums": ((images(), torch.full((4, 3), 0.5)), r"whose rows sum to 1 with an error of 0\.5: divide each row by its sum"),
    "negative soft": ((images(), torch.tensor([[1.5, -0.5, 0.0]] * 4)), r"each row is a distribution"),
    "NaN soft": ((images(), torch.full((4, 3), torch.nan)), r"each row is a distribution"),
    "lengths": ((images(), LABELS[:3]), r"as many targets as images in batch 0, received 4 and 3"),
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_cannot_be_measured_are_one_line(name: str, measure: Callable[[vs.Probe], Any]) -> None:
    if name == "too high" and measure is vs.feature_map_variance:
        return  # a measure that reads neither logits nor labels
    batch, text = BATCHES[name]
    with pytest.raises(ValueError, match=text) as error:
        measure(vs.Probe(network(), [batch]))
    assert "\n" not in str(error.value)


def test_a_label_beyond_the_logits_is_found_in_a_later_batch() -> None:
    with pytest.raises(ValueError, match="received 3 in batch 1"):
        vs.evaluation(vs.Probe(network(), [(images(), LABELS), (images(), LABELS + 1)]))


def test_features_are_not_taken_for_logits() -> None:
    data = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))]
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"received one built with num_classes=0, .* build it with num_classes=K"):
        vs.evaluation(vs.Probe(model, data))
    assert np.isfinite(vs.feature_map_variance(vs.Probe(model, data)).variance).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_class_indices_of_any_integer_type_give_the_same_numbers(dtype: torch.dtype) -> None:
    model = network()
    expected = vs.evaluation(vs.Probe(model, [(images(), LABELS)]))
    result = vs.evaluation(vs.Probe(model, [(images(), LABELS.to(dtype))]))
    assert (result.nll, result.accuracy) == (expected.nll, expected.accuracy)


def test_soft_targets_in_lower_precision_are_distributions() -> None:
    soft = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0)).softmax(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert np.isfinite(vs.evaluation(vs.Probe(network(1000), [(images(), soft.to(dtype))])).nll)


@pytest.mark.parametrize("measure", MEASURES)
def test_weights_that_cannot_be_measured_are_one_line(measure: Callable[[vs.Probe], Any]) -> None:
    data = [(images(), LABELS)]
    with torch.inference_mode():
        frozen = network()
    with pytest.raises(ValueError, match=r"'0\.weight' made under torch\.inference_mode: .* copy\.deepcopy\(model\)"):
        measure(vs.Probe(frozen, data))
    measure(vs.Probe(copy.deepcopy(frozen), data))  # what the error says
    unreal = network()
    unreal[0].weight = nn.Parameter(unreal[0].weight + 0j)
    with pytest.raises(ValueError, match=r"'0\.weight' of type torch\.complex64"):
        measure(vs.Probe(unreal, data))


def test_weights_and_batches_on_other_devices_are_one_line() -> None:
    with torch.device("meta"):
        empty = network()
    with pytest.raises(ValueError, match="on the device meta: load weights first"):
        vs.evaluation(vs.Probe(empty, [(images(), LABELS)]))
    with pytest.raises(ValueError, match="batch 0 on the model's device cpu, received meta"):
        vs.evaluation(vs.Probe(network(), [(images().to("meta"), LABELS)]))


@pytest.mark.parametrize("batches", [images(), {"train": [(images(), LABELS)]}, 3])
def test_batches_that_are_no_list_of_pairs(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected batches \[\(x, y\), \.\.\.\], received a"):
        vs.Probe(network(), batches)


class Cut(nn.Module):
    """Gives logits that no gradient leads back from."""

    def __init__(self, context: Callable[[], Any] | None) -> None:
        super().__init__()
        self.net, self.context = network(), context

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            return torch.as_tensor(self.net(x).detach().numpy())
        with self.context():
            return self.net(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
@pytest.mark.parametrize("measure", [MEASURES[2], vs.critical_point, lambda p: vs.hessian_eigenvalues(p, k=1)])
def test_logits_without_a_gradient_are_one_line(measure: Callable[[vs.Probe], Any], context: Any) -> None:
    probe = vs.Probe(Cut(context), [(images(), LABELS)], vs.Objective())
    with pytest.raises(
        ValueError, match=r"Expected logits that depend on the parameters .* without a gradient"
    ) as caught:
        measure(probe)
    assert "\n" not in str(caught.value)


def test_an_operation_that_does_not_run_is_not_put_down_to_the_images() -> None:
    class Flexible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("FlexAttention does not support backward on CPU")

    probe = vs.Probe(Flexible(), [(torch.rand(2, 4), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match=r"operations run here, .*FlexAttention does not support backward on CPU\)"):
        vs.hessian_trace(probe, n_vectors=1)


def test_logits_that_are_not_dense_are_one_line() -> None:
    probe = vs.Probe(Returning(lambda z: z.to_sparse()), [(images(), LABELS)], vs.Objective())
    for measure in (vs.evaluation, vs.calibration, vs.critical_point):
        with pytest.raises(ValueError, match=r"Expected .* a dense tensor of logits .* received sparse_coo \(4, 3\)"):
            measure(probe)


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_class_indices(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = network()
    found, expected = (
        vs.evaluation(vs.Probe(model, [(images(), y)], vs.Objective())) for y in (LABELS.to(kind), LABELS)
    )
    assert found.scalars() == pytest.approx(expected.scalars(), nan_ok=True)
