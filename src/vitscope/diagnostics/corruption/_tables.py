"""The strengths of the generated corruptions: one table for small images, one for large ones.

They follow the published ones (Hendrycks and Dietterich 2019: CIFAR-10-C at 32 pixels, ImageNet-C at 224) where those do
more damage at every step, measured as the distance from the clean image. Where they do not (elastic_transform, glass_blur
and saturate go back and forth, which shows in AlexNet's published errors), the steps are evened out, and marked by a
comment. Data sets made in advance are never touched.
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

#: images whose shorter side is below this take the table for 32 pixels
SMALL_BELOW = 128

Steps = tuple[tuple[float, ...], ...]

SMALL: dict[str, Steps] = {
    # standard deviation; photons; share of values
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    # radius, smoothing of the disk
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    # blur, reach of the shuffle, rounds, share of pixels moved; published: all moved, blurs .05 .25 .4 .25 .4
    "glass_blur": ((0.05, 1, 1, 0.15), (0.15, 1, 1, 0.3), (0.25, 1, 1, 0.5), (0.25, 1, 1, 0.8), (0.25, 1, 2, 1.0)),
    # radius, standard deviation; published: 2 at the fourth step as at the third
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2.25), (9, 2.5)),
    # largest zoom, step
    "zoom_blur": ((0.05, 0.01), (0.10, 0.01), (0.15, 0.01), (0.20, 0.01), (0.25, 0.01)),
    # mean and deviation of the flakes, zoom, threshold, radius and deviation of their fall, share of the image kept
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    # share of the image, share of the frost; published: .9 .85 .75 and .4 .4 .45 at the last three
    "frost": ((1, 0.2), (1, 0.3), (1, 0.4), (0.95, 0.5), (0.9, 0.6)),
    # amount, how fast detail fades
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.10,), (0.15,), (0.20,), (0.30,)),
    "contrast": ((0.75,), (0.50,), (0.40,), (0.30,), (0.15,)),
    # shares of the side: corner jitter, rms displacement, its smoothness; published jitter falls: .08 .07 .06 .05 .03
    "elastic_transform": (
        (0.02, 0.005, 0.05),
        (0.03, 0.008, 0.04),
        (0.04, 0.011, 0.04),
        (0.05, 0.014, 0.035),
        (0.06, 0.018, 0.03),
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

LARGE: dict[str, Steps] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    # published: 2 1 3 2 2 rounds
    "glass_blur": ((0.7, 1, 1, 1.0), (0.9, 2, 1, 1.0), (1.0, 2, 2, 1.0), (1.1, 3, 2, 1.0), (1.5, 4, 2, 1.0)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((0.10, 0.01), (0.15, 0.01), (0.20, 0.02), (0.25, 0.02), (0.30, 0.03)),
    # published: a threshold of .9 at the third
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.87, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    # published: .65 and .7, .6 and .75 at the last two
    "frost": ((1, 0.4), (0.85, 0.6), (0.75, 0.75), (0.7, 0.85), (0.65, 0.95)),
    # published: 2.5 at the fourth
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.8, 1.5), (3.2, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (
        (0.011, 0.0018, 0.01),
        (0.013, 0.0036, 0.01),
        (0.015, 0.0051, 0.01),
        (0.017, 0.0070, 0.01),
        (0.019, 0.0087, 0.01),
    ),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
    "speckle_noise": ((0.15,), (0.20,), (0.35,), (0.45,), (0.60,)),
    "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),
    "spatter": ((4, 0.10, 0.6), (4, 0.15, 0.6), (4, 0.20, 0.6), (4, 0.25, 0.9), (4, 0.30, 1.0)),
    "saturate": ((1.5, 0.0), (2.0, 0.0), (3.0, 0.1), (5.0, 0.1), (20.0, 0.2)),
}
