"""Rules of single functions for the axes of units: which axes of parameters and values must be permuted alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.models.permutations import axis_rules as rules
from vitscope.models.permutations import function_families as families
from vitscope.models.permutations.axis_recorder import AxisRecorder
from vitscope.models.permutations.axis_rules import Axes, fix_all, joined, plain
from vitscope.models.permutations.channel_labels import Label, cut_into_blocks, cut_into_heads, fix, merge
from vitscope.models.permutations.function_families import argument, axis_order
from vitscope.models.structure.execution import tensors
from vitscope.runtime.torch_internals import UnobservedFunctions


class UnitRecorder(AxisRecorder):
    """Merge the labels of axes that must be permuted alike; arguments as those of `AxisRecorder`."""

    def _result_axes(
        self, op: str, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor]
    ) -> Sequence[Axes] | None:
        """Return the axes of each result, or None for a function that is not known."""
        x, place_name = operands[0], self._place(op)
        axes = self._axes(x)
        if op == "linear" or op.startswith("conv"):
            return [self._layer(op, args, kwargs, results[0], place_name)]
        if op == "scaled_dot_product_attention":
            return [self._attention(args, kwargs, place_name)]
        if op == "multi_head_attention_forward":
            return self._multi_head_attention(args, kwargs, results)
        if op.endswith("norm") and op not in families.REDUCTIONS:
            return self._norm(op, args, kwargs, axes, place_name)
        if op in families.ELEMENTWISE and op != "prelu":
            return [plain(axes) if op in ("softmax", "log_softmax", "normalize") else axes] * len(results)
        if op in families.BINARY or op == "prelu":
            return [self._elements(op, operands, results[0], place_name)]
        if op in families.PRODUCTS:
            first, second = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
            pair = (second, first) if op == "__rmatmul__" else (first, second)
            return [self._product(*pair, place_name)]
        if op == "einsum":
            return [self._einsum(args, place_name)]
        if op in families.JOINS or op == "stack":
            return [self._join(op, args, kwargs, results[0], place_name)]
        if op in families.RESHAPES:
            return [rules.reshaped(axes, x.shape, results[0].shape, place_name)]
        if op in families.PERMUTATIONS:
            order = axis_order(op, args, kwargs, x.ndim)
            return [tuple(axes[k] for k in order)]
        if op in families.PIECES or op in ("unbind", "select", "narrow"):
            return self._pieces(op, args, kwargs, axes, results, place_name)
        if op == "__getitem__":
            return [rules.indexed(axes, args[1], place_name)]
        if op in families.REDUCTIONS or op in ("max", "min", "argmax", "argmin"):
            return [self._reduced(args, kwargs, axes, t, x) for t in results]
        if op in families.SPATIAL or op in ("expand", "expand_as", "repeat", "broadcast_to", "repeat_interleave"):
            return [self._resized(op, args, kwargs, axes, t, place_name) for t in results]
        return None

    def _layer(self, op: str, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        """Join the channels of a linear layer or convolution with the axes of its weight (out, in, *kernel) and bias (out,)."""
        x, weight, bias = (argument(args, kwargs, k, name) for k, name in enumerate(("input", "weight", "bias")))
        place = -1 if op == "linear" else 1 - weight.ndim  # of the channels, for images without a batch too
        groups = 1 if op == "linear" else argument(args, kwargs, 6, "groups", 1)
        axes, kernel = plain(self._axes(x)), plain(self._axes(weight))
        place %= x.ndim
        label, (out, into) = axes[place], kernel[:2] if "transpose" not in op else kernel[1::-1]
        if groups == 1:
            if x.shape[place] > 1:
                label = joined(label, into, f"{place_name} reads channels that are no units")
        elif (
            groups
            == x.shape[place]
            == (weight.shape[0] if "transpose" not in op else weight.shape[0] * weight.shape[1])
        ):
            out = label = joined(label, kernel[0], f"{place_name} reads channels that are no units")
        else:
            reason = f"{place_name} has groups of channels"
            for one in (label, into, out):
                if one is not None:
                    fix(one, reason)
        if bias is not None and out is not None:
            out = joined(out, plain(self._axes(bias))[0], place_name)
        for k in kernel[2:]:  # places of the kernel
            if k is not None:
                fix(k, "these are places of a kernel")
        if self.observe is not None and label is not None:
            self.observe(x, place, label)
        if self.observe is not None and out is not None:
            self.observe(result, place, out)
        rest = [None if op != "linear" else axis for axis in axes]
        rest[place] = out
        return tuple(rest)

    def _norm(self, op: str, args: Any, kwargs: Any, axes: Axes, place_name: str) -> Sequence[Axes] | None:
        """Join the normalized channels with scale and shift; channels in groups stay in place."""
        result = list(plain(axes))
        if op in ("layer_norm", "rms_norm"):
            n = len(argument(args, kwargs, 1, "normalized_shape"))
            places = range(len(result) - n, len(result))
            scales = args[2:4] if len(args) > 2 else (kwargs.get("weight"), kwargs.get("bias"))
        elif op in ("batch_norm", "instance_norm", "group_norm"):
            places = range(1, 2)
            if op == "group_norm" and argument(args, kwargs, 1, "num_groups") > 1 and result[1] is not None:
                fix(result[1], f"{place_name} has groups of channels")
            scales = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, Tensor)]
        else:
            return None
        for scale in scales:
            if isinstance(scale, Tensor):
                for k, tensor_axes in zip(places, plain(self._axes(scale))):
                    result[k] = joined(result[k], tensor_axes, place_name)
        return [tuple(result)]

    def _elements(self, op: str, operands: list[Tensor], result: Tensor, place_name: str) -> Axes:
        """Join the axes of operands that broadcast; of `prelu`, the channels with its slopes (channels,)."""
        if op == "prelu":
            x, weight = operands[:2]
            axes = list(plain(self._axes(x)))
            if weight.numel() > 1:
                axes[1] = joined(axes[1], plain(self._axes(weight))[0], place_name)
            return tuple(axes)
        return rules.broadcast([(self._axes(t), t.shape) for t in operands], result.shape, place_name)

    def _attention(self, args: Any, kwargs: Any, place_name: str) -> Axes:
        """Join the channels of queries and keys (..., tokens, channels); the result has those of the values."""
        query, key, value = (argument(args, kwargs, k, name) for k, name in enumerate(("query", "key", "value")))
        mask = argument(args, kwargs, 3, "attn_mask", None)
        for tensor in (query, key) if self.observe is not None else ():
            self._observe_heads(tensor)
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

    def _join(self, op: str, args: Any, kwargs: Any, result: Tensor, place_name: str) -> Axes:
        """Return the axes of tensors joined along one axis: its channels are blocks, each of which is permuted by itself."""
        parts = list(tensors(argument(args, kwargs, 0, "tensors")))
        dim = argument(args, kwargs, 1, "dim", 0) % result.ndim
        if op == "stack":
            axes = [plain(self._axes(t)) for t in parts]
            merged = rules.broadcast([(a, t.shape) for a, t in zip(axes, parts)], parts[0].shape, place_name)
            return (*merged[:dim], None, *merged[dim:])
        along = [plain(self._axes(t))[dim] for t in parts]
        others = [(tuple(None if k == dim else axis for k, axis in enumerate(plain(self._axes(t)))),
                   [1 if k == dim else size for k, size in enumerate(t.shape)]) for t in parts]  # fmt: skip
        merged = rules.broadcast(others, others[0][1], place_name)
        labels = [label for label in along if label is not None]
        label = None
        if labels and len(labels) == len(parts):
            label = Label(result.shape[dim], f"channels joined by {place_name}", blocks=tuple(labels))
        else:
            for one in labels:
                fix(one, f"{place_name} joins it with places that have a meaning")
        return (*merged[:dim], label, *merged[dim + 1 :])

    def _pieces(
        self, op: str, args: Any, kwargs: Any, axes: Axes, results: list[Tensor], place_name: str
    ) -> Sequence[Axes]:
        """Return the axes of the pieces of a tensor; an axis of channels is cut into blocks."""
        dim = argument(args, kwargs, 1 if op in ("unbind", "select", "narrow") else 2, "dim", 0) % len(axes)
        if op == "unbind":
            return [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
        if op == "select":
            return [rules.selected(axes, dim, argument(args, kwargs, 2, "index"), place_name)]
        axis = axes[dim]
        if op != "narrow" and isinstance(axis, Label):
            blocks = cut_into_blocks(axis, tuple(t.shape[dim] for t in results))
            return [(*axes[:dim], block, *axes[dim + 1 :]) for block in blocks]
        if isinstance(axis, rules.Stacked) and axis.is_index and len(results) == len(axis.labels):
            parts = [rules.selected(axes, dim, k, place_name) for k in range(len(results))]
            return [(*part[:dim], None, *part[dim:]) for part in parts]
        if axis is not None:
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
