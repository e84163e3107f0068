"""Words that a user gives a new run: its name, which its id holds, and its tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitscope.runtime.errors import ConfigError

#: a name becomes a part of a folder's name
_NAME = re.compile(r"\w[\w.-]{0,59}")


def check_run_words(tree: Mapping[str, Any]) -> None:
    """Check ``name`` and ``tags`` of a resolved configuration.

    Raises:
        ConfigError: A name that no folder could have, or tags that `vitscope runs list` could not find.
    """
    name, tags = tree.get("name"), tree.get("tags")
    if isinstance(name, str) and not _NAME.fullmatch(name):
        suggestion = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "vit-baseline"
        reason = "not 1 to 60 letters, digits, -, _ and ."
        raise ConfigError("name", repr(name), reason, f"write name={suggestion}")
    if isinstance(tags, str):
        raise ConfigError("tags", tags, "not a list", f"write tags=[{tags}]")
    if not isinstance(tags, list):
        return
    for tag in tags:
        if isinstance(tag, str) and (not tag.strip() or "," in tag):
            raise ConfigError("tags", repr(tag), "a tag is empty or holds a comma", "write tags=[first,second]")
