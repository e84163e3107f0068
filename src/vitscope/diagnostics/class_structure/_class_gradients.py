"""Means over classes of the vectors that the Gauss-Newton matrix of the cross entropy is made of.

For an image i with probabilities p and logit Jacobian J, ``J^T (diag(p) - p p^T) J = sum_c' p_c' d_c' d_c'^T`` with the gradients
``d_c' = J^T (p - e_c')`` of the losses that the image would have with label c'. With the weights ``w = p_c' / n`` these vectors,
grouped by the class c of the image and by c', give G as a sum of the parts named in `PARTS` (Papyan 2020, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs, selected_images
from vitscope.core.losses.targets import hard_targets, labeled
from vitscope.linalg.basis_memory import free_bytes
from vitscope.linalg.curvature.double_backward import BilinearConvDoubleBackward
from vitscope.linalg.krylov_basis import CPU_BLOCK
from vitscope.runtime import distributed
from vitscope.runtime.progress import track

#: parts of the Gauss-Newton matrix: means over a class of the cross-class means; these around them; means of the vectors of an
#: image's own class; vectors around the means of their pair of classes
PARTS = ("class", "cross_class", "same_class", "within")

Batches = Callable[[], Iterable[tuple[Inputs, Tensor]]]


@dataclass(frozen=True)
class ClassGradients:
    """Means of the vectors, and their inner products with given ones.

    Attributes:
        weights: (n_classes, n_classes) sum of the weights of the vectors of each class c and each c'.
        square_norms: (n_classes, n_classes) of the mean of each pair.
        class_gram: (n_classes, n_classes) inner products of the classes' means over c' other than c.
        projections: (n_vectors, n_classes, n_classes) inner products of the given vectors with the mean of each pair.
    """

    weights: np.ndarray
    square_norms: np.ndarray
    class_gram: np.ndarray
    projections: np.ndarray

    @property
    def class_weights(self) -> np.ndarray:
        """The weights of the classes' means over c' other than c ``(n_classes,)``."""
        return self.weights.sum(1) - self.weights.diagonal()

    @property
    def class_eigenvalues(self) -> np.ndarray:
        """The eigenvalues of the part ``class``, in descending order ``(n_classes,)``."""
        roots = np.sqrt(self.class_weights)
        return np.linalg.eigvalsh(roots[:, None] * self.class_gram * roots)[::-1]

    def traces(self) -> np.ndarray:
        """Return the traces of the parts ``class``, ``cross_class`` and ``same_class`` ``(3,)``."""
        squares = (self.weights * self.square_norms)[None]
        return self._parts(squares, (self.class_weights * self.class_gram.diagonal()).sum()[None])[:, 0]

    def quadratic_forms(self) -> np.ndarray:
        """Return ``v^T A v`` of each given vector and the parts A ``class``, ``cross_class`` and ``same_class`` ``(3, n)``."""
        squares = self.weights * self.projections**2  # (n, C, C)
        diagonals = np.einsum("cc,ncc->nc", self.weights, self.projections)  # (n, C)
        sums = (self.weights * self.projections).sum(2) - diagonals  # (n, C): of w_c times the class's mean
        weights = np.where(self.class_weights > 0, self.class_weights, 1.0)
        return self._parts(squares, (sums**2 / weights).sum(1))

    def _parts(self, squares: np.ndarray, of_class: np.ndarray) -> np.ndarray:
        same = np.einsum("ncc->n", squares)
        return np.stack([of_class, squares.sum((1, 2)) - same - of_class, same])


def class_gradients(
    model: nn.Module,
    batches: Batches,
    parameters: Mapping[str, Tensor],
    n_classes: int,
    n_images: int,
    vectors: Sequence[Callable[[], Tensor]],
    max_memory: float | None = None,
) -> ClassGradients:
    """Go through the images of each class and compute the means of their vectors.

    An image costs a forward pass and ``n_classes`` backward passes.

    Args:
        model: The guarded model.
        batches: Function that yields this rank's ``(x, y)`` on every call.
        parameters: The parameters analyzed, by name.
        n_classes: Number of logits C.
        n_images: Images with a label on all ranks.
        vectors: Each returns a vector ``(size,)`` whose inner products are computed; called once for each group of classes.
        max_memory: Bytes for the vectors of the classes that are held at once, C for each; None for a quarter of what is free.
    """
    tensors = list(parameters.values())
    like = tensors[0]
    size = sum(p.numel() for p in tensors)
    at_once = _classes_at_once(size * n_classes * like.element_size(), n_classes, like.device, max_memory)
    weights = torch.zeros(n_classes, n_classes, dtype=torch.float64, device=like.device)
    square_norms = np.zeros((n_classes, n_classes))
    projections = np.zeros((len(vectors), n_classes, n_classes))
    class_means = torch.zeros(n_classes, size, dtype=like.dtype, device=like.device)
    for first in track(range(0, n_classes, at_once), "class means"):
        classes = range(first, min(first + at_once, n_classes))
        sums = torch.zeros(len(classes), n_classes, size, dtype=like.dtype, device=like.device)
        with distributed.failing_together():
            for x, y in batches():
                _add(model, x, y, tensors, classes, sums, weights)
        sums = distributed.all_reduce_sum(sums)
        of_classes = distributed.all_reduce_sum(weights[classes.start : classes.stop].clone())
        weights[classes.start : classes.stop] = of_classes
        means = sums.div_(torch.where(of_classes > 0, of_classes, 1.0).to(sums)[:, :, None])  # (c, C, size)
        for number, c in enumerate(classes):
            others = of_classes[number].clone()
            others[c] = 0.0
            share = others / others.sum().clamp(min=torch.finfo(torch.float64).tiny)
            torch.mv(means[number].T, share.to(means), out=class_means[c])
            square_norms[c] = _square_norms(means[number])
        rows = means.view(-1, size)
        for number, vector in enumerate(vectors):
            products = inner_products(vector()[None], rows)[0]
            projections[number, classes.start : classes.stop] = products.reshape(len(classes), n_classes)
        del sums, means, rows
    return ClassGradients(
        weights.cpu().numpy() / n_images,
        square_norms,
        inner_products(class_means, class_means),
        projections,
    )


def _classes_at_once(class_bytes: int, n_classes: int, device: torch.device, max_memory: float | None) -> int:
    """Return how many classes are held at once: as many on every rank, which add them up together.

    Args:
        class_bytes: Bytes of the vectors of a class.
        n_classes: Number of classes.
        device: The device of the vectors.
        max_memory: Bytes for all of them; None for a quarter of what is free on the rank that has least.
    """
    memory = min(distributed.gather_objects(free_bytes("device", device))) / 4 if max_memory is None else max_memory
    return int(min(max(1, memory // class_bytes), n_classes))


def inner_products(rows: Tensor, others: Tensor) -> np.ndarray:
    """Return the inner products ``(n, m)`` of ``rows (n, size)`` and ``others (m, size)``, summed in float64."""
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    step = max(1, CPU_BLOCK // max(1, len(rows) + len(others)))
    for a in range(0, rows.shape[1], step):
        total += rows[:, a : a + step].double() @ others[:, a : a + step].double().T
    return total.cpu().numpy()


def _square_norms(rows: Tensor) -> np.ndarray:
    return np.array([float(inner_products(row[None], row[None])[0, 0]) for row in rows])


def _add(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    parameters: Sequence[Tensor],
    classes: range,
    sums: Tensor,
    weights: Tensor,
) -> None:
    """Add the weighted vectors of a batch's images of some classes to ``sums (c, C, size)``, their weights to ``weights``."""
    for c, images in _by_class(y, classes):
        with BilinearConvDoubleBackward(convolutions=False):
            logits = model(selected_images(x, images))
            p = logits.detach().softmax(1)  # (B, C)
            targets = y[images]
            mass = targets.sum(1, keepdim=True).to(p) if targets.ndim == 2 else torch.ones_like(p[:, :1])
            scaled = mass * p
            weights[c] += scaled.double().sum(0)
            for other in range(p.shape[1]):
                residuals = scaled[:, other, None] * p
                residuals[:, other] -= scaled[:, other]
                gradient = torch.autograd.grad(
                    logits, parameters, residuals, retain_graph=other + 1 < p.shape[1], materialize_grads=True
                )
                sums[c - classes.start, other] += torch.cat([g.reshape(-1) for g in gradient])


def _by_class(y: Tensor, classes: range) -> Iterator[tuple[int, list[int]]]:
    """Yield each class that has images in the batch, with their numbers."""
    places: dict[int, list[int]] = {}
    for image, (label, counts) in enumerate(zip(hard_targets(y).tolist(), labeled(y).tolist())):
        if counts and label in classes:
            places.setdefault(label, []).append(image)
    yield from sorted(places.items())
