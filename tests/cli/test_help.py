"""Help: examples first, then groups and keys, each with its comment, in the width of the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vitscope
from tests.cli.test_startup import HEAVY, libraries_of
from vitscope.cli import help_text, hydra_command
from vitscope.config import loading
from vitscope.config.keys.key_comments import comments_of
from vitscope.config.ranges.source_signatures import argument_descriptions
from vitscope.runtime.errors import ConfigError

Help = Callable[..., str]


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Help:
    def call(command: str, *arguments: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.argv", ["vitscope"])
        return help_text.help_of(command, arguments)

    return call


def flat(text: str) -> str:
    return " ".join(text.split())


def test_examples_come_first_then_groups_then_keys_with_comments(help_of: Help) -> None:
    text = help_of("train", "--help")
    places = [text.index(part) for part in ("Examples:", "Groups (", "Keys (", "More:")]
    assert places == sorted(places)
    root = comments_of(loading.folder() / "train.yaml")
    for group, description in root.groups.items():
        if not group.startswith("override"):
            assert description, f"the group {group} has no description"
            assert f"{group:12}{description}" in text
    for key, comment in root.keys.items():
        if not key.startswith("hydra"):
            assert flat(comment) in flat(text), key
    assert "*alternet, convit" in text
    assert "vitscope train data=folder --help" in text


def test_a_choice_shows_its_own_keys(help_of: Help) -> None:
    text = help_of("train", "data=folder", "data.root=mine", "--help", columns=120)
    assert text.startswith("data=folder: Any images in <root>/train/<class>/")
    assert re.search(r"data\.root=mine +where files are", text)
    assert re.search(r"data\.source\.val_share=0\.1 +share of each training class", text)
    assert "model." not in text
    assert "analysis.cka.probe.n_images=2048" in help_of("analyze", "+analysis=cka", "--help")
    assert "logger.csv.flush_logs_every_n_steps=100" in help_of("train", "logger=[wandb,csv]", "--help")
    assert "model._target_=???" in help_of("train", "model=module", "--help")


def test_an_experiment_states_what_it_sets_on_lines_of_its_own(help_of: Help) -> None:
    lines = help_of("train", "experiment=fig4_hessian_spectra", "-h").splitlines()
    assert "  analysis.hessian.probe.n_images=2560" in lines
    assert {line.split()[0] for line in lines} >= {"Claim:", "Command:", "Cost:", "Expected"}


@pytest.mark.parametrize(
    "group", ["analysis", "callbacks", "data", "experiment", "logger", "objective", "optimizer", "trainer"]
)
def test_a_group_lists_its_choices_one_by_one(help_of: Help, group: str) -> None:
    text = help_of("train", group, "--help")
    for option in loading.options(group):
        assert re.search(rf"^  ({group}=)?{option}( +|\n {{8,}})\S", text, re.MULTILINE), option


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["train", "analyze", "report"])
def test_lines_fit_the_terminal(help_of: Help, command: str, columns: int) -> None:
    examples = set(help_of(command).partition("Groups (")[0].partition("Keys (")[0].splitlines())  # to be copied whole
    arguments = [["all"], []] if command != "report" else [[]]
    for words in arguments:
        too_long = [line for line in help_of(command, *words, columns=columns).splitlines() if len(line) > columns]
        assert [line for line in too_long if line not in examples and " " in line.strip()] == []


def test_every_key_of_the_demo_has_a_meaning(help_of: Help) -> None:
    """All but those of other libraries, whose names say it or whose documentation does."""
    text = help_of("train", "all", columns=120)
    rows = [line for line in text.splitlines() if re.match(r"  [a-z_]+\.?[\w.]*=\S*$", line)]
    bare = [row.strip().partition("=")[0] for row, following in zip(rows, rows[1:]) if following]
    ours = [key for key in bare if key.startswith(("analysis.", "data.", "paths."))]
    assert [key for key in ours if f"{key}=" in text and not _has_comment(text, key)] == [
        "data.recipe.epochs",
        "data.recipe.lr",
    ]


def _has_comment(text: str, key: str) -> bool:
    lines = text.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith(f"  {key}="))
    is_beside = bool(re.search(r"=\S+ {2,}\S", lines[index]))
    return is_beside or (index + 1 < len(lines) and lines[index + 1].startswith(" " * 6))


def test_a_name_that_is_no_group(help_of: Help) -> None:
    with pytest.raises(ConfigError, match="dat: no such group; did you mean data"):
        help_of("train", "dat", "--help")


def test_help_and_version_are_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_command.answered("train", ["model=vit", "--version"])
    assert capsys.readouterr().out == f"vitscope {vitscope.__version__}\n"
    assert not hydra_command.answered("train", ["model=vit", "--cfg", "job"])
    for arguments in (["train", "data=folder", "--help"], ["analyze", "all", "-h"], ["report", "--help"]):
        code, libraries, stderr = libraries_of(*arguments)
        assert (code, libraries & HEAVY, stderr) == (0, set(), "")


def test_comments_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "# @package x\n# First line\n# and second.\ndefaults:\n  - model: a  # the network\na: 'b # c'  # of a\n"
        '# above b,\n# in two lines\nb: 1\nc:  # all of c\n  d: 2\n  e: "#"\n\n# of no key\n\nf: 3\n'
    )
    comments = comments_of(file)
    assert comments.description == "First line and second."
    assert comments.groups == {"model": "the network"}
    assert comments.keys == {"a": "of a", "b": "above b, in two lines", "c": "all of c"}


def test_descriptions_of_arguments_are_read_from_the_source() -> None:
    spectrum = argument_descriptions("vitscope.hessian_max_eigenvalue_spectrum")
    assert spectrum["n_top"]
    assert spectrum["budget_s"].endswith("None for all batches"), "an entry of several lines"
    assert "**options" not in argument_descriptions("vitscope.models.timm_model")["grad_checkpointing"]
    assert argument_descriptions("torch.optim.AdamW") == {}
