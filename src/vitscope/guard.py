"""What `Probe.guard` is made of: contexts that make a model safe to measure and give it back bit-identical."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating-point tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  the global states are what is kept
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off."""
    # read through getattr: torch declares these attributes at run time only
    backends = [getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul]  # noqa: B009
    backends += [getattr(torch.backends.mkldnn, op) for op in ("matmul", "conv")]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


@contextmanager
def kept_model(model: nn.Module, dtype: torch.dtype | None, restore_weights: bool) -> Iterator[None]:
    """Cast the model for the time inside; give parameters, buffers, gradients and flags back as they were."""
    parameters = list(model.parameters())
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    weights = [p.detach().clone() for p in parameters] if restore_weights else []
    tensors = [(p, p.data) for p in parameters]
    buffers = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    cast = dtype is not None and dtype != float_dtype(model)
    for p in parameters:
        p.grad = None
    try:
        if cast:
            model.to(dtype)
        yield
    finally:
        for p, data in tensors if cast else ():
            p.data = data  # the very storage from before, so a round trip through float64 is exact
        for module, key, buffer, copy in buffers:
            if module._buffers.get(key) is not buffer:
                module._buffers[key] = buffer
            if not torch.equal(buffer, copy):  # NaN compares unequal and is copied: harmless
                buffer.copy_(copy)
        with torch.no_grad():
            for p, weight in zip(parameters, weights):
                p.copy_(weight)
        for p, gradient, flag in gradients:
            p.requires_grad_(flag)
            p.grad = gradient


@contextmanager
def modes(model: nn.Module, bn: str) -> Iterator[None]:
    """Set the eval mode, BatchNorm by its policy; give every module's mode back."""
    before = [(m, m.training) for m in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [(m, m.track_running_stats) for m in norms]
    model.eval()
    try:
        if bn == "batch":
            for norm in norms:  # training without tracking: batch statistics, buffers neither read nor written
                norm.train()
                norm.track_running_stats = False
        yield
    finally:
        for norm, track in tracked:
            norm.track_running_stats = track
        for module, training in before:
            module.training = training
