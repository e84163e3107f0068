"""Figures, tables and files of attention maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer

import vitscope as vs
from tests.fixtures.networks.attention_probes import filled, images, probe_of, vit
from tests.fixtures.oracles.result_checks import check_result
from vitscope.models import convnet
from vitscope.plotting.api import save_figure

pytestmark = pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")


@pytest.mark.slow
def test_figures_of_one_and_of_several_results(tmp_path: Path) -> None:
    x = images(16)
    one = vs.attention_maps(probe_of(filled(vit(depth=5)), x), images=3)
    figure = vs.plot(one)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["Image", *(f"blocks.{i}.attn" for i in (0, 1, 3, 4)), "Rollout", "Rollout\nof gradients"]
    shown = np.asarray(figure.axes[1].get_images()[1].get_array())
    mean = one.maps[0].mean(1)[0]
    np.testing.assert_allclose(shown, mean / mean.mean(), rtol=1e-12)
    assert all(ax.has_data() for ax in figure.axes)
    assert {path.suffix for path in save_figure(figure, tmp_path / "maps")} == {".png", ".pdf"}
    head = np.asarray(vs.plot(one, view="maps", head=2).axes[1].get_images()[1].get_array())
    np.testing.assert_allclose(head, one.maps[0][0, 2] / one.maps[0][0, 2].mean(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"head in 0 .. 2 of 'blocks.0.attn', received 3"):
        vs.plot(one, head=3)
    options: Any = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 6, "depths": (1,)}
    swin = vs.attention_maps(probe_of(filled(SwinTransformer(num_heads=(2,), num_classes=3, **options)), x), images=3)
    both = vs.plot({"ViT": one, "Swin": swin}, allow_different=True)
    titles = [ax.get_title() for ax in both.axes if ax.get_title()]
    assert titles == [
        "Image",
        *(f"ViT\n{name}\nquery: class" for name in ("blocks.4.attn", "Rollout")),
        "Swin\nlayers.0.blocks.0.\nattn\nquery: mean",
    ]
    same = vs.plot({"ViT": one, "other": one})
    assert [ax.get_title() for ax in same.axes if ax.get_title()][1] == "ViT\nblocks.4.attn"
    numbers = vs.plot({"ViT": one, "Swin": swin}, allow_different=True, view="numbers")
    labels = [ax.get_ylabel() for ax in numbers.axes]
    assert labels == ["Share on prefix tokens", "Entropy / ln(keys)", "IoU of masks"]
    line = next(line for line in numbers.axes[0].lines if line.get_linestyle() == "-")
    np.testing.assert_allclose(np.asarray(line.get_ydata()), one.sink_share.mean(1))
    with pytest.raises(ValueError, match="maps of images, received none"):
        vs.plot(vs.attention_maps(probe_of(filled(vit(depth=1)), x), images=0))


def test_the_result_has_a_table_a_file_and_a_text(tmp_path: Path) -> None:
    options: Any = {"embed_dims": (8,) * 4, "depths": (1,) * 4, "num_heads": (1, 2, 2, 2), "sr_ratios": (4, 2, 1, 1)}
    for model in (vit(), PyramidVisionTransformerV2(num_classes=3, **options)):
        check_result(
            vs.attention_maps(probe_of(filled(model), images(64 if hasattr(model, "stages") else 16))), tmp_path
        )


def test_a_result_without_attention_has_a_figure_and_a_file(tmp_path: Path) -> None:
    x = images(16)
    none = vs.attention_maps(probe_of(convnet(num_classes=3).double(), x), images=3)
    loaded = check_result(none, tmp_path)
    assert [text.get_text() for ax in vs.plot(loaded).axes for text in ax.texts] == ["No attention that can be read"]
    vit_maps = vs.attention_maps(probe_of(filled(vit()), x), images=3)
    figure = vs.plot({"ResNet": none, "ViT": vit_maps}, allow_different=True)
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["Image", "ViT\nblocks.1.attn", "ViT\nRollout"]
    labels = [text.get_text() for part in figure.subfigs for legend in part.legends for text in legend.get_texts()]
    assert labels[:2] == ["ResNet: no attention that can be read", "ViT"]
