"""Parameters of attention by the names of classes and attributes, independent of what runs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

#: gates of channels or positions and pooling in a head, which mix no positions
_NO_MIXING = (
    "channel",
    "spatial",
    "split",
    "coord",
    "kernel",
    "pool",
    "gate",
    "cbam",
    "eca",
    "effective",
    "squeeze",
    "module",
    "convattention",  # a grouped convolution of that name (NextViT)
)
_ATTRIBUTES = {
    "attn",
    "attention",
    "self_attn",
    "self_attention",
    "xca",
    "factoratt_crpe",
    "attn1",
    "attn2",
    "cross_attn",
}


def attention_parameters(model: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters of modules whose class or attribute name says attention."""
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        name, attribute = type(module).__name__, path.rpartition(".")[2]
        says_so = re.search("Attention|Attn", name) or (attribute in _ATTRIBUTES and not _is_gate(name))
        if not says_so or any(word in name.lower() for word in (*_NO_MIXING, "block")):
            continue
        if any("mlp" in child or "block" in child for child, _ in module.named_children()):
            continue  # a whole layer
        yield from (names[id(p)] for p in module.parameters())


def _is_gate(name: str) -> bool:
    return name.lower().startswith(("se", "eca", "effectivese", "globalcontext", "batchnorm", "identity", "conv"))
