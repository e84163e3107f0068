"""The commands: ``vitscope train | analyze | report``, and ``train.py analyze.py report.py`` in a checkout."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("train", "analyze", "report", "doctor", "sweep", "reproduce")


def main() -> None:
    """Run ``vitscope <command> <overrides>``."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: vitscope {{{','.join(COMMANDS)}}} [overrides]\nvitscope <command> --help shows what can be set")
        return
    if name not in COMMANDS:
        from vitscope.config import nearest

        sys.exit(f"error: {name}: no such command; {nearest(name, COMMANDS)}")
    sys.argv = [f"vitscope {name}", *sys.argv[2:]]
    importlib.import_module(f"vitscope.commands.{name}").main()
