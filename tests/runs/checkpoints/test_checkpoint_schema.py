"""Every entry of a training's checkpoint, replaced by another kind of value, is refused before anything is restored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitscope.runs.checkpoints import checkpoint_io, checkpoint_schema, optimizer_schema
from vitscope.runtime.errors import CheckpointError
from vitscope.training.checkpoint_callback import Checkpoints

torch.set_num_threads(1)
MISSING = object()
DAMAGES = [None, "x", float("nan"), -1, [], {}, torch.zeros(2, 3), True, MISSING]
#: what torch and Lightning do not read, or may legitimately be absent or of several kinds
UNREAD = (
    "pytorch-lightning_version",
    "_is_initial",
    "_get_lr_called_within_step",
    "lr_lambdas",
    "hparams",
    "state_dict",
)


class Tiny(pl.LightningModule):
    """A linear layer, AdamW and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def new_trainer(folder: Path, **options: Any) -> pl.Trainer:
    callback = Checkpoints(monitor="x")
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, plugins=[checkpoint_io.AtomicCheckpointIO()], **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("schema")
    data = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitscope.training.stop_callbacks.agreed_signal", lambda _: 0)
        new_trainer(folder, max_epochs=1).fit(Tiny(), data)
    return checkpoint_io.read(folder / "checkpoints" / "last.ckpt")


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def damaged(tree: Any, place: tuple, value: object) -> Any:
    key, *rest = place
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copy[key] = damaged(tree[key], tuple(rest), value)
    elif value is MISSING:
        del copy[key]
    else:
        copy[key] = value
    return copy


@pytest.mark.filterwarnings("ignore")
def test_every_entry_of_another_kind_is_refused(saved: dict[str, Any], tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, max_epochs=2)
    network = Tiny().model
    checkpoint_schema.check(saved, tmp_path, network, trainer)  # as it was written
    accepted = []
    tried = 0
    for place in places(saved):
        if any(part in UNREAD for part in place):
            continue
        original = saved
        for part in place:
            original = original[part]
        for damage in DAMAGES:
            if damage is not MISSING and type(damage) is type(original):  # another value of the same kind
                continue
            tried += 1
            try:
                checkpoint_schema.check(damaged(saved, place, damage), tmp_path, network, trainer)
            except CheckpointError:
                continue
            accepted.append((".".join(map(str, place)), "missing" if damage is MISSING else repr(damage)))
    assert tried > 500
    harmless = {
        (f"optimizer_states.0.state.{i}", "missing") for i in (0, 1)  # a weight that had no gradient has none
    }  # fmt: skip
    options = ("lr", "eps", "weight_decay", "initial_lr", "betas")
    switches = optimizer_schema._SWITCHES
    harmless |= {(f"optimizer_states.0.param_groups.0.{key}", "missing") for key in (*options, *switches)}
    harmless |= {(f"optimizer_states.0.param_groups.0.{key}", "None") for key in switches}
    harmless |= {(f"optimizer_states.0.param_groups.0.{key}", "True") for key in switches}
    harmless |= {(f"callbacks.Checkpoints.{key}", value) for key in ("best", "validated") for value in ("-1", "None")}
    assert [case for case in accepted if case not in harmless] == []
