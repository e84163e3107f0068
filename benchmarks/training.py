"""Training steps against the plain loop that they stand for, and with attention written out.

The same model, batches, mixing, optimizer, clipping and schedule on every side: `lightning`, the LightningModule with every
callback of `train.py` (checkpoints, rates, journal, signals, progress); `plain`, a loop of PyTorch; for AlterNet `einsum`,
the plain loop with attention as two einsums and a softmax (see attention.py). Correctness first: the losses of the first
two must be equal bit for bit, those of the third to 1e-4 (float32, another order of sums). Then the sides take turns; what
is timed are whole cycles, from the start of one step to the start of a later one, data included. A sample during which
other processes used more than 0.1 core is left out. Goal: `lightning` at most 3% above `plain`.

`--options` adds the sides bfloat16 (autocast) and channels_last. `--pipeline` times `train.py`'s whole way from bytes to
weights instead, against timm's loader and a plain loop, and against the same steps on a batch that is there already; and
projects the hours of 305 epochs of 50,000 images.

    python benchmarks/training.py [--models alternet18 convnet18] [--batch 32] [--steps 6] [--rounds 5] [--options]
    python benchmarks/training.py --pipeline --models alternet50 convnet50     # where a GPU is at hand
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from attention import einsum_attention, medians
from data import BATCH, timm_batches
from landscape import busy
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import vitscope as vs
from vitscope.core import lr_schedule
from vitscope.core.objective import Objective
from vitscope.data import DataModule
from vitscope.models.layers.window_attention import WindowAttention
from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.lightning_module import _STEP_STREAM, Classifier, _step_seed
from vitscope.training.progress_callbacks import EpochAccuracy, PlainProgress
from vitscope.training.run_logger import RunLogger
from vitscope.training.stop_callbacks import ConfigurationCheck

STRONG = {"augment": "rand-m9-n2-mstd1.0", "mixup": 1.0, "cutmix": 0.8, "switch_prob": 0.5, "label_smoothing": 0.1}
RATES = {"kind": "cosine", "warmup_epochs": 0.3}  # of one epoch, which a sample is
WARM = 2  # steps before the clock starts: the optimizer makes its state in the first
GOAL = 1.03

Batch = tuple[Tensor, Tensor]
Mix = Callable[[Tensor, Tensor, tuple[int, ...]], Batch]


class Cycles(pl.Callback):
    """The losses, and the moments at which two steps start."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device, self.marks, self.losses = n, device, [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Look at the clock."""
        if batch_idx in (WARM, WARM + self.n):
            self.marks.append(mark(self.device))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(outputs["loss"].detach())


def mark(device: torch.device) -> tuple[float, tuple[float, float]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), busy()


def between(marks: list[Any]) -> tuple[float, float]:
    """Return wall seconds between two marks, and the cores that other processes used meanwhile."""
    (start, before), (end, after) = marks
    return end - start, max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / (end - start)


