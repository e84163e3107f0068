"""Memory of a Lanczos basis: on the device, in the host's memory or in a file, all columns of its rows or a rank's share.

A basis of m rows takes m times as many bytes as the parameters. Ranks that run one search together, on an operator whose
products are reduced, each hold some columns of all rows: a rank's memory is the basis divided by the number of ranks, and inner
products are completed by a sum of m numbers over the ranks. A basis in the host's memory or in a file is multiplied by the CPU
where it is, since its rows are read once for each product: to copy them to a GPU would take longer than to multiply them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vitscope.runtime import distributed
from vitscope.runtime.errors import StorageError

#: ``auto`` takes the first of the others that has space
Placement = Literal["auto", "device", "cpu", "disk"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)
#: number of processes on this machine, as launchers state it
_LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"


class BasisBuffer:
    """Memory that one basis after another uses: taking pages from the operating system costs as much as filling them.

    Args:
        choice: One of `PLACEMENTS`. ``device`` is the memory of the operator's device, ``cpu`` the host's, ``disk`` a file
            without a name in the folder for temporary files (``TMPDIR``), which ends with the process.
        shared: Every rank runs one search on an operator whose products are reduced; each then holds its share of the columns.

    Attributes:
        placement: Place of the rows: ``device``, ``cpu`` or ``disk``; with ``auto`` ``device`` until `plan` has chosen.
    """

    def __init__(self, choice: str = "auto", *, shared: bool = False) -> None:
        check_placement(choice)
        self.choice, self.shared = choice, shared
        self.placement = "device" if choice == "auto" else choice
        self._kept: Tensor | None = None

    @property
    def n_shares(self) -> int:
        """Number of ranks among which the columns are divided."""
        return distributed.world_size() if self.shared else 1

    def share(self, size: int) -> int:
        """Return the columns of a rank, the same number on each: the last ones' may exceed the ``size``."""
        return -(-size // self.n_shares)

    def columns(self, size: int) -> slice:
        """Return which of the ``size`` columns this rank holds."""
        if self.n_shares == 1:
            return slice(0, size)
        share, rank = self.share(size), distributed.rank()
        return slice(min(rank * share, size), min((rank + 1) * share, size))

    def plan(self, like: Tensor, least: int, most: int, max_memory: float | None = None) -> int:
        """Choose where the rows will be; return how many fit, up to ``most``.

        Args:
            like: A vector ``(size,)`` whose size, dtype and device are used.
            least: Number of rows without which the basis is of no use.
            most: Number of rows beyond which more are of no use.
            max_memory: Bytes that the rows may take, those of all ranks together; None: a quarter of what is free, and where that
                is too little for ``least`` rows up to half.

        Raises:
            ValueError: Fewer than ``least`` rows fit.
        """
        row = like.element_size() * len(like)
        rows = 0
        choices = _candidates(like.device) if self.choice == "auto" else (self.choice,)
        for placement in choices:
            free = self._free(placement, like.device)
            if max_memory is None:
                rows = int(max(free / 4, min(free / 2, least * row)) // row)
            else:
                rows = int(max_memory // row)
                if placement != choices[-1] and min(rows, most) * row > free:
                    continue
            if rows >= least:
                self.placement = placement
                return min(rows, most)
        name = "max_memory" if max_memory is not None else f"memory (basis={self.choice})"
        raise ValueError(
            f"Expected {name} for at least {least} vectors of {row / 2**20:.1f} MiB ({least * row / 2**20:.0f} MiB), "
            f"received {rows * row / 2**20:.0f} MiB: ask for fewer eigenvalues, steps or parameters, "
            "or use a micro_batch."
        )

    def rows(self, capacity: int, like: Tensor) -> Tensor:
        """Return ``(capacity, share)``, of the dtype of ``like (size,)``; the rows given before are lost.

        Raises:
            StorageError: The disk has no space for the file.
        """
        share = self.share(len(like))
        device = like.device if self.placement == "device" else torch.device("cpu")
        buffer, kind = self._kept, (share, like.dtype, device)
        if buffer is None or len(buffer) < capacity or (buffer.shape[1], buffer.dtype, buffer.device) != kind:
            self._kept = None  # freed before its successor is made
            with distributed.failing_together(self.shared):
                if self.placement == "disk":
                    buffer = _mapped(capacity, share, like.dtype)
                else:
                    buffer = torch.empty(capacity, share, dtype=like.dtype, device=device)
            self._kept = buffer
        return buffer[:capacity]

    def _free(self, placement: str, device: torch.device) -> float:
        """Return the bytes for the rows of all ranks together, where each rank has as many as the one that has the fewest."""
        free = free_bytes(placement, device)
        if self._kept is not None and placement == self.placement:
            free += self._kept.numel() * self._kept.element_size()
        if self.n_shares == 1:
            return free
        return min(distributed.gather_objects(free)) * self.n_shares


def check_placement(choice: str) -> None:
    """Check the name of a place for a basis.

    Raises:
        ValueError: An unknown name.
    """
    if choice not in PLACEMENTS:
        raise ValueError(f"Expected basis to be one of {', '.join(PLACEMENTS)}, received {choice!r}.")


def placements_of(buffers: Sequence[BasisBuffer]) -> str | None:
    """Return where the bases of a measure are, for its card; None where it had none."""
    return ", ".join(dict.fromkeys(buffer.placement for buffer in buffers)) or None


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on ``device``; on Linux's host with the file cache, which gives way."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _candidates(device: torch.device) -> tuple[str, ...]:
    return ("device", "disk") if device.type == "cpu" else ("device", "cpu", "disk")


def free_bytes(placement: str, device: torch.device) -> float:
    """Return the free bytes of one process: what processes share on a machine is divided among them."""
    if placement == "device" and device.type != "cpu":
        return free_memory(device)
    n_here = int(os.environ.get(_LOCAL_WORLD_SIZE, "1")) if distributed.world_size() > 1 else 1
    if placement == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free / n_here
    return free_memory(torch.device("cpu")) / n_here


def _mapped(capacity: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor in a file without a name, see `file_tensor`."""
    raw = file_tensor(capacity * size * dtype.itemsize, "basis", "set TMPDIR to a larger disk, or max_memory to less")
    return raw.view(dtype).view(capacity, size)


def file_tensor(n_bytes: int, key: str, fix: str) -> Tensor:
    """Return uninitialized bytes ``(n_bytes,)`` in a mapped file without a name in the folder for temporary files (``TMPDIR``).

    Its blocks are reserved, so that writing cannot fail; the file ends with the tensor, or with the process.

    Args:
        n_bytes: Number of bytes.
        key: The configuration's key that asked for a file, for the error.
        fix: Advice for the error where there is no space.

    Raises:
        StorageError: The disk has no space.
    """
    if n_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder, prefix=f"vitscope-{key.rpartition('.')[2]}-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            reason = f"no {n_bytes / 2**20:.0f} MiB can be reserved in {folder} ({error.strerror})"
            raise StorageError(key, "disk", reason, fix) from error
        raw = np.memmap(file, dtype=np.uint8, mode="r+", shape=(n_bytes,))
    return torch.from_numpy(raw)
