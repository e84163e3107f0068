"""Keeps passwords and keys out of what is written down, by the names they stand under and by their values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

REDACTED = "redacted"

#: shorter values of the environment are words that occur anywhere
_SHORTEST = 8

_PARTS = re.compile(
    r"password|passwd|passphrase|passcode|secret|credential|(api|access|private|auth|signing|encryption|ssh|license)key"
    r"|(auth|access|bearer|refresh|session|api)token(?!s|iz)"
)
_WORDS = {"auth", "bearer", "jwt", "cookie", "pat"}
#: words before `token`, `key`, `pwd` and `pass` in names of this field that hold no secret
_HARMLESS_BEFORE = {
    "backward", "bos", "cache", "class", "cls", "dist", "distillation", "eos", "forward", "foreign", "full", "global",
    "group", "hash", "image", "label", "low", "high", "band", "mask", "max", "metric", "min", "monitor", "n", "num", "old",
    "one", "pad", "patch", "per", "prefix", "primary", "public", "query", "reg", "register", "single", "sort", "two",
}  # fmt: skip
_HARMLESS_AFTER = {
    "count", "dim", "dims", "drop", "dropout", "embed", "grid", "index", "label", "labels", "len", "length", "mix", "mixer",
    "mlp", "norm", "num", "pool", "ratio", "shape", "size", "type",
}  # fmt: skip
#: a user and a password, or a token alone, before a host's name
_IN_ADDRESS = re.compile(r"(?<=://)(?:[^/@\s:'\"]*:[^/@\s'\"]+|[^/@\s:'\"]{8,})(?=@)")
#: in texts: 'name': value, "name": value, name=value; in values and arguments also name: value
_QUOTED_OR_EQUAL = re.compile(r"(?:(?P<quote>[\"'])(?P<name>[\w.-]+)(?P=quote)\s*[:=]|(?P<plain>[\w.-]+)=)\s*")
_ANY_PAIR = re.compile(r"(?P<quote>[\"']?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*[:=](?P<plain>)\s*")

#: values that stood under a secret's key in a configuration or on the command line of this process
_remembered: set[str] = set()


def is_secret(key: str) -> bool:
    """Tell whether a key, or the name of an environment variable, looks like a secret's."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # apiKey
    words = [word for word in re.split(r"[^a-z0-9]+", separated.lower()) if word]
    if _PARTS.search("".join(words)) or _WORDS & set(words):
        return True
    for index, word in enumerate(words):
        before, after = words[index - 1] if index else "", words[index + 1] if index + 1 < len(words) else ""
        if word == "token" and before not in _HARMLESS_BEFORE and after not in _HARMLESS_AFTER:
            return True
        if word in ("key", "pwd", "pass") and not after and before and before not in _HARMLESS_BEFORE:
            return True
    return False


def redacted(value: Any) -> Any:
    """Return a tree of plain values without secrets.

    Whatever stands under a secret's key is replaced, a list or a group of keys as a whole (true, false and null tell
    nothing and stay); the same values elsewhere in the tree, secrets of the environment and passwords in addresses are
    replaced inside of texts.
    """
    _remember(_under_secret_keys(value))
    return _clean(value)


def masked(text: str) -> str:
    """Return a text without secrets.

    Replaced are the values of the environment's secret variables (an ``${oc.env:...}`` may have brought them in) and those
    that `redacted` met, as they are, escaped (``repr``, JSON, URL) or line by line; values written as ``name=value`` or
    ``'name': value``; and passwords in addresses.
    """
    for secret in _known():
        text = text.replace(secret, REDACTED)
    return _IN_ADDRESS.sub(REDACTED, _without_pairs(text, _QUOTED_OR_EQUAL))


def cleaned(text: str) -> str:
    """Return a value or a command line's argument without secrets: as `masked`, and what a secret's key names in it."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[+~]*[\w./@:-]+", key) and is_secret(key):
        _remember([value.strip("'\"")])
        return f"{key}={REDACTED}"
    return masked(_without_pairs(text, _ANY_PAIR) if equals or text.lstrip().startswith(("{", "[")) else text)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            (masked(key) if isinstance(key, str) else key): (
                REDACTED if is_secret(str(key)) and _tells(item) else _clean(item)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)([_clean(item) for item in value]) if type(value) in (list, tuple) else [*map(_clean, value)]
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) in _known():
        return REDACTED
    return value


def _tells(value: Any) -> bool:
    """Tell whether a value can be a secret, or hold one."""
    return not (
        value is None or isinstance(value, bool) or (isinstance(value, str | Mapping | list | tuple) and not value)
    )


def _under_secret_keys(value: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _under_secret_keys(item, secret or is_secret(str(key)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _under_secret_keys(item, secret)
    elif secret and _tells(value):
        yield str(value)


def _remember(values: Any) -> None:
    _remembered.update(value for value in values if len(value) >= _SHORTEST and value != REDACTED)


def _known() -> list[str]:
    """Return the secrets of the environment and of this process as they may be written, longest first.

    One that begins with another must go first: else the rest of it would stay.
    """
    values = {v for name, v in os.environ.items() if len(v) >= _SHORTEST and is_secret(name)} | _remembered
    forms = {form for value in values for form in _forms(value) if len(form) >= _SHORTEST}
    return sorted(forms, key=len, reverse=True)


def _forms(value: str) -> Iterator[str]:
    yield value
    yield value.strip()
    yield repr(value)[1:-1]
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(repr(value)[1:-1])[1:-1]  # a message inside of a message
    yield quote(value, safe="")
    yield " ".join(value.split())
    if len(lines := value.splitlines()) > 1:
        yield from (line.strip() for line in lines)


def _without_pairs(text: str, pattern: re.Pattern[str]) -> str:
    """Return the text with the value after each secret's name replaced."""
    pieces, position = [], 0
    for match in pattern.finditer(text):
        name = match["plain"] or match["name"] or ""
        if match.start() < position or not is_secret(name):
            continue
        end = _end_of_value(text, match.end())
        if text.startswith(REDACTED, match.end()) or end == match.end():
            continue
        if text[match.end() : end].lower() in ("none", "null", "true", "false"):
            continue
        pieces += [text[position : match.end()], REDACTED]
        position = end
    return "".join([*pieces, text[position:]])


def _end_of_value(text: str, start: int) -> int:
    """Return where a value ends that begins at ``start``: at its quote or bracket, else before a separator."""
    if start >= len(text):
        return start
    if text[start] in "\"'":
        end = start + 1
        while end < len(text) and text[end] != text[start]:
            end += 2 if text[end] == "\\" else 1
        return min(end + 1, len(text))
    depth, end = 0, start
    while end < len(text):
        letter = text[end]
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            if depth == 0:
                break
            depth -= 1
            if depth == 0:
                return end + 1
        elif depth == 0 and (letter in ",;&" or letter.isspace()):
            break
        end += 1
    return end
