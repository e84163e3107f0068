"""Directions in weight space: random ones with shared seeds, given ones, and their scaling.

A direction maps parameter names to tensors of the parameters' shapes; a parameter that it does not name stays where it is.
Directions cover parameters only, never buffers, and of those the ones that require gradients.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitscope.linalg.weights.effective_weights import masked
from vitscope.runtime.torch_internals import ConvolutionBase

Direction = dict[str, Tensor]

Normalization = Literal["filter", "filter_official", "layer", "none"]
NORMALIZATIONS = get_args(Normalization)

#: names of position tables (learned position embeddings, relative position biases) in timm, torchvision and vitscope
POSITION_TABLES = r"pos_?emb|position_(emb|bias)|rel_pos|relative_position|absolute_pos"

#: the ones that the released code of Park & Kim leaves where they are
OFFICIAL_IGNORE = ("one_dim", "pos_embed|relative_position")


def random_direction(
    parameters: Mapping[str, Tensor], seed: int, index: int = 0, names: Mapping[str, str] | None = None
) -> Direction:
    """Return a direction of independent standard normal entries.

    Each tensor's numbers depend on ``(seed, index, name)`` alone, are drawn on the CPU in float32 and then cast (to
    `wide_dtype`): models that share a parameter's name and shape share its numbers, on every device and in every precision.

    Args:
        parameters: The parameters that the direction covers, by name.
        seed: Seed of the measurement.
        index: Number of the direction among those of the seed.
        names: The names that the numbers depend on, by the parameters' own (see
            `vitscope.linalg.weights.effective_weights.canonical_names`, which leave wrappers out); by default these.
    """
    drawn = {}
    for parameter_name, p in parameters.items():
        name = parameter_name if names is None else names.get(parameter_name, parameter_name)
        digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn[parameter_name] = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(
            p.device, wide_dtype(p)
        )
    return drawn


def wide_dtype(p: Tensor) -> torch.dtype:
    """Return the type of a direction's entries for a parameter: its own, float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def moving(parameters: Mapping[str, Tensor], ignore: str | Sequence[str] = "bias_bn") -> dict[str, Tensor]:
    """Return the parameters that a random direction moves.

    Args:
        parameters: The candidates, by name.
        ignore: Parameters that stay: ``bias_bn`` (parameters with fewer than two dimensions, and position tables), its two parts
            ``one_dim`` and ``positions``, or regular expressions searched in the names; an empty sequence moves everything.

    Raises:
        ValueError: An expression that does not compile, or nothing left to move.
    """
    words = {"bias_bn": ("one_dim", "positions"), "": ()}
    entries = [ignore] if isinstance(ignore, str) else list(ignore)
    flat = [word for entry in entries for word in words.get(entry, (entry,))]
    one_dim = "one_dim" in flat
    patterns = [POSITION_TABLES if word == "positions" else word for word in flat if word != "one_dim"]
    try:
        stays = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(
            f"Expected ignore to hold words or regular expressions, received {ignore!r}: {error}."
        ) from None
    moving_parameters = {
        name: p
        for name, p in parameters.items()
        if not (one_dim and p.ndim < 2) and not any(pattern.search(name) for pattern in stays)
    }
    if not moving_parameters:
        raise ValueError(f"Expected a parameter to move, received ignore={ignore!r} that leaves none.")
    return moving_parameters


def filter_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters whose rows of dimension 0 are filters.

    These are the weights of linear layers and convolutions (grouped and depthwise ones too) and the in-projections of
    ``nn.MultiheadAttention``, pruned ones included. Tied parameters go by their first name, as in ``named_parameters``.
    """
    identities = set()
    for module in model.modules():
        keys: tuple[str, ...] = ()
        if isinstance(module, nn.Linear) or (isinstance(module, ConvolutionBase) and not module.transposed):
            keys = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            keys = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        own_parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False))
        for key in keys:
            pruned = f"{key}_mask" in buffers
            identities.add(id(own_parameters.get(f"{key}_orig" if pruned else key)))
    return {name for name, p in model.named_parameters() if id(p) in identities}


def normalize(
    direction: Direction,
    parameters: Mapping[str, Tensor],
    normalization: str,
    filters: Iterable[str] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> Direction:
    """Scale ``direction`` in place to the weights' own scale, and return it.

    - ``filter`` (Li et al., NeurIPS 2018, section 4): each filter, a row of dimension 0 of the parameters named in
      ``filters``, gets the norm of the weights' filter; any other tensor gets the norm of the weight tensor.
    - ``filter_official`` (Park & Kim, released code): ``d * norm(w) / (norm(d) + 1e-7)`` with norms *over* dimension 0,
      so per input column and not per filter.
    - ``layer``: each tensor gets the norm of the weight tensor.
    - ``none``: left as it is.

    Norms are accumulated in float64; a filter whose weights are zero does not move. Pruned entries, zero in ``masks``, count
    neither in the direction, which does not move them, nor in the weights.

    Raises:
        ValueError: An unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"Expected normalization to be one of {', '.join(NORMALIZATIONS)}, received {normalization!r}."
        )
    filters, masks = set(filters), masks or {}
    masked(direction, masks)
    if normalization == "none":
        return direction
    for name, d in direction.items():
        w = _used(parameters, name, masks)
        if normalization == "filter_official":
            ratio = _norms(w, (0,)) / (_norms(d, (0,)) + 1e-7)
        else:
            filter_axes = _axes(name, d, normalization, filters)
            ratio = (_norms(w, filter_axes) / _norms(d, filter_axes)).nan_to_num(0.0, posinf=0.0)
        d.mul_(ratio.to(d.dtype))
    return direction


