"""Compare a checkpoint that training resumes from with what this training would save: keys, types, shapes, counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vitscope.runs.checkpoints.optimizer_schema import check_optimizers, check_schedules
from vitscope.runs.checkpoints.state_comparison import WrongEntry, compare_states, kind_name
from vitscope.runtime.errors import CheckpointError

_REQUIRED = {"epoch": int, "global_step": int, "state_dict": dict, "loops": dict, "optimizer_states": list,
             "lr_schedulers": list, "callbacks": dict}  # fmt: skip
#: key of weights beside ``state_dict``: those that training resumes with where ``state_dict`` holds averaged ones
_TRAINED_WEIGHTS = "current_model_state"


def check(
    content: Mapping[str, Any], path: Path, network: nn.Module, trainer: Any, optimizer: Optimizer | None = None
) -> None:
    """Check everything that Lightning will restore, before any of it is.

    Args:
        content: Contents that `checkpoint_io.read` returned.
        path: File of the checkpoint, for the error.
        network: The model without Lightning's module around it, its weights already compared.
        trainer: Lightning's, not yet fitted: its loops and callbacks say what they would save.
        optimizer: A new one over the network's parameters, whose groups are compared; None for one group of all of them.

    Raises:
        CheckpointError: An entry is missing or of another kind, named by its place.
    """
    try:
        _check_entries(content)
        for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop"):
            compare_states(content["loops"].get(name), getattr(trainer, name).state_dict(), f"loops.{name}")
        _check_counters(content)
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [trained] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        check_optimizers(content["optimizer_states"], groups)
        check_schedules(content["lr_schedulers"])
        _check_callbacks(content["callbacks"], trainer)
        if _TRAINED_WEIGHTS in content:
            _check_weights(content[_TRAINED_WEIGHTS], content["state_dict"], _TRAINED_WEIGHTS)
    except WrongEntry as wrong:
        raise CheckpointError("ckpt_path", path, f"{wrong}", "use another checkpoint") from None


def _check_entries(content: Mapping[str, Any]) -> None:
    """Check the presence and the types of the entries that every checkpoint has."""
    for key, kind in _REQUIRED.items():
        if key not in content:
            raise WrongEntry(key, "is missing")
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise WrongEntry(key, f"is a {kind_name(content[key])}, not a {kind.__name__}")
    for key in ("epoch", "global_step"):
        if content[key] < 0:
            raise WrongEntry(key, f"is {content[key]}, which is negative")


def _check_callbacks(states: Mapping[str, Any], trainer: Any) -> None:
    """Compare the saved states of this training's callbacks; only vitscope's own must be there."""
    for callback in trainer.callbacks:
        key = callback.state_key
        if key in states:
            compare_states(states[key], callback.state_dict(), f"callbacks.{key}")
        elif key == "Checkpoints":
            raise WrongEntry("callbacks.Checkpoints", "is missing")


def _check_counters(content: Mapping[str, Any]) -> None:
    """Compare the epoch and the step with the counters of the loops, which they are copies of, and with the note of ours."""
    fit = content["loops"]["fit_loop"]
    progress = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if content["global_step"] != progress:
        raise WrongEntry("global_step", f"is {content['global_step']} and its loops count {progress} steps")
    processed = fit["epoch_progress"]["current"]["processed"]
    if not 0 <= processed - content["epoch"] <= 1:  # at an epoch's end the loops have counted it already
        raise WrongEntry("epoch", f"is {content['epoch']} and its loops count {processed}")
    note = content.get("vitscope", {})
    if note.get("pending", "") not in ("", "validation", "epoch end"):
        raise WrongEntry("vitscope.training.resume_state", f"is {note['pending']!r:.40}")
    n_correct, n_images = note.get("right", 0), note.get("seen", 0)
    if not (isinstance(n_correct, int) and isinstance(n_images, int) and 0 <= n_correct <= n_images):
        raise WrongEntry("vitscope", "does not count images")
    if note and not 0 <= note["epoch"] - content["epoch"] <= 1:
        raise WrongEntry("vitscope.epoch", f"is {note['epoch']} and its loops count {content['epoch']}")


def _check_weights(weights: Any, like: Mapping[str, Any], place: str) -> None:
    if not isinstance(weights, Mapping) or set(weights) != set(like):
        raise WrongEntry(place, "does not hold the names of state_dict")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.shape != like[name].shape:
            raise WrongEntry(f"{place}.{name}", "is not a tensor of that weight's shape")
