"""Names that other tools give to what vitscope sets by a key, and the answer that names the right key.

timm's and torchvision's scripts take options (``--data-dir``), templates of Hydra and Lightning other keys (``debug=default``,
``task_name=``), and ``vitscope reproduce`` has keys of its own (``dry=true``, ``out=``). An argument of such a name is refused
with what to write instead, for the whole command line at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from vitscope.config import loading
from vitscope.runtime.errors import ConfigError

_LAST = "run=runs/<id> ckpt_path=last"
#: option of Hydra that prints the configuration and runs nothing
_PRINT_ONLY = "--cfg job"

#: replacements for keys and options of other tools; ``{}`` stands for the value
_REPLACEMENTS = {
    **dict.fromkeys(("lr", "learning_rate", "model.lr", "model.optimizer.lr"), "optimizer.lr={}"),
    **dict.fromkeys(("weight_decay", "wd", "optimizer.wd"), "objective.weight_decay={}"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "data.batch_size={}"),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "max_epochs", "trainer.epochs"), "trainer.max_epochs={}"),
    "max_steps": "trainer.max_steps={}",
    "warmup_epochs": "optimizer.schedule.warmup_epochs={}",
    **dict.fromkeys(("warmup_steps", "warmup_iters"), "optimizer.schedule.warmup_steps={}"),
    **dict.fromkeys(("opt", "optim"), "optimizer={}"),
    "momentum": "optimizer=sgd optimizer.momentum={}",
    **dict.fromkeys(("clip_grad", "gradient_clip_val"), "trainer.gradient_clip_val={}"),
    "drop_path": "model.drop_path={}",
    "mixup": "objective.mixup={}",
    "cutmix": "objective.cutmix={}",
    **dict.fromkeys(("smoothing", "label_smoothing"), "objective.label_smoothing={}"),
    **dict.fromkeys(("aa", "auto_augment"), "objective.augment={}"),
    **dict.fromkeys(("workers", "num_workers"), "data.num_workers={}"),
    **dict.fromkeys(("data_dir", "data_path", "data_root", "root"), "data=folder data.root={}"),
    **dict.fromkeys(("data.data_dir", "data.dir", "data.path"), "data.root={}"),
    "dataset": "data={}",
    "num_classes": "data.num_classes={}",
    **dict.fromkeys(("img_size", "image_size", "input_size"), "data.image_size={}"),
    **dict.fromkeys(("arch", "model_name"), "model=timm model.name={}"),
    "patch_size": "model.patch_size={}",
    "pretrained": "model.pretrained=true",
    **dict.fromkeys(("checkpoint", "checkpoint_path", "ckpt", "initial_checkpoint"), "ckpt_path={}"),
    **dict.fromkeys(("model.checkpoint_path", "model.checkpoint", "model.ckpt_path"), "ckpt_path={}"),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "trainer.resume_from_checkpoint"), _LAST),
    **dict.fromkeys(("gpus", "n_gpus", "devices", "trainer.gpus"), "trainer=ddp trainer.devices={}"),
    "accelerator": "trainer.accelerator={}",
    "precision": "trainer.precision={}",
    "amp": "trainer.precision=bf16-mixed",
    **dict.fromkeys(("debug", "fast_dev_run", "trainer.fast_dev_run"), "caps=smoke"),
    **dict.fromkeys(("task_name", "exp_name", "experiment_name", "run_name"), "name={}"),
    **dict.fromkeys(("out", "out_dir", "output", "output_dir", "save_dir", "log_dir", "work_dir"), "paths.runs={}"),
    **dict.fromkeys(("dry", "dry_run"), _PRINT_ONLY),
    **dict.fromkeys(("wandb", "use_wandb", "log_wandb"), "logger=wandb"),
    **dict.fromkeys(("tensorboard", "use_tensorboard"), "logger=tensorboard"),
    **dict.fromkeys(("project", "wandb_project"), "logger.project={}"),
}

#: the same where `analyze.py` has another answer
_OF_ANALYZE = {
    "batch_size": "analysis.<name>.probe.batch_size={}",
    **dict.fromkeys(("split", "data.split"), "probe.split={}"),
    **dict.fromkeys(("n_images", "num_images", "num_samples"), "probe.n_images={}"),
    **dict.fromkeys(("augment", "data.augmentation"), "probe.augment={}"),
    **dict.fromkeys(("gpus", "n_gpus", "devices", "accelerator"), "device=cuda"),
    **dict.fromkeys(("resume", "resume_from_checkpoint"), "run=runs/<id>"),
    **dict.fromkeys(("out", "out_dir", "output", "output_dir", "save_dir"), "run_dir={}"),
    **dict.fromkeys(("dry", "dry_run"), "cost=true"),
}

#: groups that only a training has
_OF_TRAINING = ("optimizer", "trainer", "callbacks")


def refuse_foreign_names(command: str, arguments: Sequence[str]) -> None:
    """Refuse arguments that other tools name so; one error says what to write for all of them.

    Args:
        command: Name of a file in ``conf/`` without its suffix; only ``train`` and ``analyze`` have such names.
        arguments: Command line without the program's name.

    Raises:
        ConfigError: Naming the arguments and their replacements.
    """
    if command not in ("train", "analyze"):
        return
    pairs = list(_replaced(command, arguments))
    if not pairs:
        return
    written = " ".join(text for text, _ in pairs)
    has_options = any(text.startswith("-") for text, _ in pairs)
    reason = "arguments are key=value" if has_options else "no such key"
    of_training = [pair for pair in pairs if command == "analyze" and pair[1].startswith(_OF_TRAINING)]
    replacements = dict.fromkeys(text for pair in pairs if pair not in of_training for text in pair[1:])
    if not of_training:
        raise ConfigError(written, None, reason, f"write {' '.join(replacements)}")
    train_keys = " ".join(dict.fromkeys(replacement for _, replacement in of_training))
    if not replacements:
        raise ConfigError(written, None, "analyze trains nothing", f"leave it out; train takes {train_keys}")
    left_out = " ".join(text for text, _ in of_training)
    fix = f"write {' '.join(replacements)}, and leave out {left_out}: analyze trains nothing, train takes {train_keys}"
    raise ConfigError(written, None, reason, fix)


def _replaced(command: str, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each foreign argument as it was written, and its replacement."""
    table = _REPLACEMENTS if command == "train" else {**_REPLACEMENTS, **_OF_ANALYZE}
    own_keys: set[str] | None = None
    for position, argument in enumerate(arguments):
        is_option = argument.startswith("--")
        key, equals, value = argument.partition("=")
        name = key.lstrip("-+").replace("-", "_")
        if not is_option and (not equals or argument.startswith("-")):
            continue
        own_keys = _root_keys(command) if own_keys is None else own_keys
        if not is_option and (name in own_keys or (key.startswith("+") and "." in name)):  # + adds a key of one's own
            continue
        template = table.get(name)
        if is_option and name in own_keys:
            template = f"{name}={{}}"
        if template is None:
            continue
        following = _value_behind(arguments, position) if is_option and not equals else ""
        if following:
            yield f"{argument} {following}", _filled(template, following)
        else:
            yield argument, _filled(template, value)


def _value_behind(arguments: Sequence[str], position: int) -> str:
    """Return the argument behind an option where it is the option's value: neither an option nor ``key=value``."""
    following = arguments[position + 1] if position + 1 < len(arguments) else ""
    return "" if following.startswith("-") or "=" in following else following


def _filled(template: str, value: str) -> str:
    """Return a replacement with the value in it; a name that is no model of vitscope is taken for one of timm."""
    if template == "model={}" and value and value not in loading.options("model"):
        template = "model=timm model.name={}"
    return template.replace("{}", shlex.quote(value) if value else "...")


def _root_keys(command: str) -> set[str]:
    """Return the groups and the other keys at the top of a command's configuration."""
    root: Any = OmegaConf.to_container(OmegaConf.load(loading.folder() / f"{command}.yaml"))
    groups = [str(name) for entry in root["defaults"] if isinstance(entry, dict) for name in entry]
    keys = [str(key) for key in root if key not in ("defaults", "hydra")]
    return {name for name in (*groups, *keys) if " " not in name}
