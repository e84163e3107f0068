"""Run a model on trial images, to observe it: it is given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitscope.core.guard import probe_guard
from vitscope.core.guard.eager_execution import eager_execution
from vitscope.core.guard.module_state import kept_attributes
from vitscope.runtime.errors import VitscopeError

T = TypeVar("T")
R = TypeVar("R")

#: sides of the images that are tried where a model states none; of smaller ones the last map of many networks is one position
_SIDES = (64, 32, 224, 28, 16, 8)

#: bytes of activations that are kept for derivatives which a network takes inside of its own forward pass
_SAVED_BYTES = 2**30


class UntraceableError(Exception):
    """A model runs on none of the inputs that were tried."""


def first_that_runs(trials: Iterable[T], observe: Callable[[T], R]) -> R:
    """Return what an observation gives of the first input that a model takes.

    Args:
        trials: Inputs, such as `trial_images`.
        observe: Runs the model on one of them; what a model raises on an input that it does not take leads to the next one.

    Raises:
        UntraceableError: The model takes none of them; with the first error's text.
    """
    error: Exception | None = None
    for x in trials:
        try:
            return observe(x)
        except (VitscopeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ValueError) as raised:
            error = error or raised
    raise UntraceableError(str(error or "no images")) from error


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Make a model safe to observe in eval mode, with gradients of all parameters.

    Weights, buffers, modes, gradients and random states are given back as they were.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with (
        torch.inference_mode(False),
        eager_execution(model),
        probe_guard.kept_random_states(device),
        probe_guard.kept_model(model, None, False),
        kept_attributes(model),  # a pass may adapt them to the size of its images
        probe_guard.modes(model, "eval"),
        torch.enable_grad(),
        _few_saved_tensors(),
    ):
        for p in model.parameters():  # frozen ones too: the graph shows what they reach
            if p.is_floating_point() and not p.is_inference():
                p.requires_grad_(True)
        yield


def _few_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    """Keep autograd's graph, which is read, but only the first `_SAVED_BYTES` of the activations behind it.

    The pass itself takes no derivatives; a network may take some inside of its forward pass.
    """
    n_bytes = 0

    def pack(tensor: Tensor) -> Tensor | None:
        nonlocal n_bytes
        if isinstance(tensor, nn.Parameter) or tensor.is_meta:
            return tensor.detach()
        n_bytes += tensor.numel() * tensor.element_size()
        return tensor.detach() if n_bytes <= _SAVED_BYTES else None  # itself, it would keep its node, which keeps it

    def unpack(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise RuntimeError("the network differentiates inside of its forward pass, more than 1 GiB of activations")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def trial_images(model: nn.Module, images: Tensor | None) -> Iterator[Tensor]:
    """Yield the first of the images; without any, random images of the sizes that the model states, then of usual ones."""
    first = next(model.parameters(), torch.empty(0))
    dtype = probe_guard.float_dtype(model)
    if images is not None:
        # inputs of another form are not cut to one example here: the model counts as not run
        if isinstance(images, Tensor):
            yield images[:1].to(first.device, dtype)
        return
    first_convolution = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    configuration = getattr(model, "pretrained_cfg", None)
    stated = (configuration.get("input_size") or (first_convolution,))[0] if isinstance(configuration, dict) else 0
    generator = torch.Generator().manual_seed(0)
    for size in dict.fromkeys((*_stated_sizes(model), *((side, side) for side in _SIDES))):
        for n_channels in dict.fromkeys((first_convolution, stated or first_convolution)):
            yield torch.rand(1, n_channels, *size, generator=generator, dtype=torch.float32).to(first.device, dtype)


def _stated_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """The image sizes that the model, its patch embedding or its configuration states: timm's, or that of transformers."""
    configurations = (getattr(module, "config", None) for module in model.modules())
    stated = next((c for c in configurations if isinstance(getattr(c, "image_size", None), int | list | tuple)), None)
    places = [
        (m, key) for m in (model, getattr(model, "patch_embed", None), stated) for key in ("img_size", "image_size")
    ]
    sizes = [getattr(m, key, None) for m, key in places]
    configuration = getattr(model, "pretrained_cfg", None)
    if isinstance(configuration, dict):
        sizes.append((configuration.get("input_size") or ())[-2:])
    for size in sizes:
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size):
            yield size[0], size[1]
