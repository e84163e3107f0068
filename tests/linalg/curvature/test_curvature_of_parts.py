"""The Hessian's block that belongs to queries, keys and values as subsets, in every measure that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import vitscope as vs
from tests.fixtures.networks.attention_networks import (
    DIM,
    HEAD,
    HEADS,
    Attention,
    Separate,
    batch,
    built,
    rows_of_order,
    vit,
)
from tests.fixtures.oracles.hessian_oracle import dense_hessian
from vitscope.core.objective import Objective
from vitscope.linalg.batched_lanczos import SideBySide
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import curvatures


def flat_rows(model: nn.Module, rows: dict[str, Sequence[int]]) -> np.ndarray:
    """Return the places of rows of parameters in the flat vector of all parameters."""
    places, start = [], 0
    for name, p in model.named_parameters():
        grid = start + np.arange(p.numel()).reshape(p.shape)
        if name in rows:
            places.append(grid[list(rows[name])].reshape(-1))
        start += p.numel()
    return np.concatenate(places)


def by_magnitude(block: np.ndarray, k: int) -> np.ndarray:
    values = np.linalg.eigvalsh(block)
    return values[np.argsort(-np.abs(values))][:k]


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(9)).double() + 0.1
        for name, p in model.named_parameters()
    }


OBJECTIVES = {
    "none": lambda model: Objective(),
    "half_sq": lambda model: Objective(weight_decay=0.3),
    "sum_norm": lambda model: Objective(weight_decay=0.3, l2="sum_norm"),
    "adamw": lambda model: Objective(weight_decay=0.3, l2="adamw", decay_scale=scales(model)),
}


@pytest.mark.filterwarnings("ignore:l2='sum_norm'")
@pytest.mark.parametrize("l2", OBJECTIVES)
def test_eigenvalues_are_those_of_the_dense_block(l2: str) -> None:
    """Of rows that lie head by head, under each L2 term; operators, products, trace and gradient too."""
    model = built(Attention("hsd"))
    x, y = batch()
    objective = OBJECTIVES[l2](model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dense = dense_hessian(model, x, y, objective)
    probe = vs.Probe(model, [(x, y)], objective)
    for part in "qkv":
        rows = rows_of_order("hsd")[part]
        places = flat_rows(model, {"attn.qkv.weight": rows, "attn.qkv.bias": rows})
        block = dense[np.ix_(places, places)]
        result = vs.hessian_eigenvalues(probe, k=3, parameters=f"part:{part}", tol=1e-9)
        # float64 products of a few thousand operations, and a residual below 1e-9 of the largest value
        np.testing.assert_allclose(result.eigenvalues, by_magnitude(block, 3), rtol=1e-7, atol=1e-9)
        assert result.card is not None
        assert result.card.parameters == f"part:{part}"
        assert result.parameter_names == (f"attn.qkv.weight[{part}]", f"attn.qkv.bias[{part}]")
        with curvatures(probe, CurvatureOptions(parameters=f"part:{part}")) as operators:
            operator = operators.mean()
            v = torch.randn(operator.size, dtype=torch.float64)
            np.testing.assert_allclose(operator(v).numpy(), block @ v.numpy(), rtol=1e-9, atol=1e-11)
            side_by_side = SideBySide(operators, [(0, (x, y))])
            (pieces,) = side_by_side.products([v], [0])
            product = torch.cat([piece.reshape(-1) for piece in pieces]) + operator.shift * v
            np.testing.assert_allclose(product.numpy(), block @ v.numpy(), rtol=1e-9, atol=1e-11)
            gradient = operator.gradient().numpy()
        with torch.enable_grad():
            loss = objective.data_loss(model(x), y) + objective.l2_term(dict(model.named_parameters()))
            whole = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy()
        np.testing.assert_allclose(gradient, whole[places], rtol=1e-9, atol=1e-11)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert type(model.get_submodule("attn.qkv")) is nn.Linear


def test_other_operators_and_products_have_the_same_block() -> None:
    model = built(Attention("hsd"))
    probe = vs.Probe(model, [batch()])
    places = np.concatenate([rows_of_order("hsd")["v"], []]).astype(int)
    choices: list[dict[str, Any]] = [{"operator": "ggn"}, {"product": "linearize"}]
    for options in choices:
        with curvatures(probe, CurvatureOptions(parameters="*.qkv.bias", **options)) as operators:
            whole = operators.mean()
            units = torch.eye(whole.size, dtype=torch.float64)
            block = torch.stack([whole(units[place]) for place in places]).numpy()[:, places]
        np.testing.assert_allclose(
            block, block.T, atol=1e-12
        )  # every product with the kept derivative, not the first alone
        with curvatures(probe, CurvatureOptions(parameters=["part:v", "part:k"], **options)) as operators:
            both = operators.mean()
            at = both.size - 2 * DIM  # the bias's rows of keys and values, which alternate by head
            units = torch.eye(both.size, dtype=torch.float64)
            is_value = [at + number for number in range(2 * DIM) if (number // HEAD) % 2 == 1]
            rows = torch.stack([both(units[number]) for number in is_value]).numpy()[:, is_value]
        np.testing.assert_allclose(rows, block, rtol=1e-8, atol=1e-11)


def copies() -> list[nn.Module]:
    """Return one attention three times: fused, with a layer each, and PyTorch's own."""
    fused = built(Attention("shd"))
    state = fused.state_dict()
    models = [fused, built(Separate()), built(nn.MultiheadAttention(DIM, HEADS, batch_first=True))]
    shared = {name: value for name, value in state.items() if not name.startswith("attn.qkv")}
    chunks = {kind: state[f"attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")}
    separate = {f"attn.{n}.{kind}": chunks[kind][i] for i, n in enumerate(("q", "to_k", "to_v")) for kind in chunks}
    models[1].load_state_dict({**shared, **separate})
    own = {name.replace("attn.proj", "attn.out_proj"): value for name, value in shared.items()}
    models[2].load_state_dict(
        {**own, "attn.in_proj_weight": state["attn.qkv.weight"], "attn.in_proj_bias": state["attn.qkv.bias"]}
    )
    return models


