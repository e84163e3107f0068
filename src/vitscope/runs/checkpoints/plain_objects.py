"""Stand-ins for the plain objects that other programs keep in a checkpoint beside its weights: options, metrics, paths.

A file names the classes of its objects. Those named here are replaced by classes of this module, which keep values and call
nothing of the library that the file names: numbers of NumPy become numbers of Python, arrays of NumPy and nodes of OmegaConf
become objects that only hold what was stored. Any other class is refused, see `file_formats`.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

#: type codes of NumPy's numbers and texts; not those of objects and of records, whose bytes may hold addresses
_NUMBER_CODE = re.compile(r"[biufcSU]\d{1,6}")


class PlainObject:
    """Holds the arguments and the state that a file gives for an object, under ``arguments`` and in its attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Keep the state: attributes of their names where it has names."""
        values = state if isinstance(state, dict) else {"state": state}
        self.__dict__.update({str(name): value for name, value in values.items()})


def plain_mapping(*_: Any) -> dict[Any, Any]:
    """Return a dictionary without a default, which is filled with what the file holds."""
    return {}


class NumberType:
    """The type of a NumPy number: its code, such as ``f8``, and its byte order.

    Args:
        code: Type code of the values.
        _: Flags that NumPy writes.

    Raises:
        UnpicklingError: A type that is neither a number nor a text.
    """

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMBER_CODE.fullmatch(code):
            raise pickle.UnpicklingError(f"a NumPy value of type {code!r:.40}, which is no number")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        """Take the byte order from what NumPy writes: a tuple whose second entry it is."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a NumPy type with an unknown byte order")
        self.order = order


def plain_number(kind: Any, data: Any = b"") -> Any:
    """Return the number or text of Python that NumPy's bytes stand for.

    Raises:
        UnpicklingError: No type of a number, or bytes of another length.
    """
    if not isinstance(kind, NumberType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy value that is no number")
    dtype = np.dtype(("" if kind.order in "=|" else kind.order) + kind.code)
    if len(data) != dtype.itemsize or not data:
        raise pickle.UnpicklingError(f"a NumPy number of {len(data)} bytes, not {dtype.itemsize}")
    return np.frombuffer(data, dtype)[0].item()


_STAND_INS: dict[Callable[..., Any], tuple[str, ...]] = {
    plain_number: ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
    NumberType: ("numpy.dtype",),
    plain_mapping: ("collections.defaultdict",),
    PlainObject: (
        "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray",
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata", "omegaconf.base.UnionNode", "omegaconf.nodes.AnyNode", "omegaconf.nodes.StringNode",
        "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode", "omegaconf.nodes.BooleanNode",
        "omegaconf.nodes.BytesNode", "omegaconf.nodes.PathNode", "omegaconf.nodes.EnumNode", "typing.Any",
        "typing.Union", "typing.Optional", "typing.List", "typing.Dict", "typing.Tuple", "builtins.dict", "builtins.list",
        "builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.tuple", "builtins.bytes",
        "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
        "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "pathlib._local.PurePosixPath",
        "pathlib._local.PureWindowsPath",
    ),
}  # fmt: skip

#: entries for `torch.serialization.safe_globals`: a stand-in and the name that it replaces; a Namespace holds attributes alone
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    *((stand_in, name) for stand_in, names in _STAND_INS.items() for name in names),
]
