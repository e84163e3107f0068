"""Import rules: every package has a rank, and a module imports only from packages of the same rank or below.

Imports inside functions and under TYPE_CHECKING count like all others. Packages of one rank may use each other as long as
neither the graph of packages nor the graph of modules has a cycle.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vitscope"
FILES = sorted(SRC.rglob("*.py"))

#: packages from the lowest to the highest; those of one line have the same rank
RANKS = (
    ("runtime", "stats"),
    ("core",),
    ("models", "data", "linalg"),
    ("diagnostics", "plotting"),
    ("config", "runs"),
    ("training", "analyses"),
    ("reports", "reproduce", "sweep"),
    ("cli",),
)
RANK = {package: rank for rank, packages in enumerate(RANKS) for package in packages}
#: the package itself finds public names by their text and imports nothing at the start
FLAT = {"__init__.py", "__main__.py"}
#: libraries that only the packages from `config` upward and plots may import
APPLICATION_LIBRARIES = {"pytorch_lightning", "lightning", "lightning_fabric", "wandb", "hydra", "omegaconf"}
DRAWING_LIBRARIES = {"matplotlib", "plotly", "seaborn"}


def module_name(file: Path) -> str:
    """Return the dotted name of a file below the package, '' for the package itself."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(file): file for file in FILES}


@functools.cache
def imported_names(file: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_modules(file: Path) -> set[str]:
    """Return the modules of this package that a file imports, by dotted name below the package."""
    modules = set()
    for name in imported_names(file):
        if name.partition(".")[0] != "vitscope":
            continue
        dotted = name.partition(".")[2]
        while dotted and dotted not in MODULES:
            dotted = dotted.rpartition(".")[0]
        modules.add(dotted)
    return modules - {""}


def libraries(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(file)}


def relative_name(file: Path) -> str:
    return file.relative_to(SRC).as_posix()


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle of a directed graph in order, or an empty list."""
    finished: set[str] = set()

    def search(node: str, path: list[str]) -> Iterator[list[str]]:
        if node in path:
            yield [*path[path.index(node) :], node]
        elif node not in finished:
            for successor in sorted(graph.get(node, ())):
                yield from search(successor, [*path, node])
            finished.add(node)

    return next((path for node in sorted(graph) for path in search(node, [])), [])


def test_every_module_stands_in_a_ranked_package() -> None:
    assert {relative_name(f) for f in FILES if f.parent == SRC} == FLAT
    assert {f.relative_to(SRC).parts[0] for f in FILES if f.parent != SRC} == set(RANK)


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != SRC], ids=relative_name)
def test_imports_go_downward(file: Path) -> None:
    own = RANK[file.relative_to(SRC).parts[0]]
    upward = {module for module in imported_modules(file) if RANK[module.partition(".")[0]] > own}
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imported_modules(file) - {name} for name, file in MODULES.items() if name}
    assert cycle(graph) == []


def test_no_package_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {package: set() for package in RANK}
    for name, file in MODULES.items():
        package = name.partition(".")[0]
        if package in graph:
            graph[package] |= {module.partition(".")[0] for module in imported_modules(file)} - {package}
    assert cycle(graph) == []


def test_the_search_for_cycles_finds_one() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("file", FILES, ids=relative_name)
def test_measures_and_models_import_no_application_library(file: Path) -> None:
    package = file.relative_to(SRC).parts[0]
    if package in ("runtime", "stats", "core", "models", "linalg", "diagnostics"):
        drawing = set() if file.stem.startswith("plot") else DRAWING_LIBRARIES
        assert not libraries(file) & (APPLICATION_LIBRARIES | drawing)


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.stem.startswith("plot") and "diagnostics" in f.parts], ids=relative_name
)
def test_plots_draw_and_do_not_compute(file: Path) -> None:
    assert not libraries(file) & {"torch", "scipy", "sklearn", "timm", "wandb", "hydra", "pytorch_lightning"}
    topic = ".".join(file.relative_to(SRC).parts[:2])
    assert all(m.startswith((topic, "plotting")) for m in imported_modules(file))


@pytest.mark.parametrize("file", [f for f in FILES if "diagnostics" in f.parts], ids=relative_name)
def test_topics_do_not_import_each_other(file: Path) -> None:
    parts = file.relative_to(SRC).parts
    others = {m for m in imported_modules(file) if m.startswith("diagnostics.") and m.split(".")[1] != parts[1]}
    assert not others


def test_wandb_is_imported_in_one_file() -> None:
    assert [relative_name(f) for f in FILES if "wandb" in libraries(f)] == ["runs/wandb_mirror.py"]


def test_folders_hold_at_most_fifteen_modules_on_three_levels() -> None:
    counts: dict[Path, int] = {}
    for file in FILES:
        counts[file.parent] = counts.get(file.parent, 0) + (file.name != "__init__.py")
    assert {f.relative_to(SRC).as_posix(): n for f, n in counts.items() if n > 15} == {}
    assert all(len(file.relative_to(SRC).parts) <= 3 for file in FILES)


def test_statistics_need_no_torch() -> None:
    for file in FILES:
        if file.relative_to(SRC).parts[0] == "stats":
            assert libraries(file) <= {
                "__future__",
                "collections",
                "itertools",
                "functools",
                "dataclasses",
                "math",
                "numpy",
                "scipy",
                "typing",
                "vitscope",
            }


def test_no_module_or_folder_is_named_after_nothing() -> None:
    """In the package and among its tests: the name of a module or folder is that of its subject."""
    files = [*FILES, *Path(__file__).parent.rglob("*.py")]
    vague_names = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [str(file) for file in files if vague_names & {file.stem, file.parent.name}]
