"""Whatever a network keeps on plain attributes is made from the weights it has, and is as before afterwards."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.weight_tables import (
    KINDS,
    InAttribute,
    InBuffer,
    InCachedProperty,
    InDictionary,
    InMethodCache,
    InObject,
    InRegisteredBuffer,
    Net,
    answers,
    attributes,
    moved_copy,
)
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.weight_space_walk import points_in_plane


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


class InstallsHooks(nn.Module):
    """Doubles a layer's output by a hook that the first pass installs, as models of transformers record hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4).double()
        self.has_hooks = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_hooks:
            self.linear.register_forward_hook(lambda _m, _a, out: 2 * out)
            self.has_hooks = True
        return self.linear(x.flatten(1))


def test_hooks_that_a_pass_installs_are_installed_once(mlp_batches: list) -> None:
    values = [vs.hessian_eigenvalues(vs.Probe(InstallsHooks(), mlp_batches), k=1).eigenvalues]
    model = InstallsHooks()
    probe = vs.Probe(model, mlp_batches)
    vs.loss_slice(probe, n=3)
    values.append(vs.hessian_eigenvalues(probe, k=1).eigenvalues)
    assert not model.has_hooks
    assert not model.linear._forward_hooks
    model(mlp_batches[0][0])  # a user's own pass
    values.append(vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues)
    assert len(model.linear._forward_hooks) == 1
    assert values[0] == values[1] == values[2]
    doubled = nn.Sequential(nn.Flatten(), model.linear)
    expected = vs.hessian_eigenvalues(vs.Probe(doubled, mlp_batches), k=1).eigenvalues
    assert values[0] == pytest.approx(expected, rel=2e-3)  # two searches, each to tol=1e-3


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
