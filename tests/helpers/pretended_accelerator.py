"""An accelerator that is not there: tensors with real numbers in host memory that say they are on ``cuda:0`` and act like it.

With real numbers every loop takes the turns that it takes on a GPU. Inside `accelerator`,

* an operation on a tensor of the accelerator and one of the host with a dimension or more raises, as CUDA does; so does a
  generator of the host for random numbers of the accelerator, and a collective of `vitscope.runtime.distributed` of a tensor of
  the host,
* each read of the accelerator by the host (``item``, ``bool``, ``tolist``, ``cpu``, ``equal``, ``nonzero``, a mask as index) is
  counted with the line of the package that asks for it, and so is each copy to it.

It is a wrapper subclass over torch's ``PrivateUse1`` backend, a dispatch mode that unwraps, checks and counts, and a function
mode that translates ``cuda``. It does not see kernels of cuDNN and cuBLAS and their precision, autocast, streams, NCCL, compiled
code, transforms of ``torch.func``, casts of a whole model, or time. The registration of the backend lasts for the process: use it
in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.device_tensors import BACKEND, SEEN, DeviceDispatch, DeviceTensor, Observations, calling_line

#: bytes of memory that it says to have
CAPACITY = 80 * 10**9


def _translated(value: Any) -> Any:
    is_name = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
    return BACKEND if is_name or (isinstance(value, torch.device) and value.type == "cuda") else value


def _with_tensors(index: Any) -> Any:
    """Return an index with tensors in place of lists of numbers."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Function(TorchFunctionMode):
    """Takes ``cuda`` for the backend, and makes tensors from Python numbers on the host first, as torch does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(_translated(value) for value in args)
        kwargs = {name: _translated(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func in (
            torch.Tensor.__getitem__,
            torch.Tensor.__setitem__,
        ):  # torch itself would make its indices on the backend
            args = (args[0], _with_tensors(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == BACKEND:
            made = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return made if isinstance(made, DeviceTensor) else put(made)
        return func(*args, **kwargs)


def put(tensor: Tensor) -> Tensor:
    """Return a copy on the accelerator."""
    SEEN.copies[calling_line()] += 1
    return DeviceTensor(tensor.detach().clone())


def put_module(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the accelerator in place, tied ones once."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not isinstance(parameter, DeviceTensor):
                if id(parameter) not in moved:
                    values = DeviceTensor(parameter.detach().clone())
                    moved[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]  # pyright: ignore[reportArgumentType]  a parameter, of the map of both
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, DeviceTensor):
                part._buffers[name] = moved.setdefault(id(buffer), DeviceTensor(buffer.detach().clone()))
    return module


_module_to = nn.Module.to


def _moved_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    targets = [torch.device(a) for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device)]
    return put_module(module) if any(t.type == "cuda" for t in targets) else _module_to(module, *args, **kwargs)


def _refuse_transform(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the transforms of torch.func do not know the pretended accelerator")


def _collectives() -> list[Any]:
    """Return patches by which collectives refuse tensors of the host, as a backend for GPUs does, wherever they are imported."""
    from vitscope.runtime import distributed

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(tensor, DeviceTensor):
                SEEN.refuse(
                    f"No backend type associated with device type cpu ({function.__name__} of {tuple(tensor.shape)})"
                )
            return function(tensor, *args, **kwargs)

        return call

    functions = [distributed.all_reduce_sum, distributed.all_gather, distributed.broadcast]
    replacements = {id(function): checked(function) for function in functions}
    modules = [module for name, module in sys.modules.items() if name.startswith("vitscope.")]
    return [
        mock.patch.object(module, name, replacements[id(value)])
        for module in modules
        for name, value in list(vars(module).items())
        if id(value) in replacements
    ]


@contextlib.contextmanager
def _forked_host_generator(devices: Any = None, enabled: bool = True, **_: Any) -> Iterator[None]:
    with _fork_rng(devices=[], enabled=enabled):
        yield


_fork_rng = torch.random.fork_rng


def _patches() -> list[Any]:
    from vitscope.linalg.curvature import blockwise_attention, double_backward

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: "a pretended accelerator",
        "mem_get_info": lambda device=None: (CAPACITY, CAPACITY),
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None, "empty_cache": lambda: None,
        "synchronize": lambda device=None: None, "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }  # fmt: skip
    return [
        *(mock.patch.object(torch.cuda, name, answer) for name, answer in answers.items()),
        # both ask whether a tensor is a plain one, which those of a GPU are
        mock.patch.object(double_backward, "Tensor", DeviceTensor),
        mock.patch.object(blockwise_attention, "Tensor", DeviceTensor),
        mock.patch.object(nn.Module, "to", _moved_module),
        mock.patch.object(torch.random, "fork_rng", _forked_host_generator),
        mock.patch.object(torch.func, "vmap", _refuse_transform),
    ]


@contextlib.contextmanager
def accelerator() -> Iterator[Observations]:
    """Let everything inside see one accelerator; yield what is seen."""
    SEEN.clear()
    with contextlib.ExitStack() as stack:
        for patch in (*_patches(), *_collectives()):
            stack.enter_context(patch)
        with _Function(), DeviceDispatch():
            yield SEEN
