"""Relations between configuration keys that no signature knows: what one group says must fit what another says.

Numbers of classes that are not given follow from the data: ``data.num_classes`` from its folder, ``model.num_classes`` from
the data or, for a network of another package, from its checkpoint.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vitscope.config import loading, target_allowlist
from vitscope.runtime import errors, trusted_packages
from vitscope.runtime.errors import ConfigError

#: metrics of the validation that a checkpoint may follow
METRICS = tuple(f"val/{name}" for name in ("loss", "nll", "accuracy", "accuracy_top5", "ece", "brier"))

#: metrics of probabilities: they take outputs for logits of a softmax, which is right for the cross entropy alone
OF_PROBABILITIES = ("nll", "ece", "brier")

#: metrics that other callbacks may follow too
TRAINING_METRICS = ("train/loss", "train/accuracy")

#: arguments that vitscope itself passes to Lightning's Trainer; a value in the configuration would have no effect
SUPPLIED_TO_TRAINER = (
    "logger", "callbacks", "plugins", "default_root_dir", "enable_model_summary", "enable_checkpointing",
    "use_distributed_sampler", "num_sanity_val_steps",
)  # fmt: skip

#: options of the Trainer that switch off the journal or train on other images than the configuration says
REFUSED_OF_TRAINER = {
    "fast_dev_run": "it switches the metrics log and checkpoints off; use caps=smoke",
    "barebones": "it switches the metrics log and checkpoints off; use caps=smoke",
    "overfit_batches": "it replaces the loaders; use data.fraction or trainer.limit_train_batches",
    "reload_dataloaders_every_n_epochs": "a resumed run would not repeat it; leave it out",
}


#: the strategy of ``conf/trainer/fsdp.yaml``, and the precisions that Lightning takes with it
_FSDP = "vitscope.training.sharding.fsdp_strategy.Fsdp"
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")

#: the sources of data whose number of classes is known without reading the images
_FOLDER = "vitscope.data.sources.folder.load"
_TABLE = "vitscope.data.sources.huggingface.load"
#: packages whose functions pass ``num_classes`` on to a class by ``**kwargs``
_PASSING_ON = ("torchvision.models.", "timm.models.")


def with_known_counts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration in which numbers of classes that follow from a folder are some number of classes.

    They are counted after the rest has been checked, see `settle_class_counts`.
    """
    if not _is_counted(tree):
        return dict(tree)
    model, data = tree.get("model"), tree["data"]
    stated_count = model.get("num_classes") if isinstance(model, Mapping) else None
    count = stated_count if type(stated_count) is int and stated_count > 0 else 1
    counted = {**tree, "data": {**data, "num_classes": count}}
    if isinstance(model, Mapping) and "num_classes" in model and stated_count is None:
        counted["model"] = {**model, "num_classes": count}
    return counted


def settle_class_counts(cfg: DictConfig) -> None:
    """Set ``data.num_classes`` in place to the number of classes of its folder where it is null.

    Args:
        cfg: A configuration that has passed `check`.

    Raises:
        ConfigError: ``model.num_classes`` is another number.
        DataError: The folder is missing or has no class folders.
    """
    if not _is_counted(cfg):
        return
    from vitscope.data.sources import folder, huggingface  # import torch

    source, root = cfg.data.source, cfg.data.get("root")
    if source.get("_target_") == _TABLE:
        options = {key: source.get(key) for key in ("subset", "version", "label_column")}
        names = huggingface.class_names(source.get("name"), root, **options)
    else:
        classes: Any = source.get("classes")
        names = folder.class_names(root, loading.plain(classes) if OmegaConf.is_list(classes) else classes)
    with open_dict(cfg):
        cfg.data.num_classes = len(names)
    stated = cfg.model.get("num_classes")
    if stated is not None and stated != len(names):
        place = f"data.name={cfg.data.get('name')}" if source.get("_target_") == _TABLE else f"data.root={root}"
        reason = f"{place} has {len(names)} classes"
        raise ConfigError(
            "model.num_classes", stated, reason, "leave it out, or name all classes in data.source.classes=[...]"
        )


def check_class_order(cfg: DictConfig, content: Mapping[str, Any], path: Any) -> None:
    """Check that a file of weights that names its classes numbers them as the data does.

    Training scripts save ``class_to_idx`` (torchvision's ``ImageFolder``) or ``classes`` beside the weights. Names of other
    classes than the data's say nothing of their order.

    Args:
        cfg: A configuration whose number of classes is settled.
        content: Contents of the file.
        path: The file, for the error.

    Raises:
        ConfigError: The same names in another order.
    """
    source = (cfg.get("data") or {}).get("source") or {}
    numbers, names = content.get("class_to_idx"), content.get("classes") or content.get("class_names")
    if isinstance(numbers, Mapping) and all(type(number) is int for number in numbers.values()):
        names = sorted(numbers, key=lambda name: numbers[name])
    if source.get("_target_") != _FOLDER or not isinstance(names, list | tuple):
        return
    from vitscope.data.sources import folder  # imports torch

    classes: Any = source.get("classes")
    own_names = folder.class_names(
        cfg.data.get("root"), loading.plain(classes) if OmegaConf.is_list(classes) else classes
    )
    stored_names = [str(name) for name in names]
    if sorted(stored_names) == sorted(own_names) and stored_names != list(own_names):
        differing = next(i for i, pair in enumerate(zip(stored_names, own_names)) if pair[0] != pair[1])
        reason = f"class {differing} is {own_names[differing]} in the data and {stored_names[differing]} in {path}"
        order = ",".join(stored_names) if len(stored_names) <= 20 else f"{stored_names[0]},{stored_names[1]},..."
        fix = f"set data.source.classes=[{order}], the order of the file"
        raise ConfigError("data.source.classes", None, reason, fix)


