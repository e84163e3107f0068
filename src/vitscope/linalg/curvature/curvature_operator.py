"""Products of a vector with the curvature of an objective, without the matrix.

The operator is the mean over images of the data term's curvature, plus the L2 term's once. Products with the Hessian are
reverse-over-reverse (Pearlmutter, Neural Computation 1994): where one chunk of images holds everything, the gradient's
graph is built once and kept, and a product costs about two gradients; with several chunks each product builds them anew,
one after the other: about three gradients, in the memory of one chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.module_state import parameter_references
from vitscope.core.objective import Objective
from vitscope.core.sharding.sharded_parameters import LocalShard, local_part, pad_to_whole, whole_shape
from vitscope.linalg.curvature.l2_curvature import add_l2_product, l2_gradient, l2_shift
from vitscope.linalg.curvature.microbatch import FILLER, Chunk, build_chunk, data_gradient
from vitscope.linalg.differences.central_differences import CentralDifferences, gradient_difference
from vitscope.linalg.krylov_basis import norm
from vitscope.runtime import distributed, stop_flag

OperatorKind = Literal["hessian", "ggn", "fisher_mc", "fisher_empirical"]
KINDS: tuple[str, ...] = get_args(OperatorKind)
ProductKind = Literal["reverse", "linearize", "difference"]
PRODUCTS: tuple[str, ...] = get_args(ProductKind)

#: yields ``(number of the batch's first image, (x, y))`` of this rank's share, as often as it is called
Batches = Callable[[], Iterable[tuple[int, tuple[Inputs, Tensor]]]]


class Curvature:
    """A symmetric operator on flat vectors ``(size,)``: call it with ``v`` to get ``C v``.

    Make and use it inside ``Probe.guard(second_order=True)``.

    Args:
        model: The guarded model.
        batches: Function that yields this rank's ``(first image, (x, y))`` on every call.
        objective: The data term and the L2 term.
        parameters: The parameters analyzed, by name: the operator is the diagonal block that belongs to them.
        n_images: Examples with a label on all ranks together, by which sums are divided.
        kind: ``hessian``, ``ggn``, ``fisher_mc`` or ``fisher_empirical``; the L2 term's Hessian is added to each.
        product: Kind of products of ``hessian``: ``reverse``, ``linearize`` (forward over reverse, `torch.func.linearize`), or
            ``difference`` (`vitscope.linalg.differences.central_differences`), which moves the weights and gives them back.
        micro_batch: Images held at once; None for a whole batch.
        reduce: Whether to add the ranks' shares up; False where each rank has an operator of its own.
        n_samples: Labels drawn for each image by ``fisher_mc``.
        seed: Seed of the drawn labels.
        difference_step: Length of the step of ``difference``; None to search for it.
        tol: Relative error that products of ``difference`` may have.
        filler: Function that returns any ``(x, y)``: with sharded weights ranks with fewer chunks take part in the others'
            passes with an image that does not count.

    Attributes:
        size: The number of parameters analyzed.
        n_products: Products made so far.
        differences: Function that makes the products of ``difference``; None for others.

    Raises:
        ValueError: An unknown ``kind`` or ``product``, no parameters, a ``micro_batch`` below 1, no image with a label.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        objective: Objective,
        parameters: Mapping[str, Tensor],
        *,
        n_images: int,
        kind: str = "hessian",
        product: str = "reverse",
        micro_batch: int | None = None,
        reduce: bool = True,
        n_samples: int = 1,
        seed: int = 0,
        difference_step: float | None = None,
        tol: float = 1e-3,
        filler: Callable[[], tuple[Inputs, Tensor]] | None = None,
    ) -> None:
        check_operator(kind, product, micro_batch)
        if not parameters:
            raise ValueError("Expected at least one parameter to analyze, received none.")
        if n_images < 1:
            raise ValueError(
                "Expected at least one image with a label, received batches in which every label is ignored."
            )
        reference = next(iter(parameter_references(model)), None) if product == "linearize" else None
        if reference is not None:  # forward derivatives would miss what is read past the module's own parameters
            owner, name = reference[2:]
            raise ValueError(
                f"Expected product='reverse' for a model that keeps parameters on plain attributes, received 'linearize' and a "
                f"{type(owner).__name__} that does so with {name!r}."
            )
        self.model, self.objective, self.parameters = model, objective, dict(parameters)
        self.kind, self.product, self.n_images, self.reduce = kind, product, n_images, reduce
        self.n_samples, self.seed, self.micro_batch = n_samples, seed, micro_batch
        self._batches = batches
        self.is_sharded = any(isinstance(p, LocalShard) for p in parameters.values())
        if self.is_sharded and not self._is_shift:
            raise ValueError(f"Expected l2='half_sq' or 'none' for sharded weights, received {objective.l2!r}.")
        self._shapes = [whole_shape(p) for p in parameters.values()]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.n_products = 0
        self._kept: Chunk | None = None
        self._several: bool | None = None
        self._filler = filler or (lambda: next(iter(batches()))[1])
        self._n_passes: int | None = None
        self._losses: dict[int, float] = {}  # of each chunk of a pass when it was first built
        self.differences: CentralDifferences | None = None
        if product == "difference":
            beside = GradientsBeside(self)
            self.differences = CentralDifferences(beside, tol=tol, step=difference_step, shared=reduce)

    def __call__(self, v: Tensor) -> Tensor:
        """Return ``C v (size,)``.

        Raises:
            NumericalError: The loss is not finite.
            Interrupted: A stop was requested.
        """
        return self._add_l2(v, self.data_product(v))

    def _add_l2(self, v: Tensor, out: Tensor) -> Tensor:
        """Add the product with the L2 term's Hessian to ``out (size,)`` in place; return ``out``."""
        if self.is_sharded:
            return out.add_(v, alpha=self.shift)
        return add_l2_product(self.objective, self.parameters, self.split(v), out)

    def data_product(self, v: Tensor) -> Tensor:
        """Return the product with the data term's curvature alone, without the L2 term's ``(size,)``."""
        if self.differences is not None:
            stop_flag.check()
            self.n_products += 1
            return self.differences.product(v)
        parts = self.split(v)
        return self._counted(lambda chunk: chunk.product(parts))

    @property
    def fails_together(self) -> bool:
        """Whether the ranks tell each other of failures in a pass: not of sharded weights, which each pass gathers on the way."""
        return self.reduce and not self.is_sharded

    @property
    def product_error(self) -> float:
        """Estimate of the length by which products with unit vectors are off beyond rounding; 0 for exact ones."""
        return 0.0 if self.differences is None else self.differences.record.error

    @property
    def shift(self) -> float:
        """The multiple of the identity that `unshifted` leaves out."""
        return l2_shift(self.objective)

    def unshifted(self, v: Tensor) -> Sequence[Tensor]:
        """Return ``C v - shift v`` in pieces, without joining them where that can be spared."""
        is_exact = self.differences is None
        is_summed_over_ranks = self.reduce and distributed.world_size() > 1
        if self._kept is not None and is_exact and self._is_shift and not is_summed_over_ranks:
            stop_flag.check()
            self.n_products += 1
            return self._kept.product(self.split(v))
        product = self.data_product(v)
        if not self._is_shift:
            product = add_l2_product(self.objective, self.parameters, self.split(v), product)
        return [product]

    @property
    def _is_shift(self) -> bool:
        return self.objective.l2 in ("half_sq", "none") or self.objective.weight_decay == 0.0

    def _counted(self, share: Callable[[Chunk], Sequence[Tensor]]) -> Tensor:
        stop_flag.check()
        self.n_products += 1
        return self._sum(share)

    def l2_product(self, v: Tensor) -> Tensor:
        """Return the product with the L2 term's Hessian alone ``(size,)``."""
        return self._add_l2(v, torch.zeros_like(v))

    def gradient(self, data_only: bool = False) -> Tensor:
        """Return the objective's gradient ``(size,)``, or the data term's."""
        total = self._sum(lambda chunk: chunk.gradient)
        if not data_only and self.is_sharded:
            total.add_(self.whole_weights(), alpha=self.shift)
        elif not data_only:
            total += torch.cat([g.reshape(-1) for g in l2_gradient(self.objective, self.parameters)])
        return total

    def whole_weights(self) -> Tensor:
        """Return the analyzed weights ``(size,)``, of which ranks hold shards."""
        is_first = distributed.rank() == 0  # weights that are not sharded count once
        parts = [
            p.detach() if is_first or isinstance(p, LocalShard) else torch.zeros_like(p)
            for p in self.parameters.values()
        ]
        return distributed.all_reduce_sum(torch.cat(self.flat(parts)))

    def split(self, v: Tensor) -> list[Tensor]:
        """Return views of ``v (size,)`` in the parameters' shapes; of sharded ones this rank's part."""
        parts = zip(v.split(self._sizes), self._shapes, self.parameters.values())
        return [local_part(part.view(shape), p) for part, shape, p in parts]

    def release(self) -> None:
        """Free the kept graph."""
        self._kept = None

    def _sum(self, share: Callable[[Chunk], Sequence[Tensor]]) -> Tensor:
        """Add ``share(chunk)`` up over chunks and ranks into a flat vector."""
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        empty = True
        with distributed.failing_together(self.fails_together, device=self.device):
            for chunk in self._chunks():
                if not empty and distributed.world_size() == 1:  # of several ranks none may leave the others waiting
                    stop_flag.check()
                flat = self.flat(share(chunk))
                if empty:
                    torch.cat(flat, out=out)
                else:
                    out += torch.cat(flat)
                empty = False
        if empty:  # more ranks than batches
            out.zero_()
        return distributed.all_reduce_sum(out) if self.reduce else out

    def flat(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors of the parameters' shapes as pieces of ``(size,)``; of sharded ones other ranks' rows are zero."""
        return [pad_to_whole(part, p).reshape(-1) for part, p in zip(parts, self.parameters.values())]

    def _chunks(self) -> Iterator[Chunk]:
        if self._kept is not None:
            yield self._kept
            return
        pieces = self.pieces()
        if self._several is None:
            ahead = list(islice(self.pieces(), 2))
            self._several = len(ahead) > 1
        for number, (first_image, x, y) in enumerate(pieces):
            chunk = build_chunk(self, first_image, x, y)
            self._check_repeated(number, chunk.loss, first_image, len(x))
            if not self._several:
                self._kept = chunk
            yield chunk

    def _check_repeated(self, number: int, loss: float, first_image: int, n: int) -> None:
        """Raise ValueError where a chunk's loss is not what it was: half of the digits are more than another order of sums."""
        before = self._losses.setdefault(number, loss)
        if abs(loss - before) > float(torch.finfo(self.dtype).eps) ** 0.5 * abs(before):
            raise ValueError(
                f"Expected a network that repeats itself, received one whose loss on images {first_image} to "
                f"{first_image + n - 1} changes by {abs(loss - before) / abs(before):.2g} of its size between two passes in "
                "eval mode: make its randomness follow module.training, or fix its seed in forward."
            )

    def pieces(self) -> Iterator[tuple[int, Inputs, Tensor]]:
        """Yield ``(number of the first image, x, y)`` of each micro-batch of this rank's share."""
        most = self._most_pieces() if self.is_sharded else 0  # all ranks ask before the first piece
        n_pieces = 0
        for first_image, (x, y) in self._batches():
            step = self.micro_batch or len(x)
            for a in range(0, len(x), step):
                yield first_image + a, x[a : a + step], y[a : a + step]
                n_pieces += 1
        for _ in range(most - n_pieces):  # every pass takes all ranks
            x, y = self._filler()
            yield FILLER, x[:1], y[:1]

    def _most_pieces(self) -> int:
        """Return the number of pieces of the rank that has most of them."""
        if self._n_passes is None:
            with distributed.failing_together():
                lengths = [len(x) for _, (x, _) in self._batches()]
            n_pieces = sum(-(-n // (self.micro_batch or n)) for n in lengths)
            self._n_passes = int(max(distributed.gather_objects(n_pieces)))
        assert self._n_passes is not None
        return self._n_passes


class GradientsBeside:
    """Gradients of an operator's data term beside the weights, see `vitscope.linalg.differences.central_differences`."""

    def __init__(self, operator: Curvature) -> None:
        self.operator, self.dtype = operator, operator.dtype

    def weight_norm(self) -> float:
        """Return the length of the analyzed weights."""
        operator = self.operator
        if operator.is_sharded:
            return norm(operator.whole_weights())
        return math.sqrt(sum(norm(p.detach().reshape(-1)) ** 2 for p in operator.parameters.values()))

    def differences(self, direction: Tensor, steps: Sequence[float]) -> list[Tensor]:
        """Return ``(g(w + h direction) - g(w - h direction)) / 2h (size,)`` for each step h, of all ranks together."""
        operator = self.operator
        weights, parts = list(operator.parameters.values()), operator.split(direction)
        sums = [torch.zeros_like(direction) for _ in steps]
        with distributed.failing_together(operator.fails_together, device=operator.device):
            for number, (first_image, x, y) in enumerate(operator.pieces()):
                if number and distributed.world_size() == 1:  # of several ranks none may leave the others waiting
                    stop_flag.check()
                gradient = functools.partial(data_gradient, operator, first_image, x, y)
                for total, step in zip(sums, steps):
                    total += torch.cat(operator.flat(gradient_difference(weights, parts, gradient, step)))
        return [distributed.all_reduce_sum(total) for total in sums] if operator.reduce else sums


def check_operator(kind: str, product: str, micro_batch: int | None) -> None:
    """Check the options of a `Curvature`.

    Raises:
        ValueError: An unknown kind of operator or product, or fewer than one image at once.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected operator to be one of {', '.join(KINDS)}, received {kind!r}.")
    if product not in PRODUCTS:
        raise ValueError(f"Expected product to be one of {', '.join(PRODUCTS)}, received {product!r}.")
    if product == "difference" and kind != "hessian":
        raise ValueError(f"Expected operator='hessian' with product='difference', received {kind!r}.")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"Expected micro_batch to be at least 1 or None, received {micro_batch}.")
