"""Wheel and source distribution: built, complete, installed into an environment of its own, and run from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vitscope
from vitscope.cli.main import COMMANDS

pytest.importorskip("hatchling", reason="the build backend is in the extra dev")

ROOT = Path(__file__).parents[1]
#: the interpreter's environment without this checkout
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(words: list[str | Path], folder: Path) -> str:
    ended = subprocess.run(
        list(map(str, words)), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, (words, ended.stdout[-1500:], ended.stderr[-3000:])
    return ended.stdout


def tracked_files(*options: str) -> set[str]:
    words = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


def build(source: Path, kind: str, folder: Path) -> Path:
    run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder], source)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that is made from the source distribution, as an index would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment that has the wheel; its libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", folder], ROOT)
    (packages,) = folder.glob("lib/python3*/site-packages")
    paths = [path for path in sys.path if path.endswith("-packages")]
    (packages / "libraries.pth").write_text("\n".join(paths) + "\n")
    run([folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    return folder / "bin"


@pytest.mark.slow
def test_no_tracked_file_is_missing_from_the_source_distribution(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert tracked_files() - names == set()
    # new files of a checkout that are not added yet are packed too, ignored ones are not
    added = names - tracked_files("--cached", "--others", "--exclude-standard")
    assert added == {"PKG-INFO"}


@pytest.mark.slow
def test_the_wheel_has_code_configurations_sweeps_style_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    expected = set()
    for name in tracked_files():
        if name.startswith("src/"):
            expected.add(name.removeprefix("src/"))
        elif name.startswith(("conf/", "sweeps/")):
            expected.add(f"vitscope/{name}")
    assert expected - names == set()
    assert any(name.endswith(".mplstyle") for name in names)
    assert any(re.search(r"\.dist-info/licenses/LICENSE$", name) for name in names)
    assert f"\nVersion: {vitscope.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


@pytest.mark.slow
def test_the_commands_run_from_another_folder(binaries: Path, tmp_path: Path) -> None:
    place = run([binaries / "python", "-c", "import vitscope; print(vitscope.__file__)"], tmp_path)
    assert place.startswith(str(binaries.parent))
    assert run([binaries / "vitscope", "--version"], tmp_path) == f"vitscope {vitscope.__version__}\n"
    for command in COMMANDS:
        assert "vitscope" in run(
            [binaries / "vitscope", command, *(["--help"] if command != "doctor" else [])], tmp_path
        )
    assert "heads" in run([binaries / "vitscope", "sweep", "--help"], tmp_path)
    style = "import matplotlib.pyplot as plt; plt.style.use('vitscope.plotting.vitscope')"
    run([binaries / "python", "-c", style], tmp_path)


@pytest.mark.slow
def test_a_small_analysis_runs_from_another_folder(binaries: Path, tmp_path: Path) -> None:
    small = ["model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "caps=smoke", "device=cpu"]
    run([binaries / "vitscope", "analyze", *small, "analysis=[evaluation,fourier]", "run_dir=runs/one"], tmp_path)
    for analysis in ("evaluation", "fourier"):
        assert list(tmp_path.glob(f"runs/one/results/{analysis}/*.npz"))
    assert list(tmp_path.glob("runs/one/figures/*.png"))
