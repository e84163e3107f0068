from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures.oracles import official_layout
from vitscope import models

REFERENCE = Path(__file__).parent / "reference"
ENTRIES = {
    **json.loads((REFERENCE / "official_logits.json").read_text()),
    **json.loads((REFERENCE / "timm054_logits.json").read_text()),
}
BUILD = {
    "resnet50_cifar": lambda: models.convnet(50),
    "alternet18_cifar_window4": lambda: models.alternet(18),
    "vit_ti_cifar": lambda: models.vit(),
    "pit_ti_cifar": lambda: models.pit(stride=1),
    "swin_ti_cifar": lambda: models.swin(),
}
TABLES = ("pos_embedding", "pos_embed", "token", "relative_position_bias_table")


def noise(i: int, shape: tuple[int, ...]) -> torch.Tensor:
    n = math.prod(shape)
    return torch.from_numpy(np.random.RandomState(1000 + i).uniform(-1, 1, n)).reshape(shape)


def generate(keys: list, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by the rule that the reference logits were computed with; masks and indices are the model's."""
    buffers = dict(model.named_buffers())
    state = {}
    for i, (name, shape) in enumerate(keys):
        t = noise(i, tuple(shape))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith(("attn_mask", "relative_position_index")):
            state[name] = buffers[name].clone()
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * t
        elif name.endswith("running_mean"):
            state[name] = 0.1 * t
        elif any(table in name for table in TABLES):
            state[name] = 0.5 * t
        elif t.ndim >= 2:
            state[name] = t * math.sqrt(3 / t[0].numel())
        else:
            state[name] = 1 + 0.1 * t if name.endswith("weight") else 0.1 * t
    return state


@pytest.mark.parametrize("name", ENTRIES)
def test_logits_equal_those_of_the_official_code(name: str) -> None:
    entry = ENTRIES[name]
    model = BUILD[name]().double().eval()
    assert sum(p.numel() for p in model.parameters()) == entry["n_params"]
    state = generate(entry["keys"], model)
    assert models.load_official_state_dict(model, {"state_dict": state}) is model
    if "logits" not in entry:  # Swin: every key found its place
        return
    with torch.no_grad():
        out = model(noise(-7, (2, 3, entry["input_size"], entry["input_size"])))
    assert (out - torch.tensor(entry["logits"], dtype=torch.float64)).abs().max() < 1e-6  # the files' precision is 1e-8


def test_the_oracle_itself_equals_the_official_code() -> None:
    for name in ("resnet50_cifar", "alternet18_cifar_window4"):
        entry = ENTRIES[name]
        kind, depth = ("resnet", 50) if name.startswith("resnet") else ("alternet", 18)
        n_msa = (0, 1, 1, 1) if kind == "alternet" else (0, 0, 0, 0)
        described = official_layout.keys(kind, depth, "cifar", n_msa, 4)
        assert {n: tuple(s) for n, s in described} == {n: tuple(s) for n, s in entry["keys"]}
        out = official_layout.logits(generate(entry["keys"], torch.nn.Module()), noise(-7, (2, 3, 32, 32)))
        assert (out - torch.tensor(entry["logits"], dtype=torch.float64)).abs().max() < 1e-6


def variants() -> list:
    found = []
    for stem, size in (("cifar", 32), ("imagenet", 64)):
        for depth in (18, 34, 50):
            slow = pytest.mark.slow if depth == 34 or (depth, stem) == (50, "imagenet") else ()
            found.append(pytest.param("resnet", depth, stem, size, 4, marks=slow))
            found.append(pytest.param("preresnet", depth, stem, size, 4, marks=slow))
            for window, image in ((4, 32), (7, 56)):
                marks = pytest.mark.slow if window == 7 and depth > 18 else slow
                image = 4 * image if stem == "imagenet" else image
                found.append(pytest.param("alternet", depth, stem, image, window, marks=marks))
    return found


@pytest.mark.parametrize(("kind", "depth", "stem", "size", "window"), variants())
def test_every_official_variant(kind: str, depth: int, stem: str, size: int, window: int) -> None:
    n_msa = {"alternet": (0, 1, 1, 1) if depth == 18 else (0, 1, 3, 2)}.get(kind, (0, 0, 0, 0))
    if kind == "alternet":
        model = models.alternet(depth, image_size=size, window_size=window, stem=stem)
    else:
        model = models.convnet(depth, stem=stem, preact=kind == "preresnet")
    model = model.double().eval()
    state = generate(official_layout.keys(kind, depth, stem, n_msa, window), model)
    x = noise(-7, (1, 3, size, size))
    models.load_official_state_dict(model, state)
    with torch.no_grad():
        assert (model(x) - official_layout.logits(state, x, window=window)).abs().max() < 1e-9  # rounding of float64


@pytest.mark.slow
def test_resnext_50() -> None:
    model = models.resnext(50).double().eval()
    state = generate(official_layout.keys("resnet", 50, "cifar", (0, 0, 0, 0), 4, groups=32), model)
    x = noise(-7, (1, 3, 16, 16))
    models.load_official_state_dict(model, state)
    with torch.no_grad():
        assert (model(x) - official_layout.logits(state, x, groups=32)).abs().max() < 1e-9


def test_a_key_too_many_or_too_few_is_an_error() -> None:
    model = models.alternet().double()
    state = generate(ENTRIES["alternet18_cifar_window4"]["keys"], model)
    with pytest.raises(ValueError, match=r"1 keys left over \['odd'\], 0 keys missing"):
        models.load_official_state_dict(model, {**state, "odd": torch.zeros(1)})
    del state["classifier.0.dense.bias"]
    with pytest.raises(ValueError, match=r"1 keys missing \['fc.bias'\]"):
        models.load_official_state_dict(model, state)


def test_a_missing_half_of_the_attention_weights_is_an_error() -> None:
    model = models.alternet().double()
    state = generate(ENTRIES["alternet18_cifar_window4"]["keys"], model)
    lonely = dict(state)
    del lonely["layer2.1.attn.attn.to_q.weight"]
    with pytest.raises(ValueError, match=r"stages.1.1.attn.qkv.weight"):
        models.load_official_state_dict(model, lonely)


def test_a_shape_that_differs_is_named_with_both_shapes() -> None:
    model = models.convnet(50, num_classes=100)
    state = generate(ENTRIES["resnet50_cifar"]["keys"], model)
    with pytest.raises(ValueError, match=r"fc.weight has shape \(10, 2048\).*needs \(100, 2048\)"):
        models.load_official_state_dict(model, state)


def test_computed_buffers_that_disagree_are_a_warning() -> None:
    model = models.swin().double()
    state = generate(ENTRIES["swin_ti_cifar"]["keys"], model)
    state["layers.0.blocks.1.attn_mask"] = state["layers.0.blocks.1.attn_mask"].flip(0)
    with pytest.warns(UserWarning, match=r"layers\.0\.blocks\.1\.attn_mask .* differs"):
        models.load_official_state_dict(model, state)


def test_todays_names_and_data_parallel_names_load_too() -> None:
    model, other = models.vit(depth=2, patch_size=8), models.vit(depth=2, patch_size=8)
    models.load_official_state_dict(other, {f"module.{k}": v for k, v in model.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
