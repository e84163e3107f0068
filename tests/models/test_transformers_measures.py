"""Measures of vision models of Hugging Face's transformers: forms of batches and outputs, numbers, parts of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs

pytest.importorskip("transformers")
from tests.fixtures.networks.transformers_models import FAMILIES, built, images
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian
from vitscope.core.guard.repeatability import UnusedParametersWarning
from vitscope.linalg.curvature.parameter_subsets import select_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use"),
    pytest.mark.filterwarnings("ignore:the outputs in eval mode do not depend on"),
    pytest.mark.filterwarnings("ignore:evaluation .*null for ece"),
]
LABELS = torch.tensor([0, 1, 2])
TINY: dict[str, dict[str, Any]] = {
    "dinov2_with_registers": {"hidden_size": 4, "num_hidden_layers": 1, "mlp_ratio": 1, "num_register_tokens": 2},
    "segformer": {
        "num_encoder_blocks": 1, "hidden_sizes": [4], "depths": [1], "num_attention_heads": [2], "mlp_ratios": [1],
        "sr_ratios": [2], "patch_sizes": [3], "strides": [2],
    },
}  # fmt: skip


class Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


@pytest.mark.parametrize("name", ["dinov2_with_registers", pytest.param("segformer", marks=pytest.mark.slow)])
def test_eigenvalues_are_those_of_the_explicit_hessian(name: str) -> None:
    model, x = built(name, **TINY[name]), images(name, side=8)
    for key, p in model.named_parameters():
        p.requires_grad_("mask_token" not in key)
    objective = vs.Objective(weight_decay=0.1, label_smoothing=0.1)
    hessian = dense_hessian(Logits(model), x, LABELS, objective)
    probe = vs.Probe(model, [{"pixel_values": x, "labels": LABELS}], objective)
    values = vs.hessian_eigenvalues(probe, k=3, tol=1e-8).eigenvalues
    assert values == pytest.approx(by_magnitude(np.linalg.eigvalsh(hessian), 3), rel=1e-7)
    names = [key for key, p in model.named_parameters() for _ in range(p.numel())]
    for part, word in (("v", "v_proj"), ("mlp_out", r"mlp.fc2|dense2")):
        selected = select_parameters(model, dict(model.named_parameters()), f"part:{part}", lambda: x)
        rows = [i for i, key in enumerate(names) if key in selected]
        assert rows
        assert all(any(w in names[i] for w in word.split("|")) for i in rows), {names[i] for i in rows}
        block = np.linalg.eigvalsh(hessian[np.ix_(rows, rows)])
        value = vs.hessian_eigenvalues(probe, k=1, tol=1e-8, parameters=f"part:{part}").eigenvalues
        assert value == pytest.approx(by_magnitude(block, 1), rel=1e-7)


@pytest.mark.parametrize("name", [
    "vit", "swin",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("beit", "swinv2", "dinov2", "segformer", "clip")),
])  # fmt: skip
def test_queries_keys_and_values_are_told_apart(name: str) -> None:
    model = built(name)
    named = dict(model.named_parameters())
    words = {
        "q": ("q_proj", "query", "q_bias"), "k": ("k_proj", "key"), "v": ("v_proj", "value", "v_bias"),
        "proj": ("o_proj", "out_proj", "attention.output.dense"),
    }  # fmt: skip
    kinds = vs.structure(model).parameter_kinds
    for part, options in words.items():
        selected = select_parameters(model, named, f"part:{part}", lambda: images(name))
        expected = {
            key
            for key in named
            if kinds[key] == "msa" and any(word in key.split(".", 1)[1] for word in options) and "position" not in key
        }
        assert expected
        assert set(selected) == expected
        assert all(selection.rows is None for selection in selected.values())


def test_forms_of_batches_and_outputs() -> None:
    model, x = built("vit"), images("vit")
    values = [
        vs.hessian_eigenvalues(vs.Probe(m, [batch], **options), k=1).eigenvalues
        for m, batch, options in (
            (Logits(model), (x, LABELS), {}),
            (model, (x, LABELS), {}),
            (model, {"pixel_values": x, "labels": LABELS}, {}),
            (model, {"pixel_values": x, "target": LABELS}, {"targets": "target", "output": "logits"}),
        )
    ]
    assert all(np.array_equal(value, values[0]) for value in values)
    tower = model.vit
    with pytest.raises(ValueError, match="received a BaseModelOutput.* with keys last_hidden_state.*output="):
        vs.hessian_eigenvalues(vs.Probe(tower, [(x, LABELS)]), k=1)
    pooled = vs.hessian_eigenvalues(vs.Probe(tower, [(x, LABELS)], output=lambda out: out.last_hidden_state[:, 0]), k=1)
    assert np.isfinite(pooled.eigenvalues).all()


def test_a_tower_whose_pooler_is_not_selected_is_measured() -> None:
    model, x = built("siglip"), images("siglip")
    probe = vs.Probe(model, [(x, LABELS)], output=lambda out: out.last_hidden_state.mean(1))
    with pytest.warns(UnusedParametersWarning, match=r"not depend on .*head\.probe"):
        assert np.isfinite(vs.hessian_eigenvalues(probe, k=1).eigenvalues).all()


def probe_of(name: str) -> vs.Probe:
    model, x = built(name), images(name)
    if name != "segmentation":
        return vs.Probe(model, [{"pixel_values": x, "labels": LABELS}])
    y = torch.randint(3, (3, 16, 16), generator=torch.Generator().manual_seed(2))
    y[1, :2] = -100

    def resized(out: Any) -> Tensor:
        return F.interpolate(out.logits, size=y.shape[1:], mode="bilinear")

    batch = {"pixel_values": x, "labels": y}
    return vs.Probe(model, [batch], vs.Objective(loss="dense_cross_entropy"), output=resized)


@pytest.mark.parametrize("name", ["dinov2_with_registers", "segmentation"])
@pytest.mark.filterwarnings("ignore:BatchNorm:UserWarning")  # random weights, new statistics
def test_fourier_hessian_and_landscape(name: str) -> None:
    probe = probe_of(name)
    n_units = sum(unit.residual for unit in vs.structure(probe.model).units)
    fourier = vs.relative_log_amplitude(probe)
    assert len(fourier.taps) == 1 + n_units + FAMILIES[name].n_stages - 1
    assert all(np.isfinite(np.asarray(values)).all() for values in fourier.log_amplitude)
    assert np.isfinite(vs.hessian_eigenvalues(probe, k=1).eigenvalues).all()
    landscape = vs.loss_landscape(probe, n=3, span=0.1)
    with torch.no_grad():
        model, (x, y) = probe.model, next(iter(probe.iter_batches()))
        logits = model(x).logits
        if name == "segmentation":
            logits = F.interpolate(logits, size=(16, 16), mode="bilinear")
        loss = F.cross_entropy(logits, y, ignore_index=-100)
    assert landscape.nll[1, 1] == pytest.approx(float(loss), rel=1e-10)
