"""The numbers behind figures as comma-separated values."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd

import vitscope as vs
from tests.fixtures.runs.sample_results import eigenvalues, loss_slice, variance
from vitscope.plotting.figure_numbers import save_numbers


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_file_has_the_numbers_of_each_curve(tmp_path: Path) -> None:
    results = {"ViT, small": loss_slice(), "ResNet": loss_slice(1 / 3)}
    path = save_numbers(results, tmp_path / "figures" / "slice-end")
    assert path == tmp_path / "figures" / "slice-end.csv"
    lines = {line.get_label(): line for line in vs.plot(results).axes[0].get_lines()}
    for name in results:
        curve = [row for row in rows(path) if row["result"] == name and row["quantity"] == "nll"]
        assert [float(row["x"]) for row in curve] == lines[name].get_xdata().tolist()
        assert [float(row["value"]) for row in curve] == lines[name].get_ydata().tolist()  # at full precision


def test_a_single_result_has_the_columns_of_its_table(tmp_path: Path) -> None:
    for result in (variance(), eigenvalues()):
        path = save_numbers(result, tmp_path / "x")
        table = result.to_dataframe()
        read = pd.read_csv(path, converters={"value": lambda text: float(text or "nan")})
        assert list(read.columns) == list(table.columns)
        np.testing.assert_array_equal(read.value, table.value)
        assert read.quantity.tolist() == table.quantity.tolist()
    nulls = [row for row in rows(save_numbers(variance(), tmp_path / "x")) if row["quantity"] == "log_variance_ratio"]
    assert [row["value"] for row in nulls] == ["", "1.1", "3.4", ""]
    assert [row["kind"] for row in nulls] == ["stem", "msa", "mlp", "conv"]
