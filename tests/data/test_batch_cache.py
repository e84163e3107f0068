"""Caches of decoded batches: bit for bit what is read without one, each image read once, ranks read their share."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.images.counted_images import READS, counted_module, network
from tests.fixtures.images.small_data import STRONG
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.core.probe import Probe
from vitscope.data import batch_cache
from vitscope.data.batch_cache import DiskStore, MemoryStore, choose_place
from vitscope.data.probe_batches import ProbeBatches
from vitscope.linalg import basis_memory
from vitscope.runtime.errors import ConfigError, StorageError

CPU = torch.device("cpu")
CACHES = ("host", "device", "disk")

#: measures, the field that is compared, and the passes over all images that each makes without a cache: the images are read as
#: often as the formula of the measure needs them, and once more in part, when the guard looks at the first batch
MEASURES: dict[str, tuple[Any, str, int]] = {
    "landscape": (lambda probe: vs.loss_landscape(probe, n=5), "nll", 5),  # a pass for each of five rows of five points
    # a pass for the points on each of four directions, the center among those of the first
    "sharpness": (lambda probe: vs.sharpness(probe, radii=(0.05, 0.1), n_pairs=2, n_steps=0), "rise_by_pair", 4),
    "spectral_density": (lambda probe: vs.spectral_density(probe, n_vectors=2, n_steps=5), "nodes", 10),  # one a product
    "fourier": (vs.relative_log_amplitude, "log_amplitude", 1),
    "corruption": (lambda probe: vs.corruption(probe, types=["contrast"], severities=[1, 3]), "accuracy", 3),  # clean, and two
}  # fmt: skip


def probe_of(cache: str, **options: Any) -> Probe:
    data = counted_module()
    settings = {"split": "train", "n_images": 24, "batch_size": 8, **options}
    batches = data.probe_batches(**settings).cached(cache, CPU)
    return Probe(network(), batches, vs.Objective(), about={"mean": data.mean, "std": data.std})


def measured(name: str, cache: str) -> tuple[bytes, int, int]:
    """Return the bytes of a measure's numbers, and the fewest and most reads of one image."""
    measure, attribute, _ = MEASURES[name]
    READS.clear()
    values = getattr(measure(probe_of(cache)), attribute)
    raw = b"".join(np.asarray(v).tobytes() for v in values) if isinstance(values, tuple) else values.tobytes()
    assert len(READS) == 24
    return raw, min(READS.values()), max(READS.values())


@pytest.mark.parametrize("name", MEASURES)
def test_each_image_is_read_once_with_a_cache_and_the_numbers_are_the_same(name: str) -> None:
    numbers, fewest, most = measured(name, "none")
    passes = MEASURES[name][2]
    assert passes <= fewest <= passes + 2
    assert fewest <= most <= passes + 8  # images of the first batch, which taps and checks look at
    for cache in CACHES:
        assert measured(name, cache) == (numbers, 1, 1), cache


@pytest.mark.parametrize("cache", CACHES)
def test_augmented_and_mixed_batches_are_those_without_a_cache(cache: str) -> None:
    data = counted_module(**STRONG)
    settings: dict[str, Any] = {"split": "train", "augment": True, "n_images": 40, "batch_size": 16, "seed": 4}
    plain = data.probe_batches(**settings).cached("none", CPU)
    cached = data.probe_batches(**settings).cached(cache, CPU)
    for _ in range(2):  # a pass that fills, and one that reads
        for (x, y), (cached_x, cached_y) in zip(plain, cached, strict=True):
            assert torch.equal(x, cached_x)
            assert torch.equal(y, cached_y)
            cached_x.zero_()  # a copy: the next pass is not changed
    for (_, y), targets in zip(plain, plain.target_batches(), strict=True):
        assert torch.equal(y, targets)


def test_targets_are_counted_without_reading_an_image() -> None:
    for options in ({}, {"augment": True}):
        READS.clear()
        probe = probe_of("none", **options)
        assert (probe.n_images, probe.n_labeled, probe.batch_size) == (24, 24, 8)
        assert not READS


def test_the_images_of_a_probe_are_freed_with_it() -> None:
    """Without a cycle of references, for which a file of tens of gigabytes would wait until the garbage collector runs."""
    probe = probe_of("disk")
    batches = weakref.ref(probe.batches.source)
    gc.collect()
    gc.disable()
    try:
        result = vs.spectral_density(probe, n_vectors=1, n_steps=3)
        vs.loss_landscape(probe, n=2)
        assert batches() is not None
        del probe
        assert batches() is None
    finally:
        gc.enable()
    assert result.nodes.size


