"""Write docs/structure.md: the units of small variants of timm's modules and of the models of torchvision and transformers.

Usage: python docs/scripts/structure_table.py [--all] [module ...]

Without arguments the rows that the page lacks are added, with ``--all`` each row is made again, else those of the modules named.
The page is written after each row, so that an interrupted run goes on where it stopped. Models are built without weights on the
meta device where they can be; nothing is downloaded.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.structure_table import Structure
from vitscope.runtime.errors import StructureError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "structure.md"
sys.path.insert(0, str(ROOT))
from tests.models.structure.timm_families import FAMILIES

#: seconds for one model
TIMEOUT = 240
HEADER = (
    "| module | model | msa | conv | mlp | pool | layers between units | stages | taps | msa, conv, mlp | note |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
#: (model, configuration) of transformers, with the configuration's defaults
TRANSFORMERS = (
    ("ViTForImageClassification", "ViTConfig"), ("DeiTForImageClassification", "DeiTConfig"),
    ("BeitForImageClassification", "BeitConfig"), ("SwinForImageClassification", "SwinConfig"),
    ("Swinv2ForImageClassification", "Swinv2Config"), ("Dinov2ForImageClassification", "Dinov2Config"),
    ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    ("ConvNextForImageClassification", "ConvNextConfig"), ("ConvNextV2ForImageClassification", "ConvNextV2Config"),
    ("SegformerForImageClassification", "SegformerConfig"), ("SegformerForSemanticSegmentation", "SegformerConfig"),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig"), ("SiglipVisionModel", "SiglipVisionConfig"),
)  # fmt: skip

OPENING = """# Structure of networks

`vs.structure(model)` lists the units of a network and the kind of every parameter. Blocks that vitscope describes are found by
their types. In every other network, one small forward pass in evaluation mode shows the residual additions. The pass also runs
on the meta device.

- **A unit** is a residual addition `s + b` or difference `s - b`. The stream `s` comes from a value through at most one layer,
  pooling and normalizations; the branch `b` comes from the same value through the layers of the unit. Additions inside a branch
  belong to this branch. Two additions are not units: one that only bridges a series of units, and a sum of parallel linear
  kernels (structural reparameterization). The branch of `x + (attention(x) + mlp(x))` is two units. The two streams of a
  reversible network have separate units.
- **The kind of a unit** is what its branch computes. The first matching rule decides:
    - `msa`: attention (softmax, linear, of channels, in windows, additive). A softmax over values of one position, as in a
      mixture of experts, is not attention. A branch with attention and an MLP, as in EdgeNeXt, is `msa` with all of its
      parameters; the table says "holds an MLP too", and measures by kind give a warning.
    - `conv`: a kernel of more than one position, a Fourier filter, a product with patches (`unfold`), or 1x1 convolutions without
      a nonlinearity.
      A state-space block is `conv` because of its depthwise convolution. A branch that expands channels, applies a depthwise
      kernel and projects back is `conv`, as in MobileNets. Directly after an attention or pooling unit of the same block, it is
      the feed-forward layer of the block and `mlp`, as in PVT v2 and SegFormer.
    - `mlp`: linear layers and 1x1 convolutions, also across tokens, and mixtures of experts.
    - `pool`: pooling or shifting without weights.
- **Kinds that are not certain** are refused by measures that compare kinds. This concerns branches without attention in four
  cases: the branch multiplies activations by activations over an unknown axis (a state-space model without a convolution,
  unnormalized additive attention); it runs from position to position with products of activations (RWKV, recurrent linear
  attention); it weighs values by exponentials of activations before a table mixes positions (AFT); or it runs a function that
  the pass does not show (an operator of an extension, `torch.func.vmap`, NumPy in a `torch.autograd.Function`).
- **Reading a branch.** The branch is read as the output of the module that returns it. It is read as the operand of the
  addition if the block itself scales it or drops paths (`x + self.gamma * f(x)`, `x + drop_path(f(x))` as a function), or if no
  module returns it (`x + fft2(norm(x)).real`). A lesion then passes zeros to the addition. If the addition itself scales the
  branch (`torch.add(..., alpha=)`, `addcmul`, `lerp`, `s - b`), a lesion removes it, and measures that read its values refuse
  it with its name.
