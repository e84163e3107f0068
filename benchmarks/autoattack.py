"""APGD and the Square Attack against the released AutoAttack, on a small network in float64.

APGD is deterministic after its start, so that both programs, given the same start, must ask for the same points. The script
prints the share of images whose points are equal within 1e-9 up to the first checkpoint of the step size and to the end.
The two differ in one rule after that: at the first checkpoint the released code counts the first step as a rise where its
loss is above 0, since no earlier loss is stored, and vitscope where it is above the start's. Points count until an image is
misclassified: the DLR loss of such an image can be constant, and L2 steps along its gradient then follow rounding errors.

The Square Attack is random: both programs are run with several seeds, and the difference of the mean robust accuracies is
printed with its standard error. The released code places no square at the last row or column (its draw of a corner leaves out
the last place), the paper's algorithm and vitscope do; the second line of each norm is of the released code with that place.

FOLDER is a checkout of the repository fra31/auto-attack.

    python benchmarks/autoattack.py FOLDER [--images 64] [--seeds 30]
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.diagnostics.adversarial._apgd import apgd, checkpoints
from vitscope.diagnostics.adversarial._attacks import Ball
from vitscope.diagnostics.adversarial._losses import LOSSES, towards
from vitscope.diagnostics.adversarial._square import square

RELEASED_NORMS = {"linf": "Linf", "l2": "L2"}
BALLS = (Ball("linf", 0.04), Ball("l2", 0.5))
N_CLASSES = 5
ITERATIONS = 100
QUERIES = 200


def network(images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a ConvNet with smooth and rectified units, images ``(N, 3, 8, 8)`` in [0, 1], and the classes that it gives them."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(72, N_CLASSES)).double().eval()
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.25)
    pixels = torch.rand(images, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        return model, pixels, model(pixels).argmax(dim=1)


class Recorder:
    """A model that keeps the images that it was asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.asked: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        self.asked.append(pixels.detach().clone())
        return self._model(pixels)


def compare_apgd(released: Any, model: nn.Module, pixels: Tensor, labels: Tensor, ball: Ball, loss: str) -> str:
    """Return a line: equal points of both programs from the same starts, and robust accuracies."""
    with torch.no_grad():  # the classes with the largest other logit (N,)
        targets = model(pixels).scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    generators = [np.random.default_rng((0, i)) for i in range(len(pixels))]
    ours, theirs = Recorder(model), Recorder(model)
    raised = towards(targets) if loss == "targeted" else LOSSES[loss]
    result = apgd(ours, pixels, labels, ball, raised, iterations=ITERATIONS, generators=generators)
    settings = {"n_iter": ITERATIONS, "norm": RELEASED_NORMS[ball.norm], "eps": ball.radius, "device": "cpu"}
    if loss == "targeted":
        attack = released.APGDAttack_targeted(theirs, **settings)
        attack.loss, attack.y_target = "dlr-targeted", targets
    else:
        attack = released.APGDAttack(theirs, loss=loss, **settings)
    attack.init_hyperparam(pixels)
    _, right, _, _ = attack.attack_single_run(pixels, labels, x_init=ours.asked[0])
    # (steps, N)
    pairs = list(zip(ours.asked, theirs.asked, strict=True))
    with torch.no_grad():
        wrong = torch.stack([model(a).argmax(dim=1) != labels for a, _ in pairs]).cumsum(dim=0)
    # a step counts when the image is right at all steps before it
    counts = torch.cat([torch.ones_like(wrong[:1]), 1 - wrong[:-1].clamp_max(1)]).bool()
    apart = counts & (torch.stack([(a - b).abs().amax((1, 2, 3)) for a, b in pairs]) > 1e-9)
    first = checkpoints(ITERATIONS)[0] + 1
    before, whole = (1 - float(rows.any(dim=0).double().mean()) for rows in (apart[:first], apart))
    accuracies = f"robust {float(result.right.double().mean()):.3f}, released {float(right.double().mean()):.3f}"
    return (
        f"apgd {loss:8} {ball.norm:4} equal to the first checkpoint {before:.3f}, to the end {whole:.3f}; {accuracies}"
    )


def compare_square(
    released: Any, model: nn.Module, pixels: Tensor, labels: Tensor, ball: Ball, seeds: int, last_place: bool
) -> str:
    """Return a line: mean robust accuracy of both programs over seeds, and the standard error of the difference."""
    ours, theirs = [], []
    for seed in range(seeds):
        generators = [np.random.default_rng((seed, i)) for i in range(len(pixels))]
        result = square(model, pixels, labels, ball, queries=QUERIES, generators=generators)
        ours.append(float(result.right.double().mean()))
        settings = {"norm": RELEASED_NORMS[ball.norm], "eps": ball.radius, "seed": seed, "device": "cpu"}
        # the released code asks once for the start and then n_queries times
        attack = released.SquareAttack(model, n_queries=QUERIES - 1, loss="margin", **settings)
        attack.init_hyperparam(pixels)
        if last_place:
            attack.random_int = corner
        torch.manual_seed(seed)
        theirs.append(robust(model, attack.attack_single_run(pixels, labels)[1], labels))
    difference = np.mean(ours) - np.mean(theirs)
    error = math.sqrt((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / seeds)
    means = f"robust {np.mean(ours):.4f}, released {np.mean(theirs):.4f}"
    name = "released with last place" if last_place else "released"
    return f"square {ball.norm:4} {means} ({name}), difference {difference:+.4f} (standard error {error:.4f})"


def corner(low: int, high: int) -> Tensor:
    """Return a corner of a square between ``low`` and ``high``, both included, as ``(1,)``."""
    return torch.randint(low, high + 1, (1,))


@torch.no_grad()
def robust(model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images that keep their class."""
    return float((model(pixels).argmax(dim=1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=30)
    given = parser.parse_args()
    sys.path.insert(0, given.folder)
    torch.set_default_dtype(torch.float64)  # the released code draws its random numbers in the default type
    released_apgd = importlib.import_module("autoattack.autopgd_base")
    released_square = importlib.import_module("autoattack.square")
    model, pixels, labels = network(given.images)
    for ball in BALLS:
        for loss in ("ce", "dlr", "targeted"):
            print(compare_apgd(released_apgd, model, pixels, labels, ball, loss), flush=True)
        for last_place in (False, True):
            print(compare_square(released_square, model, pixels, labels, ball, given.seeds, last_place), flush=True)


if __name__ == "__main__":
    main()
