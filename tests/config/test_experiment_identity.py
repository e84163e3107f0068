from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.fixtures.runs.report_runs import configuration
from vitscope.config import loading
from vitscope.config.experiment_identity import (
    EXPERIMENT_KEYS,
    INCIDENTAL,
    INCIDENTAL_TO_A_RUN,
    config_hash,
    experiment,
    identity,
    labels,
    setting,
    short_name,
)


def test_folders_of_images_of_other_names_are_other_experiments() -> None:
    """A sweep over folders, and ``skip_finished=true``, would take the run of one folder for that of the other."""

    def of(root: str, target: str = "vitscope.data.sources.folder.load") -> dict[str, Any]:
        source = {"_target_": target}
        groups: dict[str, Any] = {name: {} for name in ("model", "objective", "optimizer", "trainer", "callbacks")}
        return groups | {"data": {"name": "folder", "root": root, "source": source}, "seed": 0}

    one, copied, other = of("/images/a"), of("/tmp/job-17/a"), of("/images/b")
    assert config_hash(one) == config_hash(copied) != config_hash(other)
    assert identity(one) == identity(copied) != identity(other)
    assert "data.root" not in identity(
        of("/anywhere/folder")
    )  # as the data are called, and as earlier versions have it
    cifar = "vitscope.data.sources.cifar.load"
    assert config_hash(of("/images/a", cifar)) == config_hash(of("/images/b", cifar))
    assert identity(of("/images/a", cifar)) == identity(of("/images/b", cifar))
    own = [one | {"data": {"_target_": "mylab.Images", "root": root}} for root in ("/images/a", "/images/b")]
    assert config_hash(own[0]) != config_hash(own[1])


def test_seeds_and_machines_do_not_make_another_experiment() -> None:
    first = identity(configuration("vit", 0))
    assert first == identity(configuration("vit", 1, trainer__devices=4, data__root="elsewhere"))
    assert first != identity(configuration("vit", 0, optimizer__lr=2e-3))


