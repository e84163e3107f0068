"""The guard gives a model back as it was; the card says what was measured."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitscope as vs
from vitscope.core.objective_card import check_comparable


class Nasty(nn.Module):
    """Draws, writes to a buffer and to its weights when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        random.random()
        np.random.rand()
        return self.linear(self.norm(x + 0 * torch.rand_like(x)))


def state(model: nn.Module) -> list:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()],
        [(None if p.grad is None else p.grad.clone(), p.requires_grad, p.dtype) for p in model.parameters()],
        torch.random.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.backends.cuda.matmul.fp32_precision,
    ]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("options", [{}, {"second_order": True}, {"dtype": torch.float64}, {"bn": "batch"}])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_bit_identical(options: dict, fails: bool) -> None:
    model = Nasty().train()
    model.linear.bias.requires_grad_(False)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    nn.functional.cross_entropy(model(x), y).backward()
    probe = vs.Probe(model, [(x, y)])
    before = state(model)
    data = model.linear.weight.data_ptr()
    try:
        with probe.guard(restore_weights=True, **options) as inside:
            for bx, by in probe.iter_batches():
                loss = probe.objective(inside, bx, by)
                if options.get("second_order"):
                    loss.backward()
            with torch.no_grad():
                inside.linear.weight.mul_(2)
            if fails:
                raise RuntimeError("boom")
    except RuntimeError:
        assert fails
    assert same(before, state(model))
    assert model.linear.weight.data_ptr() == data


def test_batch_statistics_leave_the_buffers_alone() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(5.0)
    x = torch.randn(6, 3)
    probe = vs.Probe(nn.Sequential(norm), [(x, torch.zeros(6, dtype=torch.long))])
    with probe.guard(bn="batch") as model:
        torch.testing.assert_close(model(x).mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    with probe.guard() as model:
        assert float(model(x).mean()) < -4
    assert norm.running_mean.tolist() == [5.0] * 3
    assert norm.num_batches_tracked == 0


def test_works_inside_inference_mode_and_autocast() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3, 16, 16)
        probe = vs.Probe(model, [(x, torch.tensor([0, 1]))])
        with probe.guard(second_order=True) as inside:
            ((bx, by),) = probe.iter_batches()
            weights = list(probe.parameters().values())
            first = torch.autograd.grad(probe.objective(inside, bx, by), weights, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    assert all(g.dtype == torch.float32 for g in second)
    assert any(float(g.abs().sum()) > 0 for g in second)


def test_half_precision_is_lifted_for_derivatives() -> None:
    model = nn.Linear(3, 2).bfloat16()
    probe = vs.Probe(model, [(torch.randn(2, 3), torch.tensor([0, 1]))])
    with probe.guard(second_order=True) as inside:
        assert inside.weight.dtype == torch.float32
        assert probe.dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16


def test_one_shot_iterators_are_refused(mlp, mlp_batches) -> None:
    with pytest.raises(ValueError, match=r"received an iterator: list\(\) it"):
        vs.Probe(mlp, iter(mlp_batches))


def test_other_refusals(mlp, mlp_batches) -> None:
    with pytest.raises(ValueError, match=r"Expected model to be an nn\.Module"):
        vs.Probe(lambda x: x, mlp_batches)
    with pytest.raises(
        ValueError, match=r"Expected objective to be a vs\.Objective, received str: pass vs\.Objective\("
    ):
        vs.Probe(mlp, mlp_batches, "cross_entropy")
    with pytest.raises(ValueError, match="Expected bn to be"), vs.Probe(mlp, mlp_batches).guard(bn="train"):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="trainable parameters"):
        vs.Probe(nn.Flatten(), mlp_batches).parameters()
    with pytest.raises(ValueError, match="at least one batch"):
        _ = vs.Probe(mlp, []).n_images
    short = vs.Probe(mlp, [(mlp_batches[0][0], mlp_batches[0][1][:1])])
    with pytest.raises(ValueError, match="as many targets as images in batch 0, received 4 and 1"):
        list(short.iter_batches())
    elsewhere = vs.Probe(mlp, [(torch.randn(2, 6, device="meta"), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match="batch 0 on the model's device cpu, received meta"):
        list(elsewhere.iter_batches())


def test_a_compiled_model_is_differentiated_uncompiled(mlp, mlp_batches) -> None:
    with vs.Probe(torch.compile(mlp), mlp_batches).guard(second_order=True) as model:
        assert model is mlp


@pytest.mark.filterwarnings("ignore:Attempted to insert:UserWarning")
@pytest.mark.parametrize("product", ["reverse", "linearize"])
def test_a_data_parallel_model_has_the_curvature_of_the_model_inside(product: str, mlp, mlp_batches) -> None:
    wrapped = nn.DataParallel(nn.DataParallel(mlp))
    found, plain = (
        vs.hessian_eigenvalues(vs.Probe(model, mlp_batches[:1]), k=1, product=product) for model in (wrapped, mlp)
    )
    assert found.converged.all()
    assert found.eigenvalues.tolist() == plain.eigenvalues.tolist()
    with vs.Probe(wrapped, mlp_batches).guard(second_order=True) as model:
        assert model is mlp


def test_models_that_cannot_be_differentiated(mlp_batches) -> None:
    with torch.inference_mode():
        frozen = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="inference_mode"), vs.Probe(frozen, mlp_batches).guard(second_order=True):
        pytest.fail("entered")


def test_the_card(mlp, mlp_batches) -> None:
    probe = vs.Probe(mlp, mlp_batches, vs.Objective(0.05), about={"data": "toy", "split": "train", "mean": (0.5,)})
    card = probe.card(bn_policy="batch", solver={"tol": 1e-3})
    assert (card.n_images, card.batch_size, card.data, card.weight_decay) == (13, 4, "toy", 0.05)
    assert (card.bn_policy, card.solver["tol"], card.dtype, card.l2) == ("batch", 1e-3, "float64", "half_sq")
    assert (card.input_shape, card.versions["vitscope"]) == ("1 x 2 x 3", vs.__version__)
    other = vs.Probe(mlp, mlp_batches[:1], vs.Objective(0.05), about={"data": "toy", "split": "test", "seed": 3}).card()
    assert set(card.differences(other)) == {"n_images", "split", "bn_policy", "solver.tol"}
    with pytest.raises(ValueError, match="'a' and 'b' that differ in split: 'train' and 'test'"):
        check_comparable({"a": probe.card(n_images=4), "b": other})
    for key, one, two in (("tol", 1e-3, 1e-4), ("solver", "lanczos", "power"), ("operator", "hessian", "ggn")):
        with pytest.raises(ValueError, match=f"differ in solver.{key}: {one!r} and {two!r}"):
            check_comparable({"a": probe.card(solver={key: one}), "b": probe.card(solver={key: two})})
    check_comparable({"a": probe.card(solver={"seed": 0, "n_products": 9}), "b": probe.card(solver={"seed": 1})})
    check_comparable({"a": card, "b": card, "c": None})
