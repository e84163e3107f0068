"""Whatever a network keeps on plain attributes is made from the weights it has, and is as before afterwards."""

from __future__ import annotations

import copy
import functools
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.guard.repeatability import UnusedParametersWarning
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.directions import random_direction
from vitscope.linalg.weights.weight_space_walk import points_in_plane


class Net(nn.Module):
    """Multiplies by a table that is made from a weight; the ways to keep the table are the subclasses'."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64))
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def make(self) -> Tensor:
        return self.scale.exp()

    def table(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.table()


class InDictionary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def table(self) -> Tensor:
        if "x" not in self.cache:
            self.cache["x"] = self.make()
        return self.cache["x"]


class InList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def table(self) -> Tensor:
        if not self.cache:
            self.cache.append(self.make())
        return self.cache[0]


class InAttribute(Net):
    kept: Tensor | None = None

    def table(self) -> Tensor:
        if self.kept is None:
            self.kept = self.make()
        return self.kept


class InNewAttribute(Net):
    def table(self) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = (self.make().detach(), 3)
        return self.kept[0]


class InCachedProperty(Net):
    @functools.cached_property
    def kept(self) -> Tensor:
        return self.make()

    def table(self) -> Tensor:
        return self.kept


class InMethodCache(Net):
    @functools.cache  # noqa: B019  a network as users write them
    def kept(self) -> Tensor:
        return self.make()

    def table(self) -> Tensor:
        return self.kept()


class InBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)

    def table(self) -> Tensor:
        if self.kept is None:
            self.kept = self.make().detach()
        return self.kept


class InRegisteredBuffer(Net):
    def table(self) -> Tensor:
        if "kept" not in self._buffers:
            self.register_buffer("kept", self.make().detach())
        return self.kept


class Holder:
    table: Tensor | None = None


class InObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def table(self) -> Tensor:
        if self.holder.table is None:
            self.holder.table = self.make()
        return self.holder.table


KINDS = [
    InDictionary, InList, InAttribute, InNewAttribute, InCachedProperty, InMethodCache, InBuffer, InRegisteredBuffer, InObject,
]  # fmt: skip


def answers(model: nn.Module, batches: list, factor: float) -> tuple[float, float, float]:
    """Return the nll at the weights, after a step along a direction, and at the weights again."""
    probe = vs.Probe(model, batches)
    direction = random_direction(probe.parameters(), 0)
    with guarded_evaluation(probe) as (_, here), points_in_plane(probe.parameters(), None, direction) as move:
        found = []
        for at in (0.0, factor, 0.0):
            move(0.0, at)
            found.append(here()["nll"])
    return found[0], found[1], found[2]


def moved_copy(fresh: nn.Module, model: nn.Module, factor: float) -> nn.Module:
    direction = random_direction(dict(model.named_parameters()), 0)
    state = {name: value.clone() for name, value in model.state_dict().items() if name in dict(fresh.state_dict())}
    for name, d in direction.items():
        state[name].add_(d, alpha=factor)
    fresh.load_state_dict(state)
    return fresh.eval()


def attributes(model: nn.Module) -> list:
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return id(value), [(k, id(v)) for k, v in value.items()]
        return (id(value), [id(v) for v in value]) if isinstance(value, list) else id(value)

    return [{key: plain(value) for key, value in vars(m).items()} for m in model.modules()]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_made_from_weights_follow_the_weights(kind: type[Net], filled: bool, mlp_batches: list) -> None:
    torch.manual_seed(3)
    model = kind().eval()
    fresh = kind()
    if filled and kind not in (InRegisteredBuffer, InBuffer, InObject):
        with torch.no_grad():
            model(mlp_batches[0][0])
    before = attributes(model)
    center, moved, again = answers(model, mlp_batches, 0.5)
    assert center == again
    want = vs.evaluation(vs.Probe(moved_copy(fresh, model, 0.5), mlp_batches)).nll
    assert moved == pytest.approx(want, rel=1e-13)  # 13 images, a few operations each in float64
    assert abs(moved - center) > 1e-3
    assert attributes(model) == before


@pytest.mark.parametrize("kind", [InDictionary, InAttribute, InCachedProperty, InMethodCache])
def test_derivatives_reach_the_weight_behind_a_table(kind: type[Net], mlp_batches: list) -> None:
    torch.manual_seed(3)
    model = kind().eval()
    with torch.no_grad():
        model(mlp_batches[0][0])  # filled without a graph: nothing would reach the weight

    class Direct(Net):
        def table(self) -> Tensor:
            return self.make()

    direct = Direct()
    direct.load_state_dict(model.state_dict())
    options = {"k": 2, "tol": 1e-8, "parameters": "scale", "max_products": 50}
    for product in ("reverse", "linearize"):
        found = vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), **options)
        want = vs.hessian_eigenvalues(vs.Probe(direct, mlp_batches), **options)
        torch.testing.assert_close(found.eigenvalues, want.eigenvalues, rtol=1e-7, atol=1e-12, msg=product)


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "tiny_vit_5m_224", "efficientformer_l1"])
def test_attention_bias_tables_of_timm(name: str) -> None:
    sizes = {"levit_128s": 224, "efficientformer_l1": 224, "efficientvit_m0": 224}  # maps of more than one position
    model = timm.create_model(name, num_classes=3).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if "attention_biases" in parameter:
                p.copy_(torch.randn(p.shape, generator=generator))
            elif parameter.endswith("weight") and not p.any():
                p.fill_(1.0)  # a branch that starts at zero would hide its attention
    fresh = copy.deepcopy(model)
    x = torch.randn(1, 3, sizes.get(name, 64), sizes.get(name, 64), generator=generator)
    with torch.no_grad():
        answer = model(x)
    before = attributes(model)
    probe = vs.Probe(model, [(x, torch.tensor([1]))])
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, __, output: seen.append(output))
    biases = {
        n: torch.ones_like(p) * p.detach().abs() for n, p in probe.parameters().items() if "attention_biases" in n
    }
    with guarded_evaluation(probe) as (_, here), points_in_plane(probe.parameters(), None, biases) as move:
        for at in (0.0, 2.0, 0.0):
            move(0.0, at)
            here()
    handle.remove()
    with torch.no_grad():
        for parameter, p in fresh.named_parameters():
            if parameter in biases:
                p.add_(biases[parameter], alpha=2.0)
        assert torch.equal(seen[-2], fresh(x))
        assert not torch.equal(seen[-2], answer)
        assert torch.equal(seen[-1], answer)
        assert attributes(model) == before
        assert torch.equal(model(x), answer)


class WritesAll(nn.Module):
    """Changes its input, registers a buffer, a module and a hook, and counts, at each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.seen = torch.zeros(1)
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).clamp_(-1, 1)
        self.n += 1
        self.seen += 1
        self.register_buffer(f"new_{self.n}", x.detach().clone())
        self.add_module("extra", nn.Identity())
        if self.n == 1:
            self.linear.register_forward_hook(lambda *_: None)
        return self.linear(x.flatten(1))


