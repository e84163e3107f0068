"""Descriptions of one run in full: differences from defaults, provenance, metrics, results, checkpoints, figures and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitscope.config import experiment_identity
from vitscope.reports import configuration_differences
from vitscope.reports.run_listing import Summary
from vitscope.runtime.text_layout import size_text


def describe(summary: Summary) -> dict[str, Any]:
    """Return all that `show` tells of a run, as plain values."""
    entry, run = summary.entry, summary.entry.run
    arguments = entry.facts.get("arguments")
    choices = configuration_differences.group_choices(arguments if isinstance(arguments, list) else [])
    results = [
        {"analysis": m.analysis, "tag": m.tag, "scalars": dict(m.scalars), "error": m.error, "file": str(m.path)}
        for m in entry.results
    ]
    checkpoints = {path.name: path.lstat().st_size for path in sorted(run.checkpoints.glob("*.ckpt"))}
    figures = sorted(path.relative_to(run.path).as_posix() for path in run.figures.rglob("*") if path.is_file())
    changes = configuration_differences.differences(entry.config, str(entry.facts.get("command")), choices)
    return {
        **summary.to_dict(),
        "choices": choices,
        "overrides": changes,
        "provenance": dict(entry.facts),
        "results": results,
        "checkpoints": checkpoints,
        "figures": figures,
    }


def text(fact: Mapping[str, Any]) -> str:
    """Return a description of a run in lines, one section after another."""
    tags = f", tags {', '.join(fact['tags'])}" if fact["tags"] else ""
    lines = [
        f"{fact['id']}: {fact['label']} on {fact['data']}, seed {fact['seed']}, {fact['state']}{tags}",
        f"  {fact['path']}",
    ]
    overrides = fact["overrides"]
    title = f"differences from the defaults of {' '.join(fact['choices']) or 'all groups'}"
    if overrides is None:
        lines += ["", f"{title}: not known, this version cannot compose them"]
    else:
        lines += _section(title, overrides or {"none": ""})
    lines += _section("provenance", experiment_identity.flattened(fact["provenance"]))
    lines += _section("metrics", fact["metrics"])
    for result in fact["results"]:
        lines += _section(f"{result['analysis']} at {result['tag']}", result["scalars"] or {"failed": result["error"]})
    lines += _section("checkpoints", {name: size_text(size) for name, size in fact["checkpoints"].items()})
    lines += _section("figures", dict.fromkeys(fact["figures"], ""))
    sizes = {name: size_text(size) for name, size in fact["sizes_bytes"].items()}
    return "\n".join([*lines, *_section(f"size: {size_text(fact['size_bytes'])}", sizes)])


def _section(title: str, values: Mapping[str, Any]) -> list[str]:
    """Return the lines of a section, none for an empty one."""
    width = max(map(len, values), default=0)
    texts = {key: f"{v:.6g}" if isinstance(v, float) else " ".join(str(v).split()) for key, v in values.items()}
    return ["", title, *(f"  {key.ljust(width)}  {value}".rstrip() for key, value in texts.items())] if values else []
