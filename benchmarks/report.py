"""The report of 200 finished runs: wall time and peak memory of `python report.py`; lists and tables of 2,000 from their index.

    python benchmarks/report.py --runs 200
    python benchmarks/report.py --runs 2000 --index

Writes run folders with the default analyses' own result types (spectra of 16 batches, 21x21 surfaces, slices, Fourier
curves of 25 taps) and 2,000 journal rows each: 40 experiments (ten models, four learning rates) of five seeds. Then runs
the command in a process of its own. Memory is that of all its processes together. Goal: under 60 s and under 2 GB.
With `--index`: `vitscope runs list` and `vitscope report table=models` without an index, with the one that they wrote, and after
one run was added; their outputs must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from vitscope.core.objective_card import ObjectiveCard
from vitscope.diagnostics.fourier.relative_log_amplitude import RelativeLogAmplitudeResult
from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import HessianMaxEigenvalueSpectrumResult
from vitscope.diagnostics.landscape.loss_landscape import LossLandscapeResult
from vitscope.diagnostics.landscape.loss_slice import LossSliceResult
from vitscope.reports import entry_index
from vitscope.runs import result_store

SEEDS = 5
CARD = ObjectiveCard(loss="cross entropy", l2="half_sq", weight_decay=0.05, data="photos", split="train", n_images=256)


def spectrum(rng: np.random.Generator) -> HessianMaxEigenvalueSpectrumResult:
    values = rng.normal(50, 30, (16, 5))
    zero, one, nan = np.zeros((16, 5)), np.ones((16, 5), bool), float("nan")
    return HessianMaxEigenvalueSpectrumResult(
        eigenvalues=values, residuals=zero, errors=zero, converged=one, n_products=np.full(16, 20), l2_contribution=zero,
        largest=np.zeros((16, 0)), smallest=np.zeros((16, 0)), batches=np.arange(16),
        negative_eigenvalue_proportion=float((values < 0).mean()),
        negative_eigenvalue_proportion_interval=np.array([0.0, 0.1]),
        average_positive_eigenvalue=float(values[values > 0].mean()),
        average_positive_eigenvalue_interval=np.array([40.0, 60.0]), near_zero_proportion=0.0,
        top1_negative_eigenvalue_proportion=0.0, top1_average_positive_eigenvalue=50.0, smallest_negative_proportion=nan,
        largest_average=nan, grid=np.linspace(-50, 150, 400), density=np.exp(-np.linspace(-3, 3, 400) ** 2), card=CARD,
    )  # fmt: skip


def surface(rng: np.random.Generator) -> LossLandscapeResult:
    x = np.linspace(-1, 1, 21)
    z = 1 + rng.uniform(1, 3) * (x[:, None] ** 2 + x[None] ** 2)
    return LossLandscapeResult(
        x=x, y=x, nll=z, l2_half_sq=z, l2_sum_norm=z, accuracy=1 / z, ece=0.1 / z, directions="random",
        normalization="filter", preset="", direction_norms=np.ones(2), direction_cosine=0.0, weight_norm=1.0,
        n_nonfinite=0, dtype_error=None, labels=(), path=np.zeros((0, 2)), projection_error=np.zeros(0), card=CARD,
    )  # fmt: skip


def line(rng: np.random.Generator) -> LossSliceResult:
    x = np.linspace(-1, 1, 21)
    each = 1 + rng.uniform(1, 3, (10, 1)) * x**2
    y = each.mean(0)
    return LossSliceResult(
        x=x, nll=y, nll_low=y - 0.2, nll_high=y + 0.2, l2_half_sq=x**2, l2_sum_norm=np.abs(x), accuracy=1 / y, ece=0.1 / y,
        nll_by_direction=each, accuracy_by_direction=1 / each, directions="random", normalization="filter",
        direction_norms=np.ones(10), n_nonfinite=0, card=CARD,
    )  # fmt: skip


def fourier(rng: np.random.Generator) -> RelativeLogAmplitudeResult:
    n = 25  # taps of a ViT-Ti
    x = tuple(np.linspace(0, 0.75, 4) for _ in range(n))
    y = tuple(-rng.uniform(2, 5) * f for f in x)
    one, half = np.array([c[-1] for c in y]), tuple(0.1 + 0 * f for f in x)
    return RelativeLogAmplitudeResult(
        taps=tuple(f"tap {i}" for i in range(n)), kinds=("stem", *("msa", "mlp") * 12), stages=np.ones(n),
        depths=np.linspace(0, 1, n), map_sizes=np.full((n, 2), 8), normalized_frequency=x, paper_frequency=x,
        log_amplitude=y, log_amplitude_half_width=half, log_amplitude_size_corrected=y, log_amplitude_first_ac=y,
        high_frequency=one, high_frequency_half_width=0.1 + 0 * one, high_frequency_first_ac=one,
        high_frequency_change=np.append(np.nan, np.diff(one)), high_frequency_change_half_width=0.1 + 0 * one,
        ac_high_share=np.full(n, 0.1), level=0.95, n_images=256, card=CARD,
    )  # fmt: skip


def write_run(root: Path, number: int, rng: np.random.Generator) -> None:
    experiment, seed = divmod(number, SEEDS)
    model = {"_target_": "vitscope.models.vit", "size": "tiny", "patch_size": 4, "depth": 3 + experiment % 10}
    cfg = {
        "seed": seed,
        "model": {**model, "num_classes": 16, "image_size": 32, "in_chans": 3},
        "data": {"name": "photos", "image_size": 32, "num_classes": 16, "fraction": 1.0, "seed": seed},
        "objective": {"augment": "crop_flip", "weight_decay": 0.05, "l2": "half_sq"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3 * (1 + experiment // 10)},
        "trainer": {"max_epochs": 3, "max_steps": -1},
    }
    path = root / f"run-{number:04d}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(cfg))
    created = f"2026-01-01T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}+0000"
    facts = {"command": "train", "status": "finished", "seed": seed, "created": created}
    (path / "provenance.json").write_text(json.dumps(facts))
    loss = 2 * np.exp(-np.arange(2000) / 800) + 0.1 * rng.random(2000)
    rows = [{"step": i, "epoch": i // 700, "time": 0.0, "train/loss": float(v)} for i, v in enumerate(loss)]
    rows.append({"step": 2000, "epoch": 3, "time": 0.0, "test/accuracy": float(rng.uniform(0.4, 0.6)), "test/nll": 1.5,
                 "test/ece": 0.05, "test/brier": 0.6, "val/accuracy": 0.5})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for analysis, make in (("hessian", spectrum), ("landscape", surface), ("slice", line), ("fourier", fourier)):
        result_store.save(path / "results" / analysis, "end-00000000", make(rng))


def family(pid: int) -> list[int]:
    """Return a process and everything that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in task.read_text().split() for p in family(int(child))]
        except OSError:
            continue  # ended in the meantime
    return found


