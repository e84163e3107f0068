"""Identity of an experiment: the configuration values that define it, its hash, and a name for reports."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitscope.config import loading
from vitscope.config.loading import digest, plain, without_default_loss

#: groups and keys of a configuration that define an experiment; the seed tells its runs apart
EXPERIMENT_KEYS = ("model", "data", "objective", "optimizer", "trainer", "callbacks", "compile", "channels_last")
RUN_KEYS = (*EXPERIMENT_KEYS, "seed")

#: switches that were added later: where one is off, a run keeps the identity that it had without the key
_OFF_IS_ABSENT = ("channels_last", "trainer.sync_batchnorm")

#: keys that were added later: where one is null, a run keeps the identity that it had without the key
_NULL_IS_ABSENT = (
    "model.width", "model.depths", "model.stage_heads", "optimizer.schedule.warmup_steps", "callbacks.checkpoint.warmup_steps",
)  # fmt: skip

#: limits of a training that were not among the identity's keys: where one is null, it is as without the key
_NULL_IS_NO_LIMIT = ("trainer.max_time",)

#: limits of a training by which a schedule counts how far it has come
_LIMITS = ("trainer.max_epochs", "trainer.max_steps")

#: schedules whose learning rate at a step follows from the length of the whole training
_SCHEDULES_OF_LENGTH = ("cosine",)

#: keys that make no other run: where it is computed, what is shown meanwhile, what is stated of the model
INCIDENTAL_TO_A_RUN = (
    "data.root", "data.num_workers", "trainer.default_root_dir", "trainer.enable_progress_bar",
    "trainer.enable_model_summary", "trainer.profiler", "trainer.logger", "model.capabilities",
)  # fmt: skip

#: modules of sources whose images are the same in every folder: known by checksums or by name, or made here
_SAME_IN_EVERY_FOLDER = tuple(
    f"vitscope.data.sources.{name}." for name in ("cifar", "digits", "huggingface", "photos", "shapes")
)

#: keys that may differ between two runs of one experiment, in addition
INCIDENTAL = (
    *INCIDENTAL_TO_A_RUN, "data.seed", "data.eval_batch_size", "data.recipe", "callbacks.checkpoint", "callbacks.lr_monitor",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps",
    "trainer.benchmark", "model.grad_checkpointing",
)  # fmt: skip

#: keys of the objective that the data node repeats: named once
REPEATED = ("augment", "random_erasing", "mixup", "cutmix", "switch_prob", "label_smoothing")

#: words for values in labels, where key and value would not be plain words
WORDS = {"data.random_labels": {True: "random labels", False: "true labels"}}

#: keys that follow from the name of the data, which labels say instead
IMPLIED = ("model.num_classes", "data.num_classes", "data.source._target_", "data.mean", "data.std", "data.split_seed")

#: a label names this many of the keys in which experiments of one model differ
MOST_KEYS = 3


def identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that define a run's experiment, the seed left out, as ``{dotted key: value}``."""
    groups = _without_later_keys({key: cfg.get(key) for key in EXPERIMENT_KEYS if cfg.get(key) or key != "compile"})
    flat = flattened(groups | {"objective": without_default_loss(plain(groups["objective"]))})
    flat = {k: v for k, v in flat.items() if v is not None or k not in _NULL_IS_NO_LIMIT}
    defining = {k: v for k, v in flat.items() if not any(k == i or k.startswith(f"{i}.") for i in INCIDENTAL)}
    folder_name = _folder_name(cfg)
    defining |= {} if folder_name is None else {"data.root": folder_name}
    return {k: v for k, v in defining.items() if k.removeprefix("data.") not in REPEATED}


def image_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Return the absolute path of the folder of images; None for images that are the same in every folder, as CIFAR's.

    Its name is a part of an experiment's identity, unless it is that of the data. Its place is not: a job may copy its images to
    a folder of its own.
    """
    data = plain(cfg.get("data")) or {}
    # a data module of another package has no source; that of this package has photographs without one
    maker = data["source"] if isinstance(data.get("source"), Mapping) else data
    target = str(maker.get("_target_", _SAME_IN_EVERY_FOLDER[0]))
    if not data.get("root") or target.startswith((*_SAME_IN_EVERY_FOLDER, "vitscope.data.DataModule")):
        return None
    return Path(str(data["root"])).expanduser().absolute()


def _folder_name(cfg: Mapping[str, Any]) -> str | None:
    """Return the name of the folder of images where it tells more than the name of the data."""
    folder = image_folder(cfg)
    return None if folder is None or folder.name == (cfg.get("data") or {}).get("name") else folder.name


def experiment(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what defines the experiment that a run belongs to: its `identity`, and where its weights come from.

    Runs of one experiment differ in their seeds and are averaged. A training from another file's weights, and one whose length
    was changed on the way, are other experiments than a training from initial weights with the same configuration.

    Args:
        cfg: A run's configuration.
        facts: The run's provenance.
    """
    if facts.get("command") == "analyze":
        return {**identity(cfg), "weights": cfg.get("ckpt_path")}
    definition = {**identity(cfg), "weights": _start(facts)}
    if changes := changed_lengths(cfg, facts):
        definition["changed_lengths"] = changes
    return definition