def project(
    direction: Direction,
    parameters: Mapping[str, Tensor],
    radius: float,
    normalization: str = "filter",
    filters: Iterable[str] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> Direction:
    """Shorten ``direction`` in place to the ball in which each filter's norm is at most ``radius`` times the weights'.

    It is the ball that holds every ``filter`` (or ``layer``) normalized direction times ``radius``.

    Raises:
        ValueError: A normalization that defines no such ball.
    """
    if normalization not in ("filter", "layer"):
        raise ValueError(f"Expected normalization to be filter or layer for a ball, received {normalization!r}.")
    filters, masks = set(filters), masks or {}
    masked(direction, masks)
    for name, d in direction.items():
        filter_axes = _axes(name, d, normalization, filters)
        ratio = radius * _norms(_used(parameters, name, masks), filter_axes) / _norms(d, filter_axes)
        d.mul_(ratio.nan_to_num(1.0).clamp(max=1.0).to(d.dtype))
    return direction


def _used(parameters: Mapping[str, Tensor], name: str, masks: Mapping[str, Tensor]) -> Tensor:
    """Return the weight that the layer uses: without the entries that are pruned."""
    weight = parameters[name].detach()
    return weight * masks[name].to(weight) if name in masks else weight


def _axes(name: str, d: Tensor, normalization: str, filters: set[str]) -> tuple[int, ...]:
    """Return the dimensions that one norm covers: a row's, or all."""
    return tuple(range(1 if normalization == "filter" and name in filters else 0, d.ndim))


def _norms(tensor: Tensor, filter_axes: tuple[int, ...]) -> Tensor:
    if not filter_axes:
        return tensor.double().abs()
    return torch.linalg.vector_norm(tensor, dim=filter_axes, keepdim=True, dtype=torch.float64)


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product of two directions, accumulated in float64."""
    total = 0.0
    for name in a:
        if name in b:
            x = a[name].reshape(-1).double()
            y = x if b[name] is a[name] else b[name].to(x.device).reshape(-1).double()
            total += float(torch.dot(x, y))
    return total


def norm(direction: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of a direction."""
    return inner(direction, direction) ** 0.5


def scale(direction: Direction, factor: float) -> Direction:
    """Multiply a direction in place, and return it."""
    for d in direction.values():
        d.mul_(factor)
    return direction


def orthogonalize(direction: Direction, against: Mapping[str, Tensor]) -> Direction:
    """Subtract the component along ``against`` in place, and return the direction (twice, for rounding)."""
    square = inner(against, against)
    for _ in range(2 if square > 0 else 0):
        factor = inner(direction, against) / square
        for name in direction:
            if name in against:
                direction[name].sub_(against[name].to(direction[name].device), alpha=factor)
    return direction


def as_direction(vectors: object, parameters: Mapping[str, Tensor]) -> Direction:
    """Return a copy of ``vectors`` as a direction: a mapping by parameter name, or one flat vector.

    Args:
        vectors: A mapping from parameter names to arrays or tensors, or a vector ``(P,)`` over all of ``parameters`` in order.
        parameters: The trainable parameters, by name.

    Raises:
        ValueError: A name that the model lacks, or a shape that does not fit.
    """
    if isinstance(vectors, Mapping):
        if unknown := [name for name in vectors if name not in parameters]:
            raise ValueError(f"Expected directions of the model's trainable parameters, received {unknown[0]!r}.")
        pieces = {str(name): torch.as_tensor(value) for name, value in vectors.items()}
    else:
        flat = torch.as_tensor(vectors)
        total = sum(p.numel() for p in parameters.values())
        if flat.numel() != total:
            raise ValueError(f"Expected a direction with {total} entries, received {flat.numel()}.")
        parts = flat.flatten().split([p.numel() for p in parameters.values()])
        pieces = {name: part.reshape(p.shape) for (name, p), part in zip(parameters.items(), parts)}
    for name, piece in pieces.items():
        if piece.shape != parameters[name].shape:
            expected, received = tuple(parameters[name].shape), tuple(piece.shape)
            raise ValueError(f"Expected the direction of {name!r} with shape {expected}, received {received}.")
    # into a tensor laid out like the parameter: a copy, so that scaling it leaves the caller's alone
    return {
        name: torch.empty_like(p, dtype=wide_dtype(p)).detach().copy_(pieces[name])
        for name, p in parameters.items()
        if name in pieces
    }
