from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.resnet import BasicBlock

import vitscope as vs
from vitscope.core.undefined_values import NullWarning


def probe_of(model: torch.nn.Module, **options) -> vs.Probe:
    return vs.Probe(model, [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))], **options)


def test_table_of_an_alternet():
    model = vs.models.alternet(depth=18, num_classes=10, image_size=32, window_size=4)
    result = vs.tap_table(probe_of(model))
    expected = vs.taps(model)
    assert result.taps == tuple(tap.name for tap in expected)
    assert result.kinds.count("msa") == 3  # (0, 1, 1, 1)
    assert result.shapes[0].tolist() == [64, 32, 32]
    assert result.shapes[-1].tolist() == [512, 4, 4]
    assert result.scalars()["n_msa"] == 3.0
    lines = result.table().splitlines()
    assert lines[0].split() == ["tap", "kind", "stage", "depth", "map"]
    assert lines[1].split() == ["stem", "stem", "0", "0.000", "64x32x32"]
    assert len(lines) == 1 + len(expected)


def test_a_model_of_unknown_blocks_says_where_it_is_read():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten())
    result = vs.tap_table(probe_of(model))
    assert (result.taps, result.n_units) == (("0", "1"), 0)
    assert (
        result.table().splitlines()[-1].startswith("no residual unit is known in this model: maps are read after conv")
    )
    assert "taps=[vitscope.Tap(" in result.table()


def test_a_tap_that_is_never_reached_is_named():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    model(torch.zeros(1, 3, 32, 32))
    taps = [vs.Tap("conv", "conv", 1, 0.0, model[0]), vs.Tap("lost", "conv", 1, 1.0, torch.nn.Identity())]
    with pytest.warns(NullWarning, match=r"tap_table: null for lost \(not reached by the forward pass\)"):
        result = vs.tap_table(probe_of(model, taps=taps))
    np.testing.assert_array_equal(result.shapes, [[4, 32, 32], [0, 0, 0]])
    with pytest.raises(ValueError, match="at least one tap"):
        vs.tap_table(probe_of(model, taps=[]))


def test_figure_shows_side_channels_and_units():
    result = vs.tap_table(probe_of(vs.models.vit(size="tiny", patch_size=8, num_classes=4, image_size=32)))
    figure = vs.plot(result)
    assert [ax.get_ylabel() for ax in figure.axes] == ["Map side (positions)", "Channels", "Parameters of the unit"]
    np.testing.assert_array_equal(figure.axes[1].get_lines()[0].get_ydata(), result.shapes[:, 0])


def test_units_of_a_model():
    model = vs.models.timm_model("test_vit", num_classes=4, pretrained=False)
    probe = vs.Probe(model, [(torch.rand(1, 3, 160, 160), torch.zeros(1, dtype=torch.long))])
    result = vs.tap_table(probe)
    structure = vs.structure(model)
    assert result.units == tuple(unit.name for unit in structure.units)
    assert result.unit_kinds == tuple(unit.kind for unit in structure.units)
    assert result.scalars()["n_units"] == len(result.units) == result.scalars()["n_units_msa"] * 2
    owned = {name for unit in structure.units for name in unit.parameters}
    expected = sum(p.numel() for name, p in model.named_parameters() if name in owned)
    assert result.unit_parameters.sum() == expected
    lines = result.unit_table().splitlines()
    assert lines[0].split() == ["unit", "kind", "stage", "parameters", "branch"]
    n_parameters = sum(
        p.numel() for module in (model.blocks[0].norm1, model.blocks[0].attn) for p in module.parameters()
    )
    assert lines[1].split() == ["blocks.0.attn", "msa", "1", f"{n_parameters:,}", "residual"]
    frame = result.to_dataframe()
    rows = frame[frame.quantity == "unit_parameters"]
    assert list(rows.unit) == list(result.units)
    assert list(rows.value) == result.unit_parameters.tolist()


def test_attention_without_a_unit_is_listed():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), BasicBlock(8, 8))
            self.mixer = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            tokens = self.stem(x).flatten(2).mT
            return self.mixer(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    with pytest.warns(UserWarning, match="no map is read after attention module mixer"):
        result = vs.tap_table(probe_of(Pooled()))
    assert result.units == ("stem.1",)
    assert result.unit_table().splitlines()[-1] == f"not covered: {result.uncovered[0]}"
    assert "mixer" in result.uncovered[0]
