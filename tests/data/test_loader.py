from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscope.data.loader import BatchSampler, Loader
from vitscope.runtime.errors import DataError, StorageError

FUZZ = int(os.environ.get("FUZZ", "0"))


class Numbers(torch.utils.data.Dataset):
    """Returns what it was asked for: epoch and indices."""

    def __len__(self):
        return 40

    def __getitems__(self, draw):
        return torch.full((len(draw.indices),), draw.epoch), torch.from_numpy(draw.indices)


class Broken(Numbers):
    def __getitems__(self, draw):
        if 7 in draw.indices:
            raise DataError("data.root", "images", "7.jpg is truncated", "replace it")
        return super().__getitems__(draw)


class Deadly(Numbers):
    def __getitems__(self, draw):
        if 7 in draw.indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(draw)


@settings(max_examples=max(150, FUZZ), deadline=None)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
    cut=st.floats(0, 1),
)
def test_each_index_once_for_any_size_batch_ranks_and_cut(n, batch_size, world, shuffle, epoch, cut):
    if n < world:
        with pytest.raises(DataError, match="too few for one batch"):
            BatchSampler(n, batch_size, shuffle=shuffle, world_size=world)
        return
    before, after, sizes = [], [], []
    for rank in range(world):
        sampler = BatchSampler(n, batch_size, shuffle=shuffle, seed=5, rank=rank, world_size=world)
        start = int(cut * len(sampler))
        before += [sampler.batch(epoch, index).indices for index in range(start)]
        sampler.resume_at(epoch, start)
        rest = list(sampler)
        assert len(sampler) == start + len(rest)
        assert all(draw.epoch == epoch for draw in rest)
        after += [draw.indices for draw in rest]
        sizes.append(len(sampler))
    seen = np.concatenate(before + after)
    np.testing.assert_array_equal(np.sort(seen), np.arange(n))
    assert len(set(sizes)) == 1  # all ranks take the same number of steps
    assert min(len(batch) for batch in before + after) >= 1


@settings(max_examples=max(60, FUZZ), deadline=None)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 12), world=st.integers(1, 4))
def test_drop_last_gives_full_batches_of_distinct_images(n, batch_size, world):
    if n < batch_size * world:
        with pytest.raises(DataError, match="drop_last leaves no batch"):
            BatchSampler(n, batch_size, shuffle=True, world_size=world, drop_last=True)
        return
    batches = [
        draw.indices
        for rank in range(world)
        for draw in BatchSampler(n, batch_size, shuffle=True, rank=rank, world_size=world, drop_last=True)
    ]
    assert {len(batch) for batch in batches} == {batch_size}
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) == n // (batch_size * world) * batch_size * world


def test_ranks_share_the_global_batches_of_a_single_process():
    alone = [draw.indices for draw in BatchSampler(37, 8, shuffle=True, seed=1)]
    ranks = [list(BatchSampler(37, 4, shuffle=True, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    for batch, (first, second) in zip(alone, zip(*ranks)):
        np.testing.assert_array_equal(np.sort(batch), np.sort(np.concatenate((first.indices, second.indices))))


def test_evaluation_order_is_the_splits_own():
    batches = [draw.indices.tolist() for draw in BatchSampler(7, 3, shuffle=False)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_only_the_resumed_epoch_starts_late():
    sampler = BatchSampler(40, 4, shuffle=True, seed=0)
    sampler.resume_at(3, 6)
    assert len(list(sampler)) == 4
    sampler.set_epoch(4)
    assert len(list(sampler)) == 10
    sampler.resume_at(3, 10)  # at the very end of the epoch
    assert list(sampler) == []


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 11)])
def test_a_position_that_does_not_exist_is_refused(epoch, batch):
    with pytest.raises(ValueError, match="Expected an epoch"):
        BatchSampler(40, 4, shuffle=True).resume_at(epoch, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_rest_of_the_epoch(workers):
    whole = BatchSampler(40, 6, shuffle=True, seed=9)
    whole.set_epoch(2)
    expected = [indices for _, indices in Loader(Numbers(), whole)]
    sampler = BatchSampler(40, 6, shuffle=True, seed=9)
    loader = Loader(Numbers(), sampler, num_workers=workers)
    sampler.resume_at(2, 3)
    assert len(loader) == 7
    for epoch in (2, 3, 2):  # the workers stay alive between these
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == (4 if epoch == 2 else 7)
        assert all((epochs == epoch).all() for epochs, _ in batches)
    for (_, indices), wanted in zip(batches, expected[3:]):
        assert torch.equal(indices, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_from_workers_too(workers):
    loader = Loader(Broken(), BatchSampler(40, 5, shuffle=False), num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == "data.root=images: 7.jpg is truncated; replace it"
    assert caught.value.exit_code == 3


def test_a_killed_worker_is_an_error_and_no_hang():
    loader = Loader(Deadly(), BatchSampler(40, 5, shuffle=False), num_workers=2)
    with pytest.raises(DataError, match=r"data.num_workers=2: a loader worker was killed"):
        list(loader)


class Hungry(Numbers):
    """Takes all descriptors of its process at the third batch, and leaves as many as it is told."""

    def __init__(self, left: int) -> None:
        self.left, self.opened = left, []

    def __getitems__(self, draw):
        if 12 in draw.indices:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with contextlib.suppress(OSError):
                while True:
                    self.opened.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(self.left):
                os.close(self.opened.pop())
        return super().__getitems__(draw)


class Unsent:
    """What a batch holds that cannot be pickled, as a tensor cannot without a descriptor."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self):
        raise self.error


class Unsendable(Numbers):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitems__(self, draw):
        return Unsent(self.error) if 7 in draw.indices else super().__getitems__(draw)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.EMFILE, "Too many open files"), StorageError, "too many open files"),
        (
            ValueError("no such type"),
            DataError,
            r"data\.num_workers: a loader worker cannot send its batch \(ValueError: no",
        ),
    ],
)
def test_a_batch_that_a_worker_cannot_send_is_an_error_and_no_hang(error, kind, text):
    """A thread of the worker pickles batches: its errors went to stderr, and the main process waited for ever."""
    loader = Loader(Unsendable(error), BatchSampler(40, 5, shuffle=False), num_workers=1)
    with pytest.raises(kind, match=text):
        list(loader)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's own clean-up fails too
@pytest.mark.parametrize("left", [0, 1, 4])
def test_a_worker_without_descriptors_is_a_storage_error_and_no_hang(left):
    loader = Loader(Hungry(left), BatchSampler(40, 5, shuffle=False), num_workers=1)
    with pytest.raises(StorageError, match="too many open files"):
        list(loader)


def test_a_process_that_cannot_start_workers_for_lack_of_descriptors():
    """In a child, since pytest needs descriptors as well."""
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with contextlib.suppress(OSError):
            while True:
                os.open(os.devnull, os.O_RDONLY)
        code = 1
        with contextlib.suppress(Exception):
            try:
                list(Loader(Numbers(), BatchSampler(40, 5, shuffle=False), num_workers=1))
            except StorageError as error:
                code = error.exit_code
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
