"""Compose the configuration of a trial; its identity tells which trials share one training."""

from __future__ import annotations

from pathlib import Path

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import caps, composition, error_translation, hydra_internals, loading
from vitscope.reproduce.plan import Trial


def composed(trial: Trial, root: Path) -> DictConfig:
    """Return the trial's configuration with its sizes lowered to the profile's bounds.

    Args:
        trial: Trial to compose.
        root: The folder of runs.

    Raises:
        ConfigError: An override that does not compose.
    """
    always = [loading.path_override("paths.runs", root.absolute()), "skip_finished=true", "ckpt_path=auto"]
    composition.install()
    with hydra_internals.composing_from(str(loading.folder()), "reproduce"):
        try:
            cfg = compose("train", overrides=[*trial.overrides, *always])
        except (HydraException, OmegaConfBaseException) as error:
            raise error_translation.explain(error) or error from None
    loading.drop_unchosen(cfg)
    with open_dict(cfg):
        caps.apply_caps(cfg)
    return cfg


class Composer:
    """Composes trials; those that differ in their seed alone are composed once.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_settings: dict[tuple[str, ...], DictConfig] = {}

    def composed(self, trial: Trial) -> DictConfig:
        """Return the trial's configuration, see `composed`."""
        settings = tuple(override for override in trial.overrides if not override.startswith("seed="))
        seed = next((o.partition("=")[2] for o in trial.overrides if o.startswith("seed=")), None)
        if settings not in self._by_settings:
            self._by_settings[settings] = composed(trial, self.root)
        cfg = self._by_settings[settings]
        if seed is None or str(cfg.seed) == seed:
            return cfg
        other = cfg.copy()
        OmegaConf.update(other, "seed", int(seed))
        return other