def _reads_of_a_rank() -> tuple[list[tuple[int, int]], list[float], set[int]]:
    probe = probe_of("host", n_images=None)
    READS.clear()
    result = vs.spectral_density(probe, n_vectors=1, n_steps=4)
    with probe.guard():
        share = {index for index, _ in probe.local_batches()}
    return sorted(READS.items()), result.nodes.tolist(), share


def test_a_rank_reads_its_share_and_the_first_batch_alone(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ranks = results_of_ranks(_reads_of_a_rank, tmp_path)
    _, nodes, _ = _reads_of_a_rank()
    for rank, (reads, nodes_of_rank, share) in enumerate(ranks):
        batches = set(range(rank, 8, 2))  # of 60 images, eight a batch
        assert share == batches
        expected = {i for b in batches | {0} for i in range(8 * b, min(8 * b + 8, 60))}
        assert dict(reads) == dict.fromkeys(expected, 1)
        # sums of float32 gradients in another order: 60 images, 8 batches, a handful of roundings of 6e-8
        np.testing.assert_allclose(nodes_of_rank, nodes, rtol=0, atol=1e-5 * np.abs(nodes).max())


def test_a_file_without_a_name_keeps_every_type_and_is_gone_at_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = DiskStore(4 * 3 * 4 + 3 * 8 + 5, CPU)
    assert list(tmp_path.iterdir()) == []  # no name from the first moment, so that a kill leaves nothing
    x, y = torch.randn(4, 3), torch.tensor([1, -100, 3])
    store.put(7, (x, y))
    assert store.get(0) is None
    for _ in range(2):
        stored_x, stored_y = store.get(7) or (x, y)
        assert torch.equal(stored_x, x)
        assert torch.equal(stored_y, y)
        assert stored_x is not x
        stored_x.zero_()
    with pytest.raises(ValueError, match="Expected batches of 77 bytes together, received 84"):
        store.put(8, (torch.zeros(3), y[:0]))


def test_a_disk_without_space_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="probe.cache=disk: no 2 MiB can be reserved in .*TMPDIR"):
        DiskStore(2 * 2**20, CPU)


def test_auto_takes_the_host_for_what_is_small_or_a_quarter_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 8.0 * 2**30, "device": 1.0 * 2**30, "disk": 4.0 * 2**30}
    monkeypatch.setattr(basis_memory, "free_bytes", lambda place, device: free[place])
    small, quarter = batch_cache.SMALL_BYTES, 2 * 2**30
    assert [choose_place("auto", n, CPU) for n in (1, small, small + 1, quarter, quarter + 1)] == ["host"] * 4 + [
        "none"
    ]
    assert choose_place("none", 1, CPU) == "none"
    assert choose_place("device", 1, CPU) == "host"
    assert choose_place("disk", quarter, CPU) == "disk"
    with pytest.raises(
        ConfigError, match=r"probe.cache=host: the images take 9.0 GiB and 8.0 GiB are free there; set probe.cache=disk"
    ):
        choose_place("host", 9 * 2**30, CPU)
    with pytest.raises(ConfigError, match=r"probe.cache=disk: .*TMPDIR on a larger disk"):
        choose_place("disk", 5 * 2**30, CPU)
    with pytest.raises(ConfigError, match=r"probe.cache=device: the images take 2.0 GiB and 1.0 GiB are free"):
        choose_place("device", 2 * 2**30, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"probe.cache=disc: no place for decoded images; did you mean disk"):
        choose_place("disc", 1, CPU)


def test_batches_too_large_for_memory_are_read_on_each_pass() -> None:
    built: list[int] = []
    batches = ProbeBatches(lambda b: built.append(b) or (torch.full((2,), b), torch.zeros(2)), 3, 6, 2**40)
    assert batches.is_read_again
    assert batches.cached("auto", CPU).place != "host"
    for _ in range(2):
        assert len(list(batches)) == 3
    assert built == [0, 1, 2] * 2


def test_host_memory_gives_copies() -> None:
    store = MemoryStore(CPU, CPU)
    store.put(0, (torch.ones(2), torch.zeros(2)))
    for _ in range(2):
        x, _ = store.get(0) or (torch.zeros(2), None)
        assert x.tolist() == [1, 1]
        x.zero_()
