"""Configurations that tests compose from kept files are those that Hydra composes from the files themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from tests.fixtures.configs import parsed_configurations
from vitscope.config import hydra_internals, loading


@pytest.fixture
def hydras_own() -> Iterator[None]:
    yield
    parsed_configurations.install()


def configuration(overrides: list[str]) -> DictConfig:
    with hydra_internals.composing_from(str(loading.folder())):
        return compose("train", overrides=overrides, return_hydra_config=True)


def nodes(cfg: Any, key: str = "") -> Iterator[tuple[Any, ...]]:
    """Yield the flags and types of a node and of those below it."""
    facts = cfg._metadata
    yield key, dict(facts.flags or {}), facts.object_type, facts.ref_type, facts.optional
    if isinstance(cfg, DictConfig) and not (cfg._is_none() or cfg._is_missing() or cfg._is_interpolation()):
        for name in cfg:
            yield from nodes(cfg._get_node(name), f"{key}.{name}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vit", "model.depth=1"],
        ["model=alternet", "optimizer=sgd", "analysis=[fourier,hessian]", "hydra.job.name=x"],
        ["profile=smoke", "+anything.of={a: 1}", "~trainer.max_epochs"],
    ],
)
def test_kept_files_compose_to_hydras_configuration(overrides: list[str], hydras_own: None) -> None:
    first, kept = configuration(overrides), configuration([*overrides, "seed=3"])
    kept.seed = first.seed
    kept.hydra.overrides.task.remove("seed=3")
    kept.hydra.job.override_dirname = first.hydra.job.override_dirname
    parsed_configurations.uninstall()
    expected = configuration(overrides)
    for cfg in (first, kept):
        assert OmegaConf.to_container(cfg) == OmegaConf.to_container(expected)
        assert list(nodes(cfg)) == list(nodes(expected))
