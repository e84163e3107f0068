"""What must not be written down: passwords and keys, found by the names they stand under and by their values."""

from __future__ import annotations

import os
import re

REDACTED = "redacted"

_NAME = re.compile(
    r"(?i)(password|passwd|passphrase|secret|token(?!s|iz)|api_?key|access_?key|private_?key|credential|(^|[_.])auth($|_))"
)
#: a user and a password before a host's name
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
#: shorter values of the environment are words that occur anywhere
_SHORTEST = 8


def is_secret(key: str) -> bool:
    """Tell whether a key, or the name of an environment variable, looks like a secret's."""
    return _NAME.search(key) is not None


def masked(text: str) -> str:
    """Return a text without the values of the environment's secret variables (an ``${oc.env:...}`` may have brought them
    in) and without passwords in addresses.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, REDACTED)
    return _IN_ADDRESS.sub(REDACTED, text)


def cleaned(text: str) -> str:
    """Return a value or a command line's argument without secrets: as `masked`, and ``key=value`` of a secret's key."""
    key, equals, _ = text.partition("=")
    if equals and re.fullmatch(r"[+~]*[\w./-]+", key) and is_secret(key):
        return f"{key}={REDACTED}"
    return masked(text)
