"""Tensors of `tests.helpers.pretended_accelerator`: numbers in host memory, with the checks and the counts of an accelerator."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")

aten = torch.ops.aten
BACKEND = torch.device("pretended", 0)
SHOWN = torch.device("cuda", 0)
#: part of the path of the files whose lines are named
_PACKAGE = "/src/vitscope/"

_INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
             aten._index_put_impl_.default}  # fmt: skip
#: operations that do not even take a number of the host without dimensions
_STRICT = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.mv.default, aten.addmv.default, aten.dot.default,
           aten.cat.default, aten.stack.default, aten.convolution.default, aten.native_layer_norm.default}  # fmt: skip
#: operations whose result the host waits for
_WAITING = {
    aten._local_scalar_dense.default: "item", aten.is_nonzero.default: "bool", aten.equal.default: "equal",
    aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select", aten._unique2.default: "unique",
    aten.unique_dim.default: "unique", aten.unique_consecutive.default: "unique", aten.bincount.default: "bincount",
}  # fmt: skip


@dataclass
class Observations:
    """What was seen.

    Attributes:
        faults: Text and line of each operation that an accelerator refuses.
        reads: Number of reads by the host, by kind and line.
        copies: Number of copies to the accelerator, by line.
    """

    faults: list[str] = field(default_factory=list)
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Forget all of it."""
        self.faults.clear()
        self.reads.clear()
        self.copies.clear()

    def refuse(self, text: str) -> None:
        """Note a fault and raise."""
        self.faults.append(f"{calling_line()}: {text}")
        raise RuntimeError(f"{text} [{calling_line()}]")


SEEN = Observations()


def calling_line() -> str:
    """Return file and line of the innermost frame of the package."""
    frame = sys._getframe(1)
    while frame is not None:
        is_mode = frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__")
        if _PACKAGE in frame.f_code.co_filename and not is_mode:
            return f"{frame.f_code.co_filename.split(_PACKAGE)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


class DeviceTensor(torch.Tensor):
    """A tensor of the accelerator; ``values`` is the one of the host that holds its numbers."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type, values: Tensor, requires_grad: bool = False) -> Any:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=BACKEND, requires_grad=requires_grad,
        )  # fmt: skip
        tensor.values = values
        return tensor

    device = property(lambda self: SHOWN)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        SEEN.refuse("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        SEEN.reads["tolist", calling_line()] += 1
        return self.values.detach().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


def _host(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.values
    if isinstance(value, torch.device) and value.type in (BACKEND.type, SHOWN.type):
        return torch.device("cpu")
    return value


def _is_host_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DeviceTensor)


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers in host memory, after the checks that an accelerator makes."""
    leaves = tree_leaves((args, kwargs))
    on_device = [t for t in leaves if isinstance(t, DeviceTensor)]
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    to_device = target is not None and target.type in (BACKEND.type, SHOWN.type)
    if func is aten._to_copy.default:
        return _copied(func, args[0], kwargs, isinstance(args[0], DeviceTensor) if target is None else to_device)
    if func is aten.copy_.default:
        return _copied_into(*args[:2])
    generator = kwargs.get("generator")
    if (on_device or to_device) and generator is not None and generator.device.type == "cpu":
        SEEN.refuse(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if not on_device and not to_device:
        return func(*args, **kwargs)
    stays_on_host = target is not None and not to_device  # new_zeros(device="cpu") of a tensor of the accelerator
    if on_device and not stays_on_host:
        _check_devices(func, args, leaves)
        if func in _WAITING:
            SEEN.reads[_WAITING[func], calling_line()] += 1
    host_args, host_kwargs = tree_map(_host, (args, kwargs))
    host_kwargs.pop("pin_memory", None)
    result = func(*host_args, **host_kwargs)
    if stays_on_host or not isinstance(result, Tensor | tuple | list):
        return result
    by_values = {id(t.values): t for t in on_device}  # an operation in place returns its argument

    def wrap(value: Any) -> Any:
        if not _is_host_tensor(value):
            return value
        return by_values[id(value)] if id(value) in by_values else DeviceTensor(value)

    wrapped = tree_map(wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_device else wrapped


def _copied(func: Any, source: Tensor, kwargs: dict[str, Any], to_device: bool) -> Tensor:
    host_kwargs = {name: _host(value) for name, value in kwargs.items() if value is not None}
    values = func(_host(source), **host_kwargs)
    if to_device:
        if _is_host_tensor(source):
            SEEN.copies[calling_line()] += 1
        return DeviceTensor(values)
    if isinstance(source, DeviceTensor):
        SEEN.reads["cpu", calling_line()] += 1
        if values.untyped_storage().data_ptr() == source.values.untyped_storage().data_ptr():
            return values.clone()
    return values


def _copied_into(target: Tensor, source: Tensor) -> Tensor:
    if isinstance(source, DeviceTensor) and _is_host_tensor(target):
        SEEN.reads["copy_", calling_line()] += 1
    elif isinstance(target, DeviceTensor) and _is_host_tensor(source):
        SEEN.copies[calling_line()] += 1
    _host(target).copy_(_host(source))
    return target


def _check_devices(func: Any, args: Any, leaves: list[Any]) -> None:
    strangers = [t for t in leaves if _is_host_tensor(t)]
    if func in _INDEXING:
        if not isinstance(args[0], DeviceTensor):
            SEEN.refuse(f"indices should be either on cpu or on the same device as the indexed tensor ({func})")
        indices = [t for t in args[1] or () if isinstance(t, Tensor)]
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            SEEN.reads["mask as index", calling_line()] += 1
        SEEN.copies[calling_line()] += sum(map(_is_host_tensor, indices))
        strangers = [t for t in args[2:3] if _is_host_tensor(t)]
    if any(t.ndim > 0 or func in _STRICT for t in strangers):
        shapes = [tuple(t.shape) for t in strangers]
        SEEN.refuse(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func}; {shapes})"
        )


class DeviceDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})
