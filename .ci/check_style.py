"""Check the words of the source: openings of module docstrings, entries of arguments, vague names, private vocabulary, American
spelling, and the reasons of suppressed checks.

Usage: python .ci/check_style.py [--write]

Tests, benchmarks and scripts are checked for the reasons alone.

Each file may have as many faults of a kind as `style_allowance.json` records for it, none where it records nothing. `--write`
records today's counts; it lowers counts only.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALLOWANCE = Path(__file__).with_name("style_allowance.json")
#: a module docstring states what the module does or holds; after these words a reader has to guess it
OPENINGS = re.compile(r"(What|Where|Who|How)\b")
#: participles, adverbs and pronouns that name an event, a place or an owner instead of a value
VAGUE_NAMES = frozenset({
    "again", "asked", "chosen", "done", "due", "found", "given", "gone", "here", "kept", "known", "left", "made", "mine", "ours",
    "over", "own", "said", "seen", "shown", "stands", "taken", "theirs", "there", "wanted", "why",
})  # fmt: skip
#: the authors' own words for a subpackage, an import rule and the layout
PRIVATE_WORDS = re.compile(r"\b(rooms?|walls?|house)\b", re.IGNORECASE)
#: stems of words in British spelling
BRITISH = re.compile(
    r"\w*((normal|initial|random|recogn|minim|maxim|optim|standard|general|regular|parametr|summar|quant|visual|organ|factor|serial"
    r"|synchron|penal)is(e|ing|ation)|analys(e[dr]?\b|ing)|centre|neighbour|behaviour|colour|favour|(label|model)l(ed|ing)|\bgrey)\w*",
    re.IGNORECASE,
)
#: sections of a docstring whose entries are ``name: Description.``
SECTIONS = re.compile(r"(Args|Attributes|Raises):")
#: an entry that begins with a small letter, but for the name of a type or a package; or with `Of` or `Its`, without saying what
FRAGMENT = re.compile(r"    (?! )\*{0,2}[\w, .*]+: ((?!float|submitit|curvlinops|p-values)[a-z]\w*|Of|Its)\b")
#: comments that switch a check of ruff or pyright off, with the names of the checks
SUPPRESSION = re.compile(
    r"#\s*(noqa|type: ignore|pyright: ignore)(:\s*[A-Z]+\d+(,\s*[A-Z]+\d+)*|\[[\w, -]+\])?(?P<reason>.*)"
)

#: number of allowed faults by file and kind
Counts = dict[str, dict[str, int]]


class Fault(NamedTuple):
    """A fault of one kind (``opening``, ``entry``, ``name``, ``word``, ``spelling`` or ``suppression``) at a line."""

    kind: str
    line: int
    text: str


def assigned_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each name that code binds by assignment, loop, `with`, walrus or argument, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each docstring of a module and the line of its owner."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or "", getattr(node, "lineno", 1)


def fragments(docstring: str) -> Iterator[str]:
    """Yield the entries of arguments, attributes and errors that `FRAGMENT` describes."""
    is_entry = False
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            is_entry = SECTIONS.fullmatch(line) is not None
        elif is_entry and FRAGMENT.match(line):
            yield line.strip()


def faults(source: str) -> list[Fault]:
    """Return the faults of a module's source, in the order of their lines."""
    tree = ast.parse(source)
    result = []
    if match := OPENINGS.match(ast.get_docstring(tree) or ""):
        result.append(
            Fault("opening", 1, f"the module docstring opens with {match.group()!r}: state what the module does")
        )
    for name, line in assigned_names(tree):
        if name in VAGUE_NAMES:
            result.append(Fault("name", line, f"the name {name!r} does not say what it holds: use a noun phrase"))
    for text, line in docstrings(tree):
        for entry in fragments(text):
            result.append(
                Fault("entry", line, f"the entry {entry!r} is no whole phrase: begin with a capital and a noun")
            )
        for match in PRIVATE_WORDS.finditer(text):
            result.append(
                Fault("word", line, f"{match.group()!r} in a docstring: use subpackage, import rule or layout")
            )
    for line, text in enumerate(source.splitlines(), start=1):
        for match in BRITISH.finditer(text):
            result.append(Fault("spelling", line, f"{match.group()!r}: the spelling is American"))
        if (match := SUPPRESSION.search(text)) and not re.search(r"\w", match["reason"].partition("# fmt:")[0]):
            result.append(
                Fault("suppression", line, f"{match.group().strip()!r} gives no reason: append it after the code")
            )
    return sorted(result, key=lambda fault: (fault.line, fault.kind))


def count(file_faults: list[Fault]) -> dict[str, int]:
    """Return the number of faults of each kind that occurs."""
    kinds = [fault.kind for fault in file_faults]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def excess(file_faults: list[Fault], allowed: dict[str, int]) -> list[Fault]:
    """Return the faults of those kinds that occur more often than is allowed."""
    counts = count(file_faults)
    return [fault for fault in file_faults if counts[fault.kind] > allowed.get(fault.kind, 0)]


def lowered(allowance: Counts, counts: Counts) -> Counts:
    """Return the allowance with each number lowered to today's count; no number rises and no file is added."""
    result = {
        name: {kind: min(n, counts.get(name, {}).get(kind, 0)) for kind, n in kinds.items()}
        for name, kinds in allowance.items()
    }
    return {name: positive for name, kinds in result.items() if (positive := {k: n for k, n in kinds.items() if n})}


def main(arguments: list[str]) -> int:
    """Print every fault beyond the allowance with its file and line; return 1 if there is one, else 0."""
    by_file = {
        path.relative_to(ROOT).as_posix(): faults(path.read_text()) for path in sorted((ROOT / "src").rglob("*.py"))
    }
    for path in sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")):
        suppressions = [fault for fault in faults(path.read_text()) if fault.kind == "suppression"]
        by_file[path.relative_to(ROOT).as_posix()] = suppressions
    allowance: Counts = json.loads(ALLOWANCE.read_text())
    if "--write" in arguments:
        allowance = lowered(allowance, {name: count(file_faults) for name, file_faults in by_file.items()})
        ALLOWANCE.write_text(json.dumps(allowance, indent=2, sort_keys=True) + "\n")
    lines = [
        f"{name}:{fault.line}: {fault.text}"
        for name, file_faults in by_file.items()
        for fault in excess(file_faults, allowance.get(name, {}))
    ]
    print("\n".join(lines), end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
