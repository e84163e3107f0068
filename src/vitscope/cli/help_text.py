"""Help of the commands that compose a configuration: examples first, then groups and keys with their comments.

``train --help`` lists groups and the keys at the top, ``train data=folder --help`` the keys of that choice, ``train data --help``
the choices of a group and ``train all --help`` every key. The texts are the comments of the files in ``conf/`` and, for keys
without one, the docstrings of what they configure; nothing is imported for them.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import hydra_internals, loading
from vitscope.config.keys.key_comments import FileComments, comments_of
from vitscope.config.ranges import library_options
from vitscope.config.ranges.source_signatures import argument_descriptions
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

_OPTIONS = ("-h", "--help")
#: columns that a line takes at most
_WIDEST = 120
#: a longer key has its comment on the next line: at most this share of the width
_KEY_SHARE = 0.42
#: a group with more choices is cut to this many
_MOST_CHOICES = 12
#: groups whose choices are files below a node of their own name
_LISTS = ("analysis", "callbacks")
#: keys of every analysis that are described in one place
_SHARED = {
    "probe": f"{library_options.__name__}.ProbeOptions",
    "when": f"{library_options.__name__}.MeasurementTimes",
}
#: options of targets of other libraries, by the node's key
_DOCUMENTED = {
    "optimizer": f"{library_options.__name__}.OptimizerOptions",
    "trainer": f"{library_options.__name__}.TrainerOptions",
    "recipe": f"{library_options.__name__}.DataRecipe",
    "schedule": "vitscope.core.lr_schedule.factor",
}
#: options that measures of curvature take from one class
_CURVATURE = "vitscope.linalg.curvature.curvature_options.CurvatureOptions"
_ON_ERROR = "warn: record a failed measurement as null; raise: stop"


def is_asked(arguments: Sequence[str]) -> bool:
    """Tell whether a command line asks for this help."""
    return any(argument in _OPTIONS for argument in arguments)


def help_of(command: str, arguments: Sequence[str]) -> str:
    """Return the help that a command line asks for.

    Args:
        command: Name of a file in ``conf/`` without its suffix.
        arguments: Command line without the program's name: overrides, and names of groups without a value.

    Raises:
        ConfigError: A name that is no group.
        HydraException: From the composition of the overrides.
    """
    file = loading.folder() / f"{command}.yaml"
    root: Any = OmegaConf.to_container(OmegaConf.load(file))
    defaults = {str(k): v for entry in root["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    groups = {name: choice for name, choice in defaults.items() if not name.startswith("override ")}
    words = [argument for argument in arguments if not argument.startswith("-")]
    names = [word for word in words if "=" not in word and not word.startswith("~")]
    overrides = [word for word in words if word not in names]
    for name in names:
        if name not in (*groups, "all"):
            raise ConfigError(name, None, "no such group", errors.nearest(name, [*groups, "all"]))
    with hydra_internals.composing_from(str(loading.folder()), command):
        cfg = compose(command, overrides=overrides)
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    choices = {key: _choices(override) for key, override in zip(keys, overrides) if key in groups}
    if "all" in names:
        choices = {**{name: _listed(choice) for name, choice in groups.items()}, **choices}
        return "\n\n".join([_root_keys(file, cfg), *(_group_keys(cfg, name, choices[name]) for name in choices)])
    parts = [_group_choices(file, name) for name in names]
    parts += [_group_keys(cfg, name, choices[name]) for name in choices]
    return "\n\n".join(parts) if parts else _overview(file, root, groups, cfg)


def _overview(file: Path, root: dict[str, Any], groups: dict[str, Any], cfg: DictConfig) -> str:
    described = comments_of(file).groups
    texts = root["hydra"]["help"]
    program = _program(file.stem)
    lines = [f"{program}: {texts['header']}", "", texts["footer"]]
    if len(groups) > 1:
        lines += ["", "Groups (GROUP=CHOICE, * is the default):"]
        for name, choice in groups.items():
            options, default = loading.options(name), _listed(choice)
            more = ""
            if len(options) > _MOST_CHOICES:
                more = f", ... ({len(options)} in all: {program} {name} --help)"
                first = [*default, *(option for option in options if option not in default)]
                options = sorted(first[:8])
            choice_list = ", ".join(f"*{option}" if option in default else option for option in options) + more
            lines += [f"  {name:12}{described.get(name, '')}", *_wrapped(choice_list, 14)]
    lines += ["", _root_keys(file, cfg)]
    if len(groups) > 1:
        hints = {
            "data=folder": "the keys of a choice and what they mean",
            "analysis": "the choices of a group, one line each",
            "all": "every key",
        }
        lines += ["", "More:", *(f"  {f'{program} {word} --help':38}{text}" for word, text in hints.items())]
    return "\n".join(lines)


def _root_keys(file: Path, cfg: DictConfig) -> str:
    return "\n".join(["Keys (KEY=VALUE):", *_key_lines(root_rows(file, cfg))])


def root_rows(file: Path, cfg: DictConfig) -> list[tuple[str, str]]:
    """Return the keys outside of groups with their comments.

    Args:
        file: Configuration file of a command, such as ``conf/train.yaml``.
        cfg: Configuration composed from it.
    """
    comments = comments_of(file)
    rows: list[tuple[str, str]] = []
    for key in map(str, cfg):
        if key in comments.groups or key in _LISTS:
            continue
        leaves = list(_leaves(cfg, key))
        if leaves and leaves[0][0] != key:
            rows.append((f"{key}.*", comments.keys.get(key, "")))
        rows += [(f"{dotted}={text}", comments.keys.get(dotted, "")) for dotted, text in leaves]
    return rows


def _group_choices(file: Path, group: str) -> str:
    """Return the choices of a group, each with the first sentence of its file."""
    title = f"{group}: {comments_of(file).groups.get(group, '')}".rstrip(" :")
    rows: list[tuple[str, str]] = []
    for option in loading.options(group):
        description = comments_of(loading.folder() / group / f"{option}.yaml").description
        sentence = re.split(r"(?<=\.)\s+(?=[A-Z])| Claim: ", description)[0]
        rows.append((f"{group}={option}" if group not in _LISTS else option, sentence.rstrip(".")))
    usage = f"'{group}=[{','.join(loading.options(group)[:2])}]'" if group in _LISTS else f"{group}=<choice>"
    return "\n".join(
        [title, "", *_key_lines(rows), "", f"{_program(file.stem)} {usage} --help shows the keys of a choice."]
    )


def _group_keys(cfg: DictConfig, group: str, choices: Sequence[str]) -> str:
    """Return the keys of chosen files of a group with their comments."""
    parts = []
    for choice in choices or [""]:
        file = loading.folder() / group / f"{choice}.yaml"
        description = comments_of(file).description if file.is_file() else ""
        title = f"{group}={choice}" if choice else f"{group}: no choice"
        rows = _global_rows(cfg, file) if "@package _global_" in _first_line(file) else choice_rows(cfg, group, file)
        # an experiment states its claim, command, cost and expectation
        sentences = re.split(r" (?=(?:Claim|Command|Cost|Expected)\b)", f"{title}: {description}".rstrip(": "))
        lines = [line for sentence in sentences for line in _wrapped(sentence, 0)]
        parts.append("\n".join([*lines, *_key_lines(rows)]))
    return "\n\n".join(parts)


def _global_rows(cfg: DictConfig, file: Path) -> list[tuple[str, str]]:
    """Return what an experiment or a profile sets, key by key."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    comments = comments_of(file).keys
    return [
        (f"{dotted}={text}", comments.get(dotted, ""))
        for key in content
        if key != "defaults"
        for dotted, text in _leaves(cfg, str(key), content[key])
    ]


