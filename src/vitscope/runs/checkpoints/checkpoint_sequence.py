"""Checkpoints by name, each read when it is asked for: a run's own in the order of its steps, or any that were named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest, checkpoint_weights
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError


class Snapshots(Sequence[tuple[str, Mapping[str, Any]]]):
    """Pairs of a label and the weights (with the names of the network's own), read one at a time.

    Args:
        files: Checkpoint files by label, in order.
        network: The network of the weights, see `checkpoint_weights.model_state`.

    Attributes:
        files: Checkpoint files by label, in order.
        labels: The labels, in order.
    """

    def __init__(self, files: Mapping[str, Path], network: nn.Module | None = None) -> None:
        self.files, self._network = dict(files), network
        self.labels: list[str] = list(files)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Read one, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        label = self.labels[index]
        file = self.files[label]
        try:
            return label, checkpoint_weights.model_state(checkpoint_io.read(file), self._network)
        except ValueError as error:
            raise CheckpointError("checkpoints", file, str(error), "name that file") from None


def of_run(run: Run) -> Snapshots:
    """Return a run's checkpoints in the order of their steps, without the best one, which repeats one of them."""
    entries = checkpoint_manifest.entries(run.checkpoints)
    names = [name for name in entries if name != "best.ckpt"]
    # last.ckpt repeats the newest snapshot where one was made at the same step
    names.sort(key=lambda name: (entries[name]["global_step"], name))
    files: dict[str, Path] = {}
    seen_steps: set[int] = set()
    for name in names:
        step = entries[name]["global_step"]
        if step not in seen_steps:
            files[Path(name).stem] = run.checkpoints / name
            seen_steps.add(step)
    return Snapshots(files)


def named(paths: Sequence[str | Path], network: nn.Module | None = None) -> Snapshots:
    """Return the checkpoints of run folders (their last) and of checkpoint files.

    A run's label is its folder's name, a file's ``<run>/<name>``, or its name alone outside a run.

    Args:
        paths: Run folders and checkpoint files.
        network: The network whose weights the files hold, under any prefix and in any entry.

    Raises:
        CheckpointError: A path that is neither, or one named twice.
    """
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = path.parent.name == "checkpoints"
        label = f"{path.parent.parent.name}/{path.stem}" if inside else path.stem
        file = path
        if not path.is_file():
            run = run_dir.find(path)
            label, file = run.id, run.checkpoints / "last.ckpt"
        if label in files:
            raise CheckpointError("checkpoints", path, "named twice, or two of one name", "name each once")
        files[label] = file
    return Snapshots(files, network)
