"""The process group of an analysis in several processes, and the end of a job in which one of them hangs.

A fixed timeout of the group would end a job whose ranks have rows of different lengths: of a landscape over many images a row
takes hours. So operations wait as long as the job advances. Each rank counts batches, products and rows (`stop_flag.check`) and
collective operations, and publishes the count; a rank that waits while no count of any rank has changed for ``timeout_s``
seconds ends its process with exit code 7.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vitscope.analyses.rank_request import RankRequest, launched_world_size
from vitscope.runs import run_end
from vitscope.runtime import distributed, stop_flag
from vitscope.runtime.errors import ConfigError, DistributedError

#: timeout of the group itself; the watchdog ends a job that does not advance long before
_GROUP_TIMEOUT = datetime.timedelta(days=365)
#: seconds between two looks of the watchdog at most, and its share of the timeout
_LONGEST_INTERVAL, _INTERVALS = 5.0, 10.0
#: port of a SLURM job whose id ends in 0000, as in Lightning
_FIRST_PORT = 15000
#: gloo for tensors on the CPU, which measures sum up too, and nccl for those on a GPU
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@contextlib.contextmanager
def joined(request: RankRequest | None, device: str) -> Iterator[None]:
    """Be a rank of the process group that a launcher's environment describes; do nothing for one process.

    Args:
        request: The request that `take_request` returned; None for one process.
        device: ``auto``, ``cpu`` or ``cuda``; a rank on GPUs takes the one of its local number.

    Raises:
        ConfigError: More processes than GPUs on this machine.
        DistributedError: Another process did not arrive in time.
    """
    if request is None or launched_world_size() == 1:
        yield
        return
    _describe_slurm_step()
    is_on_gpu = device != "cpu" and torch.cuda.is_available()
    if is_on_gpu:
        torch.cuda.set_device(_local_gpu())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=request.timeout_s)
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
        watchdog = _Watchdog(_own_connection(store), rank, world, request.timeout_s)
        dist.init_process_group(
            _BACKENDS["cuda" if is_on_gpu else "cpu"],
            store=PrefixStore("analysis", store),
            rank=rank,
            world_size=world,
            timeout=_GROUP_TIMEOUT,
        )
    except (dist.DistError, RuntimeError) as error:
        reason = f"not all {world} processes arrived within {request.timeout_s:g} s"
        raise DistributedError("trainer.devices", None, reason, "see their output") from error
    watchdog.start()
    try:
        yield
        distributed.gather_objects(None)  # the store is rank 0's: it stays until all are done
        watchdog.stop()
        dist.destroy_process_group()
    finally:
        watchdog.stop()


def _describe_slurm_step() -> None:
    """Set torchrun's variables from those of a SLURM step."""
    if "RANK" in os.environ:
        return
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
    }
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])))


def _local_gpu() -> int:
    local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local < n_gpus:
        return local
    if n_gpus == 1 and "SLURM_PROCID" in os.environ:  # each task sees its own GPU alone
        return 0
    reason = f"process {local} of this machine has no GPU: there are {n_gpus}"
    raise ConfigError("device", "cuda", reason, f"start {n_gpus} processes a machine, or set device=cpu")


def _own_connection(store: Store) -> Store:
    """Return another connection to a store: the group's may be held by a call that waits."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.clone()


class _Watchdog(threading.Thread):
    """Ends the process where it waits and no rank advances."""

    def __init__(self, store: Store, rank: int, world: int, timeout_s: float) -> None:
        super().__init__(name="analysis-watchdog", daemon=True)
        self._store = store
        self._rank, self._world, self._timeout_s = rank, world, timeout_s
        self._ended = threading.Event()
        self._interval = min(_LONGEST_INTERVAL, timeout_s / _INTERVALS)
        store.set_timeout(datetime.timedelta(seconds=max(1.0, self._interval)))
        self._publish()

    def run(self) -> None:
        """Look until `stop`."""
        counts: tuple[bytes, ...] = ()
        last_change = time.monotonic()
        while not self._ended.wait(self._interval):
            try:
                self._publish()
                current = tuple(self._store.get(f"progress/{rank}") for rank in range(self._world))
            except RuntimeError:  # the rank that holds the store does not answer: nothing is known to have advanced
                current = counts
            if current != counts:
                counts, last_change = current, time.monotonic()
            elif distributed.is_waiting() and time.monotonic() - last_change > self._timeout_s:
                self._end_process()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()

    def _publish(self) -> None:
        self._store.set(f"progress/{self._rank}", str(stop_flag.n_checks() + distributed.n_collectives()))

    def _end_process(self) -> None:
        if self._ended.is_set():
            return
        reason = f"another process died or hangs (no process advanced for {self._timeout_s:g} s)"
        error = DistributedError("trainer.devices", None, reason, "see its output")
        prefix = f"rank {self._rank}: " if self._rank else ""
        run_end.log_traceback(f"rank {self._rank}: {error}\n")
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        os._exit(DistributedError.exit_code)
