"""Cost of attacks: gradients in the image and passes without them, before the first image is attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

import torch

from vitscope.core.cost.image_passes import EVALUATION, evaluations, guard_checks, independence_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.objective import hard_targets
from vitscope.core.probe import Probe
from vitscope.diagnostics.adversarial._attacks import evaluated
from vitscope.diagnostics.adversarial._losses import LOSSES
from vitscope.diagnostics.adversarial._suite import SUITE


@contextmanager
def _image_gradient(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with probe.guard(second_order=True) as model:
        for p in model.parameters():
            p.requires_grad_(False)  # the guard gives the flags back
        x, y = next(iter(probe.iter_batches()))
        labels = hard_targets(y)
        yield lambda: evaluated(model, x, torch.zeros_like(x), labels, LOSSES[options["loss"]])


#: a forward pass and the gradient of the loss in the image
IMAGE_GRADIENT = WorkUnit("gradient in the image", _image_gradient, ("loss",))


def attack_cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the passes of all attacks at all radii.

    FGSM and PGD make the same number for every image. All others leave an image alone once its class is wrong: expected are the
    passes over images that withstand, which is the upper bound.
    """
    attacks, n_epsilons, n = list(options["attacks"]), len(options["epsilons"]), workload.n_images
    passes = [_passes(workload, options, attack) for attack in attacks]
    gradients = sum((of_attack[0] for of_attack in passes), Count.exactly(0)).times(n_epsilons)
    looks = sum((of_attack[1] for of_attack in passes), Count.exactly(0)).times(n_epsilons)
    differentiates = any(attack != "square" for attack in attacks)
    # each attack reads the images once at each radius
    n_sharing = looks.expected / max(1, len(attacks) * n_epsilons)
    works = [evaluations(workload, {}, Count.exactly(1)), Work(EVALUATION, looks, n, n_sharing=n_sharing)]
    if differentiates:
        works.append(Work(IMAGE_GRADIENT, gradients, n, n_sharing=inf))
    works += guard_checks(workload)
    if differentiates:
        works += guard_checks(workload, second_order=True)[1:]
    works += independence_checks(workload)
    n_members = len(SUITE) if "suite" in attacks else 0
    # accuracy with its ends, nll, blind share and largest change
    entries = 6 * len(attacks) * n_epsilons + n_epsilons + n_members * n_epsilons
    return MeasureCost(works, result_bytes=ENTRY * entries)


def _passes(workload: Workload, options: Options, attack: str) -> tuple[Count, Count]:
    """Return the numbers of gradients and of passes without one that an attack makes for an image."""
    restarts, none = int(options["restarts"]), Count.exactly(0)
    if attack == "fgsm":
        return Count.exactly(1), Count.exactly(1)
    if attack == "pgd":
        return Count.exactly(restarts * (int(options["steps"]) + 1)), Count.exactly(1)
    gradients, looks = none, Count.exactly(1)  # the image as it is
    for member in SUITE if attack == "suite" else (attack,):
        n_runs = restarts
        if member == "apgd_t":
            n_runs *= min(int(options["n_targets"]), _n_classes(workload) - 1)
            looks += Count.exactly(1)  # the ranking of the classes
        if member == "square":
            most = n_runs * int(options["queries"])
            looks += Count(most, 0, most)
        else:
            most = n_runs * (int(options["iterations"]) + 1)
            gradients += Count(most, 0, most)
    return gradients, looks


def _n_classes(workload: Workload) -> int:
    probe = workload.model_probe()
    with probe.guard() as model:
        x, _ = next(probe.iter_batches())
        return int(model(x[:1]).shape[1])
