"""Residual units: read their branches, remove them, or rerun a model from one of them onward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.tap import Kind
from vitscope.models.removals.changed_outputs import changed_operand, changed_output, check_ran, zeros_of
from vitscope.models.removals.head_channels import HeadOutputs
from vitscope.models.structure.coverage import refuse_missing_units
from vitscope.models.structure.feature_maps import observed_pass, to_map
from vitscope.models.structure.found_structure import FoundStructure, find_structure
from vitscope.models.structure.residual_structure import DESCRIBING_UNITS, Read
from vitscope.models.structure.taps import attach
from vitscope.models.tracing.running_sums import SumFunction, SumPlace, SumReader, sum_place
from vitscope.models.tracing.token_orders import with_orders
from vitscope.runtime.errors import StructureError

Side = Literal["input", "output"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Unit:
    """One residual branch of a model: what is added to the stream at one place.

    Attributes:
        name: Unique name, that of the tap after it, such as ``blocks.1.attn``.
        kind: ``conv``, ``msa``, ``mlp`` or (a blur in an attention block) ``pool``.
        stage: Number of the stage, from 1.
        depth: Normalized depth, index / (number of units - 1).
        block: The block it belongs to, called with the stream as first argument.
        branch_in: The branch's normalized input; where there is no norm before the branch (post-activation
            ResNet, ConvNeXt, post-norm transformers), the stream.
        branch_out: The branch's output as it is added; None where no module returns it.
        n_prefix: Prefix tokens in front of the grid.
        grid: Rows and columns of the tokens, to be declared where no convolution or pooling of the forward pass shows them.
        subsamples: Whether the block makes the map smaller: branch input and output differ in size.
        attention: The attention module of an ``msa`` unit, if its heads can be told apart.
        conv3x3: The 3x3 convolution that `conv3x3_identity` replaces, or None.
        added: The operand of the addition, where no module returns the branch as it is added. Without it and without an exact
            ``branch_out`` the branch cannot be read.
    """

    name: str
    kind: Kind
    stage: int
    depth: float
    block: nn.Module
    branch_in: Read | None
    branch_out: Read | None
    n_prefix: int = 0
    grid: tuple[int, int] | None = None
    subsamples: bool = False
    attention: nn.Module | None = None
    conv3x3: nn.Conv2d | None = None
    added: Read | None = None

    @property
    def n_heads(self) -> int:
        """Number of attention heads, 0 if the unit has none or no output projection that tells them apart."""
        if self.projection is None:
            return 0
        names = ("num_heads", "num_attention_heads")  # timm's and CLIP's, those of other models of transformers
        return int(next((getattr(self.attention, name) for name in names if hasattr(self.attention, name)), 0))

    @property
    def projection(self) -> nn.Module | None:
        """The output projection of the attention module, which reads one head after the other; None if there is none."""
        if isinstance(self.attention, nn.MultiheadAttention):  # does not call it
            return None
        projections = (getattr(self.attention, name, None) for name in ("proj", "o_proj", "out_proj"))
        return next((module for module in projections if isinstance(module, nn.Module)), None)

    @property
    def window(self) -> tuple[int, int] | None:
        """Side lengths of the attention window; None if attention sees the whole grid."""
        size = getattr(self.attention, "window_size", None)
        if self.branch_in is None or self.branch_in.layout in ("NLC", "LNC"):  # a sequence is never cut into windows
            return None
        return (size, size) if isinstance(size, int) else size


def units(model: nn.Module, images: Tensor | None = None) -> list[Unit]:
    """The residual units of a model in order.

    Args:
        model: The model.
        images: (B, C, H, W) that the model takes, of which the first shows where the model attends; None to try the sizes
            that the model states.

    Raises:
        ValueError: If the model has none that vitscope knows, or attention or an MLP outside of those.
    """
    inner = unwrapped(model)
    model_structure = find_structure(inner, images)
    residual_units = _units(inner, model_structure, images)
    refuse_missing_units(inner, [*model_structure.missing, *((text, "") for text in model_structure.doubts)])
    return residual_units


def known_units(model: nn.Module, images: Tensor | None = None) -> list[Unit]:
    """The residual units that vitscope finds, where the model may have others: for ``units=`` of a measure.

    Depths and stages are counted over these units alone. Arguments and errors are those of `units`.
    """
    inner = unwrapped(model)
    return _units(inner, find_structure(inner, images), images)


def _units(model: nn.Module, model_structure: FoundStructure, images: Tensor | None) -> list[Unit]:
    components = [p for p in model_structure.components if p.part.is_residual]
    if not components:
        raise ValueError(f"{type(model).__name__} has no residual unit that vitscope knows: {DESCRIBING_UNITS}.")
    last_index = max(len(components) - 1, 1)
    reads = [(piece.part.branch_in, piece.part.branch_out, piece.part.added) for piece in components]
    ordered = iter(with_orders(model, [read for places in reads for read in places], images))
    residual_units = []
    for i, piece in enumerate(components):
        part = piece.part
        residual_units.append(Unit(
            piece.name, part.kind, piece.stage, i / last_index, piece.block, next(ordered), next(ordered), piece.n_prefix,
            None, part.subsamples, part.attention, part.conv3x3, next(ordered),
        ))  # fmt: skip
    return residual_units


@contextmanager
def reading_branches(
    model: nn.Module, units: Sequence[Unit], fn: Callable[[int, Unit, Side, Tensor], None]
) -> Iterator[None]:
    """Call ``fn(index, unit, side, feature_map)`` for each branch's input and output, (B, C, h, w) each.

    ``side`` is ``input`` or ``output``. As with `vitscope.models.structure.taps.reading`, nothing is kept and the map
    may be overwritten once ``fn`` has returned.
    """
    with ExitStack() as stack:
        sides = [(unit, side) for unit in units for side in ("input", "output")]
        forward_pass = stack.enter_context(observed_pass(model, [f"{unit.name} ({side})" for unit, side in sides]))

        readers: dict[SumPlace, SumFunction] = {}
        reader: SumReader | None = None

        def read(index: int, unit: Unit, side: Side, place: Read, value: Tensor) -> None:
            forward_pass.ran(f"{unit.name} ({side})")
            n_prefix = unit.n_prefix if place.n_prefix is None else place.n_prefix
            layout, order = place.layout, place.order
            with nullcontext() if reader is None else reader.paused():
                fn(index, unit, side, to_map(value, unit.name, layout, n_prefix, unit.grid, forward_pass, order))

        for i, unit in enumerate(units):
            places: tuple[tuple[Side, Read], ...] = (
                ("input", _place(unit, "input")),
                ("output", _place(unit, "output")),
            )
            for side, place in places:

                def fn_of_side(
                    value: Tensor, i: int = i, unit: Unit = unit, side: Side = side, place: Read = place
                ) -> None:
                    read(i, unit, side, place, value)

                if place.at == "sum":
                    readers[sum_place(place)] = fn_of_side
                else:
                    attach(stack, place, fn_of_side)
        if readers:
            reader = SumReader(readers)
            stack.enter_context(reader.following(unwrapped(model)))
            stack.enter_context(reader)
        yield


def _place(unit: Unit, side: Side) -> Read:
    """Return where one side of a branch is read.

    Raises:
        StructureError: No module has it as its input or output.
    """
    place = unit.branch_in if side == "input" else unit.added or unit.branch_out
    if place is None:
        raise StructureError(
            unit.name,
            f"the {side} of its branch is no module's, so that it can neither be read nor removed",
            "pass units=[...] without it",
        )
    return place


@contextmanager
def zeroed(*units: Unit) -> Iterator[None]:
    """Remove units: their branches add zero; shortcuts and downsampling stay.

    A module that returns the branch, also before it is scaled, returns zeros; where there is none, the addition gets them.

    Raises:
        ValueError: The branch of a unit did not run inside, so that nothing was removed.
    """
    with ExitStack() as stack:
        ran = {}
        for unit in units:
            if unit.branch_out is not None:
                ran[unit.name] = changed_output(stack, unit.branch_out, zeros_of)
            else:
                ran[unit.name] = changed_operand(stack, _place(unit, "output"))
        yield
        check_ran(ran)


@contextmanager
def head_zeroed(unit: Unit, head: int) -> Iterator[None]:
    """Remove one attention head: its part of the output projection's input is zero.

    A projection by a convolution, as in timm's ``Attention2d`` (CoAtNet), takes the channels on the second axis, others on the
    last one. Attention of one's own may put the channels of its heads in another order, which the pass inside shows.

    Raises:
        ValueError: If the unit has no such head, if its channels cannot be told apart, or its projection did not run inside.
    """
    projection, attention, ran = unit.projection, unit.attention, list[bool]()
    if not 0 <= head < unit.n_heads or projection is None or attention is None:
        raise ValueError(f"unit {unit.name!r} has {unit.n_heads} heads, there is no head {head}.")
    with HeadOutputs() as outputs:

        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ran.append(True)
            x = args[0].clone()
            axis = 1 if isinstance(projection, _Convolution) else x.ndim - 1  # of the channels of all heads
            channels = outputs.channels_of(head, unit.n_heads, x, axis, attention, unit.name)
            x.index_fill_(axis, channels, 0)
            return (x, *args[1:])

        handle = projection.register_forward_pre_hook(drop)
        try:
            yield
        finally:
            handle.remove()
    check_ran({unit.name: ran})


@contextmanager
def conv3x3_identity(unit: Unit) -> Iterator[None]:
    """Replace the unit's 3x3 convolution by an identity, strided as the convolution: x[::s, ::s].

    The paper's lesion for ResNet: the 3x3 of a bottleneck, the second (channel-preserving) 3x3 of a basic block.

    Raises:
        ValueError: If the unit has no 3x3 convolution that keeps the number of channels, or it did not run inside.
    """
    if unit.conv3x3 is None:
        raise ValueError(f"unit {unit.name!r} has no 3x3 convolution with as many outputs as inputs.")
    vertical, horizontal = unit.conv3x3.stride
    with ExitStack() as stack:
        ran = changed_output(stack, Read(unit.conv3x3), lambda args, output: args[0][:, :, ::vertical, ::horizontal])
        yield
        check_ran({unit.name: ran})


@contextmanager
def resumed(units: Sequence[Unit], unit: Unit, block_input: Tensor) -> Iterator[None]:
    """Let the model skip every block before that of ``unit`` and give this block ``block_input`` instead.

    For many lesions on one batch: read the input of each block once in a clean pass (a pre-hook on
    ``unit.block``), then rerun only what follows. The images passed to the model must be those of that pass;
    stem and pooling layers still run. ``units`` are all units of the model, in order.
    """
    blocks: dict[nn.Module, None] = {}
    for other in units:
        if other.block is unit.block:
            break
        blocks[other.block] = None
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(_restore, block, block.__dict__.get("forward"))
            block.forward = lambda x, *args, **kwargs: x  # the blocks' shapes do not matter until block_input
        hook = unit.block.register_forward_pre_hook(lambda module, args: (block_input, *args[1:]))
        stack.callback(hook.remove)
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    del block.forward
    if forward is not None:
        block.forward = forward