- **Layers between units** have a kind as well. They are `pool` if they make the map smaller without a nonlinearity. They are
  not residual, so that no lesion removes them.
- **Stem and head.** `stem` is the part before the first unit, and `head` the part after the last unit. Layers in the block of
  the first unit are not `stem` if blocks of the same type follow: the depthwise layer of RepViT's first block is `conv`, as in
  the later blocks. Depthwise mixing between the patch embedding and the first block is `stem`, as is a position encoding
  without a shortcut. After the last unit, a residual layer of the pooled vector and attention pooling by learned queries are
  `head`. A U-Net that adds its skips has only the units of its blocks.
- **Large stem or head.** One warning names the convolutions with overlapping windows in stem and head if there are more than
  four of them and they hold over 60 % of the parameters. For example, a U-Net of plain convolutions with a single residual
  attention block has its encoder as `stem` and its decoder as `head`. The largest share in the tables below is 36 %
  (`hrnet_w18_small`).
- **Stages** are numbered from 1 in the order of decreasing map size.
- **Networks that are not residual** are those whose units hold fewer parameters than the layers between them, do not mix
  channels, or whose sums are concatenated. Their maps are read after each convolution and pooling layer.

A measure that compares kinds raises `StructureError` with the name of the module if some attention belongs to no unit. Such a
network can be described by hand:

```python
import torch
from torch import nn

import vitscope as vs
from vitscope.models.structure import UnitDescription


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return torch.stack((x, self.attention(y, y, y, need_weights=False)[0])).mean(0)  # no addition


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


units = [
    UnitDescription(
        "blocks.*.attention", "msa", branch_in="blocks.{0}.norm", after="blocks.{0}", modules=("blocks.{0}.norm",)
    )
]
probe = vs.Probe(Network(), [(torch.rand(4, 3, 16, 16), torch.arange(4))], structure=units)
print(vs.structure(probe.model))
```

In these names, `*` stands for one part of a module's name, and `{0}` for the part that matched it. `:input` after a name means
the module's first input. In YAML, the same description is `model.structure`:

```yaml
structure:
  - {module: "blocks.*.attention", kind: msa, branch_in: "blocks.{0}.norm", after: "blocks.{0}", modules: ["blocks.{0}.norm"]}
```

## How to read the tables

