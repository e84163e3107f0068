"""Which kind of unit and which stage each parameter belongs to."""

from __future__ import annotations

from torch import nn

from vitscope.models import blocks as blocks  # describes timm's and torchvision's blocks
from vitscope.models.anatomy import Kind, Piece, anatomy


def parameter_kinds(model: nn.Module) -> dict[str, Kind]:
    """Kind of every parameter by its name in ``named_parameters()``: ``stem conv msa mlp pool head``.

    A parameter inside a residual unit or pooling layer has that unit's kind (norms with their branch, a
    projection shortcut with its block); one before the first block is ``stem`` (class token and position
    embedding too), one after the last ``head``.

    Raises:
        ValueError: If nothing in the model is known, see `vitscope.models.taps.taps`.
    """
    return {name: kind for name, (kind, _) in _places(model).items()}


def parameter_stages(model: nn.Module) -> dict[str, int]:
    """Stage of every parameter by name: 0 for the stem, from 1 for the blocks, one past the last for the head."""
    return {name: stage for name, (_, stage) in _places(model).items()}


def _places(model: nn.Module) -> dict[str, tuple[Kind, int]]:
    pieces = anatomy(model)
    names = [name for name, _ in model.named_parameters()]
    owned = {name: piece for name in names for piece in pieces if _owns(model, piece, name)}
    last = max((i for i, name in enumerate(names) if name in owned), default=-1)
    places: dict[str, tuple[Kind, int]] = {}
    latest: tuple[Kind, int] = ("stem", 0)
    for i, name in enumerate(names):
        if name in owned:
            latest = (owned[name].part.kind, owned[name].stage)
        places[name] = latest if i <= last else ("head", pieces[-1].stage + 1)
    return places


def _owns(model: nn.Module, piece: Piece, name: str) -> bool:
    suffix = piece.part.suffix
    path = piece.name.removesuffix(suffix).rstrip(".") if suffix else piece.name
    if path and not name.startswith(path + "."):
        return False
    child = name[len(path) + 1 :].split(".")[0] if path else name.split(".")[0]
    return not piece.part.children or child in piece.part.children
