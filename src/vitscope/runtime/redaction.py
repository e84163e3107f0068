"""Keeps passwords and keys out of what is written down, by the names they stand under and by their values."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

REDACTED = "redacted"

#: shorter values of the environment are words that occur anywhere
_SHORTEST = 8

_PARTS = re.compile(
    r"password|passwd|passphrase|passcode|secret|credential|authorization|webhook|connectionstring|sharedaccess|amzsignature"
    r"|(api|access|private|auth|signing|encryption|ssh|license)key|(auth|access|bearer|refresh|session|api)tokens?(?!iz)"
    r"|(aws|comet|github|gitlab|hf|huggingface|kaggle|mlflow|neptune|ngc|openai|slack|wandb)(key|token)s?(?!iz)"
)
_WORDS = {
    "auth", "bearer", "cookie", "cookies", "creds", "csrf", "dsn", "hmac", "jwt", "mysqlpwd", "oauth", "oauth2", "otp", "pat",
    "pats", "pgpass", "psk", "sessionid", "sshpass", "totp", "xsrf",
}  # fmt: skip
#: words that name a secret after another word, or below another key
_LAST_WORDS = ("key", "pwd", "pass", "pw")
#: words before `token`, `key`, `pwd` and `pass` in names of this field that hold no secret
_HARMLESS_BEFORE = {
    "backward", "bos", "cache", "changes", "class", "cls", "dist", "distillation", "eos", "forward", "foreign", "full", "global",
    "group", "hash", "image", "label", "low", "high", "band", "mask", "max", "metric", "min", "monitor", "n", "num", "old",
    "one", "pad", "patch", "per", "prefix", "primary", "public", "query", "reg", "register", "single", "sort", "two",
}  # fmt: skip
_HARMLESS_AFTER = {
    "count", "dim", "dims", "drop", "dropout", "embed", "grid", "index", "label", "labels", "len", "length", "mix", "mixer",
    "mlp", "norm", "norms", "num", "pool", "ratio", "shape", "size", "type",
}  # fmt: skip
#: a user and a password, or a token alone, before a host's name; a signature in a query; what an option of curl names
_IN_ADDRESS = re.compile(
    r"(?<=://)(?:[^/@\s:'\"]*:[^@\s'\"]+|[^/@\s:'\"]{8,})(?=@)|(?<![^\s'\"\[{(,=])[\w.+-]+:[^\s:@'\"]{3,}(?=@[A-Za-z])"
    r"|(?<=[?&]sig=)[^&\s'\"]+|(?<=-u )[\w.+-]+:[^\s'\"]+|(?<=--user )[\w.+-]+:[^\s'\"]+"
)
#: secrets that are known by their form: keys and tokens of services, of HTTP headers, private keys
_BY_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{20,}|sk-(?:ant|proj|svcacct)-[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{36,}"
    r"|github_pat_\w{22,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)|(?<=\bBearer )[\w.~+/=-]{8,}|(?<=\bBasic )[\w+/=-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
#: in texts: 'name': value, "name": value (quotes may be escaped), name=value, name => value; in values and arguments also
#: name: value
_QUOTED_OR_EQUAL = re.compile(
    r"(?:(?P<quote>\\*[\"'])(?P<name>[\w.-]+)(?P=quote)\s*(?:[:=]>?)|(?P<plain>[\w.-]+)(?:=|\s+=>))\s*"
)
_ANY_PAIR = re.compile(r"(?P<quote>(?:\\*[\"'])?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*(?:[:=]>?)(?P<plain>)\s*")
#: an element of XML, with attributes and inner elements or not
_ELEMENT = re.compile(
    r"<(?P<name>[A-Za-z_][\w.:-]*)(?P<attributes>\s[^<>]*)?>(?P<value>.{1,500}?)</(?P=name)\s*>", re.DOTALL
)
_OPTION = re.compile(r"(?<![\w-])(?P<quote>)--?(?P<name>[A-Za-z][\w-]*)(?P<plain>)\s+(?!-)")

#: values that stood under a secret's key in a configuration or on the command line of this process
_remembered: set[str] = set()
#: secrets of the environment while a tree is redacted, whose texts are thousands; None otherwise
_environment_of_tree: ContextVar[frozenset[str] | None] = ContextVar("environment_of_tree", default=None)


@functools.lru_cache(maxsize=4096)  # the environment's names are asked for with each text
def is_secret(key: str) -> bool:
    """Tell whether a key, or the name of an environment variable, looks like a secret's."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # apiKey
    words = [word for word in re.split(r"[^a-z0-9]+", separated.lower()) if word]
    if _PARTS.search("".join(words)) or _WORDS & set(words):
        return True
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        after = words[index + 1] if index + 1 < len(words) else ""
        if word == "token" and before not in _HARMLESS_BEFORE and after not in _HARMLESS_AFTER:
            return True
        if word in _LAST_WORDS and not after and before and before not in _HARMLESS_BEFORE:
            return True
    return False


