"""Write docs/structure.md: the units of one small variant of each of timm's modules.

Usage: python docs/scripts/structure_table.py [module ...]

Models are built without weights on the meta device; nothing is downloaded.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
from torch import nn

import vitscope as vs
from vitscope.models.structure.structure_table import Structure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.models.structure.timm_families import FAMILIES  # noqa: E402

OPENING = """# Structure of networks

`vs.structure(model)` lists the units of a network and the kind of every parameter. Blocks that vitscope describes are found by
their types. In every other network one small forward pass in evaluation mode shows the residual additions; it runs on the meta
device too.

- **A unit** is a residual addition `s + b`: the stream `s` comes from a value by at most one layer, pooling and norms, the
  branch `b` from the same value by what the unit computes. Additions inside a branch belong to it. An addition that only
  bridges a series of units is none, nor is a sum of parallel linear kernels (structural reparameterization).
- **Its kind** is what the branch computes: `msa` for attention (softmax, linear, of channels, in windows, additive), else `conv`
  for a kernel of more than one position, else `mlp` for linear layers and 1x1 convolutions, also across tokens, else `pool`. A
  branch that expands channels, applies a depthwise kernel and projects back is `conv`, as in MobileNets; directly behind an
  attention or pooling unit of the same block it is the block's feed-forward layer and `mlp`, as in PVT v2 and SegFormer.
- **Layers between units** have a kind as well: `pool` where they make the map smaller without a nonlinearity. They are not
  residual, so that no lesion removes them.
- `stem` is what comes before the first unit, `head` what comes after the last.
- **Stages** are numbered from 1 by the size of the map.
- **Not residual** are networks whose units hold less than the layers between them, mix no channels, or whose sums are
  concatenated. They are read after each convolution and pooling layer.

A measure that compares kinds raises `StructureError` where attention belongs to no unit, and names the module. Such a network can
be described by hand:

```python
import torch
from torch import nn

import vitscope as vs
from vitscope.models.structure.structure_table import Structure
from vitscope.models.structure import UnitDescription


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return torch.lerp(x, self.attention(y, y, y, need_weights=False)[0], 0.5)  # no addition that a pass shows


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


units = [UnitDescription("blocks.*.attention", "msa", branch_in="blocks.{0}.norm", after="blocks.{0}",
                         modules=("blocks.{0}.norm",))]
probe = vs.Probe(Network(), [(torch.rand(4, 3, 16, 16), torch.arange(4))], structure=units)
print(vs.structure(probe.model))
```

`*` stands for one part of a module's name and `{0}` for what it stood for; `:input` behind a name means the module's first input.
The same in YAML, as `model.structure`:

```yaml
structure:
  - {module: "blocks.*.attention", kind: msa, branch_in: "blocks.{0}.norm", after: "blocks.{0}", modules: ["blocks.{0}.norm"]}
```

## timm's modules

One small variant of each module. Written by `docs/scripts/structure_table.py` with timm VERSION.

| module | model | msa | conv | mlp | pool | layers between units | stages | taps | share of parameters in msa, conv, mlp |
|---|---|---|---|---|---|---|---|---|---|
"""


def built(name: str) -> tuple[nn.Module, Structure]:
    """Return a model without weights and its structure, on a real device where the meta device does not build or run it."""
    reason = ""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = timm.create_model(name, num_classes=3, pretrained=False).eval()
            return model, vs.structure(model)
        except (RuntimeError, NotImplementedError) as error:  # both devices failing is an error below
            reason = str(error)
    raise ValueError(f"Expected a model that runs, received {name}: {reason}")


def row(module: str, name: str) -> str:
    """Return one line of the table."""
    model, structure = built(name)
    units = Counter(unit.kind for unit in structure.units if unit.residual)
    between = Counter(unit.kind for unit in structure.units if not unit.residual)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    counts = Counter[str]()
    for key, kind in structure.parameter_kinds.items():
        counts[kind] += sizes[key]
    shares = " ".join(f"{100 * counts[kind] / counts.total():.0f} %" for kind in ("msa", "conv", "mlp"))
    cells = [f"{units[kind] or ''}" for kind in ("msa", "conv", "mlp", "pool")]
    layers = ", ".join(f"{n} {kind}" for kind, n in between.items())
    if not structure.is_residual:
        layers = f"not residual: {layers}"
    stages = max(unit.stage for unit in structure.units)
    return f"| {module} | {name} | {' | '.join(cells)} | {layers} | {stages} | {len(vs.taps(model))} | {shares} |"


def main(modules: list[str]) -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    rows = [row(module, FAMILIES[module][0]) for module in modules or FAMILIES]
    text = OPENING.replace("VERSION", timm.__version__) + "\n".join(rows) + "\n"
    (ROOT / "docs" / "structure.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
