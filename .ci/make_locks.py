"""Write ``locks/<extra>.txt``: every package of an environment with its version and the SHA-256 of its files.

Usage: python .ci/make_locks.py [path of uv]

The versions are those of ``constraints.txt``, the packages those of ``pyproject.toml``. The locks of other extras
than ``dev`` have what they need beside it. No address of a server is written. Each file states the digest of what it was made
from, which `tests/test_locks.py` compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
#: extras of pyproject.toml that have a lock; `make setup`, `make docs` and `make bench` install the first three
EXTRAS = ("dev", "docs", "bench", "hf", "report")
#: the oldest patch release of Python that every locked package supports
PYTHON = "3.11.5"


def digest(extra: str) -> str:
    """Return the digest of the requirements and the versions that a lock is made from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line and not line.startswith("#")]
    made_from = [project["requires-python"], project["dependencies"], project["optional-dependencies"][extra], versions]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def entries(text: str) -> dict[str, str]:
    """Return the entries of a lock, each with its hashes, by the name of the package."""
    parts = re.split(r"^(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text), flags=re.MULTILINE)
    return {part.partition("==")[0]: part for part in parts if part.strip()}


def header(extra: str) -> str:
    """Return the first line of a lock."""
    return f"# made by `make locks` from pyproject.toml and constraints.txt, digest {digest(extra)[:16]}\n"


def write_lock(extra: str, uv: str) -> Path:
    """Resolve an extra for every platform and supported Python, and write its lock."""
    words = [
        uv, "pip", "compile", "pyproject.toml", "--extra", extra, "--constraints", "constraints.txt", "--universal",
        "--python-version", PYTHON, "--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url",
        "--no-emit-find-links", "--quiet",
    ]  # fmt: skip
    text = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    file = LOCKS / f"{extra}.txt"
    file.parent.mkdir(exist_ok=True)
    packages = entries(text)
    if extra != "dev":
        common = entries((LOCKS / "dev.txt").read_text(encoding="utf-8"))
        packages = {name: entry for name, entry in packages.items() if common.get(name) != entry}
    file.write_text(header(extra) + "".join(packages.values()), encoding="utf-8")
    return file


if __name__ == "__main__":
    for name in EXTRAS:
        print(write_lock(name, sys.argv[1] if len(sys.argv) > 1 else "uv"))
