"""State of the optimizer that a checkpoint holds, and the scale of AdamW's decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vitscope.config import loading
from vitscope.core.optimizer_state import OptimizerState, of_checkpoint
from vitscope.linalg.optimizer_stability import adam_scale
from vitscope.runtime.errors import CheckpointError, first_line


def optimizer_state(
    network: nn.Module, content: Mapping[str, Any] | None, cfg: Mapping[str, Any] | None = None
) -> OptimizerState | None:
    """Return the optimizer that a checkpoint holds: its class, hyper-parameters by group and state; None where it holds none.

    Args:
        network: whose parameters it trains.
        content: the checkpoint.
        cfg: the run's configuration, which names the optimizer's class.

    Raises:
        CheckpointError: the state is not one that an optimizer writes.
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
        CheckpointError: the state is not one that AdamW writes.
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
        why = f"its optimizer state is damaged ({type(error).__name__}: {first_line(error)})"
        raise CheckpointError("ckpt_path", None, why, "use another checkpoint, or objective.l2=half_sq") from None