def lightning(model: nn.Module, batches: Iterable[Batch], n: int, mix: Mix, device: torch.device, *, half: bool = False,
              channels_last: bool = False) -> tuple[list[Tensor], tuple[float, float]]:  # fmt: skip
    """Train WARM + n + 1 steps as `train.py` does, without validation; return the losses and the time of n cycles."""
    module = Classifier(model, num_classes=16, optimizer=partial(torch.optim.AdamW, lr=1.25e-4, weight_decay=0.05),
                        lr_schedule=RATES, mix=mix, channels_last=channels_last)  # fmt: skip
    clock = Cycles(n, device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        cfg = OmegaConf.create({"seed": 0})
        logger = RunLogger(run, Journal(run.journal), WandbMirror())
        watching = [
            ConfigurationCheck("x"),
            EpochAccuracy(),
            Checkpoints(init=False),
            LearningRateMonitor("step"),
            PlainProgress(),
        ]
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, logger=logger,
            precision="bf16-mixed" if half else "32-true", gradient_clip_val=5.0, log_every_n_steps=10,
            callbacks=[*watching, DiagnosticCallback(cfg, [], run, WandbMirror()), clock], limit_train_batches=WARM + n + 1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.save_checkpoint = lambda *_, **__: None  # once an epoch in truth, not once a benchmark
        trainer.fit(module, train_dataloaders=batches)
        logger.journal.close()
    return clock.losses, between(clock.marks)


def plain(model: nn.Module, batches: Iterable[Batch], n: int, mix: Mix, device: torch.device, *, half: bool = False,
          channels_last: bool = False) -> tuple[list[Tensor], tuple[float, float]]:  # fmt: skip
    """Make the same steps in a bare loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.25e-4, weight_decay=0.05)
    rates = LambdaLR(optimizer, partial(lr_schedule.factor, steps_per_epoch=WARM + n + 1, total_epochs=1.0, **RATES))
    cast = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    order = torch.channels_last if channels_last else torch.contiguous_format
    objective, losses, marks = Objective(), [], []
    model.to(device).train()
    for step, (x, y) in enumerate(itertools.islice(batches, WARM + n + 1)):
        if step in (WARM, WARM + n):
            marks.append(mark(device))
        torch.manual_seed(_step_seed(0, step, 0))
        x, y = mix(x.to(device), y.to(device), (0, _STEP_STREAM, step, 0))
        with cast:
            loss = objective.data_loss(model(x.contiguous(memory_format=order)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rates.step()
        losses.append(loss.detach())
    return losses, between(marks)


@contextmanager
def written_out() -> Iterator[None]:
    fused = WindowAttention.forward
    WindowAttention.forward = einsum_attention
    try:
        yield
    finally:
        WindowAttention.forward = fused


def with_einsum(*args: Any, **options: Any) -> tuple[list[Tensor], tuple[float, float]]:
    with written_out():
        return plain(*args, **options)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = name.rstrip("0123456789")
    return getattr(vs.models, kind)(depth=int(name[len(kind) :]), num_classes=16)


def compared(name: str, sides: dict[str, Any], batches: Iterable[Batch], mix: Mix, device: torch.device) -> None:
    """Refuse to time sides that train differently."""
    losses = {side: torch.stack(train(built(name), batches, 2, mix, device)[0]) for side, train in sides.items()}
    if not torch.equal(losses["lightning"], losses["plain"]):
        raise SystemExit(f"losses differ: {losses['lightning'].tolist()} and {losses['plain'].tolist()}")
    text = f"{name}: {len(losses['plain'])} losses of lightning and plain equal bit for bit"
    for side in set(losses) - {"lightning", "plain"}:
        error = float((losses[side] / losses["plain"] - 1).abs().max())
        text += f"; {side} within {error:.1e}"
        if error > (1e-4 if side == "einsum" else 0.05):
            raise SystemExit(f"{text}: too far")
    print(text, flush=True)


def steps(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Compare and time the sides on one model."""
    torch.manual_seed(1)
    mix = DataModule(**STRONG).mixed
    one = (torch.randn(options.batch, 3, 32, 32), torch.randint(16, (options.batch,)))
    batches = DataLoader([one] * (WARM + options.steps + 1), batch_size=None)
    sides: dict[str, Any] = {"plain": plain, "lightning": lightning}
    if name.startswith("alternet"):
        sides["einsum"] = with_einsum
    if options.options:
        sides |= {"bfloat16": partial(lightning, half=True), "channels_last": partial(lightning, channels_last=True)}
    compared(name, sides, batches, mix, device)
    models = {side: built(name) for side in sides}
    samples: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, train in sides.items():
            samples[side].append(train(models[side], batches, options.steps, mix, device)[1])
    found = medians(samples, options.steps, f"a step of {options.batch}")
    if {"plain", "lightning"} <= set(found):
        extra, ratio = 1e3 * (found["lightning"] - found["plain"]), found["lightning"] / found["plain"]
        print(
            f"  overhead {100 * (ratio - 1):+.2f}% ({extra:+.2f} ms a step), goal 3%: {'kept' if ratio <= GOAL else 'MISSED'}"
        )


def endless(workers: int) -> Iterator[Batch]:
    """Yield the strong pipeline's batches of photographs, not mixed yet: that is the training step's."""
    loader = DataModule(num_workers=workers, batch_size=BATCH, drop_last=True, **STRONG).train_dataloader()
    for epoch in itertools.count():
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def pipeline(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Time everything from bytes to weights; on a GPU with bfloat16 on all sides, channels_last on ours."""
    half, mix = device.type == "cuda", DataModule(**STRONG).mixed
    ours = {"half": half, "channels_last": half}
    batches = endless(options.workers)
    there = DataLoader([next(batches)] * (WARM + options.steps + 1), batch_size=None)
    sides: dict[str, Any] = {
        "timm, plain": (plain, timm_batches(options.workers, device), lambda x, y, seed: (x, y), {"half": half}),
        "vitscope": (lightning, batches, mix, ours),
        "without data": (lightning, there, mix, ours),
    }
    samples: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    models = {side: built(name) for side in sides}
    for _ in range(options.rounds):
        for side, (train, source, mixed, flags) in sides.items():
            samples[side].append(train(models[side], source, options.steps, mixed, device, **flags)[1])
    print(f"{name}, from bytes to weights, {options.workers} workers each")
    found = medians(samples, options.steps, f"a step of {BATCH}")
    for side, seconds in found.items():
        hours = 305 * 50_000 / BATCH * seconds / 3600
        print(f"  {side:14s} {BATCH / seconds:8,.0f} images/s, {hours:.1f} h for 305 epochs of 50,000 images")
    if {"vitscope", "without data"} <= set(found):
        print(f"  the device computes {100 * found['without data'] / found['vitscope']:.0f}% of vitscope's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["alternet18", "convnet18"])
    for name, default in (("batch", 32), ("steps", 6), ("rounds", 5), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--options", action="store_true", help="bfloat16 and channels_last too")
    parser.add_argument("--pipeline", action="store_true", help="data included, against timm's loader")
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore",
        message=".*(LeafSpec|does not have many workers|smaller than the logging|is an iterable|val_dataloader).*",
    )
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    for name in options.models:
        (pipeline if options.pipeline else steps)(name, options, device)


if __name__ == "__main__":
    main()