def resident(pid: int) -> int:
    """Return a process's memory in bytes, shared pages divided among those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def timed(*arguments: str) -> tuple[float, float, bytes]:
    """Run a command of vitscope; return its seconds, those of its processor, and its output."""
    before, started = os.times(), time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "vitscope", *arguments], stdout=subprocess.PIPE, check=True)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu, process.stdout


def compare_index(root: Path, n: int, rng: np.random.Generator) -> None:
    """Print the time of lists and tables without and with the index, and check that their outputs are equal."""
    runs = root / "runs"
    time.sleep(3)  # runs that were written just now are not kept
    commands = {
        "runs list": ("runs", "list", str(runs)),
        "report table=models": ("report", "table=models", f"paths.runs={runs}", f"out={root}/out"),
    }
    for name, command in commands.items():
        (runs / entry_index.FILE).unlink(missing_ok=True)
        outputs = []
        for title in ("without an index", "with it"):
            wall, cpu, output = timed(*command)
            outputs.append(output)
            print(f"{name}, {n} runs, {title}: wall {wall:.1f} s, processor {cpu:.1f} s")
        if outputs[0] != outputs[1]:
            raise SystemExit(f"{name}: the output with the index differs")
    print(f"index: {(runs / entry_index.FILE).stat().st_size / 2**20:.1f} MiB; equal outputs")
    write_run(runs, n, rng)
    wall, cpu, _ = timed(*commands["runs list"])
    print(f"runs list, one run added: wall {wall:.1f} s, processor {cpu:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--index", action="store_true", help="compare lists and tables without and with the index")
    arguments = parser.parse_args()
    n = arguments.runs
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        for number in range(n):
            write_run(root / "runs", number, rng)
        if arguments.index:
            compare_index(root, n, rng)
            return
        command = [sys.executable, "-m", "vitscope", "report", f"paths.runs={root}/runs", f"out={root}/out"]
        before, started = os.times(), time.perf_counter()
        with open(os.devnull, "w") as null:
            process = subprocess.Popen(command, stdout=null)
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(map(resident, family(process.pid))))
                time.sleep(0.2)
        wall, after = time.perf_counter() - started, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        page = (root / "out" / "report.html").stat().st_size
        figures = len(list((root / "out").glob("*.png")))
        print(f"{n} runs, {figures} figures, page {page / 1e6:.1f} MB, exit code {process.returncode}")
        print(f"wall {wall:.1f} s (goal 60), processor {cpu:.1f} s, peak memory {peak / 1e9:.2f} GB (goal 2)")


if __name__ == "__main__":
    main()
