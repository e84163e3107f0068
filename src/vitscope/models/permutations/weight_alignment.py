"""`vs.align_weights`: permute one network's units so that they match another's, without changing its function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitscope.core.guard import probe_guard
from vitscope.core.guard.eager_execution import eager_execution, unwrapped
from vitscope.core.guard.pass_comparison import output_tensors
from vitscope.core.guard.trial_pass import first_that_runs, trial_images
from vitscope.models.permutations.activation_similarity import ActivationSimilarity
from vitscope.models.permutations.unit_matching import inner_product, match_similarities, match_weights
from vitscope.models.permutations.unit_symmetry import Permutations, unit_symmetry
from vitscope.models.state_dicts import with_default_keys
from vitscope.runtime import distributed
from vitscope.runtime.errors import NumericalError
from vitscope.runtime.value_ranges import Seed

Method = Literal["weights", "activations"]
METHODS = get_args(Method)

#: largest change of the outputs by a permutation, as a share of the largest output, in float64. Permuted sums round differently
#: by about 1e-16 a layer, which deep networks amplify; a wrong permutation changes outputs by their own size
LARGEST_CHANGE = 1e-9

#: images on which the unchanged function is checked
_CHECKED_IMAGES = 8


@dataclass(frozen=True)
class WeightAlignment:
    """A network's weights with its units in the order of another's.

    Attributes:
        state_dict: The permuted weights and buffers, by name.
        permutations: By group of units: new unit i is old unit p[i]. Channels of heads are (heads, channels).
        fixed: Parameters with units that stay in place, with the reason.
        distance_before: Euclidean distance of the parameters before.
        distance_after: And after.
        n_moved: Number of units, heads and channels of heads that changed their place.
        n_sweeps: Sweeps over all groups of units.
        converged: Whether the last sweep changed nothing.
        function_change: Largest change of an output by the permutation, as a share of the largest output, in float64.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    permutations: dict[str, Tensor] = field(repr=False)
    fixed: dict[str, str] = field(repr=False)
    distance_before: float
    distance_after: float
    n_moved: int
    n_sweeps: int
    converged: bool
    function_change: float


