"""Rules of single functions for the axes of units: which axes of parameters and values must be permuted alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.models.permutations import axis_rules as rules
from vitscope.models.permutations import function_families as families
from vitscope.models.permutations.axis_recorder import AxisRecorder
from vitscope.models.permutations.axis_rules import Axes, fix_all, joined, plain
from vitscope.models.permutations.channel_labels import Label, cut_into_blocks, cut_into_heads, fix, merge
from vitscope.models.structure.execution import argument, tensors
from vitscope.models.tracing.axes import axis_order
from vitscope.runtime.torch_internals import UnobservedFunctions


class UnitRecorder(AxisRecorder):
    """Merge the labels of axes that must be permuted alike; arguments as those of `AxisRecorder`."""

    def _result_axes(
        self, op: str, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor]
    ) -> Sequence[Axes] | None:
        """Return the axes of each result, or None for a function that is not known."""
        x, place_name = operands[0], self._place(op)
        axes = self._axes(x)
        # layers and attention
        if op == "linear" or op.startswith("conv"):
            return [self._layer(op, args, kwargs, results[0], place_name)]
        if op in families.NORMS:
            return [self._norm(op, args, kwargs, axes, place_name)]
        if op == "scaled_dot_product_attention":
            return [self._attention(args, kwargs, place_name)]
        if op == "multi_head_attention_forward":
            return self._multi_head_attention(args, kwargs, results)
        # functions of elements
        if op in families.ELEMENTWISE:
            return [axes] * len(results)
        if op in families.NORMALIZATIONS:
            return [plain(axes)] * len(results)
        if op == "prelu":
            return [self._prelu(x, operands[1], place_name)]
        if op in families.BINARY:
            return [rules.broadcast([(self._axes(t), t.shape) for t in operands], results[0].shape, place_name)]
        # products and sums
        if op in families.PRODUCTS:
            first, second = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
            pair = (second, first) if op == "__rmatmul__" else (first, second)
            return [self._product(*pair, place_name)]
        if op == "einsum":
            return [self._einsum(args, place_name)]
        if op in families.REDUCTIONS:
            return [self._reduced(args, kwargs, axes, t, x) for t in results]
        # functions that rearrange
        if op in families.JOINS:
            return [self._joined(args, kwargs, results[0], place_name)]
        if op == "stack":
            return [self._stacked(args, kwargs, results[0], place_name)]
        if op in families.RESHAPES:
            return [rules.reshaped(axes, x.shape, results[0].shape, place_name)]
        if op in families.PERMUTATIONS:
            return [tuple(axes[k] for k in axis_order(op, args, kwargs, x.ndim))]
        if op == "__getitem__":
            return [rules.indexed(axes, args[1], place_name)]
        if op in families.SLICES:
            return self._slices(op, args, kwargs, axes, results, place_name)
        if op in families.PIECES:
            dim = argument(args, kwargs, 2, "dim", 0) % len(axes)
            return self._pieces(axes, dim, results, place_name)
        if op in families.RESIZES:
            return [self._resized(op, args, kwargs, axes, t, place_name) for t in results]
        return None

    def _layer(self, op: str, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        """Join the channels of a linear layer or convolution with the axes of its weight (out, in, *kernel) and bias (out,)."""
        x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        bias = argument(args, kwargs, 2, "bias", None)
        is_linear = op == "linear"
        place = x.ndim - 1 if is_linear else x.ndim + 1 - weight.ndim  # of the channels, for images without a batch too
        n_groups = 1 if is_linear else argument(args, kwargs, 6, "groups", 1)
        axes = plain(self._axes(x))
        first, second, *kernel = plain(self._axes(weight))
        out, into = (second, first) if "transpose" in op else (first, second)
        label = axes[place]
        if n_groups == 1 and x.shape[place] > 1:
            label = joined(label, into, f"{place_name} reads channels that are no units")
        elif n_groups == x.shape[place] == result.shape[place] > 1:  # a kernel for each channel
            out = label = joined(label, first, f"{place_name} reads channels that are no units")
        elif n_groups > 1:
            _fix_each((label, into, out), f"{place_name} has groups of channels")
        if bias is not None and out is not None:
            out = joined(out, plain(self._axes(bias))[0], place_name)
        _fix_each(kernel, "these are places of a kernel")
        if self.observe is not None and label is not None:
            self.observe(x, place, label)
        if self.observe is not None and out is not None:
            self.observe(result, place, out)
        others = axes if is_linear else (None,) * len(axes)
        return (*others[:place], out, *others[place + 1 :])

    def _norm(self, op: str, args: Any, kwargs: Any, axes: Axes, place_name: str) -> Axes:
        """Join the normalized channels with scale and shift; channels in groups stay in place."""
        result = list(plain(axes))
        if op in ("layer_norm", "rms_norm"):
            n = len(argument(args, kwargs, 1, "normalized_shape"))
            places = range(len(result) - n, len(result))
            scales = args[2:4] if len(args) > 2 else (kwargs.get("weight"), kwargs.get("bias"))
        else:
            places = range(1, 2)
            if op == "group_norm" and argument(args, kwargs, 1, "num_groups") > 1 and result[1] is not None:
                fix(result[1], f"{place_name} has groups of channels")
            scales = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor)]
        for scale in scales:
            if isinstance(scale, Tensor):
                for k, tensor_axes in zip(places, plain(self._axes(scale))):
                    result[k] = joined(result[k], tensor_axes, place_name)
        return tuple(result)

    def _prelu(self, x: Tensor, slopes: Tensor, place_name: str) -> Axes:
        """Join the channels with their slopes (channels,)."""
        axes = list(plain(self._axes(x)))
        if slopes.numel() > 1:
            axes[1] = joined(axes[1], plain(self._axes(slopes))[0], place_name)
        return tuple(axes)

    def _attention(self, args: Any, kwargs: Any, place_name: str) -> Axes:
        """Join the channels of queries and keys (..., tokens, channels); the result has those of the values."""
        query, key, value = (argument(args, kwargs, k, name) for k, name in enumerate(("query", "key", "value")))
        mask = argument(args, kwargs, 3, "attn_mask", None)
        if self.observe is not None:
            self._observe_heads(query)
            self._observe_heads(key)
        scores = [*self._batch_axes([query, key], place_name), None, None]
        joined(plain(self._axes(query))[-1], plain(self._axes(key))[-1], place_name)
        if mask is not None:
            sizes = [*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]), query.shape[-2], key.shape[-2]]
            scores = list(rules.broadcast([(tuple(scores), sizes), (self._axes(mask), mask.shape)], sizes, place_name))
        values = plain(self._axes(value))
        batch = [joined(a, b, place_name) for a, b in zip(plain(tuple(scores))[:-2], values[:-2])]
        return (*batch, plain(self._axes(query))[-2], values[-1])

    def _observe_heads(self, tensor: Tensor) -> None:
        """Observe queries or keys (..., heads, tokens, channels) as one axis of units."""
        axes = plain(self._axes(tensor))
        heads, channels = (axes[-3], axes[-1]) if tensor.ndim > 3 else (None, None)
        if self.observe is not None and heads is not None and channels is not None:
            label = Label(heads.size * channels.size, "queries and keys", heads=(heads, channels))
            with torch.no_grad(), UnobservedFunctions():
                flat = tensor.detach().transpose(-3, -2).flatten(-2)  # (..., tokens, heads * channels)
            self.observe(flat, flat.ndim - 1, label)

    def _multi_head_attention(self, args: Any, kwargs: Any, results: list[Tensor]) -> Sequence[Axes] | None:
        """Join the axes of torch's fused attention: rows of the input projection are queries, keys and values, each of all heads.

        Returns None for separate projections and for bias vectors of keys and values.
        """
        names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
                 "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")  # fmt: skip
        call = {**dict(zip(names, args)), **kwargs}
        if call["bias_k"] is not None or call["bias_v"] is not None or call.get("use_separate_proj_weight"):
            return None
        place_name = self._place("multi_head_attention_forward")
        query, weight, bias = call["query"], call["in_proj_weight"], call["in_proj_bias"]
        rows, columns = plain(self._axes(weight))  # (3 * channels, channels)
        for name in ("query", "key", "value"):
            joined(plain(self._axes(call[name]))[-1], columns, place_name)
        if bias is not None and rows is not None:
            rows = joined(rows, plain(self._axes(bias))[0], place_name)
        out, out_in = plain(self._axes(call["out_proj_weight"]))
        assert rows is not None
        assert out_in is not None
        blocks = cut_into_blocks(rows, (rows.size // 3,) * 3)  # rows of queries, keys and values
        parts = [cut_into_heads(block, call["num_heads"]) for block in blocks]  # (heads, channels) of each
        for heads, _ in parts[1:]:
            merge(parts[0][0], heads)
        merge(parts[0][1], parts[1][1])  # the channels of values are their own
        values = Label(out_in.size, place_name)
        values.heads = parts[2]
        merge(out_in, values)
        if call["out_proj_bias"] is not None and out is not None:
            out = joined(out, plain(self._axes(call["out_proj_bias"]))[0], place_name)
        if self.observe is not None:
            if columns is not None:
                self.observe(query, query.ndim - 1, columns)
            with torch.no_grad(), UnobservedFunctions():
                self.observe(F.linear(query, weight, bias), query.ndim - 1, rows)
        return [(None, None, out), *((None,) * t.ndim for t in results[1:])]

    def _product(self, a: Tensor, b: Tensor, place_name: str) -> Axes:
        """Join the axes over which a product of matrices (..., n, k) and (..., k, m) sums."""
        first, second = plain(self._axes(a)), plain(self._axes(b))
        if a.ndim < 2 or b.ndim < 2:
            raise ValueError("product with a vector")
        joined(first[-1], second[-2], place_name)
        return (*self._batch_axes([a, b], place_name), first[-2], second[-1])

    def _batch_axes(self, operands: Sequence[Tensor], place_name: str) -> Axes:
        """Join the leading axes of matrices that broadcast."""
        shape = torch.broadcast_shapes(*(t.shape[:-2] for t in operands))
        return rules.broadcast([(plain(self._axes(t))[:-2], t.shape[:-2]) for t in operands], shape, place_name)

    def _einsum(self, args: Any, place_name: str) -> Axes:
        """Join the axes that have the same letter."""
        inputs, _, output = args[0].replace(" ", "").partition("->")
        operands = list(tensors(args[1:]))
        label_of: dict[str, Label | None] = {}
        for letters, operand in zip(inputs.split(","), operands, strict=True):
            for letter, axis in zip(letters, plain(self._axes(operand)), strict=True):
                label_of[letter] = joined(label_of[letter], axis, place_name) if letter in label_of else axis
        return tuple(label_of[letter] for letter in output)

    def _stacked(self, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        """Return the axes of tensors stacked along a new axis."""
        parts = list(tensors(argument(args, kwargs, 0, "tensors")))
        dim = argument(args, kwargs, 1, "dim", 0) % result.ndim
        merged = rules.broadcast([(self._axes(t), t.shape) for t in parts], parts[0].shape, place_name)
        return (*merged[:dim], None, *merged[dim:])

    def _joined(self, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        """Return the axes of tensors joined along one axis: its channels are blocks, each of which is permuted by itself."""
        parts = list(tensors(argument(args, kwargs, 0, "tensors")))
        dim = argument(args, kwargs, 1, "dim", 0) % result.ndim
        part_axes = [plain(self._axes(t)) for t in parts]
        # along ``dim`` the parts do not meet
        operands = [((*axes[:dim], None, *axes[dim + 1 :]), (*t.shape[:dim], 1, *t.shape[dim + 1 :]))
                    for axes, t in zip(part_axes, parts)]  # fmt: skip
        merged = rules.broadcast(operands, operands[0][1], place_name)
        labels = [axes[dim] for axes in part_axes]
        blocks = tuple(label for label in labels if label is not None)
        label = None
        if len(blocks) == len(labels):
            label = Label(result.shape[dim], f"channels joined by {place_name}", blocks=blocks)
        else:
            _fix_each(blocks, f"{place_name} joins it with places that have a meaning")
        return (*merged[:dim], label, *merged[dim + 1 :])

    def _slices(
        self, op: str, args: Any, kwargs: Any, axes: Axes, results: list[Tensor], place_name: str
    ) -> Sequence[Axes]:
        """Return the axes of slices of a tensor: `unbind` gives all along an axis, `select` one, `narrow` a range."""
        dim = argument(args, kwargs, 1, "dim", 0) % len(axes)
        if op == "unbind":
            return [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
        if op == "select":
            return [rules.selected(axes, dim, argument(args, kwargs, 2, "index"), place_name)]
        fix_all((axes[dim],), f"{place_name} takes a part of its channels")
        return [(*axes[:dim], None, *axes[dim + 1 :])]

    def _pieces(self, axes: Axes, dim: int, results: list[Tensor], place_name: str) -> Sequence[Axes]:
        """Return the axes of the pieces of a tensor; an axis of channels is cut into blocks."""
        axis = axes[dim]
        if isinstance(axis, Label):
            blocks = cut_into_blocks(axis, tuple(t.shape[dim] for t in results))
            return [(*axes[:dim], block, *axes[dim + 1 :]) for block in blocks]
        if isinstance(axis, rules.Stacked) and axis.is_index and len(results) == len(axis.labels):
            parts = [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
            return [(*part[:dim], None, *part[dim:]) for part in parts]  # pieces keep the axis
        fix_all((axis,), f"{place_name} takes a part of its channels")
        return [(*axes[:dim], None, *axes[dim + 1 :]) for _ in results]

    def _reduced(self, args: Any, kwargs: Any, axes: Axes, result: Tensor, x: Tensor) -> Axes:
        """Return the axes that a reduction leaves."""
        tensor_axes = plain(axes)
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        if dims is None or isinstance(dims, Tensor | float):
            return (None,) * result.ndim
        places = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if result.ndim == x.ndim:
            return tuple(None if k in places else axis for k, axis in enumerate(tensor_axes))
        return tuple(axis for k, axis in enumerate(tensor_axes) if k not in places)

    def _resized(self, op: str, args: Any, kwargs: Any, axes: Axes, result: Tensor, place_name: str) -> Axes:
        """Return the axes after a change of size or order of places; channels that it moves stay in place."""
        x = args[0]
        added = result.ndim - x.ndim
        dims = argument(args, kwargs, 2 if op in ("roll", "repeat_interleave") else 1, "dims", kwargs.get("dim", ()))
        dims = (dims,) if isinstance(dims, int) else dims
        reordered = {d % x.ndim + added for d in dims} if op in ("roll", "flip", "repeat_interleave") else set()
        remaining: list[Label | None] = [None] * added
        for k, axis in enumerate(plain(axes), start=added):
            if axis is not None and (x.shape[k - added] != result.shape[k] or k in reordered):
                fix(axis, f"{place_name} moves or repeats its channels")
                axis = None
            remaining.append(axis)
        return tuple(remaining)


def _fix_each(labels: Iterable[Label | None], reason: str) -> None:
    """Leave the channels of each label in place."""
    for label in labels:
        if label is not None:
            fix(label, reason)
