"""Contexts of `Probe.guard`: they make a model safe to measure and restore it bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from vitscope.core.guard.fingerprints import dense_parts, same_bits
from vitscope.runtime.errors import NumericalError
from vitscope.runtime.torch_internals import BatchNormBase, buffer_registry


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating-point tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def refuse_unfit_weights(model: nn.Module, differentiated: bool, frozen_integers: bool = False) -> None:
    """Raise where no measure, or none that differentiates or moves the weights, can work with them.

    Args:
        model: The model.
        differentiated: Whether a measure differentiates or moves the weights.
        frozen_integers: Whether integers may stand beside trainable floating-point weights.

    Raises:
        NumericalError: A parameter or a buffer holds NaN, or a parameter or a BatchNorm statistic an infinity.
        ValueError: Parameters without a shape yet; with ``differentiated`` also quantized, sparse or opaque weights.
    """
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"Expected parameters with values, received {name!r} without a shape: run the model once.")
    if differentiated:
        _refuse_quantized(model, frozen_integers and any(p.requires_grad for p in model.parameters()))
        for name, p in model.named_parameters():
            if p.layout != torch.strided:
                raise ValueError(
                    f"Expected dense weights, received {name!r} of layout {str(p.layout).removeprefix('torch.')}: "
                    "pass a copy of the model with to_dense() weights."
                )
    refuse_nonfinite(model)


def _refuse_quantized(model: nn.Module, frozen_integers: bool) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # holds an object of its own kind, and is refused as what it is
            continue
        packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
        integers = [
            key
            for key, p in module.named_parameters(recurse=False)
            if not _is_continuous(p) and (p.is_quantized or not frozen_integers)
        ]
        if packed or integers or ".quantized" in type(module).__module__:
            what = f"{name}.{integers[0]}".lstrip(".") if integers else name or "model"
            raise ValueError(
                f"Expected floating-point weights (integers have no gradient), received {what!r} of "
                f"{type(module).__name__}: measure the model before it is quantized; measures of the Hessian take frozen "
                "integers beside trainable weights with product='difference'."
            )


def _is_continuous(p: Tensor) -> bool:
    return (p.is_floating_point() or p.is_complex()) and not p.is_quantized


def refuse_nonfinite(model: nn.Module) -> None:
    """Raise NumericalError where a parameter or a BatchNorm statistic is not finite, or another buffer holds NaN.

    Infinities in other buffers are masks.
    """
    strict: dict[str, Tensor] = {f"parameter {name!r}": p for name, p in model.named_parameters()}
    loose: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            statistic = isinstance(module, BatchNormBase)
            (strict if statistic else loose)[f"buffer {f'{path}.{key}'.lstrip('.')!r}"] = buffer
    for tensors, bad, word in ((strict, _not_finite, "NaN or infinite"), (loose, torch.isnan, "NaN")):
        for name in _suspects(tensors):
            values = _values(tensors[name])
            if count := int(bad(values).sum()):
                raise NumericalError(
                    "model",
                    None,
                    f"{name} holds {count} {word} values of {values.numel()}",
                    "measure a checkpoint from before the training diverged",
                )


def _not_finite(values: Tensor) -> Tensor:
    return ~torch.isfinite(values)


def _suspects(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors whose sum is not finite: one number each, read from the device together."""
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in tensors.items():
        if _is_continuous(t) and not t.is_meta:
            values = _values(t)
            real = torch.view_as_real(values) if values.is_complex() else values
            wide = torch.float32 if real.element_size() < 4 else real.dtype
            sums.setdefault(t.device, []).append((name, real.sum(dtype=wide).double()))
    suspects = []
    for pairs in sums.values():
        finite = torch.isfinite(torch.stack([total for _, total in pairs])).tolist()
        suspects += [name for (name, _), good in zip(pairs, finite) if not good]
    return suspects


def _values(tensor: Tensor) -> Tensor:
    try:
        return dense_parts(tensor.detach())[-1]
    except ValueError:  # an opaque layout
        return tensor.detach().to_dense()


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  the global states are what is kept
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002  likewise


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off."""
    # torch declares `conv` and `matmul` of cudnn and mkldnn at run time only
    cudnn, mkldnn = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    backends = [cudnn.conv, torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv]
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
def kept_model(model: nn.Module, dtype: torch.dtype | None, copy_weights: bool) -> Iterator[list[Tensor]]:
    """Cast the model for the time inside; give parameters, buffers, gradients and flags back as they were.

    Yields the copies of the weights that ``copy_weights`` asks for; whoever empties the list says that none will be written to.
    """
    parameters = list(model.parameters())
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    copies = [p.detach().clone() for p in parameters] if copy_weights else []
    tensors = [(p, p.data) for p in parameters]
    buffers = [
        (m, key, b, b.clone())
        for m in model.modules()
        for key, b in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    is_cast = dtype is not None and dtype != float_dtype(model)
    for p in parameters:
        p.grad = None
    try:
        if dtype is not None and is_cast:
            _cast(model, dtype)
        yield copies
    finally:
        if is_cast or copies:
            for p, data in tensors:
                p.data = data  # the very storage from before, so a round trip through float64 is exact
        for module, key, buffer, copy in buffers:
            registry = buffer_registry(module)
            if registry.get(key) is not buffer:
                registry[key] = buffer
            if not same_bits(buffer, copy):  # NaN compares unequal and is copied: harmless
                buffer.copy_(copy)
        with torch.no_grad():
            for p, weight in zip(parameters, copies):
                if not same_bits(p, weight):
                    p.copy_(weight)
        for p, gradient, flag in gradients:
            p.requires_grad_(flag)
            p.grad = gradient


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model in place; complex buffers, whose imaginary parts `torch.nn.Module.to` drops, to the complex type of it."""
    complex_buffers = [
        (registry, key, buffer)
        for registry in map(buffer_registry, model.modules())
        for key, buffer in registry.items()
        if buffer is not None and buffer.is_complex()
    ]
    try:
        for registry, key, _ in complex_buffers:
            registry[key] = None
        model.to(dtype)
    finally:
        for registry, key, buffer in complex_buffers:
            registry[key] = buffer.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


@contextmanager
def modes(model: nn.Module, bn: str) -> Iterator[None]:
    """Set the eval mode, BatchNorm by its policy; give every module's mode back."""
    before = [(m, m.training) for m in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    tracked = [(m, m.track_running_stats) for m in norms]
    try:
        model.eval()
    except NotImplementedError as error:  # of torch.export
        raise ValueError(
            f"Expected modules of Python code, received {type(model).__name__} whose mode cannot be set ({error}), as those of "
            "torch.export: pass the nn.Module that it was made from."
        ) from error
    try:
        if bn == "batch":
            for norm in norms:  # training without tracking: batch statistics, buffers neither read nor written
                norm.training = True  # of this layer alone: a dropout that it holds stays off
                norm.track_running_stats = False
        yield
    finally:
        for norm, track in tracked:
            norm.track_running_stats = track
        for module, training in before:
            module.training = training