def align_weights(
    model: nn.Module,
    other: nn.Module | Mapping[str, Tensor],
    *,
    method: Method = "weights",
    images: Tensor | Iterable[Tensor] | None = None,
    target: Mapping[str, Tensor] | None = None,
    seed: Seed = 0,
) -> WeightAlignment:
    """Permute the units of ``other`` so that they match those of ``model``; its function stays the same.

    Units are channels of convolutions and linear layers, attention heads and the channels of each head; all layers on a residual
    stream share one permutation, which is also that of its normalizations (`vitscope.models.permutations.unit_symmetry`).
    ``weights`` maximizes the inner product of all parameters (Ainsworth et al., "Git Re-Basin", ICLR 2023, section 3.2), and
    ``activations`` the sum of the correlations of matched units at inputs and outputs of all layers over images (section 3.1;
    Li et al., "Convergent Learning", ICLR 2016); both with `scipy.optimize.linear_sum_assignment`. Rescalings of units, which
    ReLU networks have too, are not undone.

    The permuted network is compared with the unpermuted one on up to 8 images in float64.

    Args:
        model: The network whose units stay; it is back bit for bit afterwards.
        other: A network of the same architecture, or its state dict.
        method: ``weights`` or ``activations``.
        images: (B, C, H, W), or batches of them that can be iterated several times; needed for ``activations``. None: random
            images of a size that the model states.
        target: State dict of weights that take the place of the model's own; None for these.
        seed: Seed of the order in which groups of units are matched.

    Raises:
        StructureError: A function through which units cannot be followed (named with its module), or no units.
        NumericalError: Outputs that change by more than 1e-9 of the largest one, or weights that are not finite.
        ValueError: An unknown method, ``activations`` without images, or a state dict of another architecture.

    Example::

        aligned = vs.align_weights(model, other)
        other.load_state_dict(aligned.state_dict)
    """
    if method not in METHODS:
        raise ValueError(f"Expected method to be weights or activations, received {method!r}.")
    if method == "activations" and images is None:
        raise ValueError("Expected images for method='activations', received None: pass a batch (B, C, H, W).")
    model = unwrapped(model)
    moving = _checked_state(model, other if isinstance(other, Mapping) else other.state_dict())
    batches = [images] if isinstance(images, Tensor) else images
    first = next(iter(batches), None) if batches is not None else None
    symmetry = unit_symmetry(model, first)
    state = _checked_state(model, model.state_dict() if target is None else target)
    state = {name: value.clone() for name, value in state.items()}
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    weights, other_weights = ({name: source[name] for name in names} for source in (state, moving))
    if not all(bool(t.isfinite().all()) for t in (*weights.values(), *other_weights.values())):
        raise NumericalError("alignment", method, "weights are not finite", "use alignment=none")
    if method == "weights":
        matching = match_weights(symmetry, weights, other_weights, seed)
    else:
        assert batches is not None
        with _replaceable(model, None) as load:
            activations = ActivationSimilarity(symmetry, model, load, (state, moving), batches)
        matching = match_similarities(symmetry, activations.occurrences, activations.at)
    # sums over activations may round differently on each rank, and equal units be matched differently
    permutations = dict(zip(matching.permutations, distributed.gather_objects(list(matching.permutations.values()))[0]))
    aliases = _aliases(model)
    permuted = {name: symmetry.permuted(aliases.get(name, name), value, permutations) for name, value in moving.items()}
    change = _function_change(model, moving, permuted, first)
    if not change <= LARGEST_CHANGE:
        problem = f"the permuted network's outputs differ by {change:.2g} of the largest"
        raise NumericalError("alignment", method, problem, "use alignment=none, and report this network")
    squares = sum(float(t.double().square().sum()) for t in (*weights.values(), *other_weights.values()))

    def distance(order: Permutations) -> float:
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a b
        return max(squares - 2 * inner_product(symmetry, weights, other_weights, order), 0.0) ** 0.5

    return WeightAlignment(
        state_dict=permuted,
        permutations={label.origin: p for label, p in permutations.items()},
        fixed=dict(symmetry.fixed),
        distance_before=distance(symmetry.identity()),
        distance_after=distance(permutations),
        n_moved=sum(int((p != torch.arange(p.shape[-1])).sum()) for p in permutations.values()),
        n_sweeps=matching.n_sweeps,
        converged=matching.converged,
        function_change=change,
    )


def _checked_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    model_state, other_state = model.state_dict(), with_default_keys(model, state)
    for name, value in model_state.items():
        if name not in other_state or other_state[name].shape != value.shape:
            received = "none" if name not in other_state else f"shape {tuple(other_state[name].shape)}"
            raise ValueError(
                f"Expected {name!r} of shape {tuple(value.shape)} in the other network, received {received}."
            )
    return {name: other_state[name].detach().to(value.device) for name, value in model_state.items()}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the first name of each tensor that has several, by each of its names."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(t), name) for name, t in named}


@contextmanager
def _replaceable(model: nn.Module, dtype: torch.dtype | None) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Yield a function that writes a state dict into the model, which is back bit for bit afterwards."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(eager_execution(model))
        stack.enter_context(probe_guard.kept_random_states(device))
        stack.enter_context(probe_guard.full_precision(device))
        stack.enter_context(probe_guard.kept_model(model, dtype, True))
        stack.enter_context(probe_guard.modes(model, "eval"))
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())

        def load(state: Mapping[str, Tensor]) -> None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    if name in state:
                        tensor.copy_(state[name])

        yield load


def _function_change(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], images: Tensor | None
) -> float:
    """Return the largest change of an output as a share of the largest output, in float64."""
    with _replaceable(model, torch.float64) as load, torch.no_grad():

        def outputs_of(x: Tensor) -> list[Tensor]:
            outputs = []
            for state in (before, after):
                load(state)
                values = [t.flatten() for t in output_tensors(model(x.double())) if t.is_floating_point()]
                outputs.append(torch.cat(values) if values else x.new_zeros(1))
            return outputs

        trials = trial_images(model, None) if images is None else (images[:_CHECKED_IMAGES],)
        first, second = first_that_runs(trials, outputs_of)
    largest = float(first.abs().max())
    return float((first - second).abs().max()) / largest if largest > 0 else 0.0