def test_inputs_and_what_a_pass_registers_are_as_before(mlp_batches: list) -> None:
    model = WritesAll().eval()
    images = [x.clone() for x, _ in mlp_batches]
    before, state = attributes(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = copy.deepcopy(model)
    logits = torch.cat([expected(x.clone()) for x in images])
    want = float(nn.functional.cross_entropy(logits, torch.cat([y for _, y in mlp_batches])).detach())
    probe = vs.Probe(model, mlp_batches)
    assert vs.evaluation(probe).nll == pytest.approx(want, rel=1e-13)
    found = vs.loss_landscape(probe, n=3)
    assert found.nll[1, 1] == pytest.approx(want, rel=1e-13)
    vs.hessian_eigenvalues(probe, k=1, max_products=4)
    assert all(torch.equal(x, image) for (x, _), image in zip(mlp_batches, images))
    assert attributes(model) == before
    assert float(model.seen) == 0.0
    assert list(model.state_dict()) == list(state)


class Normalizing(nn.Module):
    """Writes to its own weight at each pass, in place or by rebinding."""

    def __init__(self, rebinds: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4).double()
        self.rebinds = rebinds

    def forward(self, x: Tensor) -> Tensor:
        unit = nn.functional.normalize(self.linear.weight.data, dim=1)
        if self.rebinds:
            self.linear.weight.data = unit
        else:
            self.linear.weight.data.copy_(unit)
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("rebinds", [False, True])
def test_weights_that_a_pass_writes_to_are_as_before(rebinds: bool, mlp_batches: list) -> None:
    model = Normalizing(rebinds)
    weight, place = model.linear.weight.detach().clone(), model.linear.weight.data_ptr()
    probe = vs.Probe(model, mlp_batches)
    for _ in range(2):
        vs.evaluation(probe)
        assert torch.equal(model.linear.weight, weight)
        assert model.linear.weight.data_ptr() == place
    for measure in (vs.hessian_eigenvalues, vs.loss_slice):
        with pytest.raises(ValueError, match=r"only reads, received 'linear\.weight' that it writes to"):
            measure(vs.Probe(model, mlp_batches))
        assert torch.equal(model.linear.weight, weight)


def test_a_weight_made_by_a_hook_keeps_its_type(mlp_batches: list) -> None:
    model = nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(6, 4)))
    made = model[1].weight
    with vs.Probe(model, mlp_batches).guard(second_order=True, dtype=torch.float64) as inside:
        assert inside(mlp_batches[0][0]).dtype == torch.float64
    assert model[1].weight is made
    assert made.dtype == torch.float32


