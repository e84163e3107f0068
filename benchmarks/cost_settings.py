"""Settings of `cost.py --analyses all`: every other analysis with few images and small options, some seconds of one core each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A short measurement.

    Attributes:
        n_images: Number of images.
        batch_size: Number of images of a batch; None for the analysis's own.
        options: Overrides of the analysis's options.
        data: Configuration of the data.
        models: Models of `cost.py` that the analysis applies to; empty for all.
    """

    n_images: int
    batch_size: int | None = None
    options: Sequence[str] = ()
    data: str = "photos"
    models: Sequence[str] = ()


SETTINGS = {
    "adversarial": Setting(96, 32, ["steps=5", "epsilons=[1,4]"]),
    "attention_distance": Setting(1024, models=("vit", "alternet")),
    "attention_maps": Setting(1024, models=("vit", "alternet")),
    "bn_policy": Setting(64, 16, ["n_top=1", "max_products=10"], models=("convnet", "small_convnet", "alternet")),
    "branch_transfer": Setting(512, 64),
    "calibration": Setting(1024),
    "cka": Setting(1024, 64),
    "critical_point": Setting(128, 16, ["n_points=5", "max_products=12"]),
    "curvature_exponents": Setting(64, 16, ["n_singular_values=4"]),
    "depth_probes": Setting(512, 128, ["train.n_images=1024"]),
    "edge_of_stability": Setting(64, 64, ["max_products=20"]),
    "effective_rank": Setting(1024, 64),
    "effective_receptive_field": Setting(256, 32),
    "evaluation": Setting(1024, 256),
    "fourier_heatmap": Setting(256, 64, ["n=4"]),
    "frequency_noise": Setting(256, 64, ["n_bands=3"]),
    "gradient_noise": Setting(128, 64),
    "hessian_block_densities": Setting(64, 64, ["blocks=kind", "n_vectors=1", "n_steps=8"]),
    "hessian_by_kind": Setting(64, 16, ["n_top=1", "max_products=10"]),
    "hessian_class_structure": Setting(64, 32, ["k=4", "n_vectors=4", "max_products=20"]),
    "hessian_diagonal": Setting(64, 64, ["n_vectors=10"]),
    "hessian_eigenvalues": Setting(64, 64, ["k=2"]),
    "hessian_trace": Setting(64, 64, ["n_vectors=10"]),
    "input_filter": Setting(256, 64, ["cutoffs=[0.3,0.6]"]),
    "kronecker_factors": Setting(64, 64),
    "lesion": Setting(512, 32),
    "linear_interpolation": Setting(512, 64, ["n=5"]),
    "loss_barrier": Setting(512, 64, ["n=5"]),
    "nep_stability": Setting(64, 16, ["ks=[1]", "k=1", "batch_sizes=[16,32]", "tols=[0.1]", "max_products=8"]),
    "normalized_hessian": Setting(64, 64, ["k=2"]),
    "oversmoothing": Setting(1024, 64),
    "patch_pca": Setting(1024, 64),
    "preconditioned_sharpness": Setting(64, 64, ["max_products=20"]),
    "rayleigh_split": Setting(64, 64, ["k=2", "n_ends=1"]),
    "shape_bias": Setting(1024, 256, data="shapes"),
    "sharpness": Setting(256, 64, ["radii=[0.1,0.5]", "n_pairs=2", "n_steps=2", "n_starts=1"]),
    "similarity": Setting(256, 128),
    "spectral_density": Setting(64, 64, ["n_vectors=1", "n_steps=15"]),
    "taps": Setting(16),
    "token_norms": Setting(1024, 64),
    "trajectory": Setting(512, 64, ["n=3"]),
    "variance": Setting(1024, 64),
}
