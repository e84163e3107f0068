"""The input of every measure: a model, frozen batches and one stated objective.

A measure works inside `Probe.guard`, which makes the model safe to evaluate or to differentiate twice and gives it back
bit-identical: weights, buffers, modes, gradients and random states.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitscope.core.batches.batch_format import BatchFormat, Key
from vitscope.core.batches.batch_inputs import image_shapes
from vitscope.core.batches.prepared_batches import Batch as Batch
from vitscope.core.batches.prepared_batches import are_pairs, count_examples, prepare_batch
from vitscope.core.guard import probe_guard
from vitscope.core.guard.eager_execution import eager_execution, unwrapped
from vitscope.core.guard.fingerprints import SeenBatches
from vitscope.core.guard.input_checks import CheckedBatches, InputChecks, check_weights
from vitscope.core.guard.module_state import kept_attributes, pure_forward
from vitscope.core.guard.pass_checks import PassChecks
from vitscope.core.guard.weight_norm import DifferentiableWeightNorm
from vitscope.core.losses.own_loss import measured_loss
from vitscope.core.objective import Objective
from vitscope.core.objective_card import ObjectiveCard as ObjectiveCard
from vitscope.core.objective_card import versions
from vitscope.core.optimizer_state import OptimizerState
from vitscope.core.results.result_text import html_of, probe_facts, text_of
from vitscope.core.sharding.sharded_parameters import plain_weights
from vitscope.core.structure_lookup import structure_reader
from vitscope.core.tap import refuse_other_taps
from vitscope.runtime import distributed


class Probe:
    """A model, batches and an objective: everything a measure needs.

    Args:
        model: Any module from images ``(B, C, H, W)`` to logits ``(B, K)``, or to the outputs that the loss takes. The module
            inside ``torch.compile(model)``, ``nn.DataParallel`` and ``DistributedDataParallel`` takes their place.
        batches: ``[(x, y), ...]`` with augmentation and mixup already applied; or mappings of named tensors with the targets in
            ``labels``, the others passed as ``model(**others)``; or, with ``forward`` and ``targets``, tuples and mappings of
            any tensors. A list, or any re-iterable that gives identical tensors on every pass. Under ``torch.distributed`` every
            rank passes the full sequence. What a batch must be like is said in `vitscope.core.guard.input_checks`; it is checked
            when it is first seen.
        objective: What is differentiated or evaluated; plain cross entropy by default.
        taps: Where feature maps are read, for a model that `vitscope.taps` does not know.
        about: Facts for the card, such as ``data``, ``split``, ``augmentation``, ``seed``, ``checkpoint``, ``epoch``.
        optimizer: Function that gives the optimizer at this point of training, where it is known.
        output: What of the model's output is measured: a key, an index or attribute, or a function of the output; by default
            the tensor that it is, or its ``logits``.
        forward: ``forward(model, batch)`` returns the output, for batches that ``model(x)`` or ``model(**others)`` does not fit.
        targets: Key, index or function of a batch that gives the targets; by default the second of a pair, or ``labels``.
        structure: Residual units to use in place of found ones, each a `vitscope.models.structure.UnitDescription` or a
            mapping with its keys. They stay with the model until others are passed; None leaves them as they are.

    Raises:
        ValueError: A one-shot iterator, no batch, a model that is not a module, or ``taps``, ``objective``, ``output``,
            ``forward`` or ``targets`` of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        objective: Objective | None = None,
        taps: Sequence[Any] | None = None,
        about: Mapping[str, Any] | None = None,
        optimizer: Callable[[], OptimizerState | None] | None = None,
        *,
        output: Key | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        targets: Key | None = None,
        structure: Sequence[Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected model to be an nn.Module, received {type(model).__name__}.")
        if objective is not None and not isinstance(objective, Objective):
            raise ValueError(
                f"Expected objective to be a vs.Objective, received {type(objective).__name__}: pass "
                "vs.Objective(loss=..., weight_decay=...), or leave it out for plain cross entropy."
            )
        if isinstance(batches, Iterator):
            raise ValueError(
                "Expected batches that can be gone through again (a list of (x, y)), received an iterator: list() it."
            )
        refuse_other_taps(taps or ())
        self.model = unwrapped(model)
        if structure is not None:
            structure_reader().declare_units(self.model, structure)
        self.objective = objective or Objective()
        if isinstance(batches, CheckedBatches) and (output, forward, targets) == (None, None, None):
            self._format = batches.format  # of another probe, whose batches these are
        else:
            self._format = BatchFormat(output, forward, targets)
        self._checks = InputChecks(self.objective.loss, self._format)
        self.batches: CheckedBatches = CheckedBatches(batches, self._checks)
        self.about = dict(about or {})
        self._optimizer = optimizer
        self._taps = list(taps) if taps is not None else None
        self._own_taps = taps is not None
        self._missing: list[tuple[str, str]] | None = None
        self._dtype: torch.dtype | None = None
        self._sizes: tuple[tuple[int, ...], int] | None = None  # images of each batch, examples with a label
        self._seen = SeenBatches()
        # weakly, so that a probe that is no longer used is freed at once, and the images that its batches keep with it
        weak_self = weakref.ref(self)

        def first_batch() -> Batch | None:
            probe = weak_self()
            return None if probe is None else next(probe.iter_batches(), None)

        self._passes = PassChecks(self.model, self.objective, first_batch, self._format)

    def __repr__(self) -> str:
        """Return the model, the batches, the objective and the taps, as far as they are known without a pass."""
        return text_of("Probe", self._facts())

    def _repr_html_(self) -> str:
        return html_of("Probe", self._facts())

    def _facts(self) -> dict[str, str]:
        n_batches = len(self.batches) if isinstance(self.batches.source, Sized) else None
        n_images = sum(self._sizes[0]) if self._sizes else None
        return probe_facts(self.model, self.device, self.objective, n_batches, n_images, self._taps, self.about)

    @property
    def taps(self) -> list[Any]:
        """The taps that were passed, or those that `vitscope.taps` finds in the model."""
        if self._taps is None:
            images = self.first_images()
            with self.calling():
                self._taps = structure_reader().known_taps(self.model, images)
                untapped = structure_reader().units_without_tap(self.model, images)
            structure_reader().warn_missing_units(self.model, [*self._missing_units(), *untapped])
        return self._taps

    def first_images(self) -> Any:
        """Return the first batch's images, the same on every rank; None without a batch.

        For a model that takes more than images, the inputs of the batch; `calling` lets ``model(inputs)`` take them.
        """
        first = next(iter(self.batches), None)
        return first[0] if first is not None else None

    @property
    def takes_images(self) -> bool:
        """Whether images are all that the model is given, so that a measure can change them."""
        return isinstance(self.first_images(), Tensor)

    def calling(self) -> AbstractContextManager[None]:
        """Return a context outside of a guard in which ``model(x)`` takes the inputs ``x`` of this probe's batches."""
        return self._format.calling(self.model, False, self._has_pairs())

    def check_taps(self) -> None:
        """Check that there is a place where feature maps can be read.

        Raises:
            ValueError: There is none.
        """
        if not self.taps:
            raise ValueError("Expected at least one tap, received none: pass taps=[...] to the probe.")

    def check_kinds(self) -> None:
        """Check that the model's taps follow all of its attention and MLPs, before a measure compares kinds of units.

        Raises:
            ValueError: They do not, and no taps were passed by hand.
        """
        if not self._own_taps:
            structure_reader().refuse_missing_units(self.model, self._missing_units())

    def _missing_units(self) -> list[tuple[str, str]]:
        """Return what `vitscope.models.structure.coverage.missing_units` does; the model runs once for it."""
        if self._missing is None:
            images = self.first_images()
            with self.calling():
                self._missing = structure_reader().missing_units(self.model, images)
        return self._missing

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer; the CPU for a module without any."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type in which batches come out: the guard's, else the model's own."""
        return self._dtype or probe_guard.float_dtype(self.model)

    @property
    def n_images(self) -> int:
        """The number of images in all batches (counted on the first request)."""
        return sum(self._counted()[0])

    @property
    def n_labeled(self) -> int:
        """The number of examples whose target counts: what sums of losses over all batches are divided by.

        An example is an image; for dense targets a labeled pixel.

        Raises:
            ValueError: None has a label.
        """
        count = self._counted()[1]
        if count == 0:
            raise ValueError(
                "Expected at least one image with a label, received batches in which every label is ignored."
            )
        return count

    @property
    def batch_size(self) -> int:
        """The number of images in the first batch."""
        return self._counted()[0][0]

    def first_image(self, index: int) -> int:
        """Return the number of the first image of batch ``index`` among those of all batches, from 0."""
        return sum(self._counted()[0][:index])

    @property
    def n_batches(self) -> int:
        """The number of batches, on all ranks together."""
        return len(self.batches)

    def optimizer(self) -> OptimizerState | None:
        """Return the optimizer's class, hyper-parameters and state at this point of training; None where they are not known.

        Raises:
            CheckpointError: The optimizer's state is damaged.
        """
        return self._optimizer() if self._optimizer is not None else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require gradients by name, tied ones once.

        Raises:
            ValueError: The model has none.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError(
                f"Expected a model with trainable parameters, received {type(self.model).__name__} without any."
            )
        return named

    def iter_batches(self) -> Iterator[Batch]:
        """Yield every batch, checked, in the guard's dtype."""
        return (self._prepared(index, batch) for index, batch in enumerate(self._seen.checked(self.batches)))

    def local_batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield ``(index, batch)`` for this rank's share: the indices that equal the rank modulo the world size.

        Batches that can be read one by one are read by the rank of whose share they are alone, all others by every rank.
        """
        rank, world = distributed.rank(), distributed.world_size()
        if world > 1 and isinstance(self.batches, CheckedBatches) and self.batches.reads_by_index:
            share = range(rank, len(self.batches), world)
            for index, batch in self._seen.checked_share(self.batches.at(share)):
                yield index, self._prepared(index, batch)
            return
        for index, batch in enumerate(self._seen.checked(self.batches)):
            if index % world == rank:
                yield index, self._prepared(index, batch)

    def card(self, **overrides: Any) -> ObjectiveCard:
        """Return the card of this probe; ``overrides`` are what only the measure knows (dtype, bn_policy, solver, ...)."""
        (inputs, targets), names = next(iter(self.batches)), self._passes.random_modules
        facts: dict[str, Any] = {
            "loss": self.objective.description(targets) + self._format.description,
            "l2": self.objective.l2,
            "weight_decay": self.objective.weight_decay,
            "n_images": self.n_images,
            "batch_size": self.batch_size,
            "input_shape": image_shapes(inputs),
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": f"eval, random outputs of {', '.join(names)}" if names else "eval",
            "versions": versions(),
        }
        card_fields = {f.name for f in fields(ObjectiveCard)}
        facts.update({key: value for key, value in self.about.items() if key in card_fields})
        return ObjectiveCard(**{**facts, **overrides})

    @contextmanager
    def guard(
        self,
        *,
        second_order: bool = False,
        dtype: torch.dtype | None = None,
        bn: str = "eval",
        restore_weights: bool = False,
        logits: bool = True,
        moves_weights: bool = False,
        micro_batch: int | None = None,
        first_order: bool = False,
        keeps_shards: bool = False,
    ) -> Iterator[nn.Module]:
        """Yield the model ready to be measured; give it back bit-identical, also after an exception.

        Inside: nothing runs compiled; eval mode, so no dropout and no drop path; no autocast, no TF32, no inference mode;
        gradients are enabled for ``second_order`` (with math attention, the only one with a double backward everywhere, and
        weight normalization whose second derivatives are right) and disabled otherwise. What a forward pass writes to plain
        attributes of modules is undone after it, so that nothing made from the weights outlives them, and the model works on
        copies of the images.

        The first time, the first batch is read twice and evaluated twice (with its gradient for ``second_order``). Outputs
        that differ by more than rounding explains are refused with ``second_order`` and ``moves_weights``, and otherwise
        stated on the card (``mode``) with a warning; so are later passes that draw random numbers, wherever they change the
        outputs.

        Args:
            second_order: Whether the model will be differentiated, once or twice.
            dtype: Type to which model and batches are cast for the time inside; half precision is lifted to float32 for
                derivatives.
            bn: ``eval`` uses BatchNorm's running statistics; ``batch`` those of each batch, buffers untouched.
            restore_weights: Whether to keep a copy of the weights and put it back (for measures that write to them).
            logits: Whether the model must return logits; False for measures of feature maps alone.
            moves_weights: Whether the model will be evaluated at other weights than its own.
            micro_batch: Images that the measure evaluates at once; the check uses no more. None for a whole batch.
            first_order: With ``second_order``, whether the model will be differentiated once alone: attention then uses the
                model's own kernels, and frozen integer weights may stand beside trainable ones.
            keeps_shards: For a model whose weights are sharded over ranks: gather them in each pass, instead of once for the
                time inside (`vitscope.core.sharding`). All ranks then have to make the same passes.

        Raises:
            NumericalError: Weights that are not finite.
            ValueError: A part made by ``torch.jit``, weights made in inference mode, outputs that are no logits, an unknown
                BatchNorm policy, batches that differ between passes, or, with ``second_order`` or ``moves_weights``, a model
                that is quantized, sparse, random in eval mode or that writes to its own weights.
        """
        if bn not in ("eval", "batch"):
            raise ValueError(f"Expected bn to be 'eval' or 'batch', received {bn!r}.")
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(plain_weights(self.model, keeps_shards=keeps_shards))
            check_weights(self.model)
            with distributed.failing_together(keeps_shards):  # a rank sees its own shards alone
                probe_guard.refuse_unfit_weights(self.model, second_order or moves_weights, frozen_integers=first_order)
            if second_order and dtype is None and self.dtype in (torch.bfloat16, torch.float16):
                dtype = torch.float32
            stack.enter_context(eager_execution(self.model))
            stack.enter_context(probe_guard.kept_random_states(self.device))
            stack.enter_context(probe_guard.full_precision(self.device))
            stack.enter_context(kept_attributes(self.model))
            copy_weights = restore_weights or self._passes.needs_copies
            copies = stack.enter_context(probe_guard.kept_model(self.model, dtype, copy_weights))
            stack.enter_context(probe_guard.modes(self.model, bn))
            stack.enter_context(measured_loss(self.objective.loss, dtype or self.dtype))
            if second_order:
                if not first_order:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(DifferentiableWeightNorm())
            stack.enter_context(torch.set_grad_enabled(second_order))
            stack.enter_context(self._format.calling(self.model, logits, self._has_pairs()))
            stack.enter_context(self._checks.of_outputs(self.model, logits))
            outer, self._dtype = self._dtype, dtype or self._dtype
            try:
                check = self._passes.examined(self.device, second_order, moves_weights, micro_batch, logits)
                if second_order or moves_weights:
                    check.refuse()
                else:
                    check.warn()
                if not check.written and not restore_weights:
                    copies.clear()
                with pure_forward(self.model), self._passes.watched(self.device, check, second_order or moves_weights):
                    yield self.model
            finally:
                self._dtype = outer

    def _counted(self) -> tuple[tuple[int, ...], int]:
        if self._sizes is None:
            targets = self.batches.targets() if isinstance(self.batches, CheckedBatches) else None
            if targets is not None:  # at hand without reading an image
                self._sizes = count_examples(((len(y), y) for y in targets), self.objective)
            else:
                counted = ((len(x), y) for x, y in self._seen.checked(self.batches))
                self._sizes = count_examples(counted, self.objective)
        return self._sizes

    def _has_pairs(self) -> bool:
        return are_pairs(getattr(self.batches, "source", self.batches))

    def _prepared(self, index: int, batch: Batch) -> Batch:
        return prepare_batch(index, batch, self.device, self.dtype)