def test_forward_derivatives_of_a_recurrent_layer_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x[:, 0])[0][:, -1])  # (B, 1, steps, features) -> (B, classes)

    model = Recurrent().double()
    probe = vs.Probe(model, [(torch.randn(3, 1, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2]))])
    options = {"k": 1, "tol": 1e-8, "parameters": "rnn.*"}
    weights = [p for name, p in model.named_parameters() if name.startswith("rnn")]
    x, y = probe.batches.source[0]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, weights, retain_graph=True)]) for g in flat]
    dense = torch.linalg.eigvalsh(torch.stack(rows)).abs().max()
    value = vs.hessian_eigenvalues(probe, **options).eigenvalues[0]
    assert abs(value) == pytest.approx(float(dense), rel=1e-6)
    with pytest.raises(ValueError, match=r"product='reverse'"):
        vs.hessian_eigenvalues(probe, **options, product="linearize")


class OutOfReach(Net):
    """Keep a table where no attribute shows it, or in a form that no pass makes again."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.filled, cells = where, False, []

        def closure() -> Tensor:
            if not cells:
                cells.append(self.make())
            return cells[0]

        self.closure = closure
        self.register_buffer("given", torch.zeros(1, 4, dtype=torch.float64))
        self.plain, self.array = torch.zeros(1), None

    def table(self) -> Tensor:
        if self.where == "closure":
            return self.closure()
        if self.where == "cached function":
            return cached_table(self)
        if not self.filled and self.where == "buffer":
            self.given.copy_(self.make().detach())
        if not self.filled and self.where == "attribute behind a flag":
            self.plain = self.make()
        if self.array is None and self.where == "array":
            self.array = self.make().detach().numpy()
        self.filled = True
        return {"buffer": self.given, "array": torch.as_tensor(self.array) if self.where == "array" else None}.get(
            self.where, self.plain
        )


@functools.lru_cache
def cached_table(net: Net) -> Tensor:
    return net.make()


@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
@pytest.mark.parametrize("where", ["closure", "cached function", "buffer", "attribute behind a flag", "array"])
def test_tables_out_of_reach_are_refused(where: str, graph: bool, mlp_batches: list) -> None:
    model = OutOfReach(where).eval()
    with torch.set_grad_enabled(graph):
        model(mlp_batches[0][0])  # the table is there before the probe
    for measure in (lambda p: vs.loss_slice(p, n=3), lambda p: vs.hessian_eigenvalues(p, k=1)):
        with pytest.raises(ValueError, match="'scale' without an effect"):
            measure(vs.Probe(model, mlp_batches))
    assert np.isfinite(vs.evaluation(vs.Probe(model, mlp_batches)).nll)  # weights that stay need no table made again


def test_derivatives_of_a_table_that_autograd_does_not_see_are_refused(mlp_batches: list) -> None:
    probe = vs.Probe(InNewAttribute(), mlp_batches)
    assert np.isfinite(vs.loss_slice(probe, n=3).nll).all()  # made again at every point
    with pytest.raises(ValueError, match="'scale' without an effect"):
        vs.hessian_eigenvalues(probe, k=1)


def test_data_parallel_models_are_looked_into(mlp_batches: list) -> None:
    model = OutOfReach("closure").eval()
    model(mlp_batches[0][0])
    with pytest.raises(ValueError, match=r"'scale' without an effect"):
        vs.loss_slice(vs.Probe(nn.DataParallel(model), mlp_batches), n=3)
    assert np.isfinite(vs.loss_slice(vs.Probe(nn.DataParallel(InDictionary()), mlp_batches), n=3).nll).all()


def test_unused_parameters_are_named(mlp_batches: list) -> None:
    class WithOthers(Net):
        def table(self) -> Tensor:
            return self.make()

    model = WithOthers()
    model.second_head = nn.Linear(6, 4, dtype=torch.float64)
    with pytest.warns(UnusedParametersWarning, match="second_head.weight, second_head.bias"):
        value = vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues
    model.second_head.requires_grad_(False)
    model.token = nn.Parameter(torch.ones(1, dtype=torch.float64))  # of a module that runs
    with pytest.raises(ValueError, match="'token' without an effect"):
        vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1)
    model.token.requires_grad_(False)
    with warnings.catch_warnings(action="error", category=UnusedParametersWarning):
        assert vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues == pytest.approx(
            value, rel=2e-3
        )  # two searches, each to tol=1e-3
