"""Comments of the configuration files: what a file, a group or a key means, in the words of its comment."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

_KEY = re.compile(r"(?P<indent>\s*)(?P<item>- )?'?(?P<key>[\w/@ .-]+?)'?:(\s|$)")


@dataclass
class FileComments:
    """Comments of a configuration file.

    Attributes:
        description: Comment at the top of the file.
        keys: Comment of each key by its dotted name: at the end of its line, else on the lines above it.
        groups: Comment of each entry of the defaults list, by the name of its group.
    """

    description: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)


@functools.cache
def comments_of(file: Path) -> FileComments:
    """Return the comments of a configuration file."""
    comments = FileComments()
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    is_top = True
    for line in file.read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        if not stripped:
            above = []
        elif stripped.startswith("#"):
            text = stripped.lstrip("# ")
            if is_top and not text.startswith("@package"):
                comments.description = f"{comments.description} {text}".strip()
            elif not is_top:
                above.append(text)
        elif entry := _KEY.match(line):
            column = comment_column(line)
            comment = line[column:].lstrip("# ") if column is not None else " ".join(above)
            is_top, above = False, []
            indent = len(entry["indent"])
            parents = [(depth, key) for depth, key in parents if depth < indent]
            if entry["item"]:
                comments.groups[entry["key"]] = comment
                continue
            parents.append((indent, entry["key"]))
            if comment:
                comments.keys[".".join(key for _, key in parents)] = comment
    return comments


def comment_column(line: str) -> int | None:
    """Return the column of the comment behind a value; None without one. A # within quotes is none."""
    quote = ""
    for column, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not line[:column][-1:].isalnum():
            quote = character
        elif character == "#" and line[:column].strip() and line[column - 1] == " ":
            return column
    return None
