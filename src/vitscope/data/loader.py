"""Loaders that can resume within an epoch: the images of batch b of epoch e are a pure function of the seed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vitscope.data import file_descriptors, philox
from vitscope.data.augment.augment import Recipe
from vitscope.runtime.errors import DataError, VitscopeError, first_line
from vitscope.runtime.torch_internals import replace_unsent_items, shut_workers_down, worker_processes


class Draw(NamedTuple):
    """One batch before it is read: what a dataset's `__getitems__` receives."""

    epoch: int
    indices: NDArray[np.int64]


class BatchSampler(Sampler[Draw]):
    """Batches of indices as a function of (seed, epoch, batch), disjoint under ranks.

    The epoch's order is cut in global batches of `batch_size * world_size`; a rank takes every `world_size`-th
    image of each. Nothing is padded or repeated: the last global batch is smaller, and one with fewer images
    than ranks joins the batch before it, so that all ranks take the same number of steps and none is empty.

    Args:
        n: Number of images in the split.
        batch_size: Images a batch and rank.
        shuffle: Not in the split's own order: a new one each epoch.
        fixed: With `shuffle`, the same order in each epoch.
        seed: Seed of the order.
        rank: This process's rank.
        world_size: Number of processes.
        drop_last: Leave out the last, smaller global batch.
        name: The split, for the error.

    Raises:
        DataError: There would be no step at all.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        shuffle: bool,
        fixed: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        name: str = "split",
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch, self.fixed = 0, fixed
        self._resumed = (0, 0)
        full, rest = divmod(n, batch_size * world_size)
        self._length = full + (not drop_last and rest >= world_size)
        if self._length == 0:
            ranks = f" a rank on {world_size} ranks" if world_size > 1 else ""
            dropped = " and drop_last leaves no batch" if drop_last else ", too few for one batch"
            fix = "lower data.batch_size or set data.drop_last=false" if drop_last else "use more data"
            raise DataError("data.batch_size", f"{batch_size}{ranks}", f"{name} has {n} images{dropped}", fix)

    @property
    def sampler(self) -> BatchSampler:
        """Itself: where Lightning looks for `set_epoch` at the start of each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next pass uses."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Go to `epoch` and start its passes at `batch`; later epochs start at 0 again.

        Raises:
            ValueError: The epoch is negative or has no such batch.
        """
        if epoch < 0 or not 0 <= batch <= self._length:
            raise ValueError(f"Expected an epoch >= 0 and a batch in 0..{self._length}, received {epoch} and {batch}.")
        self._resumed = (epoch, batch)
        self.epoch = epoch

    def batch(self, epoch: int, index: int) -> Draw:
        """Return batch `index` of `epoch` on this rank."""
        return self._cut(self._order(epoch), epoch, index)

    def __len__(self) -> int:
        """Number of batches in a full epoch, wherever it starts."""
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        order = self._order(epoch)
        start = self._resumed[1] if epoch == self._resumed[0] else 0
        return (self._cut(order, epoch, index) for index in range(start, self._length))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.n)
        return philox.permutation(self.n, seed=self.seed, stream=philox.ORDER, epoch=0 if self.fixed else epoch)

    def _cut(self, order: NDArray[np.int64], epoch: int, index: int) -> Draw:
        size = self.batch_size * self.world_size
        last = index == self._length - 1 and not self.drop_last
        globally = order[index * size : None if last else (index + 1) * size]
        return Draw(epoch, globally[self.rank :: self.world_size])


class Loader(DataLoader[Any]):
    """A `DataLoader` whose failures are one-line errors, from the main process and from workers alike.

    Args:
        dataset: A dataset with `__getitems__(draw: Draw)` that returns the whole batch.
        batch_sampler: Where each batch comes from.
        num_workers: Worker processes, at most one a CPU; they stay alive between epochs.
        pin_memory: Copy batches to page-locked memory.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_sampler: BatchSampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        num_workers = min(num_workers, os.cpu_count() or 1)
        super().__init__(
            _ErrorsAsValues(dataset),
            batch_sampler=batch_sampler,  # pyright: ignore[reportArgumentType]  yields a `Draw` a batch, torch annotates lists
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_unchanged,
            persistent_workers=num_workers > 0,
            worker_init_fn=_prepare_worker,
        )

    def __iter__(self) -> Iterator[Any]:
        """Yield batches.

        Raises:
            DataError: An image could not be read (with its path), or a worker process died.
            StorageError: No file descriptor is left, here or in a worker.
        """
        try:
            batches = super().__iter__()
        except OSError as error:  # a worker that cannot be started
            raise (file_descriptors.shortage() if file_descriptors.is_shortage(error) else error) from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if file_descriptors.is_shortage(error) or self._cannot_hand_over(error):
                    self.stop_workers()
                    raise file_descriptors.shortage() from error
                if "DataLoader worker" not in str(error):
                    raise
                self.stop_workers()
                problem = "a loader worker was killed (out of memory?)"
                raise DataError("data.num_workers", self.num_workers, problem, "try fewer workers, or 0") from error
            if isinstance(batch, VitscopeError):
                self.stop_workers()
                raise batch
            yield batch

    def _cannot_hand_over(self, error: BaseException) -> bool:
        """Tell whether workers that live could not send what they had read, which takes them a descriptor."""
        workers = worker_processes(self)
        alive = bool(workers) and all(worker.is_alive() for worker in workers)
        return isinstance(error, EOFError | ConnectionError) and alive

    def stop_workers(self) -> None:
        """End the worker processes now: left to the garbage collector, each takes five seconds."""
        shut_workers_down(self)


class Augmented(Dataset[Any]):
    """Images with a recipe: a batch is a function of its draw and the seed.

    Args:
        images: `ArrayImages` or `FileImages`.
        recipe: What happens to them.
        seed: Seed of their augmentation.
    """

    def __init__(self, images: Any, recipe: Recipe, seed: int) -> None:
        self.images, self.recipe, self.seed = images, recipe, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        x, y = self.__getitems__(Draw(0, np.array([index])))
        return x[0], y[0]

    def __getitems__(self, draw: Draw) -> Any:
        """Return the batch `(x, y)` of a draw."""
        return self.images.batch(philox.Key(draw.indices, draw.epoch, philox.AUGMENT, self.seed), self.recipe)


class _ErrorsAsValues(Dataset[Any]):
    """Hands a `VitscopeError` over as a value: raised in a worker it would arrive as text with a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        return self.__getitems__(draw)

    def __getitems__(self, draw: Draw) -> Any:
        try:
            batch = self.dataset.__getitems__(draw)
            if get_worker_info() is not None:
                file_descriptors.check_spare()
        except VitscopeError as error:
            return error
        except (RuntimeError, OSError) as error:
            if not file_descriptors.is_shortage(error):
                raise
            return file_descriptors.shortage()
        return batch


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(_worker: int) -> None:
    # Ctrl-C reaches the whole process group: the parent decides, workers go on feeding it until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replace_unsent_items(_error_in_place_of)


def _error_in_place_of(error: Exception, item: Any) -> Any:
    """Return the item ``(index, error)`` in place of a batch ``(index, batch)`` that a worker cannot send."""
    index = item[0] if isinstance(item, tuple) else None
    if file_descriptors.is_shortage(error):
        return index, file_descriptors.shortage()
    reason = f"a loader worker cannot send its batch ({type(error).__name__}: {first_line(error)})"
    return index, DataError("data.num_workers", None, reason, "set data.num_workers=0")
