"""Models of `fully_shard` on gloo ranks: derivatives of gathered shards, and curvature against the dense Hessian in float64."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import vitscope as vs
from tests.fixtures.networks.small_networks import small_convnet, small_vit
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.core.sharding.differentiable_gather import ShardLayout, gather
from vitscope.core.sharding.sharded_parameters import LocalShard, is_sharded, plain_weights
from vitscope.linalg.curvature.operator_factory import curvatures

OBJECTIVE = vs.Objective(weight_decay=0.1)


def network(kind: str) -> nn.Module:
    """Return timm's blocks with all parameters away from special points; some have fewer rows than there are ranks."""
    torch.manual_seed(0)
    model = (small_vit() if kind == "vit" else small_convnet()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim in (1, 3):
                p.add_(0.3 * torch.rand_like(p))
        for name, statistic in model.named_buffers():  # of trained layers, not those of new ones
            if name.endswith("running_mean"):
                statistic.add_(0.1 * torch.rand_like(statistic))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return three batches, so that of two ranks one has one more, and of four one has none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator)
    return list(zip(x.split([3, 2, 2]), y.split([3, 2, 2])))


def sharded(kind: str) -> nn.Module:
    model = network(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    units = model.blocks if kind == "vit" else [model.layer1, model.layer2, model.layer3, model.layer4]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Any] = model.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in tensors.items()}


def products(model: nn.Module, **options: Any) -> np.ndarray:
    """Return products with three vectors (3, size)."""
    probe = vs.Probe(model, batches(), OBJECTIVE)
    with curvatures(probe, mean_alone=True, **options) as operators:
        operator = operators.mean()
        generator = torch.Generator().manual_seed(2)
        vectors = torch.randn(3, operator.size, generator=generator, dtype=torch.float64).to(operator.dtype)
        return torch.stack([operator(v) for v in vectors]).double().numpy()


def products_on_rank(kind: str, is_thorough: bool) -> dict[str, Any]:
    model = sharded(kind)
    before, hooks = whole_state(model), [len(m._forward_pre_hooks) for m in model.modules()]
    with curvatures(vs.Probe(model, batches(), OBJECTIVE), mean_alone=True) as operators:
        gradient = operators.mean().gradient()
        n_local = sum(p.numel() for p in operators.model.parameters() if isinstance(p, LocalShard))
    results: dict[str, Any] = {
        "n_local": n_local,
        "objective's gradient": gradient.numpy(),
        "reverse": products(model),
    }
    if is_thorough:
        results |= {
            "micro-batches": products(model, micro_batch=2),
            "ggn": products(model, operator="ggn"),
            "fisher": products(model, operator="fisher_mc"),
            "blocks": products(model, checkpoint_blocks=True),
            "difference": products(model, product="difference"),
        }
        if kind == "vit":
            results["whole"] = products(model, product="linearize")
    after = whole_state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert isinstance(model, FSDPModule)
    assert is_sharded(model)
    x, y = batches()[0]
    nn.functional.cross_entropy(model(x), y).backward()  # and goes on being trained
    results["gradient"] = torch.cat([p.grad.full_tensor().reshape(-1) for p in model.parameters()]).numpy()
    return results


