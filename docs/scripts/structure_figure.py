"""Draw how networks are put together: their units in order, with the kind and the number of parameters of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitscope.models.structure.structure_table import Structure
from vitscope.plotting.style import KIND_COLORS, KIND_LABELS, STYLE

#: inches of a network's panel
HEIGHT = 0.78


def draw_structures(structures: Mapping[str, Structure]) -> Figure:
    """Draw a row a network: one bar a unit, its height the number of parameters on a logarithmic scale.

    Args:
        structures: By the name of the network.
    """
    sizes = {name: [_size(structure, i) for i in range(len(structure.units))] for name, structure in structures.items()}
    largest = max(max(values) for values in sizes.values())
    kinds = [kind for kind in KIND_COLORS if any(u.kind == kind for s in structures.values() for u in s.units)]
    with style.context(STYLE):
        figure = Figure(figsize=(6.6, 0.7 + HEIGHT * len(structures)), layout="constrained")
        panels = figure.subplots(len(structures), squeeze=False, sharey=True)[:, 0]
        for axes, (name, structure) in zip(panels, structures.items()):
            heights = np.maximum(sizes[name], 1)  # a layer without parameters is one pixel high
            colors = [KIND_COLORS[unit.kind] for unit in structure.units]
            axes.bar(np.arange(len(heights)), heights, width=0.85, color=colors)
            stages = np.array([unit.stage for unit in structure.units])
            for place in np.flatnonzero(np.diff(stages)):
                axes.axvline(place + 0.5, color="0.4", linewidth=0.8, linestyle=":")
            axes.set(yscale="log", ylim=(1e3, 2 * largest), xlim=(-0.6, len(heights) - 0.4), xticks=[])
            axes.set_yticks([1e4, 1e6], ["10k", "1M"], fontsize=6)
            axes.minorticks_off()
            total = sum((structure.sizes or {}).values())
            axes.set_title(
                f"{name}: {len(heights)} units, {total / 1e6:.1f} M parameters", fontsize=7, loc="left", pad=2
            )
        figure.supylabel("Parameters", fontsize=7)
        handles = [Patch(color=KIND_COLORS[kind], label=KIND_LABELS[kind]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=7)
    return figure


def _size(structure: Structure, index: int) -> int:
    return sum((structure.sizes or {}).get(name, 0) for name in structure.units[index].parameters)
