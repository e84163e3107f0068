"""Claim: nothing grows and nothing is lost under load. Each part prints its figures; ``python benchmarks/soak.py [part ...]``.

Parts: ``rows`` (a million metric rows), ``saves`` (50 saves of 300 MB with random kills), ``writers`` (8 processes on one
folder of runs), ``steps`` (2,000 training steps with diagnostics: resident memory and open files), ``runs`` (200 offline runs
in one folder).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ["model=vit", "model.depth=1", "model.patch_size=8", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
        "data.batch_size=8"]  # fmt: skip
WRITER = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from vitscope.runs import run_dir
from vitscope.runs.metrics_log import Journal
for i in range(int(sys.argv[2])):
    run = run_dir.create(OmegaConf.create({"paths": {"runs": sys.argv[1]}, "seed": i, "run_dir": None}), "train")
    journal = Journal(run.journal)
    for step in range(100):
        journal.append(step, 0, {"train/loss": 1.0 / (step + 1)})
    journal.close()
"""


def resident() -> tuple[float, int]:
    """Return this process's resident memory in MiB and its number of open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def rows(folder: Path, n: int = 1_000_000) -> str:
    """Append ``n`` rows and read them back."""
    from vitscope.runs import metrics_log

    before, started = resident()[0], time.perf_counter()
    writer = metrics_log.Journal(folder / "metrics.jsonl")
    for step in range(n):
        writer.append(step, step // 1000, {"train/loss": 1.0 / (step + 1)})
    writer.close()
    wrote = time.perf_counter() - started
    written_memory = resident()[0] - before
    started = time.perf_counter()
    count = sum(1 for _ in metrics_log.read(folder / "metrics.jsonl"))
    assert count == n, f"{count} rows of {n}"
    size = (folder / "metrics.jsonl").stat().st_size / 2**20
    return (f"{n:,} rows: {n / wrote:,.0f} a second, {size:.0f} MiB, {written_memory:+.0f} MiB resident while writing; "
            f"all read back in {time.perf_counter() - started:.1f} s")  # fmt: skip


def saves(folder: Path, megabytes: int = 300, n: int = 50) -> str:
    """Kill a process that saves without end until ``n`` saves were seen; after each kill the newest checkpoint is whole."""
    from vitscope.runs.checkpoints import checkpoint_io

    draws, kills, seen, fallbacks, started = random.Random(0), 0, 0, 0, time.perf_counter()
    while seen < n:
        command = [sys.executable, str(ROOT / "tests" / "survivor.py"), str(folder), str(megabytes)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = int(process.stdout.readline())
        time.sleep(draws.uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        said = [last, *(int(line) for line in process.communicate()[0].split())]
        kills, seen = kills + 1, seen + len(said)
        newest = checkpoint_io.newest(folder)
        content = checkpoint_io.read(newest)
        assert content["global_step"] >= max(said)
        assert bool((content["state_dict"]["w"] == content["global_step"]).all())
        fallbacks += len(list(folder.glob(".*.tmp-*")))
    checkpoint_io.repair(folder)
    assert not list(folder.glob(".*.tmp-*"))
    return (f"{seen} saves of {megabytes} MB, {kills} kills, {fallbacks} of them within a save: every time the newest verified "
            f"checkpoint was whole and as new as the last one announced; {time.perf_counter() - started:.0f} s")  # fmt: skip


def writers(folder: Path, processes: int = 8, each: int = 5) -> str:
    """Let several processes make runs in one folder and write their journals at once."""
    from vitscope.runs import metrics_log

    started = time.perf_counter()
    children = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(each)]) for _ in range(processes)]
    assert all(child.wait() == 0 for child in children)
    made = list(folder.glob("*/metrics.jsonl"))
    assert len(made) == processes * each, f"{len(made)} runs of {processes * each}"
    assert all(len(list(metrics_log.read(file))) == 100 for file in made)
    return (
        f"{processes} processes, {len(made)} runs in one folder, every row there; {time.perf_counter() - started:.0f} s"
    )


def steps(folder: Path, n: int = 2000) -> str:
    """Train ``n`` steps with diagnostics after every epoch of 100; memory and open files after each."""
    from pytorch_lightning import Callback

    from vitscope.training import checkpoint_callback

    samples: list[tuple[float, int]] = []
    original = checkpoint_callback.Checkpoints.on_train_epoch_end

    def sampled(self: Callback, trainer, module) -> None:
        original(self, trainer, module)
        samples.append(resident())

    checkpoint_callback.Checkpoints.on_train_epoch_end = sampled
    epochs = n // 100
    every = [f"analysis.{name}.when.every_n_epochs=1" for name in ("hessian", "fourier", "slice")]
    _train(folder, "analysis=[hessian,fourier,slice]",
           "analysis.hessian.probe.n_images=16", "analysis.fourier.probe.n_images=16",
           "analysis.slice.n=3", "analysis.slice.probe.n_images=16", *every, f"trainer.max_epochs={epochs}",
           "trainer.limit_train_batches=100", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
           "logger=none")  # fmt: skip
    checkpoint_callback.Checkpoints.on_train_epoch_end = original
    middle, last = samples[len(samples) // 2], samples[-1]
    return (f"{n} steps, diagnostics every 100: resident {samples[1][0]:.0f} -> {middle[0]:.0f} -> {last[0]:.0f} MiB "
            f"(epoch 2, half way, end), open files {samples[1][1]} -> {middle[1]} -> {last[1]}")  # fmt: skip


def runs(folder: Path, n: int = 200) -> str:
    """Train ``n`` tiny runs, logged offline, one after the other in one process."""
    started, samples = time.perf_counter(), []
    for seed in range(n):
        _train(folder, "analysis=[]", "caps=smoke", f"seed={seed}", "test=false")
        samples.append(resident())
    facts = [json.loads(file.read_text()) for file in folder.glob("*/provenance.json")]
    assert len(facts) == n
    assert all(fact["status"] == "finished" for fact in facts)
    assert len({fact["wandb_id"] for fact in facts}) == n, "runs merged in W&B"
    seconds = time.perf_counter() - started
    tenth, half, last = samples[n // 10], samples[n // 2], samples[-1]
    return (f"{n} offline runs in {seconds:.0f} s, every one finished under an id of its own; resident {tenth[0]:.0f} -> "
            f"{half[0]:.0f} -> {last[0]:.0f} MiB, most {max(s[0] for s in samples):.0f}, open files {tenth[1]} -> {half[1]} -> "
            f"{last[1]} (a tenth in, half way, end); trainers still there {alive()}")  # fmt: skip


def alive() -> int:
    """Return how many trainers of this process are still there after a collection; the last run's may be."""
    from pytorch_lightning import Trainer

    gc.collect()
    return sum(isinstance(found, Trainer) for found in gc.get_objects())


def _train(folder: Path, *arguments: str) -> None:
    from vitscope.cli import exit_codes, train

    sys.argv = ["train.py", *TINY, f"paths.runs={folder}", *arguments]
    code = exit_codes.run_command(train._command)
    assert code == 0, f"exit code {code}"


PARTS = {"rows": rows, "writers": writers, "saves": saves, "steps": steps, "runs": runs}


def main() -> None:
    """Run the parts that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--n", type=int, help="how many, instead of the part's own number")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            extra = {} if arguments.n is None else {"n": arguments.n}
            print(f"{name}: {PARTS[name](Path(folder), **extra)}", flush=True)


if __name__ == "__main__":
    main()
