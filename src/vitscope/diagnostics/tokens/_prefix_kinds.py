"""Kinds of the tokens in front of the patches: class, distillation and register tokens, by the parameters that hold them."""

from __future__ import annotations

from torch import Tensor, nn

#: attributes of models that hold tokens, by their kind, in the order in which they stand in front of the patches
KINDS = {
    "class": ("cls_token", "class_token", "class_embedding"),
    "distillation": ("dist_token", "distillation_token"),
    "register": ("reg_token", "reg_tokens", "register_token", "register_tokens"),
}


def prefix_kinds(model: nn.Module, n_prefix: int) -> tuple[str, ...]:
    """Return the kind of each prefix token: ``class``, ``distillation``, ``register``, or ``unknown``.

    timm, torchvision and transformers put the class token first, then the distillation token, then the registers. The kinds
    are those of the outermost module that holds such tokens, and ``unknown`` where their number is not ``n_prefix``.

    Args:
        model: The model.
        n_prefix: Number of prefix tokens at a tap.
    """
    for module in model.modules():
        kinds: list[str] = []
        for kind, names in KINDS.items():
            for tokens in (getattr(module, name, None) for name in names):
                if isinstance(tokens, Tensor):  # (1, n, C), (n, C) or (C,)
                    kinds += [kind] * (tokens.shape[-2] if tokens.ndim > 1 else 1)
        if kinds:
            return tuple(kinds) if len(kinds) == n_prefix else ("unknown",) * n_prefix
    return ("unknown",) * n_prefix
