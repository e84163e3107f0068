"""Loops over batches and products do not make the host wait for the device, but for reads that are listed with their reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fixtures.oracles.host_reads import host_reads

SRC = Path(__file__).parents[2] / "src" / "vitscope"
#: packages whose code runs on the device
PACKAGES = ("core", "linalg", "diagnostics", "models", "training")

#: reads in hot code, by module and function: their number, and why they are there
ALLOWED: dict[str, tuple[int, str]] = {
    "core/evaluation.py::RunningEvaluation.add": (
        4,
        "losses and answers of each image go to the host where a measure asks for them",
    ),
    "diagnostics/cka/_batch_hsic.py::BatchHsic.add": (4, "one matrix a mini-batch; permutations are drawn on the host"),
    "diagnostics/tokens/_attention_collapse.py::AttentionCollapse.add": (1, "images with one position are left out"),
    "diagnostics/tokens/_attention_sinks.py::AttentionSinks.add": (1, "the largest share of each unit"),
    "diagnostics/tokens/_token_statistics.py::KeptRows.add": (2, "norms of tokens are kept on the host for histograms"),
    "training/accumulation.py::StepGroup.add": (3, "groups of several micro-batches alone: weights by labeled images"),
    "core/input_normalization.py::shown_images": (1, "the few images of a figure"),
    "diagnostics/adversarial/_square.py::square": (
        2,
        "a random search drops images that were fooled: fewer queries each time",
    ),
    "diagnostics/adversarial/adversarial.py::_row": (5, "five sums after each attack of some dozen passes"),
    "diagnostics/attention/_shown_images.py::_local_images": (4, "the few images of a figure"),
    "diagnostics/cka/_representations.py::FeatureStore.representations": (
        1,
        "features of all images are kept in host memory",
    ),
    "diagnostics/cka/cka.py::_Sums.close_batch": (
        2,
        "a matrix of taps by taps a batch, which intervals need one by one",
    ),
    "diagnostics/corruption/_conditions.py::_made": (2, "corruptions are made on the CPU"),
    "diagnostics/corruption/_transforms.py::glass_blur": (1, "of NumPy numbers"),
    "diagnostics/evaluation/evaluation.py::_seen": (1, "of a row that is on the host"),
    "diagnostics/gradient_noise/_hessian_moments.py::_weighted_gradient": (
        1,
        "labels are counted before the first pass",
    ),
    "diagnostics/gradient_noise/gradient_noise.py::gradient_noise": (1, "labels are counted before the first pass"),
    "diagnostics/hessian/nep_stability.py::_rows": (1, "of an option"),
    "diagnostics/kronecker/_kfac_factors.py::kronecker_factors_of": (1, "labels are counted before the first pass"),
    "diagnostics/kronecker/_kfac_factors.py::_LabeledBatches.__iter__": (1, "a batch without a label is left out"),
    "diagnostics/patch_pca/_sums.py::PatchSums.close_batch": (2, "maps of the few images of a figure"),
    "linalg/partial_reorthogonalization.py::SemiorthogonalLanczos.absorb": (1, "of NumPy numbers"),
}


def modules() -> list[Path]:
    paths = [path for package in PACKAGES for path in sorted((SRC / package).rglob("*.py"))]
    return [path for path in paths if not path.name.startswith("plot")]


def test_hot_loops_read_the_device_where_it_is_listed_and_nowhere_else() -> None:
    seen = {
        f"{path.relative_to(SRC).as_posix()}::{name}": count
        for path in modules()
        for name, count in host_reads(path).items()
    }
    more = {name: count for name, count in seen.items() if count > ALLOWED.get(name, (0, ""))[0]}
    assert not more, f"reads of the device in loops over batches or products: {more}"
    less = {name: count for name, (count, _) in ALLOWED.items() if seen.get(name, 0) < count}
    assert not less, f"listed, but no longer there: {less}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("total += float(loss)", 1),
        ("total += loss.item()", 1),
        ("rows.append(x.cpu().numpy())", 2),
        ("if bool(counts.all()): pass", 1),
        ("n = int(x.shape[0])", 0),
        ("n = float(np.abs(x).max())", 0),
        ("total += loss", 0),
    ],
)
def test_a_planted_read_is_found(tmp_path: Path, line: str, expected: int) -> None:
    module = tmp_path / "module.py"
    module.write_text(f"def f(probe):\n    for x, y in probe.iter_batches():\n        {line}\n")
    assert sum(host_reads(module).values()) == expected
    module.write_text(f"def f(probe):\n    for name in names:\n        {line}\n")
    assert not host_reads(module)
    module.write_text(f"class Sums:\n    def close_batch(self, number, n_images):\n        {line}\n")
    assert sum(host_reads(module).values()) == expected


#: collectives of torch that take a tensor, which a backend for GPUs takes of its device alone
TENSOR_COLLECTIVES = {
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter",
    "gather",
}


def test_collectives_of_tensors_are_where_their_device_is_seen_to() -> None:
    """`vitscope.runtime.distributed` reduces what measures pass; the others make or take tensors on their network's device."""
    calls = {
        (path.relative_to(SRC).as_posix(), node.func.attr)
        for path in sorted(SRC.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TENSOR_COLLECTIVES
        and ast.unparse(node.func.value).endswith(("dist", "torch.distributed"))
    }  # fmt: skip
    assert {path for path, _ in calls} == {
        "runtime/distributed.py",
        "training/stop_callbacks.py",
        "training/sharding/fsdp_strategy.py",
    }
