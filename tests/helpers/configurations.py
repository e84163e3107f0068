"""Composition of configurations in tests."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from vitscope.config import loading

CONF = loading.folder()


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=False)


def options(group: str) -> list[str]:
    return loading.options(group)