def is_from_initial_weights(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Tell whether a training began with initial weights and had one length throughout, as its configuration alone says."""
    return _start(facts) is None and not changed_lengths(cfg, facts)


def start_text(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return in words where a training from other than initial weights began, or the length that it had at first; else ''."""
    words = []
    if (start := _start(facts)) is not None:
        words.append(f"from {start_file(start)}")
    changes = changed_lengths(cfg, facts)
    words += [f"{key.rpartition('.')[2]} at first {old}" for key, old, _ in changes[:1]]
    return ", ".join(words)


def start_file(start: Mapping[str, Any]) -> str:
    """Return the file that a training started from as ``folder/file``, the folder of a run's checkpoints being the run's."""
    file = PurePath(str(start.get("checkpoint")))
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    return f"{folder.name}/{file.name}" if folder.name else file.name


def changed_lengths(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> list[list[Any]]:
    """Return the changes of a training's length on a resume that make its learning rates another training's.

    A cosine ends with the training, so that the steps before such a change were made with the rates of another length. Constant
    rates and milestones do not depend on the length.

    Returns:
        Key, old and new value of each change.
    """
    schedule = (cfg.get("optimizer") or {}).get("schedule") or {}
    rows = facts.get("changes")
    if schedule.get("kind", "cosine") not in _SCHEDULES_OF_LENGTH or not isinstance(rows, list):
        return []
    limits = [row for row in rows if isinstance(row, Mapping) and row.get("key") in _LIMITS and row.get("step")]
    return [[row["key"], row.get("old"), row.get("new")] for row in limits]


def _start(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a training's provenance notes of the file that it started from; None for initial weights."""
    start = facts.get("started_from")
    return start if isinstance(start, Mapping) else None


def config_hash(cfg: DictConfig | Mapping[str, Any]) -> str:
    """Return the hash (16 digits) of the values that define a run; `INCIDENTAL_TO_A_RUN` and other groups are left out.

    Of a folder of images the name counts.

    Args:
        cfg: A run's configuration, or a resolved copy of it.
    """
    resolved = plain({key: cfg.get(key) for key in RUN_KEYS} if not OmegaConf.is_config(cfg) else cfg)
    defining = _without_later_keys({key: resolved.get(key) for key in RUN_KEYS})
    defining["objective"] = without_default_loss(defining["objective"])
    for dotted in INCIDENTAL_TO_A_RUN:
        group, _, key = dotted.partition(".")
        if isinstance(defining[group], dict):
            defining[group] = {k: v for k, v in defining[group].items() if k != key}
    if (folder_name := _folder_name(resolved)) is not None:
        defining["data"]["root"] = folder_name
    return digest(defining, 16)


def _without_later_keys(groups: dict[str, Any]) -> dict[str, Any]:
    """Return groups of a configuration without switches of `_OFF_IS_ABSENT` that are off and nulls of `_NULL_IS_ABSENT`."""
    for dotted in _OFF_IS_ABSENT:
        groups = _without(groups, dotted.split("."), lambda value: not value)
    for dotted in _NULL_IS_ABSENT:
        groups = _without(groups, dotted.split("."), lambda value: value is None)
    return groups


def _without(node: dict[str, Any], keys: Sequence[str], is_absent: Callable[[Any], bool]) -> dict[str, Any]:
    """Return a mapping without the value at a path of keys, where that counts as absent."""
    key, *inner = keys
    if not inner:
        return {k: v for k, v in node.items() if k != key or not is_absent(v)}
    if isinstance(node.get(key), Mapping):
        return {**node, key: _without(node[key], inner, is_absent)}
    return node


def setting(cfg: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Return a digest of what two models must share to be compared: data, objective and length of training.

    Args:
        cfg: A run's configuration.
        without: Dotted keys that may differ all the same.
    """
    lengths = (*_LIMITS, "trainer.max_time")
    shared = {k: v for k, v in identity(cfg).items() if k.startswith(("data.", "objective.", *lengths))}
    return loading.digest({k: v for k, v in shared.items() if k not in without})


def flattened(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys; lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def family(cfg: Mapping[str, Any]) -> str:
    """Return the model's builder, such as ``alternet``; a timm model's own name."""
    node = cfg.get("model") or {}
    builder = str(node.get("_target_", "model")).rpartition(".")[2]
    return str(node.get("name", builder)) if builder == "timm_model" else builder


def short_name(cfg: Mapping[str, Any]) -> str:
    """Return family and size, such as ``alternet-18``, ``vit-tiny``; with a width of its own ``alternet-18-w8``, ``vit-w64``."""
    node = cfg.get("model") or {}
    size = node.get("depth") if isinstance(node.get("depth"), int) and "size" not in node else node.get("size")
    if width := node.get("width"):
        size = f"w{width}" if size is None or "size" in node else f"{size}-w{width}"
    return f"{family(cfg)}-{size}" if size is not None else family(cfg)


def recipe(cfg: Mapping[str, Any]) -> str:
    """Return the name of the objective in ``conf/objective`` that has the run's values; an empty text for none.

    Args:
        cfg: A run's configuration.
    """
    node = without_default_loss(plain(cfg.get("objective") or {}))
    return next((name for name, stated_recipe in _stated_recipes().items() if node == stated_recipe), "")


@functools.cache
def _stated_recipes() -> dict[str, Any]:
    """Return the objectives of ``conf/objective`` by name, without the default loss."""
    paths = {name: loading.folder() / "objective" / f"{name}.yaml" for name in loading.options("objective")}
    contents = {name: OmegaConf.to_container(OmegaConf.load(path)) for name, path in paths.items()}
    return {name: without_default_loss(content) for name, content in contents.items() if isinstance(content, dict)}


def labels(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a name for each experiment: the model, and the keys in which those of one model differ.

    What most of them share goes without saying: beside many trainings of a ViT one with another patch size is
    ``vit-tiny, patch_size 8`` and the others do not name theirs.

    Args:
        configs: One configuration for each experiment, by its digest.

    Returns:
        By digest; no two names are equal.
    """
    digests_of: dict[str, list[str]] = {}
    for experiment, cfg in configs.items():
        digests_of.setdefault(short_name(cfg), []).append(experiment)
    labels: dict[str, str] = {}
    for name, digests in digests_of.items():
        facts = _with_recipes([configs[experiment] for experiment in digests])
        usual = {key: _usual(key, facts) for key in _varying_keys(facts)}
        for experiment, fact in zip(digests, facts):
            unusual_keys = [key for key in usual if digest(fact.get(key)) != usual[key]]
            if "trainer.max_steps" in unusual_keys and fact.get("trainer.max_epochs") in (-1, None):
                unusual_keys = [key for key in unusual_keys if key != "trainer.max_epochs"]  # no limit in epochs
            words = [_word(key, fact.get(key)) for key in unusual_keys[:MOST_KEYS]]
            labels[experiment] = ", ".join([name, *words])
    return _numbered(labels)


def _varying_keys(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys in which experiments differ: what is built, then how it is trained; keys of some optimizers last."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    varying_keys = [key for key in keys if key not in IMPLIED and _varies(key, facts)]
    return sorted(
        varying_keys,
        key=lambda key: (EXPERIMENT_KEYS.index(key.partition(".")[0]), key in ("optimizer.betas", "optimizer.eps")),
    )


def _numbered(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels with numbers from the second one of each name on: what `MOST_KEYS` cuts off may leave equal ones."""
    counts: dict[str, int] = {}
    numbered: dict[str, str] = {}
    for experiment, label in labels.items():
        counts[label] = counts.get(label, 0) + 1
        numbered[experiment] = label if counts[label] == 1 else f"{label}, no. {counts[label]}"
    return numbered


def _with_recipes(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the identities of experiments; where each has an objective of ``conf/objective``, its name stands for its keys."""
    facts = [identity(cfg) for cfg in configs]
    objectives = {digest([v for k, v in fact.items() if k.startswith("objective.")]) for fact in facts}
    if len(objectives) < 2:
        return facts
    names = [recipe(cfg) for cfg in configs]
    if not all(names):
        return facts
    return [
        {key: value for key, value in fact.items() if not key.startswith("objective.")} | {"objective": name}
        for fact, name in zip(facts, names)
    ]


def _varies(key: str, facts: Sequence[Mapping[str, Any]]) -> bool:
    return len({loading.digest(fact.get(key)) for fact in facts}) > 1


def _usual(key: str, facts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the digest of the value that more than half of the experiments have, None where there is no such value."""
    (digest, count), *_ = Counter(loading.digest(fact.get(key)) for fact in facts).most_common(1)
    return digest if 2 * count > len(facts) else None


def _word(key: str, value: Any) -> str:
    if key == "data.name":
        return str(value)
    if key.endswith("._target_"):
        return str(value).rpartition(".")[2]
    if key in WORDS:
        return WORDS[key][bool(value)]
    return f"{key.rpartition('.')[2]} {_said(value)}"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "(" + ",".join(map(_said, value)) + ")"
    if isinstance(value, int) and not isinstance(value, bool):  # 1 and 0 are keys as True and False
        return str(value)
    return {None: "default", True: "on", False: "off"}.get(value, str(value))
