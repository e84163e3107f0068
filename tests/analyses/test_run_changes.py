"""Changes of a run's network, images and files that a command makes name results of their own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import vitscope as vs
from vitscope.analyses import arguments, runner, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.run_changes import changed_values
from vitscope.config import factories

#: images that a test asks for
REQUEST = {"split": "test", "augment": False, "n_images": 12, "batch_size": 6}


def _config(**values: object) -> DictConfig:
    """Return a configuration of a ViT on a folder of images, with dotted values."""
    source = {"_target_": "vitscope.data.sources.folder.load"}
    cfg = OmegaConf.create({
        "model": {"_target_": "vitscope.models.vit", "heads": 3, "width": None, "grad_checkpointing": False},
        "data": {"root": "/images/a", "source": source, "name": "folder"},
        "objective": {"weight_decay": 0.0},
        "seed": 0,
    })  # fmt: skip
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def test_what_weights_and_names_do_not_tell_is_a_change() -> None:
    run = _config()
    assert changed_values(_config(), run) == {}
    assert changed_values(_config(model__heads=1), run) == {"model.heads": 1}
    assert changed_values(_config(data__root="/images/b"), run) == {"data.root": "/images/b"}
    assert changed_values(_config(data__root="/images/./a"), run) == {}
    # how gradients are stored, and a key that the run's version did not have
    assert changed_values(_config(model__grad_checkpointing=True, model__reg_tokens=None), run) == {}


@pytest.mark.parametrize("name", ["cifar.load", "photos.load", "photos.whole", "digits.load", "shapes.load"])
def test_images_that_are_the_same_everywhere_may_lie_in_another_folder(name: str) -> None:
    source = {"data__source___target_": f"vitscope.data.sources.{name}"}
    assert changed_values(_config(data__root="/elsewhere", **source), _config(**source)) == {}


def test_a_change_names_another_result_and_no_change_the_run_s_own(made: AnalysisContext) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "fourier"]
    own = runner.settings_hash(analysis, made)
    assert own == runner.settings_hash_under(analysis, made.cfg)
    names = {own} | {
        runner.settings_hash(analysis, dataclasses.replace(made, changes=changes))
        for changes in ({"model.heads": 1}, {"data.root": "/images/b"})
    }
    assert len(names) == 3


def test_the_card_names_another_folder(made: AnalysisContext) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "evaluation"]
    own = runner.perform(analysis, made, reuse=False)
    other = runner.perform(analysis, dataclasses.replace(made, changes={"data.root": "/images/b"}), reuse=False)
    assert own is not None
    assert other is not None
    assert (own.card.data, other.card.data) == ("shapes", "shapes, data.root=/images/b")
    assert (own.card.changes, other.card.changes) == ({}, {"data.root": "/images/b"})
    assert own.card.differences(other.card) == ["data", "changes"]


@pytest.mark.parametrize("option", ["other", "reference", "eigenvectors"])
def test_a_file_that_changes_names_another_result(made: AnalysisContext, tmp_path: Path, option: str) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "fourier"]
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "last.ckpt"
    folder = tmp_path if option == "other" else file
    analysis = spec.replaced(analysis, options={**analysis.options, option: str(folder)})
    names = set()
    for content in (b"one", b"two"):
        file.write_bytes(content)
        names.add(runner.settings_hash(analysis, made))
    assert len(names) == 2


def test_another_run_sees_the_images_as_it_was_trained_on_them(made: AnalysisContext, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made.run.path, folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.data.mean, cfg.data.std = [0.0, 0.1, 0.2], [1.0, 0.5, 0.25]
    OmegaConf.save(cfg, folder / "config.yaml")
    probe = factories.probe(made.cfg, made.network, made.datamodule, REQUEST)
    other = arguments.loaded("other", str(folder), probe, REQUEST, made)
    mean, std = (torch.tensor(probe.about[name])[:, None, None] for name in ("mean", "std"))
    own_mean, own_std = (torch.tensor(cfg.data[name])[:, None, None] for name in ("mean", "std"))
    for (x, y), (own, own_y) in zip(probe.iter_batches(), other.iter_batches(), strict=True):
        torch.testing.assert_close(own, (x * std + mean - own_mean) / own_std, rtol=0, atol=1e-5)  # float32 of up to 10
        assert torch.equal(y, own_y)
    assert other.about["mean"] == (0.0, 0.1, 0.2)
    result = vs.cka(probe, other)
    assert result.card is not None
    assert result.card.solver == {"images_of_other": "equal but for each channel's normalization"}


def test_another_run_of_the_same_processing_has_the_same_batches(made: AnalysisContext) -> None:
    probe = factories.probe(made.cfg, made.network, made.datamodule, REQUEST)
    other = arguments.loaded("other", str(made.run.path), probe, REQUEST, made)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(probe.iter_batches(), other.iter_batches(), strict=True))
    assert other.about["checkpoint"] != probe.about.get("checkpoint")


def test_a_seed_of_images_is_not_that_of_the_initial_weights(made: AnalysisContext) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "branch_transfer"]
    cfg = made.cfg.copy()
    cfg.seed = made.cfg.seed + 5
    place = dataclasses.replace(made, cfg=cfg)
    rows = cast(Any, None)
    initial = arguments.options(analysis, place, rows, str)["initial"]
    expected = factories.model(made.cfg).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in initial.state_dict().items())
