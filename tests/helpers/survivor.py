"""A program for `test_survival`: writes checkpoints without end, says when each is written, and is killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest


def main() -> None:
    folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
    step = max([entry["global_step"] for entry in checkpoint_manifest.entries(folder).values()], default=0)
    while True:
        step += 1
        weights = torch.full((megabytes * 2**18,), float(step))
        name = f"{('best', 'last')[step % 2]}.ckpt"  # killed between file and manifest, the other one is whole
        checkpoint_io.write({"epoch": 0, "global_step": step, "state_dict": {"w": weights}}, folder / name)
        print(step, flush=True)


if __name__ == "__main__":
    main()
