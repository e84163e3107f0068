"""Bytes of the tensors that a computation allocates: how many are alive at most, on any device, also on `meta`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """A context in which the storages that operations allocate are counted while they live.

    Tensors made before it do not count, nor do workspaces that an operation takes for itself and frees.

    Attributes:
        alive: Bytes that are allocated now.
        peak: The most that were allocated at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._counted: dict[int, weakref.finalize[..., Any]] = {}  # by identity of a living storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it allocates: outputs whose storage is none of an input's."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        input_storages = {
            id(storage) for tensor in tree_leaves((args, kwargs)) if (storage := _storage(tensor)) is not None
        }
        for tensor in tree_leaves(result):
            storage = _storage(tensor)
            if storage is not None and id(storage) not in input_storages and id(storage) not in self._counted:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        n_bytes, key = storage.nbytes(), id(storage)
        self.alive += n_bytes
        self.peak = max(self.peak, self.alive)

        def forget() -> None:
            self.alive -= n_bytes
            del self._counted[key]

        self._counted[key] = weakref.finalize(storage, forget)


def _storage(value: object) -> torch.UntypedStorage | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    try:
        return value.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a wrapper without a storage of its own
        return None


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a computation takes beside what was there before.

    Args:
        compute: The computation.
        device: The device that it runs on; on a GPU its allocator is asked, which counts workspaces too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as memory:
        compute()
    return memory.peak
