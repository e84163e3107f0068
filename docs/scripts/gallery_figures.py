"""The figures of the gallery: of a study's networks, of a public ResNet-20, and of timm's families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: headings of the page in their order, by the group of an entry
GROUPS = {
    "study": "Small networks on CIFAR-10 (JPEG)",
    "sight": "What trained networks see",
    "curvature": "Curvature of small networks on CIFAR-10 (JPEG)",
    "resnet20": "A public ResNet-20 on CIFAR-10 (JPEG)",
    "timm": "Structures of timm's families",
}
INTRODUCTIONS = {
    "study": "The networks are those of the profile `cifar10_small`, with 0.3 to 0.6 million parameters and few epochs of "
    "training. Each figure shows one seed, which is an example and no evidence; [Findings](findings.md) has intervals "
    "over seeds. Error bars here are 95 % intervals over images, and over units where a mean over units is shown.",
    "sight": "The networks are those of the section above: images of 32 pixels encoded again as JPEG, two epochs, one seed. "
    "Intervals are over images and say nothing about other seeds or longer training.",
    "curvature": "The measures are described in [Curvature](curvature.md) and in [Definitions](definitions.md), sections 2 to 4. "
    "Each network has one seed or one pair of seeds, so that the figures are examples and no evidence about kinds of "
    "networks.",
    "resnet20": "A checkpoint of the ResNet for CIFAR of He et al. (2016), trained by others on the original CIFAR-10 (published "
    "test error 8.27 %). The images here are CIFAR-10 encoded again as JPEG: no number is comparable with published "
    "ones.",
    "timm": "The weights are random. These figures show how the networks are built, and nothing that is learned by training.",
}


@dataclass(frozen=True)
class GalleryFigure:
    """A figure of results of one analysis.

    Attributes:
        analysis: The analysis.
        title: Heading of the entry and title of the figure.
        caption: What is seen.
        models: Families of `study_runs.NAMES`; for an AlterNet with something else in attention's place ``alternet:blur``.
        overrides: Settings of the measurement.
        plot: Options of `vitscope.plot`.
        name: Name of its files; the analysis by default.
        group: One of `GROUPS`; figures of ``sight`` are of analyses that the study's profile does not run.
    """

    analysis: str
    title: str
    caption: str
    models: Sequence[str] = ("convnet", "vit", "alternet")
    overrides: Sequence[str] = ()
    plot: Mapping[str, Any] | None = None
    name: str = ""
    group: str = "study"

    @property
    def file(self) -> str:
        """Name of its files without the group."""
        return self.name or self.analysis


STUDY = (
    GalleryFigure("hessian", "Leading Hessian eigenvalues",
                  "Density of the five leading eigenvalues of each mini-batch Hessian. Marks on the axis are the eigenvalues.",
                  ("convnet", "vit", "pit", "swin", "alternet")),
    GalleryFigure("branch_transfer", "Frequencies that branches pass",
                  "Transfer of residual branches, highest minus lowest third of the frequencies, trained minus initial, by unit "
                  "and kind."),
    GalleryFigure("variance", "Variance of feature maps",
                  "Spatial variance over depth, and its logarithmic ratio across each unit."),
    GalleryFigure("lesion", "Removal of single units",
                  "Change of accuracy where one residual unit is removed from the trained network."),
    GalleryFigure("cka", "Similarity of layers", "Unbiased mini-batch CKA of every pair of feature maps."),
    GalleryFigure("frequency_noise", "Noise of one frequency band",
                  "Change of accuracy under noise of equal root mean square in each band of frequencies.", ("convnet", "vit")),
    GalleryFigure("hessian", "Leading Hessian eigenvalues with and without attention",
                  "The same for AlterNet and for other operations in the places of its attention.",
                  ("alternet", "alternet:conv", "alternet:uniform", "alternet:blur"), name="mixers"),
    GalleryFigure("corruption", "Corrupted images", "Accuracy under 15 corruptions at 5 severities."),
)  # fmt: skip

_FIVE = ("convnet", "vit", "pit", "swin", "alternet")
SIGHT = (
    GalleryFigure("attention_maps", "Where attention goes",
                  "Attention of the last layer over four test images (of the ViT's class token, else the mean over queries), "
                  "and the ViT's rollout; below, numbers over all images by depth. Attention of ViT and AlterNet is close to "
                  "uniform: its mean entropy over heads is above 0.9 of the largest possible at every layer, that of the "
                  "Swin's windows is 0.54 to 0.74. The ViT's rollout is nearly flat, so it says little about the objects.",
                  ("vit", "swin", "alternet"), ("analysis.attention_maps.probe.n_images=128",), group="sight"),
    GalleryFigure("effective_receptive_field", "Effective receptive fields, trained and before training",
                  "Pixels that the central position of the last feature map depends on (mean squared gradient), below it the "
                  "change by training. Of the ViT's field 99 % lies in the position's own patch, trained and untrained; a "
                  "likely reason, not tested here, is that its nearly uniform attention gives each other patch a small "
                  "weight, which the square makes smaller. The radius of 90 % of the other four is 12 to 15 pixels: training "
                  "has widened it from 4 to 13 in the Swin and from 9 to 15 in the AlterNet, and has not changed it in the "
                  "ConvNet.",
                  _FIVE, ("analysis.effective_receptive_field.probe.n_images=128",), group="sight"),
    GalleryFigure("oversmoothing", "How alike positions become",
                  "Mean cosine of pairs of positions, residual from equal positions, mutual information of query and key "
                  "positions, and cosine of attention maps, over depth. The AlterNet's positions become nearly equal in the "
                  "last stage (cosine 0.93), the ViT's least (0.43). Mutual information is close to 0 except in the Swin: "
                  "its attention depends on the place of the query, that of the others hardly.",
                  _FIVE, ("analysis.oversmoothing.probe.n_images=128",), group="sight"),
    GalleryFigure("depth_probes", "What is known of the classes at each depth",
                  "Accuracy of ridge and k-NN classifiers on pooled features and of the network's own head on earlier "
                  "layers, where it fits (logit lens; horizontal lines: the networks themselves), neural collapse and "
                  "intrinsic dimension, over depth. In AlterNet and ConvNet the last layer's ridge "
                  "classifier comes to the network's own accuracy; on the ViT's pooled patches it stays lower, 0.42 (0.49 on "
                  "the class token, which its head reads). With 256 test images intervals are about 0.06 on either side, and "
                  "no network is near collapse after two epochs.",
                  _FIVE, ("analysis.depth_probes.probe.n_images=256", "analysis.depth_probes.train.n_images=1024"),
                  group="sight"),
    GalleryFigure("patch_pca", "Principal components of patch features",
                  "The first three components of the last feature map as colors, with their shares of the variance. Each "
                  "network has components of its own, so colors are compared within a row. The AlterNet's colors tell the "
                  "images apart and hardly vary within one, as its cosine of 0.93 says; the ViT's vary from patch to patch. "
                  "No network separates objects as clearly as large self-supervised ones do.",
                  _FIVE, ("analysis.patch_pca.probe.n_images=128",), group="sight"),
)  # fmt: skip

RESNET20 = (
    GalleryFigure("hessian", "ResNet-20: leading Hessian eigenvalues",
                  "Density of the five leading eigenvalues of each mini-batch Hessian of 16 images.",
                  overrides=("analysis.hessian.probe.n_images=160",)),
    GalleryFigure("spectral_density", "ResNet-20: density of all eigenvalues",
                  "Density of the Hessian's spectrum by stochastic Lanczos quadrature.",
                  overrides=("analysis.spectral_density.probe.n_images=64", "analysis.spectral_density.n_vectors=2")),
    GalleryFigure("landscape", "ResNet-20: loss landscape",
                  "Loss over a filter-normalized random plane through the trained weights.",
                  overrides=("analysis.landscape.n=11", "analysis.landscape.span=0.5", "analysis.landscape.probe.n_images=128",
                             "analysis.landscape.probe.batch_size=128")),
    GalleryFigure("fourier", "ResNet-20: frequencies of feature maps",
                  "Relative log amplitude of the feature maps over frequency, and at the highest frequency over depth.",
                  overrides=("analysis.fourier.probe.n_images=256",)),
    GalleryFigure("effective_receptive_field", "ResNet-20: effective receptive field",
                  "Pixels that the central position of the last feature map depends on, with the radii of 50, 90 and 99 %; below "
                  "it, the change by training.",
                  overrides=("analysis.effective_receptive_field.probe.n_images=64",)),
    GalleryFigure("lesion", "ResNet-20: removal of single blocks", "Change of accuracy where one block's branch is removed.",
                  overrides=("analysis.lesion.probe.n_images=500",), plot={"title": "ResNet-20, CIFAR-10 (JPEG)"}),
    GalleryFigure("cka", "ResNet-20: similarity of layers", "Unbiased mini-batch CKA of every pair of feature maps.",
                  overrides=("analysis.cka.probe.n_images=400",)),
    GalleryFigure("calibration", "ResNet-20: calibration",
                  "Reliability diagram on all test images, before and after temperature scaling fitted on held-out images."),
)  # fmt: skip

#: figures of `docs/scripts/draw_curvature.py` in their order
CURVATURE = ("stability", "blocks", "barrier", "exponents")

#: timm's models of the structure figures and their names
TIMM = {
    "resnet50": "ResNet-50", "convnext_tiny": "ConvNeXt-T", "vit_small_patch16_224": "ViT-S/16",
    "swin_tiny_patch4_window7_224": "Swin-T", "mixer_b16_224": "Mixer-B/16", "coatnet_0_224": "CoAtNet-0",
}  # fmt: skip
RECEPTIVE = ("resnet50", "convnext_tiny", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")
