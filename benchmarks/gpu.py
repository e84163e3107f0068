"""Figures of one GPU: ceilings, curvature against its peers, landscapes, memory, representation and training steps.

Each stage prints a table and adds its rows to ``benchmarks/results/<card>.json`` and ``.md``, with the versions of the packages.
A stage that fails says so in its rows, and the next one runs. `make gpu-check` runs the tests marked ``gpu`` first.

Correctness comes first: eigenvalues against float64 on the same card, landscapes against the bare loop's loss at the center.
Times are medians of repetitions after a warming one, between two synchronizations. Peers are those of pyproject's extra
``bench`` that are installed.

    python benchmarks/gpu.py [STAGE ...] [--limit 900] [--out benchmarks/results]
    python benchmarks/gpu.py --rehearse               # tiny sizes, on any device: does it run?
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_bench import Bench, Row
from gpu_stages import STAGES

from vitscope.runtime import progress

VERSIONS = ("torch", "torchvision", "timm", "pytorch-lightning", "numpy", "scipy", "pyhessian", "curvlinops-for-pytorch",
            "hessian-eigenthings")  # fmt: skip


def shown(value: object) -> str:
    """Return a cell of a table."""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table with a column a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["-"] * len(columns), *([shown(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(stage: str, bench: Bench) -> list[Row]:
    """Return the rows of a stage; one that fails ends with a row that says how."""
    rows: list[Row] = []
    try:
        for row in STAGES[stage](bench):
            rows.append(row)
            print("  " + ", ".join(f"{key}: {shown(value)}" for key, value in row.items()), flush=True)
    except Exception as error:  # a card that lacks one thing still has figures of the others
        traceback.print_exc()
        rows.append({"failed": f"{type(error).__name__}: {str(error)[:300]}"})
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def facts_of_the_machine(device: torch.device) -> Row:
    """Return the card's name and the versions of what is timed."""
    versions: Row = {}
    for package in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "card": card,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **versions,
    }


def main() -> int:
    """Run the stages that the command line names, all by default, and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all by default")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, on any device; nothing is written without --out"
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which no further stage starts")
    parser.add_argument("--out", type=Path, help="folder of the tables; benchmarks/results by default")
    parser.add_argument("--only-check", action="store_true", help="only say whether there is a GPU")
    options = parser.parse_args()
    if unknown := sorted(set(options.stages) - set(STAGES)):
        print(f"error: stages: no such stage: {', '.join(unknown)}; choose from {', '.join(STAGES)}", file=sys.stderr)
        return 2
    if not (torch.cuda.is_available() or options.rehearse):
        print("error: gpu: torch finds no CUDA GPU on this machine; run this where there is one, or rehearse it with "
              "`python benchmarks/gpu.py --rehearse`", file=sys.stderr)  # fmt: skip
        return 2
    if options.only_check:
        return 0
    progress.enabled = False
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, start = Bench(device, options.rehearse), time.monotonic()
    facts = facts_of_the_machine(device)
    print(json.dumps(facts))
    results: dict[str, list[Row]] = {}
    for stage in options.stages or STAGES:
        if time.monotonic() - start > options.limit:
            print(f"{stage}: not started, {options.limit:.0f} s are over")
            continue
        print(f"\n== {stage}", flush=True)
        results[stage] = run(stage, bench)
    folder = options.out or (None if options.rehearse else Path(__file__).parent / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = "-".join(str(facts["card"]).split())
        (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "stages": results}, indent=1))
        titles = {stage: (STAGES[stage].__doc__ or stage).splitlines()[0] for stage in results}
        tables = "\n\n".join(f"## {titles[stage]}\n\n{table(rows)}" for stage, rows in results.items())
        machine = ", ".join(f"{key} {value}" for key, value in facts.items())
        (folder / f"{name}.md").write_text(f"# {facts['card']}\n\n{machine}\n\n{tables}\n")
        print(f"\n{folder / name}.json and .md")
    return int(any("failed" in row for rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
