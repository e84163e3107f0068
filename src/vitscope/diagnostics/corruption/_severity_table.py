"""The strengths of the generated corruptions: the published constants for images of 32, 64 and 224 pixels.

Those of CIFAR-10-C (32), Tiny-ImageNet-C (64) and ImageNet-C (224), from the code that Hendrycks and Dietterich released with
their paper of 2019; published steps do not always do more damage than the one before (glass_blur and elastic_transform go back
and forth). Two types differ in more than their textures and have strengths of their own: spatter (one kind of drops) and
saturate (steps that only go up); both are validation types, which no mean of the fifteen contains. An image takes the table
whose size is nearest to its shorter side, by ratio, and lengths are scaled to that side.
"""

from __future__ import annotations

#: the fifteen types that are reported, in the published order
COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip

#: four more, for choosing anything without looking at the fifteen
VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

SEVERITIES = (1, 2, 3, 4, 5)

Steps = tuple[tuple[float, ...], ...]

SMALL: dict[str, Steps] = {
    # standard deviation; photons; share of values
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    # radius, smoothing of the disk
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    # deviation of the blur, reach of the shuffle, rounds
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    # radius, standard deviation
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    # end (exclusive) and step of the factors from 1
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    # mean and deviation of the flakes, zoom, threshold, radius and deviation of their fall, share of the image kept
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    # share of the image, share of the frost
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    # amount, how fast detail fades
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.10,), (0.15,), (0.20,), (0.30,)),
    "contrast": ((0.75,), (0.50,), (0.40,), (0.30,), (0.15,)),
    # amplitude and smoothness of the field, jitter of the corners, pixels
    "elastic_transform": (
        (0, 0, 32 * 0.08),
        (32 * 0.05, 32 * 0.2, 32 * 0.07),
        (32 * 0.08, 32 * 0.06, 32 * 0.06),
        (32 * 0.1, 32 * 0.04, 32 * 0.05),
        (32 * 0.1, 32 * 0.03, 32 * 0.03),
    ),
    "pixelate": ((0.95,), (0.90,), (0.85,), (0.75,), (0.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
    "speckle_noise": ((0.06,), (0.10,), (0.12,), (0.16,), (0.20,)),
    "gaussian_blur": ((0.4,), (0.6,), (0.7,), (0.8,), (1.0,)),
    # size of the drops, share covered, opacity; published: water at 1 to 3, mud at 4 and 5, by thresholds
    "spatter": ((1.2, 0.05, 0.5), (1.2, 0.10, 0.5), (1.2, 0.15, 0.6), (1.2, 0.20, 0.8), (1.2, 0.25, 1.0)),
    # factor of the saturation, added; published: .3 .1 1.5 2 2.5
    "saturate": ((1.25, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2), (3.0, 0.3)),
}

MEDIUM: dict[str, Steps] = {
    "gaussian_noise": ((0.04,), (0.08,), (0.12,), (0.15,), (0.18,)),
    "shot_noise": ((250,), (100,), (50,), (30,), (15,)),
    "impulse_noise": ((0.01,), (0.02,), (0.05,), (0.08,), (0.14,)),
    "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    "frost": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (
        (0, 0, 64 * 0.08),
        (64 * 0.05, 64 * 0.3, 64 * 0.06),
        (64 * 0.1, 64 * 0.08, 64 * 0.06),
        (64 * 0.1, 64 * 0.03, 64 * 0.03),
        (64 * 0.16, 64 * 0.03, 64 * 0.02),
    ),
    "pixelate": ((0.9,), (0.8,), (0.7,), (0.6,), (0.5,)),
    "jpeg_compression": ((65,), (58,), (50,), (40,), (25,)),
    "speckle_noise": ((0.15,), (0.20,), (0.25,), (0.30,), (0.35,)),
    "gaussian_blur": ((0.5,), (0.75,), (1.0,), (1.25,), (1.5,)),
    "spatter": ((1.7, 0.10, 0.5), (1.7, 0.15, 0.5), (1.7, 0.20, 0.6), (1.7, 0.25, 0.8), (1.7, 0.30, 1.0)),
    "saturate": ((1.5, 0.0), (2.0, 0.0), (3.0, 0.1), (5.0, 0.1), (20.0, 0.2)),
}

LARGE: dict[str, Steps] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (  # the released code takes 244 for 224
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    ),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
    "speckle_noise": ((0.15,), (0.20,), (0.35,), (0.45,), (0.60,)),
    "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),
    "spatter": ((4, 0.10, 0.6), (4, 0.15, 0.6), (4, 0.20, 0.6), (4, 0.25, 0.9), (4, 0.30, 1.0)),
    "saturate": ((1.5, 0.0), (2.0, 0.0), (3.0, 0.1), (5.0, 0.1), (20.0, 0.2)),
}

#: strengths by the side of the images that they were made for, pixels
TABLES = {32: SMALL, 64: MEDIUM, 224: LARGE}


def reference_side(side: int) -> int:
    """Return the size of the table for images whose shorter side is `side` pixels: the nearest by ratio."""
    return min(TABLES, key=lambda size: max(size / side, side / size))
