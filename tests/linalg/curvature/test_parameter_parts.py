"""Queries, keys and values as subsets of parameters: which rows they are in every layout."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.attention_networks import (
    DIM,
    HEADS,
    Attention,
    Separate,
    batch,
    built,
    rows_of_order,
    vit,
)
from vitscope.linalg.curvature.attention_rows import attention_parts


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


def test_the_ways_into_and_out_of_mlps() -> None:
    probe = vs.Probe(vit(), [batch(2, side=16)])
    names = {
        part: vs.hessian_eigenvalues(probe, k=1, parameters=f"part:{part}").parameter_names
        for part in ("mlp_in", "mlp_out")
    }
    for part, layer in (("mlp_in", "fc1"), ("mlp_out", "fc2")):
        assert names[part] == tuple(f"blocks.{i}.mlp.{layer}.{kind}" for i in range(2) for kind in ("weight", "bias"))


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
