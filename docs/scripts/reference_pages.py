"""Make the pages of the site that follow from files elsewhere: configuration keys, errors, changelog, security, notebook.

`pages` returns the text of each by its path; they are made when the site is built and are not stored.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hydra import compose

from docs.scripts.diagnostic_pages import cell, rows_as_table
from vitscope.cli import help_text
from vitscope.cli.main import COMMANDS, usage
from vitscope.config import hydra_internals, loading
from vitscope.config.keys.key_comments import comments_of
from vitscope.runtime import errors

ROOT = Path(__file__).parents[2]
#: commands that compose a configuration
COMPOSED = ("train", "analyze", "report")
#: commands that print a help of their own
OTHERS = ("sweep", "reproduce", "runs")
#: groups whose choices have pages or tables of their own elsewhere, or only list what other files set
LISTED_ONLY = ("analysis", "experiment", "profile")
#: files of the repository that are pages of the site
REPOSITORY_PAGES = {
    "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md",
}  # fmt: skip
NOTEBOOKS = tuple(
    f"tutorials/{name}" for name in ("own_network", "comparing_models", "reading_report", "sweep_to_table")
)


def rewrite_links(text: str, page: str) -> str:
    """Return a page with the links between files of the repository replaced by those between pages of the site.

    Args:
        text: Markdown of a file in the repository.
        page: Path of the page in the site, such as ``tutorials/cifar100.md``.
    """
    up = "../" * page.count("/")
    for file, name in REPOSITORY_PAGES.items():
        text = re.sub(rf"\]\((\.\./)*{re.escape(file)}", f"]({up}{name}", text)
    text = re.sub(r"\]\((\.\./)*README\.md(#[\w-]+)?\)", f"]({up}index.md)", text)
    for notebook in NOTEBOOKS:
        text = text.replace(f"{notebook}.ipynb)", f"{notebook}.md)")
    return text


def repository_page(file: str) -> str:
    """Return a file of the repository's top folder as a page; its links into ``docs/`` become links between pages."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](")
    # a folder or a file outside of docs/ has no page: its name stays
    text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+\.(?:cff|toml|py|txt|yaml)|LICENSE)\)", r"`\2`", text)
    return rewrite_links(text, REPOSITORY_PAGES[file])