def source_of_class_count(cfg: DictConfig) -> str:
    """Return where the number of classes of the data comes from, for errors: its folder, its list or its key."""
    data = cfg.get("data") or {}
    source = data.get("source") or {}
    if source.get("_target_") != _FOLDER:
        return f"data.num_classes is {data.get('num_classes')}"
    if source.get("classes") is not None:
        return f"data.source.classes names {data.get('num_classes')}"
    return f"data.root={data.get('root')} has {data.get('num_classes')} class folders"


def settle_own_network(cfg: DictConfig, count: int | None = None) -> bool:
    """Set ``model.num_classes`` in place for a network of another package that takes it and is not told it.

    Args:
        cfg: A validated configuration.
        count: The number of classes; None for that of the data, unless pretrained weights decide it.

    Returns:
        Whether it was set.
    """
    node, target = cfg.model, str(cfg.model.get("_target_"))
    if "num_classes" in node or target.startswith("vitscope."):
        return False
    if count is None and any(node.get(key) for key in ("weights", "pretrained")):
        return False
    builder = target_allowlist.resolve(target, "model")
    if "num_classes" not in inspect.signature(builder).parameters and not builder.__module__.startswith(_PASSING_ON):
        return False
    with open_dict(cfg):
        cfg.model.num_classes = int(cfg.data.num_classes) if count is None else count
    return True


def _is_counted(tree: Mapping[str, Any]) -> bool:
    """Tell whether the number of classes is that of a folder, or of a table's column."""
    data = tree.get("data")
    if not isinstance(data, Mapping | DictConfig) or data.get("num_classes") is not None or "num_classes" not in data:
        return False
    source = data.get("source")
    return isinstance(source, Mapping | DictConfig) and source.get("_target_") in (_FOLDER, _TABLE)


def check(tree: Mapping[str, Any]) -> None:
    """Check a resolved configuration.

    Raises:
        ConfigError: Naming the keys that do not fit.
    """
    model, data = tree.get("model") or {}, tree.get("data") or {}
    _check_model(model, data)
    _check_monitors(tree.get("callbacks") or {}, (tree.get("objective") or {}).get("loss", loading.DEFAULT_LOSS))
    _check_averages(tree.get("callbacks") or {})
    _check_trainer(tree.get("trainer") or {})
    _check_sam(tree.get("optimizer") or {}, tree.get("trainer") or {})
    _check_sharded_training(tree)
    for name in (*(tree.get("analysis") or {}), *(tree.get("callbacks") or {})):
        if not re.fullmatch(r"[\w-]{1,100}", str(name)):  # it names a folder of the run
            raise ConfigError("analysis", repr(name), "not a name of letters, digits, - and _", "rename it")


