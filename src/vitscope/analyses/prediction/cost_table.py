"""The table of ``analyze.py ... cost=true``: what each analysis is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitscope.analyses.prediction.cost_prediction import PredictedCost
from vitscope.core.cost.measure_cost import Count
from vitscope.runtime.text_layout import aligned, duration_text, size_text

_HEADER = ("analysis", "time", "peak memory", "forward passes", "products", "result")


def cost_table(costs: Sequence[PredictedCost]) -> str:
    """Return the table, its sum of the times that are known, and why the others are not."""
    rows = [_HEADER, *(_row(cost) for cost in costs)]
    seconds = [cost.seconds.expected for cost in costs if cost.seconds is not None]
    unknown = [cost for cost in costs if cost.seconds is None]
    lines = [*aligned(rows, right=range(1, len(_HEADER)))]
    together = duration_text(sum(seconds)) if seconds else "unknown"
    if seconds and unknown:
        together += f" + unknown ({len(unknown)})"
    lines.append(f"together: {together}")
    lines += [f"{cost.name}: unknown: {cost.reason}" for cost in unknown]
    if any(cost.products is not None and cost.products.low < cost.products.high for cost in costs):
        lines.append("in brackets: lowest and highest; a search for eigenvalues ends when they have converged")
    if any(cost.seconds is not None for cost in costs):
        lines.append("result: size of the arrays before compression, without figure, CSV and card")
    return "\n".join(lines)


def _row(cost: PredictedCost) -> tuple[str, ...]:
    if cost.seconds is None or cost.forward_passes is None or cost.products is None:
        return (cost.name, *["unknown"] * (len(_HEADER) - 1))
    return (
        cost.name,
        _bounded(cost.seconds, duration_text),
        "unknown" if cost.peak_bytes is None else size_text(cost.peak_bytes),
        _bounded(cost.forward_passes, _number_text),
        _bounded(cost.products, _number_text),
        "unknown" if cost.result_bytes is None else size_text(cost.result_bytes),
    )


def _bounded(count: Count, text: Callable[[float], str]) -> str:
    expected, low, high = (text(n) for n in (count.expected, count.low, count.high))
    return expected if low == high else f"{expected} [{low}, {high}]"


def _number_text(n: float) -> str:
    return f"{n:.0f}" if n >= 100 or n == round(n) else f"{n:.1f}"