def choice_rows(cfg: DictConfig, group: str, file: Path) -> list[tuple[str, str]]:
    """Return the keys of a choice, each as ``key=value``, with their comments.

    Args:
        cfg: Configuration in which the choice was composed.
        group: Folder of ``conf/``, such as ``analysis``.
        file: File of the choice in that folder.
    """
    comments = comments_of(file) if file.is_file() else FileComments()
    place = f"{group}.{file.stem}" if f"@package {group}." in _first_line(file) else group
    node = OmegaConf.select(cfg, place)
    if node is None:
        return []
    target = ""
    if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, "_target_"):
        target = str(node.get("_target_", ""))
    rows = []
    for dotted, text in _leaves(cfg, place):
        relative = dotted.removeprefix(f"{place}.")
        if relative.rpartition(".")[2] not in ("_target_", "_partial_") or text == "???":
            comment = comments.keys.get(relative) or _comment(group, relative, target)
            if not comment and group == "analysis":  # keys of a mapping that is described as a whole
                comment = comments.keys.get(relative.rpartition(".")[0], "")
            rows.append((f"{dotted}={text}", comment))
    return rows


def _comment(group: str, key: str, target: str) -> str:
    """Return what a key means where its own file does not say so: another file of the group, or a docstring."""
    first, _, rest = key.rpartition(".")
    if group == "analysis" and key == "on_error":
        return _ON_ERROR
    documented = _SHARED.get(first) or _DOCUMENTED.get(first or group) or target
    descriptions = argument_descriptions(documented)
    if group == "analysis" and not first:
        descriptions = {**argument_descriptions(_CURVATURE), **descriptions}
    if comment := descriptions.get(rest if first in {**_SHARED, **_DOCUMENTED} else key, ""):
        words = re.sub(r"\bNone\b", "null", comment)
        return words[0].lower() + words[1:] if words[1:2].islower() else words
    if group in ("model", "objective", "optimizer", "trainer", "callbacks", "paths"):
        for option in loading.options(group):
            if comment := comments_of(loading.folder() / group / f"{option}.yaml").keys.get(key):
                return comment
    return ""