def test_copies_of_one_attention_have_the_same_spectra() -> None:
    x, y = batch()
    for subset in ("part:q", "part:k", "part:v", "part:proj", ["part:q", "part:v"]):
        values = [
            vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=3, parameters=subset, tol=1e-9).eigenvalues
            for model in copies()
        ]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(values[2], values[0], rtol=1e-7, atol=1e-10)


def test_the_type_of_products_is_that_of_the_recorded_pass() -> None:
    model = built(Attention("hsd")).float()
    x, y = batch()
    probe = vs.Probe(model, [(x.float(), y)])
    values = [
        vs.hessian_eigenvalues(probe, k=1, parameters="part:k", dtype=dtype).eigenvalues for dtype in (None, "float64")
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3)  # the tolerance of the search
    assert model.get_parameter("attn.qkv.weight").dtype == torch.float32


class Encoder(nn.Module):
    """PyTorch's encoder layer over patches, the norms after the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 8, 8)
        self.layer = nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("name", ["timm", pytest.param("torch", marks=pytest.mark.slow)])
def test_measures_of_known_networks_take_parts(name: str) -> None:
    """The block of keys of a ViT of timm and of PyTorch's encoder layer, in every measure that takes ``parameters``."""
    torch.manual_seed(0)
    model = vit() if name == "timm" else Encoder().double().eval()
    attention = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"] if name == "timm" else ["layer.self_attn.in_proj"]
    separator = "." if name == "timm" else "_"
    x, y = batch(4, side=16)
    objective = Objective(weight_decay=0.05)
    probe = vs.Probe(model, [(x, y)], objective)
    rows = list(range(DIM, 2 * DIM))
    names = [f"{path}{separator}{kind}" for path in attention for kind in ("weight", "bias")]
    places = flat_rows(model, dict.fromkeys(names, rows))
    parameters = dict(model.named_parameters())

    def loss(block: Tensor) -> Tensor:
        point, at = {}, 0
        for key in names:
            whole = parameters[key].detach().clone()
            n = whole[rows].numel()
            point[key] = whole.index_copy(0, torch.tensor(rows), block[at : at + n].view_as(whole[rows]))
            at += n
        return F.cross_entropy(functional_call(model, point, (x,)), y)

    start = torch.cat([parameters[key].detach()[rows].reshape(-1) for key in names])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, start)
    assert isinstance(hessian, Tensor)
    block = hessian.numpy() + 0.05 * np.eye(len(places))
    expected = by_magnitude(block, 2)
    subset: dict[str, Any] = {"parameters": "part:k"}
    np.testing.assert_allclose(vs.hessian_eigenvalues(probe, k=2, tol=1e-9, **subset).eigenvalues, expected, rtol=1e-6)
    if name == "timm":
        batchwise = vs.hessian_max_eigenvalue_spectrum(probe, n_top=2, tol=1e-9, **subset)
        np.testing.assert_allclose(batchwise.eigenvalues[0], expected, rtol=1e-6)
        split = vs.rayleigh_split(probe, k=1, n_ends=0, tol=1e-9, **subset)
        np.testing.assert_allclose(split.eigenvalues, expected[:1], rtol=1e-6)
        np.testing.assert_allclose(split.mass, 1.0)
        card = vs.critical_point(probe, **subset).card
        assert card is not None
        assert card.parameters == "part:k"
        return
    largest = np.linalg.eigvalsh(block).max()
    density = vs.spectral_density(probe, n_vectors=1, n_steps=30, **subset)
    np.testing.assert_allclose(density.nodes.max(), largest, rtol=1e-6)
    trace = vs.hessian_trace(probe, method="hutch++", n_vectors=3 * len(places), **subset)
    np.testing.assert_allclose(trace.trace, np.trace(block), rtol=1e-7)
    preconditioned = vs.preconditioned_sharpness(probe, k=1, tol=1e-6, **subset)
    np.testing.assert_allclose(preconditioned.eigenvalues[0], largest, rtol=1e-4)
    assert vs.nep_stability(probe, **subset).card.parameters == "part:k"


def test_spectra_by_part() -> None:
    probe = vs.Probe(vit(1), [batch(2, side=16)])
    result = vs.hessian_by_kind(probe, by="part", n_top=1, tol=1e-3)
    assert result.groups == ("q", "k", "v", "proj", "mlp_in", "mlp_out")
    width, hidden = DIM, 4 * DIM
    attention, mlp_in, mlp_out = width * (width + 1), hidden * (width + 1), width * (hidden + 1)
    assert result.n_parameters.tolist() == [*[attention] * 4, mlp_in, mlp_out]
    values = vs.hessian_max_eigenvalue_spectrum(probe, n_top=1, tol=1e-3, parameters="part:v").eigenvalues
    assert result.eigenvalues[2].tolist() == values.tolist()
    assert result.card is not None
    assert result.card.parameters == "by part"
    with pytest.raises(ValueError, match="Expected a model with attention or MLPs for by='part'"):
        vs.hessian_by_kind(
            vs.Probe(timm.create_model("resnet10t", num_classes=3).double(), [batch(2, side=32)]), by="part"
        )
