"""Classes that a file of weights numbers otherwise than the folder of the data, and ranges of mean and standard deviation."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vitscope.config.cross_checks import check_class_order
from vitscope.data import range_checks
from vitscope.data.sources import folder
from vitscope.runtime.errors import ConfigError


def cfg_of(root: Path, *names: str, classes: list[str] | None = None) -> DictConfig:
    for name in names:
        (root / "train" / name).mkdir(parents=True)
    source = {"_target_": "vitscope.data.sources.folder.load", "classes": classes}
    return OmegaConf.create({"data": {"root": str(root), "source": source}})


@pytest.mark.parametrize(
    "content", [{"class_to_idx": {"cat": 0, "ant": 1, "bee": 2}}, {"classes": ["cat", "ant", "bee"]}]
)
def test_the_same_classes_in_another_order_are_refused(tmp_path: Path, content: dict) -> None:
    cfg = cfg_of(tmp_path, "ant", "bee", "cat")
    with pytest.raises(ConfigError, match="class 0 is ant in the data and cat in w.pth.*classes=\\[cat,ant,bee\\]"):
        check_class_order(cfg, content, "w.pth")
    check_class_order(cfg_of(tmp_path, classes=["cat", "ant", "bee"]), content, "w.pth")


def test_the_same_order_other_names_and_no_names_pass(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "ant", "bee", "cat")
    for content in ({}, {"classes": 3}, {"classes": ["ant", "bee", "cat"]}, {"class_to_idx": {"x": 0, "y": 1, "z": 2}}):
        check_class_order(cfg, content, "w.pth")


def test_numbered_folders_in_alphabetic_order_are_noted(tmp_path: Path, caplog) -> None:
    cfg_of(tmp_path, *(str(i) for i in range(1, 11)))
    with caplog.at_level("INFO"):
        assert folder.class_names(tmp_path)[:3] == ("1", "10", "2")
    assert "label 1 is folder 10" in caplog.text
    caplog.clear()
    cfg_of(tmp_path / "other", "01", "02", "10")
    with caplog.at_level("INFO"):
        folder.class_names(tmp_path / "other")
    assert not caplog.records


def test_statistics_of_pixels_up_to_255_are_refused() -> None:
    with pytest.raises(ConfigError, match="not in \\[0, 1\\].*divide by 255: \\[0.4851, 0.4561, 0.4059\\]"):
        range_checks.channels("data.mean", [123.7, 116.3, 103.5], positive=False)
    assert range_checks.channels("data.std", [1.0, 1.0, 1.0], positive=True) == (1.0, 1.0, 1.0)
