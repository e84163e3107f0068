"""Muon (`torch.optim.Muon`) for the matrices of hidden layers, AdamW for every other parameter, as one optimizer.

Muon orthogonalizes the update of a matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). Its authors train the
first and the last layer, embeddings, normalization layers and biases with AdamW, and take the kernel of a convolution as the
matrix of its output channels by everything else.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from vitscope.runtime.value_ranges import NonNegativeFloat, PositiveInt

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: images have at most four channels (RGBA), feature maps more
_MOST_IMAGE_CHANNELS = 4
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class MuonAdamW(Optimizer):
    """Trains the matrices of hidden layers with Muon and all other parameters with AdamW.

    Its first group of parameters is Muon's, the second AdamW's. A kernel ``(out, in, h, w)`` is the matrix ``(out, in h w)``.

    Args:
        params: Parameters to train.
        network: Network whose parameters they are; it tells which of them are matrices of hidden layers, see `hidden_matrices`.
        lr: Learning rate. With ``adjust_lr_fn="match_rms_adamw"`` that of AdamW suits both.
        weight_decay: Decoupled weight decay of all parameters.
        momentum: Momentum of Muon.
        nesterov: Whether Muon's momentum is Nesterov's.
        ns_steps: Newton-Schulz steps of the orthogonalization.
        adjust_lr_fn: Scale of Muon's update by the shape of the matrix, see `torch.optim.Muon`.
        adamw_lr: Learning rate of AdamW; None for ``lr``.
        betas: Decay rates of AdamW's moments.
        eps: A constant that is added to AdamW's denominator.
        adamw_names: Patterns (``head*``) of names of parameters that AdamW trains in any case.

    Raises:
        ValueError: The network has no matrix of a hidden layer among the parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        network: nn.Module,
        lr: float = 1e-3,
        weight_decay: NonNegativeFloat = 0.0,
        momentum: NonNegativeFloat = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original", "spectral_unclamped"] = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: Sequence[float] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
        adamw_names: Sequence[str] = (),
    ) -> None:
        params = list(params)
        names = {id(p): name for name, p in hidden_matrices(network, adamw_names).items()}
        matrices = set(names)
        hidden_weights = [p for p in params if id(p) in matrices]
        if not hidden_weights:
            raise ValueError(
                "Expected a network with matrices between its first and its last layer, received none to train: use "
                "optimizer=adamw."
            )
        other_matrices = [name for name, p in _matrices(network) if id(p) not in matrices]
        #: which parameters have which optimizer, in a line
        self.summary = (
            f"Muon trains {len(hidden_weights)} matrices, {names[id(hidden_weights[0])]} to {names[id(hidden_weights[-1])]}; "
            f"AdamW all other parameters, among them the matrices {', '.join(other_matrices)}"
        )
        self._views = [nn.Parameter(p.detach().flatten(1)) for p in hidden_weights]
        self._muon = Muon(
            self._views,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        others = {"params": [p for p in params if id(p) not in matrices]}
        rate = lr if adamw_lr is None else adamw_lr
        self._adamw = AdamW([others], lr=rate, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)
        groups = [{**self._muon.param_groups[0], "params": hidden_weights}, {**self._adamw.param_groups[0]}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return the loss of ``closure``, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hand_over()
        hidden_weights = self.param_groups[0]["params"]
        for p, view in zip(hidden_weights, self._views):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        self._muon.step()
        self._adamw.step()
        for p, view in zip(hidden_weights, self._views):
            view.grad = None
            if view in self._muon.state:  # the same memory in the shape of the parameter
                self.state[p] = {key: value.view_as(p) for key, value in self._muon.state[view].items()}
        for p in self.param_groups[1]["params"]:
            if p in self._adamw.state:
                self.state[p] = self._adamw.state[p]
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: torch's own entries are those of every optimizer alone."""
        added_entries = ("summary", "_views", "_muon", "_adamw")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in added_entries}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(dict(state_dict))
        self._muon.state.clear()
        self._adamw.state.clear()
        for p, view in zip(self.param_groups[0]["params"], self._views):
            if p in self.state:
                self._muon.state[view] = {key: value.flatten(1) for key, value in self.state[p].items()}
        for p in self.param_groups[1]["params"]:
            if p in self.state:
                self._adamw.state[p] = self.state[p]

    def _hand_over(self) -> None:
        """Give both optimizers the options of the groups, which schedules change, and Muon the weights where they lie now."""
        for group, inner in zip(self.param_groups, (self._muon, self._adamw)):
            inner.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
        for p, view in zip(self.param_groups[0]["params"], self._views):
            view.data = _matrix_of(p)


def hidden_matrices(network: nn.Module, excluded: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the matrices of hidden layers by name, in the order of their modules.

    They are the weights of linear layers, of convolutions without groups and of attention's projections, but for the first layer
    and every other convolution that sees pixels (CrossViT has one a branch), and the classifier: what timm's ``get_classifier``
    returns, otherwise the last layer. Patch embeddings between stages (CoaT, PVT) take feature maps and are hidden layers, as are
    other downsampling convolutions. Embeddings and tables of positions are none.

    Args:
        network: The network.
        excluded: Patterns of further names to leave out.
    """
    matrices_by_name = dict(_matrices(network))
    if not matrices_by_name:
        return {}
    last = next(reversed(matrices_by_name))
    pixel_layers = _pixel_layers(next(iter(matrices_by_name)), matrices_by_name)
    classifier = _classifier_parameters(network) or {id(matrices_by_name[last])}
    return {
        name: p
        for name, p in matrices_by_name.items()
        if name not in pixel_layers
        and id(p) not in classifier
        and not any(fnmatch.fnmatch(name, text) for text in excluded)
    }


def _pixel_layers(first: str, matrices_by_name: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the first layer and, where it is a convolution of at most four channels, all convolutions of as many."""
    shape = matrices_by_name[first].shape  # (out, in, ...)
    if len(shape) < 3 or shape[1] > _MOST_IMAGE_CHANNELS:
        return {first}
    return {name for name, p in matrices_by_name.items() if p.ndim == len(shape) and p.shape[1] == shape[1]}


def _matrices(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in network.named_modules():
        of_module = dict(module.named_parameters(recurse=False))
        keys: tuple[str, ...] = ()
        if isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1):
            keys = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            keys = _PROJECTIONS
        for key in keys:
            if key in of_module:
                yield f"{name}.{key}" if name else key, of_module[key]


def _classifier_parameters(network: nn.Module) -> set[int]:
    classifier = getattr(network, "get_classifier", None)
    modules = classifier() if callable(classifier) else ()
    modules = modules if isinstance(modules, tuple | list) else (modules,)
    return {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}


def _matrix_of(p: Tensor) -> Tensor:
    """Return a parameter's memory as a matrix ``(out, rest)``; channels last in memory is made contiguous once."""
    if not p.is_contiguous():
        p.data = p.data.contiguous()
    return p.detach().flatten(1)
