"""Forms of batches and outputs: split a batch into inputs and targets, call the network with them, select its output.

A batch is one of

- a pair ``(x, y)`` of images and targets; the network is called as ``model(x)``;
- a mapping of named tensors, such as ``{"pixel_values": ..., "labels": ...}``; the targets are the entry ``labels`` or the one
  that ``targets`` names, and the network is called as ``model(**others)``;
- a tuple of more entries, or anything above, with ``forward``: the network is called as ``forward(model, batch)``, ``targets``
  says which entry holds the targets.

Of a network's output the tensor is measured that ``output`` selects; by default the output itself, or its ``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs, Inputs
from vitscope.core.losses.output_checks import described_value
from vitscope.core.losses.own_loss import described

#: entry of a mapping, or place in a tuple; or a function of the whole
Key = str | int | Callable[[Any], Any]

#: the name of the targets in the batches of transformers
TARGETS = "labels"


class BatchFormat:
    """Rules by which a probe reads its batches and its network's outputs.

    Args:
        output: Key, index or attribute of the output, or a function of it; None for the output itself or its ``logits``.
        forward: ``forward(model, batch)`` returns the output; None for the calls that this module describes.
        targets: Key, index or function of a batch that gives the targets; None for the second of a pair, or ``labels``.
    """

    def __init__(
        self,
        output: Key | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        targets: Key | None = None,
    ) -> None:
        for name, value in (("output", output), ("targets", targets)):
            is_key = isinstance(value, str | int) and not isinstance(value, bool)
            if value is not None and not is_key and not callable(value):
                raise ValueError(
                    f"Expected {name} to be a key, an index or a function, received {described_value(value)}: e.g. "
                    f"{name}={'logits' if name == 'output' else TARGETS!r}."
                )
        if forward is not None and not callable(forward):
            raise ValueError(
                f"Expected forward to be a function (model, batch) -> outputs, received {described_value(forward)}: e.g. "
                "forward=lambda model, batch: model(batch[0], batch[1])."
            )
        self.output, self.forward, self.targets = output, forward, targets
        self.is_calling = False  # while `forward` runs, which calls the model itself
        self._input_name: str | None = None  # of the one tensor beside the targets, which measures see as the images

    @property
    def description(self) -> str:
        """How outputs come about, where that is not the default; for the card."""
        parts = []
        if self.output is not None:
            parts.append(f"of output {described(self.output) if callable(self.output) else repr(self.output)}")
        if self.forward is not None:
            parts.append(f"of forward {described(self.forward)}")
        if self.targets is not None:
            parts.append(f"targets {described(self.targets) if callable(self.targets) else repr(self.targets)}")
        return "".join(f", {part}" for part in parts)

    def split(self, index: int, batch: Any) -> tuple[Inputs, Tensor]:
        """Return the inputs and the targets of a batch.

        Raises:
            ValueError: A batch of another form.
        """
        if isinstance(batch, Mapping):
            return self._split_mapping(index, batch)
        if isinstance(batch, Tensor):
            raise ValueError(
                f"Expected batch {index} to be a pair (x, y), received a Tensor {tuple(batch.shape)}: pass a list of pairs, "
                "[(x, y)] for one batch."
            )
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(
                f"Expected batch {index} to be a pair (x, y), received {described_value(batch)}: make pairs, "
                "[(x, y) for x, y, *_ in batches]."
            )
        if len(batch) > 2 and (self.forward is None or self.targets is None):
            raise ValueError(
                f"Expected batch {index} to be a pair (x, y), received {described_value(batch)}: make pairs, "
                "[(x, y) for x, y, *_ in batches], or pass forward=(a function of model and batch) and targets=(the index of "
                "the targets, e.g. -1) to the probe."
            )
        key = 1 if self.targets is None else self.targets
        y = _tensor("targets y", index, self._entry(index, batch, key))
        if self.forward is not None:
            return _inputs(index, batch, y), y
        if not isinstance(key, int):
            raise ValueError(
                f"Expected targets to be an index with pairs (x, y), received a {type(key).__name__}: pass targets=1, or "
                "forward= too."
            )
        x = batch[1 - key % 2]
        return _tensor("images x", index, x), y

    def _split_mapping(self, index: int, batch: Mapping[Any, Any]) -> tuple[Inputs, Tensor]:
        key = TARGETS if self.targets is None else self.targets
        if self.targets is None and TARGETS not in batch:
            names = list(batch)
            pairs = f"[(b[{names[0]!r}], b[{names[-1]!r}]) for b in batches]" if names else "[(x, y), ...]"
            raise ValueError(
                f"Expected batch {index} to be a pair (x, y) or a mapping with {TARGETS!r}, received {described_value(batch)}: "
                f"make pairs, {pairs}, or pass targets=(the key of the targets) to the probe."
            )
        y = _tensor("targets y", index, self._entry(index, batch, key))
        if self.forward is not None:
            return _inputs(index, batch, y), y
        if callable(key):
            raise ValueError(
                f"Expected forward=(a function of model and batch) with targets={described(key)}, received none: it says which "
                "entries the model takes."
            )
        others = {name: value for name, value in batch.items() if name != key}
        if len(others) != 1:
            return _inputs(index, others, y), y
        name, value = next(iter(others.items()))
        if self._input_name not in (None, name):
            raise ValueError(
                f"Expected batches of the same entries, received {name!r} in batch {index} after {self._input_name!r}."
            )
        self._input_name = str(name)
        return _tensor(f"images {name!r}", index, value), y

    def _entry(self, index: int, batch: Any, key: Key) -> Any:
        if callable(key):
            return key(batch)
        try:
            return batch[key]
        except (LookupError, TypeError):
            raise ValueError(
                f"Expected targets={key!r} to name an entry of batch {index}, received {described_value(batch)}: pass one of "
                f"{', '.join(map(repr, list(batch)[:6] if isinstance(batch, Mapping) else range(len(batch))))}."
            ) from None

    @contextmanager
    def calling(self, model: nn.Module, select: bool = True, pairs: bool = False) -> Iterator[None]:
        """Let ``model(inputs)`` inside take the inputs of `split` and return the selected output.

        Hooks and ``torch.func.functional_call`` work as on any module. Calls of the model by ``forward`` run it as it is.

        Args:
            model: The model whose ``forward`` is replaced where it may not take the inputs as its only argument.
            select: Whether the output is selected; with False it comes as it is.
            pairs: Whether every batch is known to be a pair.
        """
        with ExitStack() as stack:
            if select and self.forward is None:
                stack.callback(model.register_forward_hook(lambda _, __, output: self.selected(output)).remove)
            if self.forward is not None or not pairs:
                stack.enter_context(self._replaced_forward(model, select))
            yield

    def selected(self, output: Any) -> Any:
        """Return what ``output`` selects; an output without an entry ``logits`` as it is by default.

        Raises:
            ValueError: No such entry.
        """
        key = self.output
        if key is None:
            if isinstance(output, Mapping):
                return output.get("logits", output)
            is_plain = isinstance(output, Tensor | tuple | list) and not hasattr(output, "_fields")  # a named tuple
            return output if is_plain else getattr(output, "logits", output)
        if callable(key):
            return key(output)
        if isinstance(output, Tensor):
            raise ValueError(f"Expected an output with an entry {key!r}, received a tensor: leave output={key!r} out.")
        if isinstance(key, str) and not isinstance(output, Mapping) and hasattr(output, key):
            return getattr(output, key)
        try:
            return output[key]
        except (LookupError, TypeError):
            raise ValueError(
                f"Expected an output with an entry {key!r}, received {described_value(output)}: pass output= one of its entries."
            ) from None

    @contextmanager
    def _replaced_forward(self, model: nn.Module, select: bool) -> Iterator[None]:
        original, attributes = model.forward, vars(model)
        before = attributes.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.is_calling or len(args) != 1 or kwargs:
                return original(*args, **kwargs)
            if self.forward is None:
                return self._called(original, args[0])
            self.is_calling = True
            try:
                output = self.forward(model, args[0].entries)
            finally:
                self.is_calling = False
            return self.selected(output) if select else output

        attributes["forward"] = forward
        try:
            yield
        finally:
            attributes.pop("forward", None)
            if before is not None:
                attributes["forward"] = before

    def _called(self, original: Callable[..., Any], inputs: Any) -> Any:
        if isinstance(inputs, BatchInputs):
            return original(**inputs.entries) if isinstance(inputs.entries, dict) else original(*inputs.entries)
        return original(inputs) if self._input_name is None else original(**{self._input_name: inputs})


def _tensor(name: str, index: int, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        fix = "use torch.as_tensor"
        if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
            fix = (
                "make one tensor of them, torch.stack(list(...)) of tensors, after torchvision's ToTensor() for images"
            )
        raise ValueError(f"Expected {name} of batch {index} to be a tensor, received {described_value(value)}: {fix}.")
    return value


def _inputs(index: int, batch: Any, y: Tensor) -> BatchInputs:
    """Return the entries of a batch, which are tensors or no data at all, so that slices of the batch hold all of it."""
    entries = batch if isinstance(batch, Mapping) else tuple(batch)
    items = entries.items() if isinstance(entries, Mapping) else enumerate(entries)
    for key, value in items:
        if not isinstance(value, Tensor | str | int | float | None):
            raise ValueError(
                f"Expected entry {key!r} of batch {index} to be a tensor, a number or a text, received {described_value(value)}: "
                "use torch.as_tensor, or put its parts into the batch one by one."
            )
    inputs = BatchInputs(entries, len(y) if y.ndim else 0)
    if not inputs.cut_tensors or not len(inputs):
        raise ValueError(
            f"Expected entries of batch {index} with one row for each of its {len(inputs)} targets, received {inputs.shape}: "
            "give tensors whose first axis is that of the images."
        )
    return inputs