@pytest.mark.parametrize(
    "change",
    [
        {"data__batch_size": 9}, {"data__random_labels": True}, {"data__split_seed": 1}, {"objective__mixup": 0.5},
        {"optimizer__weight_decay": 0.1}, {"trainer__precision": "bf16-mixed"}, {"trainer__gradient_clip_val": 1.0},
        {"trainer__accumulate_grad_batches": 2}, {"trainer__limit_train_batches": 2},
        {"callbacks__ema": {"decay": 0.9}}, {"model__drop_path": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_a_step_of_the_training_depends_on_makes_another_experiment(change: dict[str, Any]) -> None:
    assert identity(configuration("vit", 0)) != identity(configuration("vit", 0, **change))


def test_analyses_of_two_checkpoints_are_two_experiments() -> None:
    cfg, facts = configuration("vit", 0), {"command": "analyze"}
    one, other = (experiment({**cfg, "ckpt_path": path}, facts) for path in ("a.pth", "b.pth"))
    assert one != other
    assert one == experiment({**cfg, "ckpt_path": "a.pth", "seed": 1}, facts)


def test_a_setting_is_data_objective_and_length() -> None:
    vit, convnet = configuration("vit", 0), configuration("convnet", 3, optimizer__lr=0.1)
    assert setting(vit) == setting(convnet)
    assert setting(vit) != setting(configuration("vit", 0, trainer__max_epochs=4))
    assert setting(vit) != setting(configuration("vit", 0, trainer__max_steps=9))
    assert setting(vit) != setting(configuration("vit", 0, trainer__max_time="00:01:00:00"))
    assert setting(vit) != setting(configuration("vit", 0, data__batch_size=9))
    small = configuration("vit", 0, data__fraction=0.06)
    assert setting(vit) != setting(small)
    assert setting(vit, ["data.fraction"]) == setting(small, ["data.fraction"])


def test_names_say_what_differs_and_nothing_else() -> None:
    assert short_name(configuration("alternet", 0)) == "alternet-18"
    assert short_name(configuration("vit", 0)) == "vit-tiny"
    assert short_name({"model": {"_target_": "vitscope.models.timm_model", "name": "resnet50"}}) == "resnet50"
    assert short_name(configuration("vit", 0, model__width=64)) == "vit-w64"
    assert short_name(configuration("convnet", 0, model__width=8)) == "convnet-18-w8"
    named = labels({
        "a": configuration("alternet", 0), "b": configuration("vit", 0),
        "c": configuration("vit", 0, model__patch_size=4, data__fraction=0.06),
    })  # fmt: skip
    assert named["a"] == "alternet-18"
    assert named["b"] == "vit-tiny, patch_size 8, fraction 1"
    assert named["c"] == "vit-tiny, patch_size 4, fraction 0.06"


def test_what_most_share_goes_without_saying() -> None:
    changes = [{}, {"model__patch_size": 4}, {"data__fraction": 0.06},
               {"data__name": "digits", "data__num_classes": 10, "model__num_classes": 10}]  # fmt: skip
    named = labels({str(i): configuration("vit", 0, **change) for i, change in enumerate(changes)})
    assert named == {
        "0": "vit-tiny",
        "1": "vit-tiny, patch_size 4",
        "2": "vit-tiny, fraction 0.06",
        "3": "vit-tiny, digits",
    }


def test_a_training_of_steps_is_called_by_its_steps() -> None:
    steps = {"trainer__max_steps": 469, "trainer__max_epochs": -1}
    named = labels({str(i): configuration("vit", 0, **change) for i, change in enumerate([{}, {}, steps])})
    assert named["2"] == "vit-tiny, max_steps 469"
    both = {"trainer__max_steps": 469, "trainer__max_epochs": 2}
    named = labels({str(i): configuration("vit", 0, **change) for i, change in enumerate([{}, {}, both])})
    assert named["2"] == "vit-tiny, max_epochs 2, max_steps 469"


def test_an_objective_of_the_package_is_called_by_its_name() -> None:
    stated = {
        name: OmegaConf.to_container(OmegaConf.load(loading.folder() / "objective" / f"{name}.yaml"))
        for name in ("weak", "strong")
    }
    weak, strong = ({**configuration("vit", 0), "objective": objective} for objective in stated.values())
    assert labels({"a": weak, "b": strong}) == {"a": "vit-tiny, objective weak", "b": "vit-tiny, objective strong"}
    own = {**weak, "objective": {**weak["objective"], "weight_decay": 0.07}}
    assert labels({"a": weak, "b": own}) == {"a": "vit-tiny, weight_decay 0.05", "b": "vit-tiny, weight_decay 0.07"}


def test_names_that_run_out_of_keys_are_numbered() -> None:
    changes = [{"model__patch_size": p, "model__depth": d, "data__fraction": f, "optimizer__lr": lr}
               for p, d, f, lr in ((2, 1, 0.1, 0.1), (4, 2, 0.2, 0.1), (2, 1, 0.1, 0.2), (4, 2, 0.2, 0.2))]  # fmt: skip
    named = labels({str(i): configuration("vit", 0, **change) for i, change in enumerate(changes)})
    assert len(set(named.values())) == 4
    assert named["2"] == named["0"] + ", no. 2"


@pytest.mark.parametrize("key", ["compile", "channels_last"])
def test_hash_and_identity_agree_on_switches(key: str) -> None:
    off, on = configuration("vit", 0), {**configuration("vit", 0), key: True}
    assert identity(off) == identity({**off, key: False})
    assert identity(off) != identity(on)
    assert config_hash(OmegaConf.create(off)) != config_hash(OmegaConf.create(on))


def test_runs_from_before_synchronized_batch_statistics_keep_their_identity() -> None:
    base = configuration("vit", 0)
    off, on = ({**base, "trainer": {**base["trainer"], "sync_batchnorm": value}} for value in (False, True))
    assert identity(off) == identity(base)
    assert config_hash(OmegaConf.create(off)) == config_hash(OmegaConf.create(base))
    assert identity(on) != identity(base)
    assert config_hash(OmegaConf.create(on)) != config_hash(OmegaConf.create(base))


@pytest.mark.parametrize("key", ["model.width", "optimizer.schedule.warmup_steps"])
def test_a_null_of_a_key_that_was_added_later_changes_neither_hash_nor_identity(key: str) -> None:
    """Runs that were made before the key are found by ``skip_finished=true``, and averaged with new ones."""
    base = configuration("vit", 0, optimizer__schedule={"warmup_epochs": 5})
    null, given = (
        OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist([f"{key}={value}"])))
        for value in ("null", 7)
    )
    for digest_of in (config_hash, identity):
        assert digest_of(null) == digest_of(base) != digest_of(given)


def test_every_key_of_an_experiment_changes_hash_and_identity() -> None:
    base = configuration("vit", 0)
    for key in EXPERIMENT_KEYS:
        node = base.get(key)
        changed = {**base, key: {**node, "marker": 1} if isinstance(node, dict) else True}
        assert config_hash(OmegaConf.create(changed)) != config_hash(OmegaConf.create(base)), key
        assert identity(changed) != identity(base), key


def test_what_may_change_in_a_run_may_differ_in_an_experiment() -> None:
    assert set(INCIDENTAL_TO_A_RUN) <= set(INCIDENTAL)
    base = configuration("vit", 0)
    for dotted in INCIDENTAL_TO_A_RUN:
        group, _, key = dotted.partition(".")
        changed = {**base, group: {**(base.get(group) or {}), key: "other"}}
        assert config_hash(OmegaConf.create(changed)) == config_hash(OmegaConf.create(base)), dotted
        assert identity(changed) == identity(base), dotted


def test_hash_of_a_configuration_is_stable() -> None:
    """Runs on disk are found by it: a change here makes every earlier run another experiment."""
    cfg = {"model": {"depth": 1}, "data": {"name": "digits", "root": "x"}, "objective": {}, "optimizer": {"lr": 0.1},
           "trainer": {"max_epochs": 1, "logger": None}, "callbacks": {}, "compile": False, "seed": 0}  # fmt: skip
    assert config_hash(OmegaConf.create(cfg)) == "1c1ec66218833fe9"
