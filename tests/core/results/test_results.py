"""Tables, files and texts of results and probes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.runs.sample_results import eigenvalues, landscape, loss_slice, variance
from vitscope.core.results.result import Result
from vitscope.runtime.errors import StorageError


def test_a_table_has_a_row_a_number_with_its_coordinates() -> None:
    table = variance().to_dataframe()
    rows = table[table.quantity == "variance"]
    assert rows[["tap", "kind", "stage", "depth", "value"]].values.tolist() == [
        ["stem", "stem", 0, 0.0, 1.0],
        ["a", "msa", 1, 1 / 3, 3.0],
        ["b", "mlp", 1, 2 / 3, 90.0],
        ["c", "conv", 2, 1.0, 2.0],
    ]
    assert table[table.quantity == "level"].value.tolist() == [0.95]
    assert table[table.quantity == "level"].tap.isna().all()
    wide = table.pivot_table("value", "tap", "quantity")
    assert wide.loc["b", "variance_half_width"] == 9.0
    surface = landscape().to_dataframe()
    point = surface[(surface.quantity == "nll") & (surface.x == -1) & (surface.y == 0)]
    assert point.value.tolist() == [2.0]
    lines = loss_slice().to_dataframe()
    curve = lines[(lines.quantity == "nll_by_direction") & (lines.direction == 1)]
    assert curve[["x", "value"]].values.tolist() == [[-1, 41], [-0.5, 11], [0, 1], [0.5, 11], [1, 41]]
    ranks = eigenvalues().to_dataframe()
    assert ranks[ranks.quantity == "eigenvalues"]["rank"].tolist() == [1, 2, 3]
    assert "eigenvectors" not in set(ranks.quantity)


@dataclasses.dataclass(frozen=True)
class _Distances(Result, coordinates={"block": "blocks", "other_block": "blocks"}):
    """Distances of blocks.

    Attributes:
        blocks: (n_blocks) names.
        size: (n_blocks,) of each.
        distance: (n_blocks, n_blocks) of two.
    """

    measure = "distances"
    blocks: tuple[str, ...]
    size: np.ndarray
    distance: np.ndarray


def test_a_field_that_two_columns_name_labels_both_axes_of_its_length() -> None:
    table = _Distances(("a", "b"), np.array([3, 4]), np.array([[0.0, 0.5], [0.25, 0.0]])).to_dataframe()
    rows = table[table.quantity == "distance"]
    assert rows[["block", "other_block", "value"]].values.tolist() == [
        ["a", "a", 0.0], ["a", "b", 0.5], ["b", "a", 0.25], ["b", "b", 0.0],
    ]  # fmt: skip
    assert table[table.quantity == "size"].block.tolist() == ["a", "b"]
    assert table[table.quantity == "size"].other_block.isna().all()


def test_equality_is_of_numbers_and_conditions() -> None:
    assert variance() == variance()  # with NaN
    assert variance() != variance(2.0)
    assert variance() != eigenvalues()
    card = dataclasses.replace(variance().card, n_images=9)
    assert dataclasses.replace(variance(), card=card) != variance()
    assert dataclasses.replace(variance(), kinds=("stem", "msa", "mlp", "mlp")) != variance()


def test_a_file_states_its_measure_version_and_conditions(tmp_path: Path) -> None:
    path = variance().save(tmp_path / "new" / "variance")
    with np.load(path, allow_pickle=False) as archive:
        meta = json.loads(str(archive["__meta__"]))
        np.testing.assert_array_equal(archive["variance"], variance().variance)
    assert (meta["measure"], meta["vitscope"], meta["format"]) == ("feature_map_variance", vs.__version__, 1)
    assert meta["fields"]["card"]["card"]["n_images"] == 8
    assert [file.name for file in path.parent.iterdir()] == ["variance.npz"]


def test_paths_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in .npz, received 'x.csv'; pass 'x' or 'x.npz'"):
        variance().save(tmp_path / "x.csv")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"path=.*x.npz: not writable .*; free space or choose another folder"):
        variance().save(tmp_path / "file" / "x")
    with pytest.raises(StorageError, match="x.npz: no such file; pass a file that result.save"):
        vs.load_result(tmp_path / "x.npz")
    with pytest.raises(StorageError, match="a folder; .* a run folder is read by vs.load_results"):
        vs.load_result(tmp_path)
    (tmp_path / "end-1.json").write_text("{}")
    with pytest.raises(StorageError, match="not an .npz file; pass a file that result.save wrote"):
        vs.load_result(tmp_path / "end-1.json")
    variance().save(tmp_path / "end-1")
    with pytest.raises(StorageError, match="not an .npz file; pass end-1.npz, which has the arrays"):
        vs.load_result(tmp_path / "end-1.json")


def test_a_file_of_a_newer_version_is_named(tmp_path: Path) -> None:
    path = variance().save(tmp_path / "x")
    assert vs.load_result(tmp_path / "x") == vs.load_result(path)  # the name that was given to save
    with np.load(path, allow_pickle=False) as archive:
        content = dict(archive)
    meta = json.loads(str(content["__meta__"])) | {"format": 2, "vitscope": "9.0"}
    np.savez(path, **{**content, "__meta__": np.array(json.dumps(meta))})
    with pytest.raises(StorageError, match="written by vitscope 9.0, which is newer"):
        vs.load_result(path)


def test_texts_state_shapes_and_ranges() -> None:
    lines = [line.split(maxsplit=1) for line in repr(landscape()).splitlines()[1:]]
    assert lines[2] == ["nll", "[3x3] 1 to 4"]
    assert lines[-2] == ["measured", "on       8 images of toy"]
    assert lines[-1] == ["objective", "cross entropy, label smoothing 0, float32"]
    text = dict(line.split(maxsplit=1) for line in repr(variance()).splitlines()[1:])
    assert text["taps"] == "[4] stem, a, b, c"
    broken = dataclasses.replace(landscape(), nll=np.full((3, 3), np.inf), preset="<b>")
    assert "[3x3] no finite value" in repr(broken)
    assert "&lt;b&gt;" in broken._repr_html_()


def test_a_probe_says_what_it_is_made_of() -> None:
    def focal(outputs, targets):
        return outputs.sum(1)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    batches = [(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long))]
    probe = vs.Probe(model, batches, vs.Objective(weight_decay=0.05, loss=focal), about={"data": "toy"})
    lines = [line.split(maxsplit=1) for line in repr(probe).splitlines()]
    assert lines[0] == ["Probe"]
    assert lines[1] == ["model", "Sequential, 39 parameters on cpu"]
    assert lines[2] == ["batches", "1 batch"]
    assert "focal, weight decay 0.05 (half_sq)" in lines[3][1]
    assert " at 0x" not in repr(probe)
    assert "<caption>Probe</caption>" in probe._repr_html_()
    assert probe.n_images == 4
    assert "1 batch, 4 images" in repr(probe)


def test_a_probe_of_a_stream_is_not_read_for_its_text() -> None:
    class Stream:
        def __iter__(self):
            raise AssertionError("read")

    assert "counted at the first pass" in repr(vs.Probe(nn.Linear(2, 2), Stream()))