def expected_products(kind: str) -> tuple[np.ndarray, np.ndarray]:
    model = network(kind)
    x, y = (torch.cat(parts) for parts in zip(*batches()))
    hessian = dense_hessian(model, x, y, OBJECTIVE)
    vectors = torch.randn(3, len(hessian), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return hessian, vectors.numpy() @ hessian


@pytest.mark.parametrize(("kind", "n", "is_thorough"), [
    ("vit", 2, False), pytest.param("vit", 2, True, marks=pytest.mark.slow),
    pytest.param("convnet", 2, True, marks=pytest.mark.slow), pytest.param("vit", 4, True, marks=pytest.mark.slow),
    pytest.param("convnet", 4, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_products_are_those_of_the_dense_hessian(kind: str, n: int, is_thorough: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    hessian, expected = expected_products(kind)
    others = {
        name: products(network(kind), operator=o)
        for name, o in (("ggn", "ggn"), ("fisher", "fisher_mc"))
        if is_thorough
    }
    ranks = results_of_ranks(lambda: products_on_rank(kind, is_thorough), tmp_path, n)
    size = np.abs(expected).max()
    for rank in ranks:
        for name in ("reverse", "micro-batches", "blocks", "whole"):
            if name in rank:
                # float64: sums in another order
                np.testing.assert_allclose(rank[name], expected, rtol=0, atol=1e-11 * size, err_msg=name)
        for name, products_of_one in others.items():
            np.testing.assert_allclose(rank[name], products_of_one, rtol=0, atol=1e-11 * np.abs(products_of_one).max())
        if is_thorough:
            np.testing.assert_allclose(rank["difference"], expected, rtol=0, atol=1e-8 * size)
        np.testing.assert_array_equal(rank["reverse"], ranks[0]["reverse"])
    x, y = (torch.cat(parts) for parts in zip(*batches()))
    model = network(kind)
    loss = OBJECTIVE.data_loss(model(x), y) + OBJECTIVE.l2_term(dict(model.named_parameters()))
    whole = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy()
    np.testing.assert_allclose(ranks[0]["objective's gradient"], whole, rtol=0, atol=1e-12)
    assert sum(rank["n_local"] for rank in ranks) == len(hessian)  # each weight is on one rank
    model, (x, y) = network(kind), batches()[0]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    np.testing.assert_allclose(
        ranks[0]["gradient"], torch.cat([g.reshape(-1) for g in gradient]).numpy(), rtol=0, atol=1e-12
    )


def measures_on_rank() -> dict[str, Any]:
    probe = vs.Probe(sharded("vit"), batches(), OBJECTIVE)
    adamw = vs.Probe(sharded("vit"), batches(), vs.Objective(weight_decay=0.1, l2="sum_norm"))
    with pytest.warns(UserWarning, match="adds curvature of its own"):
        whole = vs.hessian_trace(adamw, n_vectors=1).trace
    return {
        "eigenvalues": vs.hessian_eigenvalues(probe, k=2, tol=1e-6, dtype="float64").eigenvalues,
        "float32": vs.hessian_eigenvalues(probe, k=1, dtype="float32").eigenvalues,
        "batches": vs.hessian_max_eigenvalue_spectrum(probe, n_top=1, tol=1e-6).eigenvalues,
        "part": vs.hessian_eigenvalues(probe, k=1, tol=1e-6, parameters="part:q").eigenvalues,
        "sum_norm": whole,
        "nll": vs.evaluation(probe).nll,
    }


@pytest.mark.slow
def test_measures_of_sharded_and_of_whole_weights(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    first, second = results_of_ranks(measures_on_rank, tmp_path)
    probe = vs.Probe(network("vit"), batches(), OBJECTIVE)
    x, y = (torch.cat(parts) for parts in zip(*batches()))
    values = np.linalg.eigvalsh(dense_hessian(network("vit"), x, y, OBJECTIVE))
    np.testing.assert_allclose(first["eigenvalues"], by_magnitude(values, 2), rtol=1e-6)
    np.testing.assert_allclose(first["float32"], by_magnitude(values, 1), rtol=1e-3)
    expected = {
        "batches": vs.hessian_max_eigenvalue_spectrum(probe, n_top=1, tol=1e-6).eigenvalues,
        "part": vs.hessian_eigenvalues(probe, k=1, tol=1e-6, parameters="part:q").eigenvalues,
        "nll": vs.evaluation(probe).nll,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(first[name], values, rtol=1e-10, err_msg=name)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes_on_rank() -> dict[bool, float]:
    """Return the bytes of all tensors that the gradient's graph keeps, over those of the whole weights."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=64, depth=4, num_heads=2)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(2, 3, 8, 8)
    probe = vs.Probe(model, [(x[:1], torch.tensor([0])), (x[1:], torch.tensor([1]))])
    kept = {}
    for is_recomputed in (False, True):
        saved: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(tensor: Tensor, saved: weakref.WeakSet[Saved] = saved) -> Saved:
            saved.add(holder := Saved(tensor))
            return holder

        with curvatures(probe, mean_alone=True, checkpoint_blocks=is_recomputed) as operators:
            operator = operators.mean()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
                operator.gradient()
                storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage().nbytes() for s in saved}
        kept[is_recomputed] = sum(storages.values()) / size
    return kept


@pytest.mark.slow
def test_a_graph_of_recomputed_blocks_keeps_no_whole_weights(tmp_path: Path) -> None:
    kept = results_of_ranks(kept_bytes_on_rank, tmp_path)[0]
    print(kept)
    assert kept[False] > 0.9  # the gathered weights of all layers, and few activations
    # shards are half of the weights; those outside of blocks (4 %) and the activations of five tokens come on top
    assert kept[True] < 0.65


def gathered_on_rank() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(15, dtype=torch.float64).reshape(5, 3).sin()
    results = {}
    for axis in (0, 1):
        layout = ShardLayout(whole.shape, axis, rank, world)
        shard = layout.local_part(whole).clone().requires_grad_()
        loss = ((gather(shard, layout) + rank) ** 3).sum()  # another function on each rank
        (first,) = torch.autograd.grad(loss, shard, create_graph=True)
        (second,) = torch.autograd.grad(first, shard, torch.ones_like(first), create_graph=True)
        (third,) = torch.autograd.grad(second, shard, torch.ones_like(second))
        results[axis] = [gather(t.detach(), layout).numpy() for t in (shard, first, second, third)]
    return results


def test_gathered_shards_are_differentiated_three_times(tmp_path: Path) -> None:
    whole = torch.arange(15, dtype=torch.float64).reshape(5, 3).sin().numpy()
    sums = [whole, *(sum(c * (whole + r) ** p for r in (0, 1)) for c, p in ((3, 2), (6, 1), (6, 0)))]
    for results in results_of_ranks(gathered_on_rank, tmp_path):
        for tensors in results.values():
            for tensor, expected in zip(tensors, sums):
                np.testing.assert_allclose(tensor, expected, rtol=1e-14)


def test_other_models_are_left_alone() -> None:
    model = network("vit")
    parameters = list(model.parameters())
    with plain_weights(model, keeps_shards=True):
        assert all(a is b for a, b in zip(parameters, model.parameters()))
