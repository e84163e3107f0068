"""A basis split over ranks, in a file, or where there is space: the numbers of one process, and bytes that are counted."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import make
from tests.fixtures.programs.processes import on_ranks
from tests.linalg.test_lanczos import SPECTRA, matrix, product_of, start_for
from vitscope.linalg import basis_memory
from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.eigensolver import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.krylov_basis import Basis
from vitscope.linalg.partial_reorthogonalization import SemiorthogonalLanczos
from vitscope.runtime import distributed, progress
from vitscope.runtime.errors import StorageError

WORLD = 3
#: rows and columns: more of them than ranks or fewer, divisible by their number or not
SEARCHES: dict[str, Callable[[BasisBuffer], Eigenpairs]] = {
    "restarted": lambda memory: search("both signs", memory, k=3, which="both", tol=1e-9, max_memory=20 * 120 * 8),
    "repeated": lambda memory: search("repeated", memory, k=4),  # breaks down: random vectors continue
    "uneven": lambda memory: search("uneven", memory, k=3),
    "fewer than ranks": lambda memory: search("two", memory, k=1),
}
MATRICES = {**SPECTRA, "uneven": np.linspace(-3, 5, 31), "two": np.array([2.0, -1.0])}


def search(name: str, memory: BasisBuffer, **options) -> Eigenpairs:
    a = matrix(MATRICES[name])
    return extreme_eigenvalues(product_of(a), start_for(a), vectors=True, shared=True, memory=memory, **options)


def measures() -> dict[str, np.ndarray]:
    """Return numbers of measures whose products are shared among ranks."""
    model, x, y = make("conv")
    probe = vs.Probe(model, list(zip(x.split(5), y.split(5))), vs.Objective(weight_decay=0.1))
    return {
        "eigenvalues": vs.hessian_eigenvalues(probe, k=3, tol=1e-9, eigenvectors=True).eigenvalues,
        "density": vs.spectral_density(probe, n_vectors=2, n_steps=8).nodes,
        "hutch++": vs.hessian_trace(probe, n_vectors=9, method="hutch++").estimates,
    }


def stored_bytes(memory: BasisBuffer) -> int:
    """Return the bytes behind a buffer's rows, whatever their shape says."""
    rows = memory._kept
    assert rows is not None
    return rows.untyped_storage().nbytes()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    progress.enabled = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    buffers: list[BasisBuffer] = []
    results: dict[str, object] = {}
    for name, run in SEARCHES.items():
        buffers.append(BasisBuffer(shared=True))
        pairs = run(buffers[-1])
        results[name] = (pairs.values, pairs.residuals, pairs.vectors, stored_bytes(buffers[-1]), pairs.n_products)
    rows_given: list[int] = []
    rows = BasisBuffer.rows

    def counted(self: BasisBuffer, capacity: int, like: torch.Tensor) -> torch.Tensor:
        given = rows(self, capacity, like)
        rows_given.append(given.numel() // capacity)
        return given

    BasisBuffer.rows = counted
    results["measures"] = measures()
    results["columns"] = sorted(set(rows_given))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, str(folder), n=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", SEARCHES)
def test_each_rank_holds_its_share_and_all_return_one_process_s_numbers(ranks: list[dict], name: str):
    memory = BasisBuffer(shared=True)
    one = SEARCHES[name](memory)
    assert one.vectors is not None
    size = one.vectors.shape[1]
    for values, residuals, vectors, n_bytes, n_products in (results[name] for results in ranks):
        assert n_products == one.n_products
        # inner products are sums in another order, float64
        np.testing.assert_allclose(values, one.values, rtol=0, atol=1e-10 * np.abs(one.values).max())
        np.testing.assert_allclose(residuals, one.residuals, rtol=1e-4, atol=1e-8)
        assert torch.equal(vectors, ranks[0][name][2])
        assert torch.allclose(vectors @ vectors.T, torch.eye(len(vectors)).double(), atol=1e-10)
        assert n_bytes == stored_bytes(memory) // size * -(-size // WORLD)


def test_measures_share_their_bases(ranks: list[dict]):
    one = measures()
    size = sum(p.numel() for p in make("conv")[0].parameters())
    for results in ranks:
        assert results["columns"] == [-(-size // WORLD)]
        for name, values in one.items():
            np.testing.assert_allclose(results["measures"][name], values, rtol=0, atol=1e-10 * np.abs(values).max())


def test_a_file_changes_no_number_and_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(basis_memory.tempfile, "tempdir", str(tmp_path))
    a = matrix(SPECTRA["both signs"], torch.float32)
    memory = BasisBuffer("disk")
    options = {"k": 3, "which": "both", "max_memory": 24 * 120 * 4, "vectors": True}
    in_memory = extreme_eigenvalues(product_of(a), start_for(a), **options)
    in_file = extreme_eigenvalues(product_of(a), start_for(a), **options, memory=memory)
    np.testing.assert_array_equal(in_memory.values, in_file.values)
    assert in_memory.vectors is not None
    assert in_file.vectors is not None
    assert torch.equal(in_memory.vectors, in_file.vectors)
    assert memory.placement == "disk"
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/" in maps  # the rows are those of the file
    assert "(deleted)" in maps


def test_measures_state_where_their_basis_is():
    model, x, y = make("conv")
    probe = vs.Probe(model, [(x, y)], vs.Objective())
    for measure, options in ((vs.hessian_eigenvalues, {"k": 2}), (vs.spectral_density, {"n_vectors": 2, "n_steps": 6}),
                             (vs.hessian_trace, {"n_vectors": 6, "method": "hutch++"}),
                             (vs.hessian_max_eigenvalue_spectrum, {"n_top": 2})):  # fmt: skip
        results = {basis: measure(probe, basis=basis, **options) for basis in ("auto", "disk")}
        assert results["auto"].card.solver["basis"] == "device"
        assert results["disk"].card.solver["basis"] == "disk"
        assert results["auto"].scalars() == results["disk"].scalars()
        assert results["auto"].card.differences(results["disk"].card) == []
    with pytest.raises(ValueError, match=r"Expected basis to be one of auto, device, cpu, disk, received 'ram'\."):
        vs.hessian_eigenvalues(probe, basis="ram")


def test_the_first_place_with_space_is_taken(monkeypatch: pytest.MonkeyPatch):
    like = torch.zeros(10, dtype=torch.float64)  # rows of 80 bytes
    free = {"device": 0.0, "cpu": 0.0, "disk": 0.0}
    monkeypatch.setattr(basis_memory, "free_bytes", lambda placement, device: free[placement])
    monkeypatch.setattr(basis_memory, "_candidates", lambda device: ("device", "cpu", "disk"))

    def planned(choice: str = "auto", **options) -> tuple[str, int]:
        memory = BasisBuffer(choice)
        rows = memory.plan(like, 6, 12, **options)
        return memory.placement, rows

    free.update(device=4 * 12 * 80, cpu=1e9, disk=1e9)
    assert planned() == ("device", 12)  # a quarter of what is free
    free["device"] = 2 * 6 * 80
    assert planned() == ("device", 6)  # up to half for the rows without which there is nothing to do
    free["device"] -= 1
    assert planned() == ("cpu", 12)
    free["cpu"] = 0.0
    assert planned() == ("disk", 12)
    assert planned(max_memory=7 * 80) == ("device", 7)
    free["device"] = 7 * 80 - 1
    assert planned(max_memory=7 * 80) == ("disk", 7)
    with pytest.raises(ValueError, match=r"Expected memory \(basis=cpu\) for at least 6 vectors .* received 0 MiB"):
        planned("cpu")
    with pytest.raises(ValueError, match="Expected max_memory for at least 6 vectors"):
        planned(max_memory=5 * 80)


def test_ranks_plan_with_the_memory_of_the_poorest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, 4 * 80.0, value, value])
    monkeypatch.setattr(basis_memory, "free_bytes", lambda placement, device: 1e6)
    like = torch.zeros(10, dtype=torch.float64)
    assert BasisBuffer(shared=True).plan(like, 1, 100) == 4  # a quarter of 320 bytes on each of 4 ranks
    assert BasisBuffer().plan(like, 1, 100) == 100


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(basis_memory, "free_memory", lambda device: 800.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert basis_memory.free_bytes("device", torch.device("cpu")) == 800.0  # one process: the variable is another's
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    assert basis_memory.free_bytes("device", torch.device("cpu")) == 200.0


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(basis_memory.os, "posix_fallocate", full)
    with pytest.raises(
        StorageError, match=r"basis=disk: no 1 MiB can be reserved in .* \(No space left on device\); set TMPDIR"
    ):
        Basis(16, torch.zeros(1 << 14), BasisBuffer("disk"))


def test_a_row_that_was_orthogonalized_again_is_that_of_the_file(tmp_path: Path):
    """Full reorthogonalization reads the row after those in use, also of a basis in a file."""
    a = matrix(SPECTRA["clustered"])
    process = SemiorthogonalLanczos(product_of(a), start_for(a), 40, memory=BasisBuffer("disk"))
    for _ in range(39):
        process.step()
    q = process.basis.rows[:39].double() * torch.from_numpy(process.basis.scales[:39, None])
    assert process.cleaned > 0
    assert float((q @ q.T - torch.eye(39)).abs().max()) < 1e-7  # the root of the precision
