"""The weights of a network in the contents of a file: which entry holds them, what stands before their names, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitscope.runtime.torch_internals import RunningNormBase

#: entries that hold the weights of a network in files of known programs, the usual ones first; "" is the file itself
_ENTRIES = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "",
)
#: entry in which Lightning's `EMAWeightAveraging` keeps the weights that the optimizer moves, while ``state_dict`` is the average
CURRENT_WEIGHTS = "current_model_state"
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged|model_average)([._]|$)", re.IGNORECASE)
#: weights and buffers whose shapes follow from the number of positions, in timm, torchvision and transformers
_POSITIONS = re.compile(
    r"(pos|position)_(embed|embedding|embeddings|ids|bias)|rel(ative)?_?pos(ition)?|attn_mask|coords_table|attention_bias"
)
#: entries without weights of a network, and how deep entries may stand in each other
_NO_WEIGHTS = re.compile(r"optimizer.*|lr_scheduler.*|scheduler.*|loops|callbacks|amp_scaler|scaler|args|vitscope")
_DEPTH = 3


@dataclass(frozen=True)
class WeightReading:
    """One reading of a file as the weights of a network.

    Attributes:
        entry: The dotted key of the mapping that holds them; empty for the file itself.
        prefix: The text that stands before each name there.
        tensors: The weights by name, without the prefix.
        other_names: The names in the entry that do not begin with the prefix.
        is_average: Whether these are averages over training steps.
    """

    entry: str
    prefix: str
    tensors: dict[str, Any]
    other_names: tuple[str, ...]
    is_average: bool

    @property
    def place(self) -> str:
        """The entry and the prefix as a user can find them in the file."""
        return " ".join(filter(None, (self.entry, f"under {self.prefix}*" if self.prefix else ""))) or "the file itself"


def default_keys(model: nn.Module) -> set[str]:
    """Return the keys that `load_state_dict` does not miss: the counters of batches of normalization layers.

    Versions of torch before 0.4.1 had none; torch goes on with the layer's own.
    """
    return {
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RunningNormBase) and module.num_batches_tracked is not None
    }


def with_default_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the model's own values of the default keys that it lacks."""
    model_state = model.state_dict()
    return {
        **state,
        **{
            key: model_state[key].detach().clone()
            for key in sorted(default_keys(model) - set(state))
            if key in model_state
        },
    }