def redacted(value: Any) -> Any:
    """Return a tree of plain values without secrets.

    Whatever stands under a secret's key is replaced, a list or a group of keys as a whole (true, false and null tell
    nothing and stay); the same values elsewhere in the tree, secrets of the environment and passwords in addresses are
    replaced inside of texts.
    """
    _remember(_under_secret_keys(value))
    token = _environment_of_tree.set(_environment_secrets())
    try:
        return _clean(value)
    finally:
        _environment_of_tree.reset(token)


def masked(text: str) -> str:
    """Return a text without secrets.

    Replaced are the values of the environment's secret variables (an ``${oc.env:...}`` may have brought them in) and those
    that `redacted` met, as they are, escaped (``repr``, JSON, URL) or line by line; values written as ``name=value`` or
    ``'name': value``; and passwords in addresses.
    """
    for secret in _known():
        text = text.replace(secret, REDACTED)
    text = _BY_FORM.sub(REDACTED, _IN_ADDRESS.sub(REDACTED, text))
    text = _ELEMENT.sub(_clean_element, text)
    return _without_pairs(_without_pairs(text, _QUOTED_OR_EQUAL), _OPTION)


def _clean_element(match: re.Match[str]) -> str:
    """Return an element of XML without its content if its name is a secret's, else with its inner elements cleaned."""
    opening = match[0][: match.start("value") - match.start()]
    closing = match[0][match.end("value") - match.start() :]
    content = REDACTED if is_secret(match["name"]) else _ELEMENT.sub(_clean_element, match["value"])
    return f"{opening}{content}{closing}"


def cleaned(text: str) -> str:
    """Return a value or a command line's argument without secrets: as `masked`, and what a secret's key names in it."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[+~]*[\w./@:-]+", key) and is_secret(key):
        _remember([value.strip("'\"")])
        return f"{key}={REDACTED}"
    _remember(_in_listed_pairs(value if equals else text))
    return masked(_without_pairs(_BY_FORM.sub(REDACTED, text), _ANY_PAIR, key if equals else ""))


def _clean_mapping(mapping: Mapping[Any, Any], above: str) -> dict[Any, Any]:
    named = _named_value(mapping)
    clean = {}
    for key, item in mapping.items():
        shown_key = masked(key) if isinstance(key, str) else key
        is_hidden = (key == named or _is_secret_below(above, key, item)) and _tells(item)
        clean[shown_key] = REDACTED if is_hidden else _clean(item, str(key))
    return clean


def _clean(value: Any, above: str = "") -> Any:
    if isinstance(value, Mapping):
        return _clean_mapping(value, above)
    if isinstance(value, list | tuple):
        items = [REDACTED if hidden else _clean(item, above) for item, hidden in zip(value, _follow_names(value))]
        return tuple(items) if type(value) is tuple else items
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return value if masked(text) == text else REDACTED
    if isinstance(value, int | float) and not isinstance(value, bool) and str(value) in _known():
        return REDACTED
    return value


def _is_secret_below(above: str, key: Any, item: Any) -> bool:
    """Tell whether a key's value is a secret, by the key and, for names such as ``key`` or ``pwd``, by the key above it."""
    name = str(key)
    if is_secret(name):
        return True
    text = isinstance(item, str) and (name.lower() != "key" or len(item) >= _SHORTEST)
    return text and name.lower() in _LAST_WORDS and is_secret(f"{above}.{name}")


def _named_value(node: Mapping[Any, Any]) -> str | None:
    """Return ``value`` where a mapping says whose value it is: ``{name: OPENAI_KEY, value: ...}``."""
    names = (node.get(key) for key in ("name", "key", "variable"))
    return "value" if "value" in node and any(isinstance(name, str) and is_secret(name) for name in names) else None


def _follow_names(items: Sequence[Any]) -> list[bool]:
    """Tell of each item whether the one before it names it: ``[--password, x]``, or a pair ``[password, x]``."""
    hidden = [False]
    for name in items[:-1]:
        option = isinstance(name, str) and re.fullmatch(r"-{1,2}[A-Za-z][\w-]*", name)
        pair = isinstance(name, str) and len(items) == 2 and re.fullmatch(r"[A-Za-z][\w.-]*", name)
        hidden.append(bool(option or pair) and is_secret(str(name)))
    return [flag and _tells(item) for flag, item in zip(hidden, items)]


def _tells(value: Any) -> bool:
    """Tell whether a value can be a secret, or hold one."""
    return not (
        value is None or isinstance(value, bool) or (isinstance(value, str | Mapping | list | tuple) and not value)
    )


