"""The commands: ``vitscope train | analyze | report | runs``, and ``train.py analyze.py report.py`` in a checkout."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = ("train", "analyze", "report", "doctor", "sweep", "reproduce", "runs")
_COMMAND = "VITSCOPE_COMMAND"


def main() -> None:
    """Run ``vitscope <command> <overrides>``."""
    if "LOCAL_RANK" in os.environ and _COMMAND in os.environ:
        # another rank, which Lightning starts with what is left of the arguments
        sys.argv.insert(1, os.environ.pop(_COMMAND))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: vitscope {{{','.join(COMMANDS)}}} [overrides]\nvitscope <command> --help shows what can be set")
        return
    if name not in COMMANDS:
        from vitscope.runtime.errors import nearest

        print(f"error: {name}: no such command; {nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    os.environ[_COMMAND] = name
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    importlib.import_module(f"vitscope.cli.{name}").main()
