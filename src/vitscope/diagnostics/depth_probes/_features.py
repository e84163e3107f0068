"""Features of labeled images at every tap from one forward pass, gathered over batches and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs, tensors_of
from vitscope.core.losses.targets import are_indices, labeled
from vitscope.core.probe import Probe
from vitscope.core.tap import Tap
from vitscope.diagnostics.depth_probes._logit_lens import Head
from vitscope.linalg.basis_memory import free_memory
from vitscope.models.structure.taps import reading
from vitscope.runtime import distributed
from vitscope.runtime.distributed import world_size
from vitscope.runtime.progress import track

#: attributes of models that hold a class token, which comes before all others
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


@dataclass
class BatchFeatures:
    """Values that are kept of a batch: rows of its labeled images, float32 or the model's double precision.

    Attributes:
        number: Number of the batch.
        labels: (B,) classes.
        decisions: (B,) the model's classes; -1 where its logits are not finite.
        digests: Digests of the images.
        pooled: (B, C) means over positions, by tap.
        class_tokens: (B, C) class tokens, by tap.
        lens: (B,) classes of the model's head, by tap.
        head_inputs: (B, C') what the head's classifier takes, by tap.
    """

    number: int
    labels: np.ndarray
    decisions: np.ndarray
    digests: list[bytes]
    pooled: dict[int, np.ndarray] = field(default_factory=dict)
    class_tokens: dict[int, np.ndarray] = field(default_factory=dict)
    lens: dict[int, np.ndarray] = field(default_factory=dict)
    head_inputs: dict[int, np.ndarray] = field(default_factory=dict)


class LabeledImages:
    """The features of all ranks' images, in the order of the batches.

    Attributes:
        labels: (n,) classes.
        decisions: (n,) of the model.
        digests: Digests of the images.
    """

    def __init__(self, local: Sequence[BatchFeatures]) -> None:
        self._local = local
        facts = [(part.number, part.labels, part.decisions, part.digests) for part in local]
        gathered = sorted((fact for share in distributed.gather_objects(facts) for fact in share), key=lambda f: f[0])
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels, _, _ in gathered]))
        self.decisions = torch.from_numpy(np.concatenate([decisions for _, _, decisions, _ in gathered]))
        self.digests = [digest for *_, digests in gathered for digest in digests]

    def gathered(self, name: str, index: int) -> Tensor | None:
        """Return a field of `BatchFeatures` at a tap for all images, features in float64; None where there is none.

        Every rank must call it alike.
        """
        rows = [(part.number, getattr(part, name)[index]) for part in self._local if index in getattr(part, name)]
        parts = sorted((p for share in distributed.gather_objects(rows) for p in share), key=lambda part: part[0])
        if not parts:
            return None
        values = torch.from_numpy(np.concatenate([part for _, part in parts]))
        return values.double() if values.is_floating_point() else values


def has_class_token(model: nn.Module) -> bool:
    """Return whether the first of a model's prefix tokens is a class token."""
    return any(isinstance(getattr(module, name, None), Tensor) for module in model.modules() for name in _CLASS_TOKENS)


def collect(probe: Probe, taps: list[Tap], head: Head | None, max_memory: float | None, what: str) -> LabeledImages:
    """Return the features of a probe's labeled images.

    Raises:
        ValueError: On every rank: targets that are no class indices, no labeled image, features that do not fit into memory, or a
            tap that was not reached.
    """
    parts: list[BatchFeatures] = []
    with distributed.failing_together():
        parts.extend(_local_features(probe, taps, head, max_memory, f"depth probes: {what} images"))
    images = LabeledImages(parts)
    if not len(images.labels):
        raise ValueError(f"Expected at least one {what} image with a label, received none.")
    return images


def _local_features(
    probe: Probe, taps: list[Tap], head: Head | None, max_memory: float | None, description: str
) -> Iterator[BatchFeatures]:
    """Yield the features of each batch of this rank."""
    values = _BatchValues(head, has_class_token(probe.model))
    is_first = True
    with probe.guard() as model, reading(model, taps, values.read, values.read_prefix):
        for number, (x, y) in track(probe.local_batches(), description, -(-probe.n_batches // world_size())):
            if not are_indices(y):
                raise ValueError(
                    f"depth_probes needs class indices (B,), received targets {tuple(y.shape)} in batch {number}: measure "
                    "images without mixup (probe.augment=false)."
                )
            values.clear()
            decisions = _decisions(model(x))
            if missing := [tap.name for index, tap in enumerate(taps) if index not in values.by_name["pooled"]]:
                raise ValueError(f"Expected a map at tap {missing[0]!r}, received none: the model did not run it.")
            if is_first:
                _check_memory(values.by_name, probe, max_memory)
                is_first = False
            yield _batch(number, x, y, decisions, values.by_name)


class _BatchValues:
    """Values of one batch: by name of a field of `BatchFeatures`, then by tap."""

    def __init__(self, head: Head | None, with_class_token: bool) -> None:
        self.head, self.with_class_token = head, with_class_token
        self.by_name: dict[str, dict[int, Tensor]] = {}
        self._prefix: dict[int, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the batch before."""
        self._prefix = {}
        self.by_name = {name: {} for name in ("pooled", "class_tokens", "lens", "head_inputs")}

    def read_prefix(self, index: int, tap: Tap, tokens: Tensor) -> None:
        """Take the tokens in front of the map ``(B, n_prefix, C)``, which comes next."""
        self._prefix[index] = tokens

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take the map ``(B, C, h, w)`` of a tap."""
        self.by_name["pooled"][index] = x.flatten(2).mean(dim=2, dtype=torch.float64)
        prefix = self._prefix.pop(index, None)
        if prefix is not None and self.with_class_token:
            self.by_name["class_tokens"][index] = prefix[:, 0].clone()
        if self.head is not None and self.head.null_reason(tap, x) is None:
            logits, head_input = self.head.apply(x, prefix)
            self.by_name["lens"][index] = _decisions(logits)
            if head_input is not None:
                self.by_name["head_inputs"][index] = head_input.clone()


def _batch(
    number: int, x: Tensor | BatchInputs, y: Tensor, decisions: Tensor, values: dict[str, dict[int, Tensor]]
) -> BatchFeatures:
    counts = labeled(y).cpu()
    digests = [digest for digest, counted in zip(_digests(x), counts.tolist()) if counted]
    part = BatchFeatures(number, y.cpu()[counts].long().numpy(), decisions.cpu()[counts].numpy(), digests)
    for name in ("pooled", "class_tokens", "lens", "head_inputs"):
        getattr(part, name).update({index: _kept(value, counts, x) for index, value in values[name].items()})
    return part


def _kept(value: Tensor, counts: Tensor, x: Tensor | BatchInputs) -> np.ndarray:
    rows = value.detach().cpu()[counts]
    double = any(t.dtype == torch.float64 for t in tensors_of(x))
    return (rows if double or not rows.is_floating_point() else rows.float()).numpy()


def _decisions(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1).where(torch.isfinite(logits).all(dim=1), -1)


def _digests(inputs: Tensor | BatchInputs) -> list[bytes]:
    """Return a digest of each image's own entries."""
    tensors = inputs.cut_tensors if isinstance(inputs, BatchInputs) else [inputs]
    rows = zip(*(t.detach().cpu().flatten(1) if t.ndim > 1 else t.detach().cpu()[:, None] for t in tensors))
    return [hashlib.blake2b(b"".join(_exact(v).numpy().tobytes() for v in row), digest_size=8).digest() for row in rows]


def _check_memory(values: dict[str, dict[int, Tensor]], probe: Probe, max_memory: float | None) -> None:
    features = [v for name in ("pooled", "class_tokens", "head_inputs") for v in values[name].values()]
    size = 8 if probe.dtype == torch.float64 else 4
    needed = float(probe.n_images * size * sum(value.shape[1] for value in features))
    limit = free_memory(torch.device("cpu")) / 4 if max_memory is None else max_memory
    if needed > limit:
        raise ValueError(
            f"depth_probes keeps the pooled features of all images and needs {needed / 2**30:.3g} GiB for "
            f"{probe.n_images} images at {len(values['pooled'])} taps, received max_memory={limit / 2**30:.3g} GiB: use "
            f"n_images={max(1, int(probe.n_images * limit / needed))}, or fewer taps."
        )


def _exact(value: Tensor) -> Tensor:
    """Return a tensor in a type that NumPy has."""
    return value.float() if value.dtype == torch.bfloat16 else value