Each row is one small variant of a family, without weights. `msa`, `conv`, `mlp` and `pool` are the numbers of residual units of
each kind. Layers between units do not add to a stream, and a network that is not residual has only such layers. Stages are the
different sizes of the map, and taps are the places where feature maps are read. The last numbers are the shares of the
parameters of kind `msa`, `conv` and `mlp`; the remaining parameters belong to stem, pooling and head. A note says that a model
is not residual, that no map can be read after some units, or why the model is refused. Written by
`docs/scripts/structure_table.py` with VERSIONS.
"""


#: title of the table, module and model
Key = tuple[str, str, str]
Build = Callable[[str], nn.Module]


def timm_model(name: str) -> nn.Module:
    """Return a model of timm."""
    return timm.create_model(name, num_classes=3, pretrained=False)


def torchvision_model(name: str) -> nn.Module:
    """Return a model of torchvision."""
    return torchvision.models.get_model(name, weights=None)


def transformers_model(name: str) -> nn.Module:
    """Return a model of transformers with the defaults of its configuration."""
    import transformers

    return getattr(transformers, name)(getattr(transformers, dict(TRANSFORMERS)[name])())


def sections() -> Iterator[tuple[str, Build, list[Key]]]:
    """Yield title, function that builds a model, and the keys of the rows of each table."""
    title = "timm's modules"
    yield title, timm_model, [(title, module, FAMILIES[module][0]) for module in FAMILIES]
    title = "torchvision's models"
    modules = {name: torchvision.models.get_model_builder(name).__module__.split(".")[-1] for name in TORCHVISION}
    yield title, torchvision_model, [(title, modules[name], name) for name in TORCHVISION]
    title = "Vision models of transformers"
    keys = [(title, config.removesuffix("Config").lower(), name) for name, config in TRANSFORMERS]
    yield title, transformers_model, keys


def built(build: Build, name: str) -> tuple[nn.Module, Tensor | None, Structure]:
    """Return a model without weights, its images and structure, on a real device where the meta device does not run it."""
    error: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = build(name).eval()
                # SegFormer states no size; on small images its last map is one token
                images = torch.rand(1, 3, 224, 224) if build is transformers_model else None
            return model, images, vs.structure(model, images)
        except (RuntimeError, NotImplementedError, ValueError) as raised:
            error = raised
    assert error is not None
    raise error


def row(key: Key, build: Build) -> str:
    """Return one line of a table."""
    _, module, name = key
    try:
        model, images, structure = built(build, name)
    except StructureError as error:
        return f"| {module} | {name} |{' |' * 8} refused: {str(error).partition(';')[0]} |"
    units = Counter(unit.kind for unit in structure.units if unit.residual)
    between = Counter(unit.kind for unit in structure.units if not unit.residual)
    sizes = {parameter: p.numel() for parameter, p in model.named_parameters()}
    counts = Counter[str]()
    for parameter, kind in structure.parameter_kinds.items():
        counts[kind] += sizes[parameter]
    shares = " ".join(f"{100 * counts[kind] / max(counts.total(), 1):.0f} %" for kind in ("msa", "conv", "mlp"))
    cells = " | ".join(f"{units[kind] or ''}" for kind in ("msa", "conv", "mlp", "pool"))
    layers = ", ".join(f"{n} {kind}" for kind, n in between.items())
    notes = [] if structure.is_residual else ["not residual"]
    notes += [f"refused: {text}" for text in structure.missing[:1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_taps = len(vs.taps(model, images))
    notes += ["no map is read after some units"] if any("no map is read" in str(w.message) for w in caught) else []
    stages = max(unit.stage for unit in structure.units)
    return f"| {module} | {name} | {cells} | {layers} | {stages} | {n_taps} | {shares} | {'; '.join(notes)} |"


def timed_row(key: Key, build: Build) -> str:
    """Return `row` from a process of its own, which is ended after `TIMEOUT` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        try:
            sender.send(row(key, build))
        except Exception as error:  # a row that fails does not end the others
            text = " ".join(str(error).split()).replace("|", "/")
            sender.send(f"| {key[1]} | {key[2]} |{' |' * 8} failed: {type(error).__name__}: {text[:160]} |")

    process = context.Process(target=work)
    process.start()
    text = receiver.recv() if receiver.poll(TIMEOUT) else f"| {key[1]} | {key[2]} |{' |' * 8} more than {TIMEOUT} s |"
    process.terminate()
    process.join()
    return text


def rows_of_page() -> dict[Key, str]:
    """Return the rows of the page as it is."""
    rows: dict[Key, str] = {}
    title = ""
    for line in PAGE.read_text().splitlines() if PAGE.is_file() else ():
        title = line[3:] if line.startswith("## ") else title
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| ") and len(cells) == 13 and cells[1] != "module":
            rows[title, cells[1], cells[2]] = line
    return rows


def write(rows: dict[Key, str]) -> None:
    """Write the page with the rows that there are."""
    versions = [f"timm {timm.__version__}", f"torchvision {torchvision.__version__.partition('+')[0]}"]
    with suppress(ImportError):  # an optional extra
        import transformers

        versions.append(f"transformers {transformers.__version__}")
    text = OPENING.replace("VERSIONS", ", ".join(versions))
    for title, _, keys in sections():
        lines = [rows[key] for key in keys if key in rows]
        text += f"\n## {title}\n\n{HEADER}" + "".join(f"{line}\n" for line in lines)
    PAGE.write_text(text)


def main(arguments: list[str]) -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    rows = rows_of_page()
    for _, build, keys in sections():
        for key in keys:
            if key in rows and arguments != ["--all"] and not set(key) & set(arguments):
                continue
            if arguments and arguments != ["--all"] and not set(key) & set(arguments):
                continue
            rows[key] = timed_row(key, build)
            print(rows[key], flush=True)
            write(rows)
    write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
