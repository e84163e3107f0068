"""Fourier and Hessian by kind of timm's hybrid and hierarchical families, with kinds by rules of the parameters' names."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import timm
import torch

import vitscope as vs

#: model, options, and the names of the parameters of kind msa and mlp; those of other parameters are none of the two
MODELS = {
    "MaxViT": (
        "maxvit_rmlp_pico_rw_256", {"img_size": 64},
        r"\.(attn_block|attn_grid)\.(norm1|attn)\.", r"\.(attn_block|attn_grid)\.(norm2|mlp)\.",
    ),
    "Hiera": ("hiera_tiny_224", {"img_size": (64, 64)}, r"^blocks\.\d+\.(norm1|attn|proj)\.", r"^blocks\.\d+\.(norm2|mlp)\."),
    "PVT v2": ("pvt_v2_b0", {}, r"blocks\.\d+\.(norm1|attn)\.", r"blocks\.\d+\.(norm2|mlp)\.|^stages\.\d\.norm\."),
    "CAFormer": (
        "caformer_s18", {}, r"stages\.[23]\.blocks\.\d+\.(norm1|token_mixer|res_scale1)\.",
        r"blocks\.\d+\.(norm2|mlp|res_scale2)\.",
    ),
    "ConvNeXt V2": ("convnextv2_atto", {}, r"$^", r"$^"),
    "EfficientNet": ("efficientnet_b0", {}, r"$^", r"$^"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fourier_and_hessian_by_kind(name: str) -> None:
    model_name, options, msa, mlp = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(model_name, pretrained=False, num_classes=10, **options).eval()
    probe = vs.Probe(model, [(torch.randn(2, 3, 64, 64), torch.randint(10, (2,)))])
    sizes: dict[str, int] = {}
    for key, p in model.named_parameters():
        for kind, rule in (("msa", msa), ("mlp", mlp)):
            if re.search(rule, key):
                sizes[kind] = sizes.get(kind, 0) + p.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # maps of 2 x 2 positions, two images
        fourier = vs.relative_log_amplitude(probe)
        hessian = vs.hessian_by_kind(probe, n_top=1, tol=0.3)
    units = [unit.kind for unit in vs.structure(model).units]
    assert fourier.kinds == ("stem", *units)
    counts = dict(zip(hessian.groups, np.asarray(hessian.n_parameters).tolist()))
    assert {kind: counts[kind] for kind in counts if kind in ("msa", "mlp")} == sizes
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert np.isfinite(hessian.eigenvalues).all()