def _leaves(cfg: DictConfig, key: str, content: Any = None) -> Iterator[tuple[str, str]]:
    """Yield ``(dotted key, value as it is written)`` of a node of the configuration, or of the keys that ``content`` has."""
    node = OmegaConf.select(cfg, key, throw_on_missing=False) if _resolves(cfg, key) else None
    if isinstance(node, DictConfig) and len(node):
        for name in content if isinstance(content, dict) else node:
            yield from _leaves(cfg, f"{key}.{name}", content.get(name) if isinstance(content, dict) else None)
    else:
        yield key, _value_text(cfg, key, node)


def _resolves(cfg: DictConfig, key: str) -> bool:
    try:
        OmegaConf.select(cfg, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return False
    return True


def _value_text(cfg: DictConfig, key: str, value: Any) -> str:
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.is_missing(holder, name):
        return "???"
    return _plain_text(loading.plain(value) if OmegaConf.is_config(value) else value)


def _plain_text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_plain_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain_text(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _key_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return keys with their comments in a column beside them; the comment of a long key begins on the next line."""
    longest = int(_width() * _KEY_SHARE)
    column = 4 + max((len(key) for key, _ in rows if len(key) <= longest), default=0)
    lines = []
    for key, comment in rows:
        comment_lines = _wrapped(comment, column)
        if comment_lines and len(key) <= longest:
            comment_lines[0] = f"  {key}".ljust(column) + comment_lines[0].lstrip()
        else:
            comment_lines.insert(0, f"  {key}")
        lines += comment_lines
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=" " * indent, subsequent_indent=" " * indent,
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, _WIDEST))


def _choices(override: str) -> list[str]:
    value = override.partition("=")[2].strip("[]'\" ")
    return [name.strip() for name in value.split(",") if name.strip() not in ("", "null")]


def _listed(choice: Any) -> list[str]:
    if choice is None:
        return []
    return [str(name) for name in choice] if isinstance(choice, list) else [str(choice)]


def _first_line(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0] if file.is_file() else ""


def _program(command: str) -> str:
    """Return how the user called the command: through a script of the checkout or as ``vitscope``."""
    return f"python {command}.py" if Path(sys.argv[0]).name == f"{command}.py" else f"vitscope {command}"
