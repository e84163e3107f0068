"""Queries, keys and values as subsets: which rows they are in every layout, and the Hessian's block that belongs to them."""

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
from tests.helpers.hessian_oracle import dense_hessian
from vitscope.core.objective import Objective
from vitscope.linalg.batched_lanczos import SideBySide
from vitscope.linalg.curvature.attention_rows import attention_parts
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import curvatures

DIM, HEADS = 8, 2
HEAD = DIM // HEADS


class Attention(nn.Module):
    """Attention over the tokens of a 4 x 4 map with a fused layer whose rows lie as ``order`` says.

    Args:
        order: axes of the fused output: three of ``s`` (which of q, k, v), ``h`` (head), ``d`` (width of a head).
        form: how scores are computed.
    """

    def __init__(self, order: str = "shd", form: str = "matmul") -> None:
        super().__init__()
        self.order, self.form = order, form
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> list[Tensor]:
        sizes = {"s": 3, "h": HEADS, "d": HEAD}
        x = self.qkv(x).reshape(*x.shape[:2], *(sizes[axis] for axis in self.order))
        x = x.permute(2 + self.order.index("s"), 0, 2 + self.order.index("h"), 1, 2 + self.order.index("d"))
        return list(x)  # each (B, heads, N, head)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.form == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "einsum":
            out = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        elif self.form == "transposed":  # scores (keys, queries), the softmax over rows
            out = (k @ q.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ v
        elif self.form == "masked":
            scores = q @ k.transpose(-2, -1)
            out = scores.masked_fill(torch.eye(scores.shape[-1]).bool(), float("-inf")).softmax(-1) @ v
        elif self.form == "normalized":
            q, k = F.layer_norm(q, (HEAD,)), F.normalize(k, dim=-1)
            out = F.softmax(q @ k.mT, dim=-1) @ v
        elif self.form == "channels":  # cross-covariance attention
            out = ((q.mT @ k).softmax(-1) @ v.mT).mT
        elif self.form == "linear":
            out = q.relu() @ (k.relu().mT @ v)
        elif self.form == "shared":  # values that are keys too
            out = F.scaled_dot_product_attention(q, k + v, v)
        else:
            out = torch.softmax(HEAD**-0.5 * (q @ k.transpose(-2, -1)), dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Separate(nn.Module):
    """Attention with a layer each; ``reduced`` gives keys and values one layer, after one before both."""

    def __init__(self, reduced: bool = False) -> None:
        super().__init__()
        self.q, self.proj, self.reduced = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), reduced
        if reduced:
            self.sr, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM, bias=False)
        else:
            self.to_k, self.to_v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(F.gelu(self.sr(x[:, ::2]))).chunk(2, -1) if self.reduced else (self.to_k(x), self.to_v(x))
        q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in (self.q(x), k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Network(nn.Module):
    """Tokens of patches, one attention in a residual connection, a classifier."""

    def __init__(self, attn: nn.Module, side: int = 8) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Conv2d(3, DIM, 2, 2), attn, nn.Linear(DIM, 3)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.attn(x, x, x)[0] if isinstance(self.attn, nn.MultiheadAttention) else self.attn(x)
        return self.head((x + y).mean(1))


def built(attn: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Network(attn).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return model


def batch(n: int = 3, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def rows_of_order(order: str) -> dict[str, list[int]]:
    """Return the rows of queries, keys and values of a fused weight, by counting through its axes."""
    sizes = {"s": 3, "h": HEADS, "d": HEAD}
    grid = np.arange(3 * DIM).reshape([sizes[axis] for axis in order])
    by_part = np.moveaxis(grid, order.index("s"), 0).reshape(3, -1)
    return {part: sorted(rows.tolist()) for part, rows in zip("qkv", by_part)}


@pytest.mark.parametrize(
    ("order", "form"),
    [("shd", "matmul"), ("hsd", "matmul"), ("hds", "matmul"), ("sdh", "matmul"), ("dsh", "sdpa"), ("shd", "sdpa"),
     ("hsd", "einsum"), ("shd", "transposed"), ("hsd", "masked"), ("hsd", "normalized"), ("hsd", "channels")],
)  # fmt: skip
def test_rows_of_a_fused_weight_in_every_layout(order: str, form: str) -> None:
    parts = attention_parts(built(Attention(order, form)), batch(1)[0])
    assert parts.unclear == {}
    for part, rows in rows_of_order(order).items():
        assert {name: r.tolist() for name, r in parts.rows[part].items()} == {
            "attn.qkv.weight": rows,
            "attn.qkv.bias": rows,
        }
    assert list(parts.rows["proj"]) == ["attn.proj.weight", "attn.proj.bias"]


def test_separate_and_partly_fused_layers() -> None:
    rows = attention_parts(built(Separate()), batch(1)[0]).rows
    assert [list(rows[part]) for part in "qkv"] == [
        [f"attn.{n}.weight", f"attn.{n}.bias"] for n in ("q", "to_k", "to_v")
    ]
    parts = attention_parts(built(Separate(reduced=True)), batch(1)[0])
    assert parts.unclear == {}  # the layer before keys and values is neither
    assert {part: {n: r.tolist() for n, r in parts.rows[part].items()} for part in "kv"} == {
        "k": {"attn.kv.weight": list(range(DIM))}, "v": {"attn.kv.weight": list(range(DIM, 2 * DIM))}
    }  # fmt: skip
    whole = attention_parts(built(nn.MultiheadAttention(DIM, HEADS, batch_first=True)), batch(1)[0]).rows
    assert (
        whole["k"]["attn.in_proj_weight"].tolist()
        == whole["k"]["attn.in_proj_bias"].tolist()
        == list(range(DIM, 2 * DIM))
    )
    assert list(whole["proj"]) == ["attn.out_proj.weight", "attn.out_proj.bias"]


class ScoresOfOneLayer(nn.Module):
    """Attention whose scores are the output of a layer, as in VOLO: there are no queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.v, self.proj = nn.Linear(DIM, 16), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.scores(x).softmax(-1) @ self.v(x))


@pytest.mark.parametrize(
    ("attn", "reason"),
    [
        (ScoresOfOneLayer(), "the scores' queries and keys, or the values, are not told apart"),
        (Attention("shd", "linear"), "it multiplies activations without a softmax"),
        (
            Attention("shd", "shared"),
            "some rows of attn.qkv.weight are none of queries, keys and values, or several of them",
        ),
    ],
)
def test_what_is_not_certain_is_refused_by_name(attn: nn.Module, reason: str) -> None:
    probe = vs.Probe(built(attn), [batch()])
    with pytest.raises(
        ValueError, match=f"certain for part:q, received 'attn': {reason}; choose parameters by layer:attn or"
    ):
        vs.hessian_eigenvalues(probe, k=1, parameters="part:q")


def test_other_refusals() -> None:
    probe = vs.Probe(built(Attention()), [batch()])
    with pytest.raises(
        ValueError, match="Expected a part to be one of q, k, v, proj, mlp_in, mlp_out, received 'part:query'"
    ):
        vs.hessian_eigenvalues(probe, k=1, parameters="part:query")
    plain = vs.Probe(built(nn.Linear(DIM, DIM)), [batch()])
    with pytest.raises(ValueError, match="Expected a model with attention .* for 'part:q', received one without"):
        vs.hessian_eigenvalues(plain, k=1, parameters="part:q")
    one_token = vs.Probe(built(Attention()), [batch(side=2)])
    with pytest.raises(ValueError, match="'attn': it has one key alone at this image size"):
        vs.hessian_eigenvalues(one_token, k=1, parameters="part:q")


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


def test_unions_with_parts_and_other_rules() -> None:
    probe = vs.Probe(built(Attention("hsd")), [batch()])
    for subset, names in (
        (["part:q", "part:k", "part:v"], ("attn.qkv.weight", "attn.qkv.bias")),
        (["part:v", "part:q"], ("attn.qkv.weight[q,v]", "attn.qkv.bias[q,v]")),
        (["part:q", "*.bias"], ("embed.bias", "attn.qkv.weight[q]", "attn.qkv.bias", "attn.proj.bias", "head.bias")),
        (["part:q", "layer:head"], ("attn.qkv.weight[q]", "attn.qkv.bias[q]", "head.weight", "head.bias")),
    ):
        result = vs.hessian_eigenvalues(probe, k=1, parameters=subset)
        assert result.parameter_names == names
        assert result.card is not None
        assert result.card.parameters == ", ".join(subset)


def vit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=DIM, num_heads=HEADS, depth=depth, num_classes=3
    )
    return model.double().eval()


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


def test_the_ways_into_and_out_of_mlps() -> None:
    probe = vs.Probe(vit(), [batch(2, side=16)])
    names = {
        part: vs.hessian_eigenvalues(probe, k=1, parameters=f"part:{part}").parameter_names
        for part in ("mlp_in", "mlp_out")
    }
    for part, layer in (("mlp_in", "fc1"), ("mlp_out", "fc2")):
        assert names[part] == tuple(f"blocks.{i}.mlp.{layer}.{kind}" for i in range(2) for kind in ("weight", "bias"))


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


#: networks of timm, and rows of one weight that are certain by their source code
TIMM = {
    "beit_base_patch16_224": (
        {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}, 32, "blocks.0.attn.q_bias", list(range(24)),
    ),
    "levit_128s": (
        {}, 224, "stages.0.blocks.0.attn.qkv.linear.weight", [64 * h + c for h in range(4) for c in range(16)],
    ),
    "pvt_v2_b0": ({}, 64, "stages.0.blocks.0.attn.q.weight", list(range(32))),
    "tnt_s_patch16_224": ({"depth": 1}, 224, "blocks.0.attn_in.qk.weight", list(range(24))),
    "cait_xxs24_224": ({"img_size": 32, "depth": 1}, 32, "blocks.0.attn.qkv.weight", list(range(192))),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_families_of_timm(name: str) -> None:
    options, side, weight, rows = TIMM[name]
    model = timm.create_model(name, num_classes=3, **options).eval()
    parts = attention_parts(model, torch.zeros(1, 3, side, side))
    assert parts.unclear == {}
    assert parts.rows["q"][weight].tolist() == rows