def notebook_page(name: str) -> str:
    """Return a notebook without outputs as Markdown, with a link to the file."""
    cells = json.loads((ROOT / "docs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for notebook_cell in cells:
        source = "".join(notebook_cell["source"])
        parts.append(source if notebook_cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[Download the notebook]({Path(name).name}.ipynb){{ download }}\n{rest}\n"


def choices_of(group: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each choice of a group of the configuration."""
    for option in loading.options(group):
        yield option, comments_of(loading.folder() / group / f"{option}.yaml").description


def group_table(group: str) -> str:
    """Return the choices of a group with their descriptions as a table."""
    lines = [f"| `{group}=` | description |", "|---|---|"]
    lines += [f"| `{option}` | {cell(description)} |" for option, description in choices_of(group)]
    return "\n".join(lines) + "\n"


def group_keys(group: str, command: str = "train") -> str:
    """Return a section for each choice of a group: its description and a table of its keys."""
    parts = []
    for option, description in choices_of(group):
        file = loading.folder() / group / f"{option}.yaml"
        is_list = f"@package {group}." in file.read_text(encoding="utf-8")
        with hydra_internals.composing_from(str(loading.folder()), command):
            cfg = compose(command, overrides=[f"{group}=[{option}]" if is_list else f"{group}={option}"])
        rows = help_text.choice_rows(cfg, group, file)
        table = rows_as_table(rows) if rows else ""
        parts.append(f"### `{group}={option}` {{ #{group}-{option} }}\n\n{description}\n\n{table}")
    return "\n".join(parts)


def choice_count(group: str) -> str:
    """Return the number of choices of a group."""
    return str(len(loading.options(group)))


def command_page(command: str) -> str:
    """Return the reference of a command that composes a configuration."""
    file = loading.folder() / f"{command}.yaml"
    with hydra_internals.composing_from(str(loading.folder()), command):
        cfg = compose(command)
    text = [f"# `vitscope {command}`\n", f"{COMMANDS[command].capitalize()}.\n", "```text"]
    text += [str(compose_help(command)).strip(), "```\n", "## Keys\n"]
    text.append(rows_as_table(help_text.root_rows(file, cfg)))
    return "\n".join(text)


def compose_help(command: str) -> str:
    """Return the examples of a command, as its help prints them."""
    lines = help_text.help_of(command, []).splitlines()
    start = lines.index("Examples:") + 1
    end = next((n for n, line in enumerate(lines) if n > start and not line.startswith(" ")), len(lines))
    return "\n".join(line.strip() for line in lines[start:end])


def groups_page() -> str:
    """Return the reference of the groups of the configuration and of the keys of their choices."""
    comments = comments_of(loading.folder() / "train.yaml").groups
    parts = [
        "# Configuration groups\n",
        "`group=choice` selects a file of `conf/<group>/`; `key=value` sets one of the keys below. The texts are the comments of "
        "these files, which `--help` prints too, and the docstrings of what they configure.\n",
    ]
    for group, description in comments.items():
        if not (loading.folder() / group).is_dir():
            continue
        parts += [f"## {group}\n", f"{description[:1].upper()}{description[1:]}.\n"]
        if group == "analysis":
            parts.append("Each diagnostic has a page: [Diagnostics](../diagnostics/index.md).\n")
        elif group in LISTED_ONLY:
            parts.append(group_table(group))
        else:
            parts.append(group_keys(group))
    return "\n".join(parts)


def other_commands_page() -> str:
    """Return the help of the commands that compose no configuration, as they print it."""
    parts = ["# Other commands\n", "```text", usage(), "```\n"]
    for command in OTHERS:
        words = [sys.executable, "-m", "vitscope", command, "--help"]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        parts += [f"## `vitscope {command}`\n", f"```text\n{printed.rstrip()}\n```\n"]
    return "\n".join(parts)


def error_rows() -> list[tuple[int, str, str]]:
    """Return exit code, class and meaning of each error of `vitscope.runtime.errors`, by exit code."""
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    rows = []
    for error in classes:
        if issubclass(error, errors.VitscopeError) and error is not errors.VitscopeError:
            meaning = re.sub(r" \(exit code \d\)", "", (error.__doc__ or "").splitlines()[0])
            rows.append((error.exit_code, error.__name__, meaning))
    return sorted(rows)


def error_table() -> str:
    """Return the table of exit codes and errors."""
    lines = ["| exit code | error | meaning |", "|---|---|---|", "| 0 | | Finished. |"]
    lines += [f"| {code} | `{name}` | {meaning} |" for code, name, meaning in error_rows()]
    lines += ["| 130 | | Interrupted with Ctrl-C; the state is saved. |", "| 143 | | Terminated; the state is saved. |"]
    return "\n".join(lines) + "\n"


#: functions that a page of ``docs/`` names in a line ``<!-- generated: name argument -->``
GENERATED: Mapping[str, Callable[..., str]] = {
    "group_table": group_table,
    "group_keys": group_keys,
    "choice_count": choice_count,
    "error_table": error_table,
}
_DIRECTIVE = re.compile(r"<!-- generated: (\w+)((?: \w+)*) -->")


def fill(text: str) -> str:
    """Return a page with its directives ``<!-- generated: name argument -->`` replaced by the text that they name."""
    return _DIRECTIVE.sub(lambda match: GENERATED[match[1]](*match[2].split()).strip(), text)


def pages() -> dict[str, str]:
    """Return the text of each page that no file in ``docs/`` holds, by its path in the site."""
    result = {name: repository_page(file) for file, name in REPOSITORY_PAGES.items()}
    result |= {f"{name}.md": notebook_page(name) for name in NOTEBOOKS}
    result |= {f"reference/{command}.md": command_page(command) for command in COMPOSED}
    return result | {"reference/groups.md": groups_page(), "reference/commands.md": other_commands_page()}
