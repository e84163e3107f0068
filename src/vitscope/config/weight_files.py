"""Refuses arguments of a configuration that name a file, a folder, an address or a repository of a hub.

Libraries of models load what such an argument names, and some unpickle it: only ``ckpt_path`` may name a file of weights, and
it is read without executing anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitscope.runtime.errors import ConfigError

#: arguments of timm by which it loads a file, refused whatever their value
_ALWAYS = re.compile(r"checkpoint_path|pretrained_cfg\w*|pretrained_path|pretrained_loc\w*")
#: arguments that name a file, a folder, an address or a repository where their value is a text
_NAMES_A_FILE = re.compile(
    r"(\w+_)?(path|paths|file|files|filename|url|uri|dir|repo|repo_id|hf_hub_id|name_or_path|hub|cache)"
    r"|teacher\w*|init_weights|checkpoint\w*|ckpt\w*|resume\w*|state_dict\w*|revision|pretrained\w*|weights_from|load_from"
)
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:")
_ADDRESS = re.compile(r"\w[\w+.-]*://|(hf[-_]hub|local[-_]dir|file|https?|s3|gs|hub):", re.IGNORECASE)
_SUFFIX = re.compile(
    r"\.(pth|pt|ckpt|bin|safetensors|pkl|pickle|npz|npy|h5|hdf5|onnx|tar|tgz|gz|zip|joblib|msgpack|th|t7|yaml|yml|json|py)$",
    re.IGNORECASE,
)
#: weights that torchvision lists by name
_TORCHVISION = re.compile(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*")
_MODELS = ("timm.", "torchvision.", "torchmetrics.", "vitscope.models.")
_FIX = "use ckpt_path, or pretrained=true with a plain name of timm"


def check(node: Mapping[str, Any], path: str, module: str) -> None:
    """Refuse a node's arguments that name weights or another file; nested lists and groups of keys are gone through.

    Args:
        node: A mapping with ``_target_``; mappings in it with one of their own are left to their own check.
        path: Dotted key of the file.
        module: The module of the object that ``_target_`` names.

    Raises:
        ConfigError: Naming the argument.
    """
    group = path.partition(".")[0]
    whole = group in ("model", "data") or module.startswith(_MODELS)
    for place, key, value in _arguments(node, path):
        if _ALWAYS.fullmatch(key) or (whole and _names_a_file(key, value, group, module)):
            displayed_value = value if isinstance(value, str) else "..."
            raise ConfigError(
                place, displayed_value, "names a file or a hub of weights, which only ckpt_path may", _FIX
            )


def _arguments(node: Any, path: str, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield ``(dotted key, its last name, value)`` of every mapping's entry and every text in a list."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == "_target_":
                continue
            place = f"{path}.{name}"
            yield place, str(name), value
            if not (isinstance(value, Mapping) and "_target_" in value):
                yield from _arguments(value, place, str(name))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            if isinstance(value, str):
                yield f"{path}.{index}", key, value
            elif not (isinstance(value, Mapping) and "_target_" in value):
                yield from _arguments(value, f"{path}.{index}", key)


def _names_a_file(key: str, value: Any, group: str, module: str) -> bool:
    if group == "data" and key in ("root", "name", "checksums"):
        return False
    if key in ("weights", "weights_backbone"):
        named = isinstance(value, str) and module.startswith("torchvision.") and _TORCHVISION.fullmatch(value)
        return not (value is None or isinstance(value, bool) or named)
    if _NAMES_A_FILE.fullmatch(key) and isinstance(value, str | bytes | Mapping | list | tuple) and value:
        return True
    if not isinstance(value, str):
        return False
    plain_name = key in ("name", "model_name")  # of timm: beit3_base_patch16_224.pt
    if _ADDRESS.match(value) or (_SUFFIX.search(value) and not plain_name):
        return True
    if group == "data":
        return "/" in value and Path(value).exists()
    outside = any(mark in value for mark in ("/", "\\")) or value.startswith("~") or _SCHEME.match(value)
    return bool(outside) or (not plain_name and not _ours(module) and _is_file(value))


def _ours(module: str) -> bool:
    return module.startswith("vitscope.") and module != "vitscope.models.timm_model"


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or a zero byte: no name of a file
        return False
