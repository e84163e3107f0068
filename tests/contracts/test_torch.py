"""Needs of torch beyond its stable interface: `vitscope.runtime.torch_internals` and beta interfaces.

Each test names one need. A failure after an upgrade means that the function it names has to be changed for the new release.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from vitscope.runtime import torch_internals


def test_once_differentiable_ends_the_graph_in_a_node_that_is_known_by_name():
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    x = torch.ones(3, requires_grad=True)
    for function, expected in ((Sine.apply, True), (torch.sin, False)):
        gradient = torch.autograd.grad((function(x) * x).sum(), x, create_graph=True)
        assert torch_internals.has_once_differentiable(gradient) is expected


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_batch_norm_derives_from_the_base_class(layer: type[nn.Module]) -> None:
    assert issubclass(layer, torch_internals.BatchNormBase)


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d])
def test_no_other_norm_derives_from_the_batch_norm_base_class(layer: type[nn.Module]) -> None:
    assert not issubclass(layer, torch_internals.BatchNormBase)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_norms_with_running_statistics_derive_from_one_base_class(layer: type[nn.Module]) -> None:
    assert issubclass(layer, torch_internals.RunningNormBase)
    assert not issubclass(nn.GroupNorm, torch_internals.RunningNormBase)


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_every_convolution_derives_from_the_base_class_and_tells_whether_it_is_transposed(layer: type) -> None:
    assert issubclass(layer, torch_internals.ConvolutionBase)
    assert layer(2, 2, 1).transposed is (layer is nn.ConvTranspose2d)


def test_a_module_keeps_its_tensors_and_submodules_in_three_dictionaries() -> None:
    attributes = vars(nn.Sequential(nn.BatchNorm1d(2)))
    for name in torch_internals.MODULE_REGISTRIES:
        assert isinstance(attributes[name], dict), f"nn.Module has no dictionary {name}"
    norm = vars(nn.BatchNorm1d(2))
    assert set(norm["_parameters"]) == {"weight", "bias"}
    assert set(norm["_buffers"]) == {"running_mean", "running_var", "num_batches_tracked"}


def test_attributes_of_every_module_include_the_registries_hooks_and_mode() -> None:
    needed = {*torch_internals.MODULE_REGISTRIES, "training", "_forward_hooks", "_forward_pre_hooks"}
    assert needed <= torch_internals.MODULE_ATTRIBUTES


def test_an_entry_of_the_buffer_registry_is_a_buffer() -> None:
    norm, value = nn.BatchNorm1d(2), torch.ones(2)
    del norm.running_mean
    torch_internals.buffer_registry(norm)["running_mean"] = value
    assert norm.running_mean is value
    assert dict(norm.named_buffers())["running_mean"] is value


def test_a_compiled_module_is_unwrapped_under_a_name_of_the_wrappers() -> None:
    network = nn.Linear(2, 2)
    compiled = torch.compile(network, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert torch_internals.uncompiled(compiled) is network
    assert torch_internals.uncompiled(network) is network
    assert [name.split(".")[0] in torch_internals.WRAPPER_ATTRIBUTES for name, _ in compiled.named_parameters()] == [
        True
    ] * 2
    assert torch_internals.is_compiler_loaded()
    assert "torch._dynamo" in sys.modules


def test_a_module_compiled_in_place_stays_itself() -> None:
    network = nn.Linear(2, 2)
    network.compile(backend="eager")
    assert torch_internals.uncompiled(network) is network


def test_the_stance_runs_compiled_modules_eagerly_with_their_hooks() -> None:
    inner = nn.Linear(2, 2)
    compiled, calls = torch.compile(nn.Sequential(inner), backend="eager"), []
    inner.register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    with torch.compiler.set_stance("force_eager"):
        compiled(torch.ones(1, 2))
    assert calls == [False]


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_a_compiled_function_gives_the_original_back() -> None:
    network = nn.Linear(2, 2)
    original = torch_internals.original_function(torch.compile(network.forward, backend="eager"))
    assert getattr(original, "__func__", original) is nn.Linear.forward
    bare = torch_internals.original_function(torch.compile(_double, backend="eager"))
    assert bare is _double
    assert torch_internals.original_function(nn.ReLU.forward) is nn.ReLU.forward


def test_a_module_calls_the_forward_of_its_instance() -> None:
    """`vitscope.models.structure.residual_units` lets a model skip blocks in this way; a hook cannot skip a forward pass."""
    network = nn.Linear(2, 2)
    network.forward = lambda x: x
    x = torch.ones(1, 2)
    assert network(x) is x
    del network.forward
    assert network(x) is not x


def test_a_schedule_reports_and_stores_the_rates_that_were_set() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    torch_internals.set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.state_dict()["_last_lr"] == [0.25]
    assert scheduler.base_lrs == [1.0]
    assert scheduler.last_epoch == 0
    assert len(scheduler.lr_lambdas) == 1


def test_workers_of_a_loader_are_listed_and_end_at_once() -> None:
    loader = DataLoader(TensorDataset(torch.ones(4)), num_workers=1, persistent_workers=True)
    assert torch_internals.worker_processes(loader) == []
    iterator = iter(loader)
    next(iterator)
    (worker,) = torch_internals.worker_processes(loader)
    assert worker.is_alive()
    torch_internals.shut_workers_down(loader)
    assert not worker.is_alive()
    assert torch_internals.worker_processes(loader) == []
    assert len(list(loader)) == 4  # a next pass starts new ones
    torch_internals.shut_workers_down(loader)


class Recorder(TorchFunctionMode):
    """Collects the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_functional_calls_of_layers() -> None:
    """`linalg.curvature.double_backward`, `models.structure.attention_weights` and `.execution` replace or record these."""
    q = torch.ones(1, 1, 2, 2)
    with Recorder() as recorder:
        nn.Conv2d(1, 1, 1)(q)
        nn.BatchNorm2d(1).eval()(q)
        nn.Hardsigmoid()(q)
        F.scaled_dot_product_attention(q, q, q)
    assert {F.conv2d, F.batch_norm, F.hardsigmoid, F.scaled_dot_product_attention} <= set(recorder.functions)


def test_unobserved_functions_are_seen_by_no_mode() -> None:
    """Readers of `models.permutations` compute with what they observe in the midst of a recorded pass."""
    x = torch.ones(2)
    with Recorder() as recorder:
        with torch_internals.UnobservedFunctions():
            x.relu()
        x.exp()
    assert [getattr(function, "__name__", "") for function in recorder.functions] == ["exp"]


def test_operators_that_take_functions_have_one_base_class() -> None:
    """`models.tracing.recorder` tells them by it."""
    from torch._higher_order_ops.cond import cond_op

    assert isinstance(cond_op, torch_internals.HigherOrderOperator)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_backward_operator_of_convolutions_gives_their_gradients(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, g = draw(2, 4, 5, 5), draw(6, 4 // groups, 3, 3), draw(2, 6, 5, 5)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=1, groups=groups), (x, weight), g)
    options = [1, 1], [1, 1], [1, 1], False, [0, 0], groups
    received = torch.ops.aten.convolution_backward(g, x, weight, None, *options, [True, True, False])
    for a, b in zip(received[:2], expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert received[2] is None


def test_the_default_store_tells_which_keys_have_been_set(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        store = torch_internals.default_store()
        store.set("a", "text")
        assert store.check(["a"])
        assert not store.check(["a", "b"])
        assert store.get("a") == b"text"
    finally:
        torch.distributed.destroy_process_group()
