"""Ranges of numbers: read from the signatures that declare them, without importing what they belong to."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

import pytest
import yaml

from tests.fixtures.configs.configurations import composed
from vitscope.config import loading, target_allowlist
from vitscope.config.ranges import library_options, number_checks
from vitscope.config.ranges.source_signatures import argument_ranges
from vitscope.config.signature_checks import check_arguments
from vitscope.config.validation import validate_plain_values
from vitscope.core import lr_schedule
from vitscope.core.objective import Objective
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.value_ranges import ImageSize, PositiveInt, Seed, ValueRange, range_of


def targets(node: object) -> set[str]:
    """Return the ``_target_`` names of this package in a tree."""
    if isinstance(node, dict):
        own = {node["_target_"]} if str(node.get("_target_", "")).startswith("vitscope.") else set()
        return own.union(*map(targets, node.values()))
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


def configured_targets() -> list[str]:
    files = sorted(Path(loading.folder()).rglob("*.yaml"))
    names = set().union(*(targets(yaml.safe_load(file.read_text())) for file in files))
    return sorted(name for name in names if not name.startswith("vitscope.sweep."))


def imported_ranges(target: object) -> dict[str, ValueRange]:
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: value_range for name, hint in hints.items() if (value_range := range_of(hint)) is not None}


@pytest.mark.parametrize("name", configured_targets())
def test_the_source_declares_the_ranges_of_the_imported_signature(name: str) -> None:
    assert argument_ranges(name) == imported_ranges(target_allowlist.resolve(name, "model"))


def test_ranges_of_what_is_no_target() -> None:
    assert argument_ranges("vitscope.core.lr_schedule.factor") == imported_ranges(lr_schedule.factor)
    assert argument_ranges("vitscope.core.objective.Objective") == imported_ranges(Objective)
    assert set(argument_ranges("vitscope.core.objective.Objective")) == {"weight_decay", "label_smoothing"}


@pytest.mark.parametrize(
    "name",
    ["torch.optim.AdamW", "vitscope.nothing", "vitscope", "", "vitscope.models.nothing.vit", "vitscope...x", "a/b.c"],
)
def test_other_names_declare_no_range(name: str) -> None:
    assert argument_ranges(name) == {}


def test_a_range_is_found_in_unions_and_sequences() -> None:
    for hint in (PositiveInt, PositiveInt | None, tuple[PositiveInt, ...], ImageSize, ImageSize | None):
        value_range = range_of(hint)
        assert value_range is not None
        assert (value_range.contains(1), value_range.contains(0)) == (True, False)
    assert range_of(int | None) is None


#: a value at the end of each range, the value beyond it, and the range in words
ENDS = [
    ("trainer.max_epochs", "1", "0", "at least 1 (or -1 with trainer.max_steps)"),
    ("trainer.max_steps", "-1", "-2", "at least 1 (or -1 for none)"),
    ("trainer.limit_train_batches", "1.0", "1.5", "at least 1, or a share in (0.0, 1.0]"),
    ("trainer.limit_train_batches", "1", "0", "at least 1, or a share in (0.0, 1.0]"),
    ("trainer.limit_val_batches", "0", "-1", "at least 0, or a share in [0.0, 1.0]"),
    ("+trainer.val_check_interval", "0.5", "0.0", "at least 1, or a share in (0.0, 1.0]"),
    ("trainer.check_val_every_n_epoch", "1", "0", "at least 1"),
    ("trainer.num_nodes", "1", "0", "at least 1"),
    ("trainer.gradient_clip_val", "0", "-0.1", "at least 0"),
    ("trainer.accumulate_grad_batches", "1", "0", "at least 1"),
    ("trainer.log_every_n_steps", "0", "-1", "at least 0"),
    ("optimizer.lr", "1e-9", "0", "greater than 0"),
    ("+optimizer.momentum", "0", "1", "in [0, 1)"),
    ("optimizer.weight_decay", "0", "-1", "at least 0"),
    ("optimizer.schedule.gamma", "0", "-1", "at least 0"),
    ("optimizer.schedule.min_factor", "1", "1.1", "in [0, 1]"),
    ("objective.weight_decay", "0", "-1", "at least 0"),
    ("data.batch_size", "1", "0", "at least 1"),
    ("model.image_size", "1", "0", "at least 1"),
    ("model.num_classes", "1", "0", "at least 1"),
    ("data.fraction", "1", "0", "in (0, 1]"),
    ("data.num_workers", "0", "-1", "at least 0"),
    ("data.split_seed", "9223372036854775807", "9223372036854775808", "in 0 .. 2^63 - 1"),
    ("data.mixup", "0", "-1", "at least 0"),
    ("data.cutmix", "0", "-1", "at least 0"),
    ("data.switch_prob", "1", "-0.1", "in [0, 1]"),
    ("data.random_erasing", "1", "2", "in [0, 1]"),
    ("data.label_smoothing", "0", "1", "in [0, 1)"),
    ("seed", "0", "-1", "in 0 .. 2^63 - 1"),
    ("model.depth", "1", "0", "at least 1"),
    ("model.window_size", "1", "0", "at least 1"),
    ("model.dim_head", "1", "0", "at least 1"),
    ("model.drop_path", "0", "1", "in [0, 1)"),
    ("callbacks.checkpoint.every_n_epochs", "1", "0", "at least 1"),
    ("callbacks.checkpoint.warmup_epochs", "0", "-1", "at least 0"),
    ("analysis.hessian.n_top", "1", "0", "at least 1"),
    ("analysis.hessian.budget_s", "0.1", "0", "greater than 0"),
    ("analysis.hessian.probe.n_images", "1", "0", "at least 1"),
    ("analysis.hessian.probe.batch_size", "1", "0", "at least 1"),
    ("+analysis.hessian.probe.seed", "0", "-1", "in 0 .. 2^63 - 1"),
    ("analysis.hessian.when.every_n_epochs", "0", "-1", "at least 0"),
    ("analysis.landscape.n", "2", "1", "at least 2"),
    ("analysis.slice.n", "2", "1", "at least 2"),
    ("analysis.hessian.tol", "0.1", "1", "between 0 and 1"),
    ("analysis.hessian.max_products", "1", "0", "at least 1"),
    ("analysis.fourier.level", "0.5", "1", "between 0 and 1"),
    ("analysis.landscape.span", "0.1", "0", "greater than 0"),
    ("analysis.slice.n_directions", "1", "0", "at least 1"),
]


@pytest.mark.parametrize(("key", "inside", "outside", "expected"), ENDS, ids=[f"{end[0]}={end[2]}" for end in ENDS])
def test_a_number_outside_of_its_range_is_refused_by_the_check_that_imports_nothing(
    key: str, inside: str, outside: str, expected: str
) -> None:
    validate_plain_values(composed("train", f"{key}={inside}"))
    with pytest.raises(ConfigError) as caught:
        validate_plain_values(composed("train", f"{key}={outside}"))
    assert str(caught.value) == f"{key.lstrip('+')}={outside}: not {expected}; give a number that is {expected}"


@pytest.mark.parametrize(
    ("group", "node", "key"),
    [
        ("optimizer", {"schedule": {"warmup_epochs": -1}}, "optimizer.schedule.warmup_epochs"),
        ("data", {"recipe": {"warmup_epochs": -1}}, "data.recipe.warmup_epochs"),
        ("data", {"recipe": {"gradient_clip_val": -1}}, "data.recipe.gradient_clip_val"),
        ("data", {"_target_": "vitscope.data.DataModule", "image_size": -1}, "data.image_size"),
        (
            "data",
            {"source": {"_target_": "vitscope.data.sources.cifar.load", "split_seed": -1}},
            "data.source.split_seed",
        ),
    ],
)
def test_values_that_other_keys_take_over_are_checked_themselves(group: str, node: dict, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        number_checks.check_numbers({group: node})
    assert str(caught.value).startswith(f"{key}=-1: not ")


@pytest.mark.parametrize("source", ["cifar", "folder", "huggingface"])
def test_shares_that_are_held_out_are_shares(source: str) -> None:
    """``val_share=10`` would leave one training image of each class."""
    for key in ("val_share", "test_share") if source != "cifar" else ("val_share",):
        for value in (10, 1, -0.1):
            node = {"source": {"_target_": f"vitscope.data.sources.{source}.load", key: value}}
            with pytest.raises(ConfigError, match=rf"data.source.{key}={value}: not in \[0, 1\)"):
                number_checks.check_numbers({"data": node})


def test_items_of_a_list_are_checked_by_the_range_of_their_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.heads\.1=0: not at least 1; give a number that is at least 1$"):
        validate_plain_values(composed("train", "model.heads=[3,0,12,24]"))


def test_the_base_optimizer_of_sam_has_the_ranges_of_optimizers() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.base\.momentum=1: not in \[0, 1\)"):
        validate_plain_values(composed("train", "optimizer=sam", "+optimizer.base.momentum=1"))


def test_bounds_of_caps_and_numbers_without_a_range_need_only_be_finite() -> None:
    number_checks.check_numbers({"caps": {"n_images": 0}, "model": {"_target_": "mylab.Net", "depth": 0}})
    with pytest.raises(ConfigError, match=r"^model\.depth=nan: not a finite number; give a finite number$"):
        number_checks.check_numbers({"model": {"_target_": "mylab.Net", "depth": float("nan")}})


def test_a_function_of_another_package_may_declare_ranges() -> None:
    def network(width: PositiveInt, seeds: list[Seed], depth: int = 0) -> None: ...

    check_arguments("model", {"width": 1, "seeds": [0], "depth": 0}, network)
    with pytest.raises(ConfigError, match=r"^model\.width=0: not at least 1"):
        check_arguments("model", {"width": 0}, network)
    with pytest.raises(ConfigError, match=r"^model\.seeds\.1=-1: not in 0 \.\. 2\^63 - 1"):
        check_arguments("model", {"seeds": [0, -1]}, network)


@pytest.mark.parametrize("options", ["OptimizerOptions", "TrainerOptions"])
def test_options_of_libraries_are_options_of_theirs(options: str) -> None:
    import pytorch_lightning
    import torch

    kinds = {"OptimizerOptions": [torch.optim.SGD], "TrainerOptions": [pytorch_lightning.Trainer]}[options]
    accepted = set().union(*(inspect.signature(kind).parameters for kind in kinds))
    assert set(number_checks.field_ranges(getattr(library_options, options))) <= accepted
