"""The sides of `hessian.py`: the same question asked of vitscope and of each peer, with its own tolerance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import vitscope as vs

TOL = 1e-3
PEERS = ("pyhessian", "curvlinops", "hessian_eigenthings")

Batch = tuple[Tensor, Tensor]
Sides = Mapping[str, Callable[[], np.ndarray]]


def vitscope_top(model: nn.Module, batches: list[Batch], k: int) -> np.ndarray:
    return vs.hessian_max_eigenvalue_spectrum(vs.Probe(model, batches), n_top=k, tol=TOL).eigenvalues


def pyhessian_top(model: nn.Module, batches: list[Batch], k: int) -> np.ndarray:
    from pyhessian import hessian

    found = []
    for batch in batches:
        operator = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=batch[0].is_cuda)
        found.append(operator.eigenvalues(maxIter=1000, tol=1e-4, top_n=k)[0])
    model.zero_grad(set_to_none=True)  # it leaves gradients with their graph behind
    return np.array(found)


def curvlinops_top(model: nn.Module, batches: list[Batch], k: int) -> np.ndarray:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    found = []
    for batch in batches:
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
        )
        values = eigsh(operator.to_scipy(), k=k, which="LM", tol=TOL, return_eigenvectors=False)
        found.append(sorted(values, key=lambda v: -abs(v)))
    return np.array(found)


def eigenthings_top(model: nn.Module, batches: list[Batch], k: int) -> np.ndarray:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    found = []
    for batch in batches:
        operator = HessianOperator(model, [batch], supervised_loss(nn.CrossEntropyLoss()))
        found.append(lanczos(operator, k=k, max_iter=30, tol=TOL, seed=0).eigenvalues.cpu().numpy())
    return np.array(found)


def sides_of(model: nn.Module, batches: list[Batch], peers: tuple[str, ...], k: int) -> Sides:
    known = {"pyhessian": pyhessian_top, "curvlinops": curvlinops_top, "hessian_eigenthings": eigenthings_top}
    chosen = {"vitscope": vitscope_top, **{name: known[name] for name in peers}}
    return {name: (lambda run=run: run(model, batches, k)) for name, run in chosen.items()}


def slq(model: nn.Module, batch: Batch, steps: int, n_vectors: int, peers: tuple[str, ...]) -> Sides:
    """The density of ``steps`` from each of some probe vectors; what is compared is the largest node of each.

    PyHessian's calls ``torch.eig``, which torch no longer has: a stand-in for it is passed in, and its products are also
    timed alone, without its Lanczos.
    """

    def ours() -> np.ndarray:
        return vs.spectral_density(vs.Probe(model, [batch]), n_vectors=n_vectors, n_steps=steps).nodes.max(axis=1)

    def operator():
        from pyhessian import hessian

        return hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=batch[0].is_cuda)

    def density() -> np.ndarray:
        torch.eig = eig_of_symmetric
        try:
            nodes, _ = operator().density(iter=steps, n_v=n_vectors)
        finally:
            del torch.eig
            model.zero_grad(set_to_none=True)
        return np.array([max(row) for row in nodes])

    def products() -> np.ndarray:
        from pyhessian.utils import hessian_vector_product

        made = operator()
        v = [torch.randn_like(p) for p in made.params]
        for _ in range(steps * n_vectors):
            hessian_vector_product(made.gradsH, made.params, v)
        model.zero_grad(set_to_none=True)
        return np.array([np.nan])

    theirs = {"pyhessian": density, "pyhessian (products alone)": products} if "pyhessian" in peers else {}
    return {"vitscope": ours} | theirs


def eig_of_symmetric(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """Stand in for ``torch.eig``: eigenvalues ``(n, 2)``, real and imaginary parts, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors
