"""Colors and markers that figures share: by model, and by the kind of a unit."""

from __future__ import annotations

#: the color cycle of the style sheet (Okabe & Ito), for libraries that do not read it
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: a marker for each model, so that color is not all that tells models apart
MARKERS = "osD^vPX*"

#: matplotlib's format of each kind of unit: a marker and a color of the cycle, the same in every figure
KIND_FORMATS = {"stem": "DC5", "conv": "sC0", "msa": "oC1", "mlp": "^C2", "pool": "vC4", "head": "XC6"}

#: the color of each kind of unit
KIND_COLORS = {kind: fmt[1:] for kind, fmt in KIND_FORMATS.items()}
