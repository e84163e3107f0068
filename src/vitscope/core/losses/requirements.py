"""Requirements of measures on the loss, the targets and the batches of a probe, as one-line errors that name the measure."""

from __future__ import annotations

from vitscope.core.losses.own_loss import described, values_of
from vitscope.core.losses.targets import are_indices
from vitscope.core.objective import Objective
from vitscope.core.probe import Probe


def check_classes(probe: Probe, measure: str) -> None:
    """Check that a probe's outputs are logits of classes, one of which each image has.

    Raises:
        ValueError: Another loss than the cross entropy, so that outputs or targets may be something else.
    """
    if probe.objective.loss != "cross_entropy":
        raise ValueError(
            f"{measure} needs logits (B, K) and one class per image, loss='cross_entropy', received {_name(probe)}: if the "
            "outputs are such logits, pass Probe(model, batches, Objective())."
        )


def class_loss(probe: Probe) -> str:
    """Return the loss that the card of a measure states which gives the negative log likelihood of one class per image.

    Such a measure smooths no label, whatever the objective does, and takes the most probable class of soft targets.
    """
    _, targets = next(iter(probe.batches))
    if are_indices(targets):
        return Objective().description(targets)
    return "cross entropy, most probable class of soft targets"


def check_images(probe: Probe, measure: str) -> None:
    """Check that images are all that a probe's model is given, so that they can be changed.

    Raises:
        ValueError: Batches of more entries, or ``forward``.
    """
    if not probe.takes_images:
        raise ValueError(
            f"{measure} changes images and needs batches of images and targets alone, (x, y) or a mapping of both, received "
            "batches of more entries or a forward=: wrap the model in a module that takes the images."
        )


def check_image_losses(probe: Probe, measure: str) -> None:
    """Check that the loss gives one value per image, and that images weigh alike.

    Raises:
        ValueError: A callable that returns a mean, or dense targets with pixels that have no label.
    """
    loss = probe.objective.loss
    if loss == "dense_cross_entropy":
        n_pixels = sum(y.numel() for _, y in probe.batches)
        n_ignored = n_pixels - probe.n_labeled
        if n_ignored:
            raise ValueError(
                f"{measure} compares the losses of images and needs a label for every pixel, received {n_ignored} "
                f"ignored ones (-100) of {n_pixels}: measure images without ignored pixels."
            )
    if not callable(loss):
        return
    with probe.guard() as model:
        x, y = next(probe.iter_batches())
        if values_of(loss, model(x), y).ndim == 0:
            raise ValueError(
                f"{measure} compares the losses of images and needs one value per image (B,), received {_name(probe)}, which "
                "returns their mean: pass reduction='none' to it."
            )


def check_non_negative(probe: Probe, measure: str, value: float) -> None:
    """Check that the objective's value is at least 0, for a measure that reports shares of it.

    Raises:
        ValueError: It is negative.
    """
    if value < 0:
        raise ValueError(
            f"{measure} reports shares of the objective and needs one of at least 0, received {value:.4g} from {_name(probe)}: "
            "add a constant to the loss."
        )


def _name(probe: Probe) -> str:
    loss = probe.objective.loss
    return f"loss={loss!r}" if isinstance(loss, str) else f"the loss {described(loss)}"