def _under_secret_keys(value: Any, secret: bool = False, above: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        named = _named_value(value)
        for key, item in value.items():
            below = secret or key == named or _is_secret_below(above, key, item)
            yield from _under_secret_keys(item, below, str(key))
    elif isinstance(value, list | tuple):
        for item, hidden in zip(value, _follow_names(value)):
            yield from _under_secret_keys(item, secret or hidden, above)
    elif secret and _tells(value):
        yield value.decode("latin-1") if isinstance(value, bytes) else str(value)


#: pairs of a name and its value inside of a list that is written out: [password, x], {name: HF_TOKEN, value: x}
_LISTED_PAIR = re.compile(
    r"\[\s*['\"]?(?P<first>[A-Za-z][\w.-]*)['\"]?\s*,\s*(?P<second>[^\s,\]\[{}]+)\s*\]"
    r"|\b(?:name|key|variable)['\"]?\s*:\s*['\"]?(?P<name>[\w.-]+)['\"]?\s*,\s*['\"]?value['\"]?\s*:\s*(?P<value>[^\s,\]\[{}]+)"
)


def _in_listed_pairs(text: str) -> Iterator[str]:
    for match in _LISTED_PAIR.finditer(text):
        if is_secret(match["first"] or match["name"]):
            yield (match["second"] or match["value"]).strip("'\"")


def _remember(values: Any) -> None:
    _remembered.update(value for value in values if len(value) >= _SHORTEST and value != REDACTED)


def _known() -> tuple[str, ...]:
    """Return the secrets of the environment and of this process as they may be written, longest first."""
    return _written_forms(_environment_secrets() | _remembered)


def _environment_secrets() -> frozenset[str]:
    """Return the values of the environment's secret variables; while a tree is redacted they are read once."""
    if (read_before := _environment_of_tree.get()) is not None:
        return read_before
    return frozenset(value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret(name))


@functools.lru_cache(maxsize=16)
def _written_forms(values: frozenset[str]) -> tuple[str, ...]:
    """Return the forms in which secrets may be written, longest first: else the rest of one that begins with another stays."""
    forms = {form for value in values for form in _forms(value) if len(form) >= _SHORTEST}
    return tuple(sorted(forms, key=len, reverse=True))


def _forms(value: str) -> Iterator[str]:
    yield value
    yield value.strip()
    yield repr(value)[1:-1]
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(repr(value)[1:-1])[1:-1]  # a message inside of a message
    yield quote(value, safe="")
    yield base64.b64encode(value.encode()).decode().rstrip("=")
    yield value.encode().hex()
    yield " ".join(value.split())
    if len(lines := value.splitlines()) > 1:
        yield from (line.strip() for line in lines)


def _without_pairs(text: str, pattern: re.Pattern[str], above: str = "") -> str:
    """Return the text with the value after each secret's name replaced; ``above`` is the key that holds the text."""
    pieces, position = [], 0
    for match in pattern.finditer(text):
        name = match["plain"] or match["name"] or ""
        end = _end_of_value(text, match.end())
        value = text[match.end() : end]
        if match.start() < position or not _is_secret_below(above or "text", name, value):
            continue
        if text.startswith(REDACTED, match.end()) or end == match.end():
            continue
        if value.lower() in ("none", "null", "true", "false"):
            continue
        pieces += [text[position : match.end()], REDACTED]
        position = end
    return "".join([*pieces, text[position:]])


#: the rest of a block of lines in YAML: ``|`` or ``>`` and the lines below it, or items of a list
_BLOCK = re.compile(r"(?:[|>][+-]?\d*[ \t]*|- [^\n]*)(?:\n(?:[ \t]+[^\n]*|(?=\n)|$|- [^\n]*))*")


def _end_of_value(text: str, start: int) -> int:
    """Return where a value ends that begins at ``start``: at its quote, bracket or block, else before a separator."""
    if start >= len(text):
        return start
    escaped_quote = re.compile(r"\\+[\"']").match(text, start)
    if escaped_quote:
        end = text.find(escaped_quote[0], escaped_quote.end())
        return len(text) if end < 0 else end + len(escaped_quote[0])
    if text[start] in "\"'":
        return _end_of_quoted(text, start)
    block = _BLOCK.match(text, start) if "\n" in text[start:] else None
    return block.end() if block else _end_of_unquoted(text, start)


def _end_of_quoted(text: str, start: int) -> int:
    """Return the place behind the quote that closes the one at ``start``, or the end of a text without it."""
    end = start + 1
    while end < len(text) and text[end] != text[start]:
        end += 2 if text[end] == "\\" else 1
    return min(end + 1, len(text))


def _end_of_unquoted(text: str, start: int) -> int:
    """Return the place behind the bracket that closes the first one, or before a separator outside of brackets."""
    depth = 0
    for end in range(start, len(text)):
        letter = text[end]
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            if depth == 0:
                return end
            depth -= 1
            if depth == 0:
                return end + 1
        elif depth == 0 and (letter in ",;&" or letter.isspace()):
            return end
    return len(text)
