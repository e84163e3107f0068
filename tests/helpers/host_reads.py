"""Find by its syntax where a loop over batches or products makes the host wait for the device.

A read is a call of ``item``, ``cpu``, ``tolist``, ``numpy`` or ``nonzero``, or ``float``, ``bool`` or ``int`` of something that
is neither a constant nor an attribute or length that torch keeps on the host. A loop is hot if what it goes through names
batches, chunks, pieces, vectors, products or steps; so is a method that a loop over batches calls for each of them.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

METHODS = {"item", "cpu", "tolist", "numpy", "nonzero"}
CASTS = {"float", "bool", "int"}
#: words of what a hot loop goes through
_HOT = re.compile(r"batch|chunk|pieces|n_vectors|n_steps|steps|products|iterations|queries")
#: methods that `vitscope.core.feature_pass` and curvature operators call for each batch or product
_HOT_METHODS = {
    "add",
    "read",
    "read_prefix",
    "read_attention",
    "close_batch",
    "absorb",
    "data_product",
    "unshifted",
    "_counted",
}
#: what a cast of reads nothing from a device: numbers of the host
_HOST = re.compile(
    r"np\.|len\(|options|config|math\.|\.shape|\.size\(|\.ndim|numpy\(\)|\.tolist\(\)|\.item\(\)|\.cpu\(\)"
)


def host_reads(path: Path) -> Counter[str]:
    """Return the number of reads in hot code of a module by the function that holds them: ``Class.function``."""
    found: Counter[str] = Counter()
    for name, function in _functions(ast.parse(path.read_text()), ""):
        is_method = name.rpartition(".")[2] in _HOT_METHODS and "." in name
        hot = [function] if is_method else [loop for loop in ast.walk(function) if _is_hot(loop)]
        reads = {id(node): node for loop in hot for node in ast.walk(loop) if _is_read(node)}
        if reads:
            found[name] += len(reads)
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _is_hot(node: ast.AST) -> bool:
    if isinstance(node, ast.For):
        return bool(_HOT.search(ast.unparse(node.iter)))
    if isinstance(node, ast.While):
        return True
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp):
        return any(_HOT.search(ast.unparse(generator.iter)) for generator in node.generators)
    return False


def _is_read(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in METHODS
    if not isinstance(node.func, ast.Name) or node.func.id not in CASTS or not node.args:
        return False
    argument = node.args[0]
    return not isinstance(argument, ast.Constant) and not _HOST.search(ast.unparse(argument))
