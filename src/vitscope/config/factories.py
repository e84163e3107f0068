"""From a composed configuration to live objects: the model, the data, the objective, a probe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from vitscope.config import instantiate, loading
from vitscope.config.loss import loss_choice
from vitscope.core.objective import Objective
from vitscope.core.optimizer_state import OptimizerState, of_checkpoint
from vitscope.core.probe import Probe
from vitscope.data.probe_batches import ProbeBatches
from vitscope.linalg.optimizer_stability import adam_scale
from vitscope.models.structure.declared_units import declare_units
from vitscope.runtime import errors, trusted_packages
from vitscope.runtime.errors import CheckpointError, ConfigError, DataError, StructureError, VitscopeError, first_line


def model(cfg: DictConfig) -> nn.Module:
    """Return the network that ``cfg.model`` describes, initialized from ``cfg.seed`` whatever was drawn before.

    Raises:
        ConfigError: Arguments that do not fit together, or a target that is not a module.
        DataError: Pretrained weights that cannot be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(cfg.seed))
        try:
            network = instantiate.instantiate(_at_own_size(cfg), "model", drop=loading.MODEL_HINTS)
            _give_shapes(network, cfg)
        except (OSError, ConnectionError) as error:
            raise DataError("model.pretrained", cfg.model.get("pretrained"), f"weights not fetched ({first_line(error)})",
                            "connect, or set model.pretrained=false") from error  # fmt: skip
        except VitscopeError:
            raise
        except Exception as error:  # of values that the signature did not tell from good ones
            if not cfg.model.get("pretrained"):
                place = trusted_packages.place_of(error)
                reason = f"{type(error).__name__}: {first_line(error)} ({place})" if place else first_line(error)
                raise ConfigError("model", cfg.model.get("name"), reason, "check its keys") from error
            raise DataError("model.pretrained", True, first_line(error), "set model.pretrained=false") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            "model._target_", cfg.model._target_, f"gives a {type(network).__name__}", "name an nn.Module"
        )
    if cfg.model.get("structure"):
        _declare_units(network, cfg)
    return network


@torch.no_grad()
def _give_shapes(network: Any, cfg: DictConfig) -> None:
    """Run a network with lazy layers on an empty image of the data's size, so that its parameters have shapes."""
    size = (cfg.get("data") or {}).get("image_size")
    is_lazy = isinstance(network, nn.Module) and any(
        isinstance(p, UninitializedParameter) for p in network.parameters()
    )
    if is_lazy and size:
        was_training = network.training
        network.eval()
        network(torch.zeros(1, 3, int(size), int(size)))
        network.train(was_training)


def _declare_units(network: nn.Module, cfg: DictConfig) -> None:
    """Let the network have the units that ``model.structure`` describes."""
    entries = loading.plain(cfg.model)["structure"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            "model.structure", None, "not a list of units", "write [{module: blocks.*.attn, kind: msa}, ...]"
        )
    try:
        declare_units(network, entries)
    except StructureError as error:
        raise ConfigError("model.structure", None, error.why, error.fix) from error
    except (TypeError, ValueError) as error:
        raise ConfigError("model.structure", None, first_line(error).rstrip("."), "correct the entry") from error


def _at_own_size(cfg: DictConfig) -> dict[str, Any]:
    """Return ``cfg.model``, a timm model at the size of its weights where the images take its preprocessing."""
    node = loading.plain(cfg.model)
    has_own_size = (cfg.get("data") or {}).get("transform") == "model" and node.get(
        "_target_"
    ) == "vitscope.models.timm_model"
    return {**node, "image_size": None} if has_own_size else node


def data(cfg: DictConfig) -> Any:
    """Return the data module that ``cfg.data`` describes."""
    return instantiate.instantiate(cfg.data, "data", drop=loading.DATA_HINTS)


def optimizer_builder(node: Mapping[str, Any], network: nn.Module) -> functools.partial[Optimizer]:
    """Return what builds the optimizer of a node from parameters; one with an argument ``network`` is given the network.

    Args:
        node: ``_target_`` and its arguments, without the schedule.
        network: The network whose parameters will be trained.
    """
    build = instantiate.instantiate({**node, "_partial_": True}, "optimizer")
    if "network" in inspect.signature(build.func).parameters:
        return functools.partial(build, network=network)
    return build


def named_objective(name: str) -> dict[str, Any]:
    """Return the values of ``conf/objective/<name>.yaml``.

    Raises:
        ConfigError: There is no such file.
    """
    names = loading.options("objective")
    if name not in names:
        raise ConfigError("probe.augment", name, "no such objective", errors.nearest(name, names))
    return loading.plain(OmegaConf.load(loading.folder() / "objective" / f"{name}.yaml"))


