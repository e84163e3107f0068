"""Reading of run folders from Python: results and probes of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitscope.core.probe import Probe
from vitscope.runs import result_store
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.run_dir import find
from vitscope.runtime.errors import CheckpointError


def load_results(run: str | Path) -> dict[str, dict[str, Any]]:
    """Return a run's results as ``{analysis: {tag: result}}``, tags being ``init``, ``epoch-0099``, ``step-000120`` or ``end``.

    Where one analysis was made with several settings at a tag, the newest counts.
    """
    results: dict[str, dict[str, Any]] = {}
    files = sorted(find(run).results.glob("*/*.npz"), key=lambda file: file.stat().st_mtime_ns)
    for file in files:
        tag = file.stem.rpartition("-")[0]
        results.setdefault(file.parent.name, {})[tag] = result_store.load(file)
    return results


def load_result(path: str | Path) -> Any:
    """Return the result that ``result.save(path)`` wrote, or a file in ``results/`` of a run; equal to what was saved.

    Nothing in the file is executed.

    Args:
        path: The ``.npz`` file.

    Raises:
        StorageError: No such file, a damaged one, or no result of this package.
    """
    return result_store.load(Path(path))


def load_probe(
    run: str | Path,
    split: str = "test",
    *,
    augment: bool | str = False,
    n_images: int | None = None,
    batch_size: int | None = None,
    ckpt: str = "last",
) -> Probe:
    """Return a probe of a finished run: its model at a checkpoint, its data, its objective.

    Args:
        run: A run folder, or a checkpoint file in one (which then wins over ``ckpt``).
        split: ``train``, ``val`` or ``test``.
        augment: Whether to apply the run's training augmentation and mixup, frozen; or those of the objective of that name.
        n_images: Number of images; all of the split by default.
        batch_size: Images a batch; the run's evaluation batch by default.
        ckpt: The checkpoint's name without its ending; ``ema`` for the averages over training steps that the last one (or
            the file) holds.

    Raises:
        CheckpointError: No such run or checkpoint.
        DataError: The data are not there.
    """
    from vitscope.config import factories
    from vitscope.runs import named_weights
    from vitscope.runs.checkpoints import checkpoint_weights

    cfg = find(run).config()
    model = factories.model(cfg)
    average = ckpt == checkpoint_weights.AVERAGE
    path = Path(run)
    if not path.is_file():
        path = find(run).checkpoints / ("last.ckpt" if average else f"{ckpt}.ckpt")
    if (measured_file := find(run).measured_file()) is not None:  # of a folder that analyze.py made for a file
        if ckpt not in ("last", checkpoint_weights.AVERAGE):
            reason = f"{find(run).path} holds results of one file, {measured_file[0]}, and no checkpoints"
            raise CheckpointError("ckpt", ckpt, reason, "leave it out; ema takes the averages that the file holds")
        path, average = measured_file[0], average or measured_file[1] == checkpoint_weights.AVERAGE
    content = checkpoint_io.read(path)
    checkpoint_weights.load_weights(model, content, path, average=average)
    if measured_file is not None:
        named_weights.refuse_other_weights(model, path, find(run))
    data = factories.data(cfg)
    data.adapt_to(model)
    size = batch_size or data.eval_batch_size
    options = {"split": split, "augment": augment, "n_images": n_images, "batch_size": size}
    epoch = content.get("epoch")  # of another program's file it may be of any type
    facts = {"checkpoint": checkpoint_weights.weights_hash(model), "epoch": epoch if type(epoch) is int else None}
    return factories.probe(cfg, model, data, options, facts, content)
