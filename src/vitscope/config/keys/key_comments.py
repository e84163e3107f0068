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
    top: list[str] = []  # lines of the comment before the first key
    above: list[str] = []  # lines of a comment directly above a key
    parents: list[tuple[int, str]] = []  # indents and names of the keys around a line
    has_keys = False
    for line in file.read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        entry = _KEY.match(line)
        if not stripped:
            above = []
        elif stripped.startswith("#"):
            text = stripped.lstrip("# ")
            if has_keys:
                above.append(text)
            elif text and not text.startswith("@package"):
                top.append(text)
        elif entry:
            column = comment_column(line)
            comment = " ".join(above) if column is None else line[column:].lstrip("# ")
            has_keys, above = True, []
            indent = len(entry["indent"])
            parents = [(depth, key) for depth, key in parents if depth < indent]
            if entry["item"]:
                comments.groups[entry["key"]] = comment
                continue
            parents.append((indent, entry["key"]))
            if comment:
                comments.keys[".".join(key for _, key in parents)] = comment
    comments.description = " ".join(top)
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