def weight_entries(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return the mappings of a file that hold tensors, by their dotted key; the key of the file itself is empty."""
    return dict(_entries(content, "", _DEPTH))


def average_entries(content: Mapping[Any, Any]) -> list[str]:
    """Return the dotted keys of the entries that hold averages over training steps."""
    entries = weight_entries(content)
    return [entry for entry, tensors in entries.items() if _is_average(entry, "", content, tensors)]


def average_places(model: nn.Module, content: Mapping[Any, Any]) -> list[str]:
    """Return the places in a file that hold averages over training steps, those that fit ``model`` and other ones."""
    fitting = {reading.entry: reading.place for reading in _readings(model, content) if reading.is_average}
    return list(({entry: entry or "the file itself" for entry in average_entries(content)} | fitting).values())


def select_weights(model: nn.Module, content: Mapping[Any, Any], *, average: bool = False) -> WeightReading | None:
    """Return the only reading of a file that has every weight of ``model`` and no further one under the same prefix.

    Entries of a usual name are preferred to others, readings with the model's shapes to others, entries with nothing outside
    of the prefix to others. Without ``average``, averages count only where nothing else fits.

    Args:
        model: The network.
        content: The contents of the file: a state dict, or a mapping with one inside.
        average: Whether to look for averages over training steps (EMA, SWA) alone.

    Returns:
        The reading; None where there is none.

    Raises:
        ValueError: Two readings fit equally well, and their tensors differ.
    """
    fits = [reading for reading in _readings(model, content) if reading.is_average or not average]
    if not average:
        fits = [reading for reading in fits if not _is_named_average(reading)] or fits
    if not fits:
        return None
    model_state = model.state_dict()
    ranked = sorted(fits, key=lambda reading: _rank(reading, model_state))
    best = [r for r in ranked if _rank(r, model_state) == _rank(ranked[0], model_state)]
    if any(not _are_equal(best[0].tensors, other.tensors) for other in best[1:]):
        places = " and ".join(reading.place for reading in best[:3])
        raise ValueError(
            f"{places} fit the model equally well: save the state dict of one of them in a file of its own"
        )
    return best[0]


def class_counts(model_state: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the numbers of classes of a file and of a model that differ in these alone; None where something else differs.

    They are the lengths of the first axis of the weights whose shapes differ, all of which must agree.

    Args:
        model_state: The model's state dict.
        state: The file's tensors of the same names.
    """
    pairs = {
        (tuple(state[name].shape), tuple(value.shape))
        for name, value in model_state.items()
        if name in state and isinstance(value, Tensor) and value.shape != state[name].shape
    }
    if not pairs or any(not a or not b or a[1:] != b[1:] for a, b in pairs):
        return None
    counts = {(a[0], b[0]) for a, b in pairs}
    return counts.pop() if len(counts) == 1 else None


def differs_in_positions(model_state: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Return whether a file and a model differ in shapes of position embeddings and biases alone: other images or patches.

    Args:
        model_state: The model's state dict.
        state: The file's tensors of the same names.
    """
    differing = [
        name
        for name, value in model_state.items()
        if name in state and isinstance(value, Tensor) and value.shape != state[name].shape
    ]
    return bool(differing) and all(
        _POSITIONS.search(name) and model_state[name].ndim == state[name].ndim for name in differing
    )


def _entries(node: Mapping[Any, Any], key: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    tensors = {str(name): value for name, value in node.items() if _is_weight(name, value)}
    if any(isinstance(value, Tensor) for value in tensors.values()):
        yield key, tensors
    for name, value in node.items():
        if depth and isinstance(value, Mapping) and not _NO_WEIGHTS.fullmatch(str(name)):
            yield from _entries(value, f"{key}.{name}" if key else str(name), depth - 1)


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(value, Tensor) or str(name).endswith("_extra_state")


def _readings(model: nn.Module, content: Mapping[Any, Any]) -> Iterator[WeightReading]:
    """Yield the readings that have every weight of the model and nothing else under the same prefix."""
    names = set(model.state_dict())
    required = names - default_keys(model)
    if not required:
        return
    last = max(required, key=len)  # the longest name is the end of the fewest others
    for entry, tensors in weight_entries(content).items():
        if entry == CURRENT_WEIGHTS:
            continue
        prefixes = [name.removesuffix(last) for name in tensors if name.endswith(last)]
        for prefix in prefixes:
            if prefix and not prefix.endswith("."):
                continue
            inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            if required <= set(inner) <= names:
                others = tuple(name for name in tensors if not name.startswith(prefix))
                yield WeightReading(entry, prefix, inner, others, _is_average(entry, prefix, content, tensors))


def _is_average(entry: str, prefix: str, content: Mapping[Any, Any], tensors: Mapping[str, Any]) -> bool:
    is_of_lightning = entry == "state_dict" and CURRENT_WEIGHTS in content
    is_of_torch = "n_averaged" in tensors and prefix in ("module.", "")  # torch.optim.swa_utils.AveragedModel
    return bool(is_of_lightning or is_of_torch or _AVERAGE.search(entry) or _AVERAGE.search(prefix))


def _is_named_average(reading: WeightReading) -> bool:
    return bool(_AVERAGE.search(reading.entry) or _AVERAGE.search(reading.prefix))


def _rank(reading: WeightReading, model_state: Mapping[str, Any]) -> tuple[bool, int, bool]:
    entry_rank = _ENTRIES.index(reading.entry) if reading.entry in _ENTRIES else len(_ENTRIES)
    return not _has_shapes(reading.tensors, model_state), entry_rank, bool(reading.other_names)


def _has_shapes(tensors: Mapping[str, Any], model_state: Mapping[str, Any]) -> bool:
    return all(getattr(tensors[name], "shape", None) == getattr(model_state[name], "shape", None) for name in tensors)


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return set(one) == set(other) and all(_are_equal_tensors(value, other[name]) for name, value in one.items())


def _are_equal_tensors(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    return value.dtype == other.dtype and value.shape == other.shape and bool((value == other).all())
