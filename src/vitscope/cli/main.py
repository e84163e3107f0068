"""The commands: ``vitscope train | analyze | report | runs``, and ``train.py analyze.py report.py`` in a checkout."""

from __future__ import annotations

import importlib
import os
import sys

#: descriptions of the commands, as ``vitscope`` alone lists it
COMMANDS = {
    "train": "train a network, then evaluate and diagnose it",
    "analyze": "measure a run, a checkpoint file or a pretrained model",
    "report": "draw figures, tables and a page that overlay runs",
    "runs": "list, show, export and delete run folders",
    "reproduce": "make a figure or a table of the paper by its name",
    "sweep": "run a sweep file on this machine or with W&B agents",
    "wandb-report": "make a W&B report and a workspace of runs",
    "doctor": "check what works on this machine",
}
#: modules of commands whose names are not those of their modules
_MODULES = {"wandb-report": "online.wandb_report"}
_COMMAND = "VITSCOPE_COMMAND"


def main() -> None:
    """Run ``vitscope <command> <overrides>``."""
    if "LOCAL_RANK" in os.environ and _COMMAND in os.environ:
        # another rank, which Lightning starts with what is left of the arguments
        sys.argv.insert(1, os.environ.pop(_COMMAND))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name in ("-V", "--version", "version"):
        print(version_line())
        return
    if name not in COMMANDS:
        from vitscope.runtime.errors import nearest

        print(f"error: {name}: no such command; {nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    os.environ[_COMMAND] = name
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    importlib.import_module(f"vitscope.cli.{_MODULES.get(name, name)}").main()


def usage() -> str:
    """Return the list of commands, one a line."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vitscope COMMAND [KEY=VALUE ...]",
            "",
            *rows,
            "",
            "vitscope COMMAND --help shows examples and keys; vitscope --version shows the version.",
        ]
    )


def version_line() -> str:
    """Return the name and the version of the package."""
    import vitscope

    return f"vitscope {vitscope.__version__}"