def _check_model(model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    size = data.get("image_size")
    for key in ("num_classes", "image_size"):
        if key in model and key in data and model[key] is not None and model[key] != data[key]:
            raise ConfigError(f"model.{key}", model[key], f"data.{key} is {data[key]}", "make them equal")
    if model.get("in_chans", 3) != 3:
        raise ConfigError("model.in_chans", model["in_chans"], "data give 3 channels", "set model.in_chans=3")
    patch = model.get("patch_size")
    if isinstance(patch, int) and isinstance(size, int) and size % patch:
        good = ", ".join(str(p) for p in range(1, size // 2 + 1) if size % p == 0)
        raise ConfigError("model.patch_size", patch, f"does not divide data.image_size={size}", f"choose from {good}")
    _check_window(model, size)


def _check_window(model: Mapping[str, Any], size: Any) -> None:
    if model.get("_target_") != "vitscope.models.alternet" or model.get("pad") or not isinstance(size, int):
        return
    from vitscope.models.alternet import valid_window_sizes

    good = valid_window_sizes(size, model.get("stem", "cifar"))
    if model.get("window_size") not in good:
        raise ConfigError("model.window_size", model.get("window_size"), f"does not divide the maps at data.image_size={size}",
                          f"choose from {', '.join(map(str, good))}, or set model.pad=true")  # fmt: skip


def _check_monitors(callbacks: Mapping[str, Any], loss: Any) -> None:
    has_own_callback = any(trusted_packages.is_trusted(str(node.get("_target_"))) for node in callbacks.values())
    for name, node in callbacks.items():
        if "monitor" not in node:
            continue
        monitor = node["monitor"]
        if has_own_callback and str(monitor).startswith("val/"):
            continue  # which it may log; a name that nothing logs is refused at the end of the first epoch
        metrics = METRICS if name == "checkpoint" else (*METRICS, *TRAINING_METRICS)
        if loss != loading.DEFAULT_LOSS:  # whose outputs are no logits of a softmax
            metrics = tuple(m for m in metrics if m.rpartition("/")[2] not in OF_PROBABILITIES)
        if monitor not in metrics and not (monitor is None and name != "checkpoint"):
            key = f"callbacks.{name}.monitor"
            raise ConfigError(key, monitor, "no such metric", errors.nearest(str(monitor), metrics))


def _check_averages(callbacks: Mapping[str, Any]) -> None:
    """Refuse Lightning's SWA, which puts its average into the network after the last checkpoint is written."""
    for name, node in callbacks.items():
        if str(node.get("_target_", "")).endswith(".StochasticWeightAveraging"):
            reason, fix = (
                "its average is tested and is in no checkpoint",
                "use callbacks=[checkpoint,ema], whose average is saved",
            )
            raise ConfigError(f"callbacks.{name}", node["_target_"], reason, fix)


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    if trainer.get("max_epochs") == -1 and trainer.get("max_steps", -1) == -1 and trainer.get("max_time") is None:
        raise ConfigError("trainer.max_epochs", -1, "training would never end", "set trainer.max_steps")
    for key in SUPPLIED_TO_TRAINER:
        if key in trainer:
            raise ConfigError(f"trainer.{key}", "...", "vitscope supplies it", "leave it out")
    for key, reason_and_fix in REFUSED_OF_TRAINER.items():
        if trainer.get(key):
            reason, fix = reason_and_fix.split("; ")
            raise ConfigError(f"trainer.{key}", trainer[key], reason, fix)


def check_schedule_length(cfg: Mapping[str, Any]) -> None:
    """Refuse a cosine in a new training that only its time ends: the number of steps is not known, and the rate would never fall.

    Args:
        cfg: A validated configuration of a training.

    Raises:
        ConfigError: Naming the schedule.
    """
    optimizer, trainer = cfg["optimizer"], cfg["trainer"]
    has_length = any(trainer.get(key) not in (None, -1) for key in ("max_epochs", "max_steps"))
    kind = (optimizer.get("schedule") or {}).get("kind", "cosine")
    if kind == "cosine" and trainer.get("max_time") is not None and not has_length:
        reason = "a cosine schedule needs the number of steps, which trainer.max_time alone does not give"
        fix = "set trainer.max_epochs=100 or trainer.max_steps=10000 beside it, or optimizer.schedule.kind=constant"
        raise ConfigError("optimizer.schedule.kind", kind, reason, fix)


def _check_sam(optimizer: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    if "rho" not in optimizer:
        return
    if trainer.get("precision") in ("16-mixed", "16", 16):
        raise ConfigError("trainer.precision", trainer["precision"], "SAM does not work with the gradient scaling of fp16",
                          "use bf16-mixed or 32-true")  # fmt: skip
    if trainer.get("precision") in ("16-true", "bf16-true"):
        reason = "SAM's ascent has the length rho over all weights, and is lost in the rounding of half-precision ones"
        raise ConfigError("trainer.precision", trainer["precision"], reason, "use bf16-mixed or 32-true")


def _check_sharded_training(tree: Mapping[str, Any]) -> None:
    """Refuse what needs whole weights on every process, or what Lightning's strategy does not know."""
    trainer = tree.get("trainer") or {}
    strategy = trainer.get("strategy")
    if not isinstance(strategy, Mapping) or strategy.get("_target_") != _FSDP:
        return
    if trainer.get("precision") not in _SHARDED_PRECISIONS:
        fix = f"use {', '.join(_SHARDED_PRECISIONS)}"
        raise ConfigError("trainer.precision", trainer.get("precision"), "trainer=fsdp does not take it", fix)
    optimizer = tree.get("optimizer") or {}
    if "rho" in optimizer or str(optimizer.get("_target_", "")).startswith("vitscope.training.optimizers."):
        reason = "it reads whole weights, and trainer=fsdp keeps shards of them"
        raise ConfigError("optimizer", optimizer.get("_target_"), reason, "use optimizer=adamw, or trainer=ddp")
    if tree.get("compile"):
        raise ConfigError(
            "compile", True, "trainer=fsdp trains the network as it is", "set compile=false, or trainer=ddp"
        )
    for name, callback in (tree.get("callbacks") or {}).items():
        if isinstance(callback, Mapping) and str(callback.get("_target_", "")).endswith(".EMAWeightAveraging"):
            reason = "it averages whole weights, and trainer=fsdp keeps shards"
            raise ConfigError(f"callbacks.{name}", callback["_target_"], reason, "leave it out, or use trainer=ddp")
