"""Any timm model by name, with or without its pretrained weights."""

from __future__ import annotations

import difflib
import inspect
import socket
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from torch import nn

from vitscope.models import timm_internals
from vitscope.runtime.value_ranges import ImageSize, PositiveInt


def timm_model(
    name: str,
    num_classes: PositiveInt | None = None,
    image_size: ImageSize | None = None,
    pretrained: bool = False,
    in_chans: int = 3,
    *,
    grad_checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """A model of timm: ``name`` is ``architecture`` or ``architecture.tag``, as timm lists them.

    Args:
        name: Architecture, with the tag of its weights after a dot if there are several.
        num_classes: Number of logits; None: the weights' own.
        image_size: Image size for models that are built for one (ViT, Swin, Mixer, ...); others take any.
        pretrained: Load timm's weights from its cache or from the hub; errors of the hub are raised.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training, where timm can.
        **options: Options that are passed on to timm.

    Raises:
        ValueError: For a name timm does not know; the nearest names are given.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()."
        raise ValueError(f"timm has no model {name!r}; {hint}")
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_size is not None and _built_for_one_size(name):
        options["img_size"] = image_size
    with _no_retries() if pretrained else nullcontext():
        model = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **options)
    if grad_checkpointing:
        checkpoint_gradients(model)
    return model


def checkpoint_gradients(model: nn.Module) -> None:
    """Switch timm's gradient checkpointing on; a ValueError if the model has none."""
    try:
        cast(Any, model).set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing; set grad_checkpointing=False."
        ) from error


def _no_retries() -> AbstractContextManager[None]:
    """Take weights from the cache only if the hub's host cannot be reached: else its client retries for 45 s."""
    return timm_internals.offline_hub(not _reachable(timm_internals.hub_address()))


def _reachable(url: str, timeout: float = 5.0) -> bool:
    """Whether the host accepts a connection; assumed behind a proxy, which resolves names by itself."""
    address = urlsplit(url)
    if getproxies() or address.hostname is None:
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def _built_for_one_size(name: str) -> bool:
    entrypoint = timm.model_entrypoint(name.split(".")[0])
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config and config.fixed_input_size) and "img_size" not in inspect.signature(entrypoint).parameters