def objective(cfg: DictConfig, *, smoothing: float, scale: Mapping[str, Tensor] | None = None) -> Objective:
    """Return the objective of a probe: the L2 term is the run's, the smoothing that of the images' recipe."""
    node = cfg.objective
    if node.l2 == "adamw" and scale is None and node.weight_decay > 0:
        raise ConfigError("objective.l2", "adamw", "needs the second moments of a trained AdamW",
                          "analyze a run's checkpoint, or set objective.l2=half_sq")  # fmt: skip
    return Objective(
        weight_decay=float(node.weight_decay),
        l2=node.l2,
        label_smoothing=smoothing,
        loss=loss_choice.build(node),
        decay_scale=scale,
    )


def probe(
    cfg: DictConfig,
    network: nn.Module,
    datamodule: Any,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    content: Mapping[str, Any] | None = None,
) -> Probe:
    """Return the probe that an analysis asks for.

    Args:
        cfg: The run's configuration: objective and seed.
        network: The model to look at.
        datamodule: Data module that gives the batches.
        settings: ``split, augment, n_images, batch_size`` and optionally ``seed``; ``augment`` is whether to apply the run's
            training augmentation, or the name of the objective whose augmentation to apply whatever the run was trained with.
        facts: Further facts for the card: ``checkpoint``, ``epoch``.
        content: The checkpoint, for an objective that needs the optimizer's state.
    """
    settings = dict(settings)
    recipe: Mapping[Any, Any] = cfg.objective
    if isinstance(settings.get("augment"), str):
        recipe = named_objective(settings["augment"])
        datamodule, settings["augment"] = datamodule.augmented_as(recipe), True
    seed = settings.pop("seed", None)
    seed = int(cfg.seed if seed is None else seed)
    batches = datamodule.probe_batches(**settings, seed=seed)
    attributes = getattr(batches, "attributes", {})
    augment = bool(settings.get("augment", False))
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if isinstance(batches, ProbeBatches):
        batches = batches.cached(image_cache(cfg), device)
    elif device.type != "cpu":
        batches = _OnDevice(batches, device)
    soft = next(iter(batches))[1].ndim == 2
    scale = adamw_scale(network, content, cfg) if content is not None and cfg.objective.l2 == "adamw" else None
    about = {**datamodule.describe(settings["split"], augment), "mean": datamodule.mean, "std": datamodule.std,
             "num_classes": datamodule.num_classes, "class_names": datamodule.class_names,
             "present_classes": datamodule.present_classes(settings["split"]), "seed": seed,
             **attributes, **(facts or {})}  # fmt: skip
    # mixup has the smoothing inside its soft targets, clean images have none
    smoothing = float(recipe["label_smoothing"]) if augment and not soft else 0.0
    stated = objective(cfg, smoothing=smoothing, scale=scale)
    return Probe(network, batches, stated, about=about, optimizer=lambda: optimizer_state(network, content, cfg))


def image_cache(cfg: Mapping[str, Any]) -> str:
    """Return ``cfg.probe.cache``, see `vitscope.data.batch_cache`; ``auto`` for configurations without it."""
    return str((cfg.get("probe") or {}).get("cache") or "auto")


class _OnDevice:
    """Batches of another data module, moved to the model's device as they are gone through: only one is there at a time."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self):
        return ((x.to(self._device), y.to(self._device)) for x, y in self._batches)


def optimizer_state(
    network: nn.Module, content: Mapping[str, Any] | None, cfg: Mapping[str, Any] | None = None
) -> OptimizerState | None:
    """Return the optimizer that a checkpoint holds: its class, hyper-parameters by group and state; None where it holds none.

    Args:
        network: The network whose parameters it trains.
        content: The checkpoint.
        cfg: The run's configuration, which names the optimizer's class.

    Raises:
        CheckpointError: The state is not one that an optimizer writes.
    """
    saved = (content or {}).get("optimizer_states") or []
    if not saved:
        return None
    target = loading.plain((cfg or {}).get("optimizer")) if cfg is not None and cfg.get("optimizer") else None
    with _readable_state():
        if len(saved) > 1:
            return OptimizerState("optimizers", {}, f"{len(saved)} optimizers take turns")
        return of_checkpoint(saved[0], network, target)


def adamw_scale(
    network: nn.Module, content: Mapping[str, Any], cfg: Mapping[str, Any] | None = None
) -> dict[str, Tensor] | None:
    """Return sqrt(v) + eps of each parameter by name from a checkpoint's AdamW or Adam state, v corrected for its bias.

    None where the checkpoint holds no such state.

    Raises:
        CheckpointError: The state is not one that AdamW writes.
    """
    state = optimizer_state(network, content, cfg)
    if state is None:
        return None
    with _readable_state():
        return adam_scale(state)


@contextmanager
def _readable_state() -> Iterator[None]:
    """Turn what reading a damaged optimizer state raises into one line."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"its optimizer state is damaged ({type(error).__name__}: {first_line(error)})"
        raise CheckpointError("ckpt_path", None, reason, "use another checkpoint, or objective.l2=half_sq") from None
