"""Published errors of AlexNet under the published corruptions, which corruption errors are measured against.

ImageNet-C: the torchvision AlexNet of Hendrycks and Dietterich (2019), whose means over severities are the well-known
normalizers (.886428 for gaussian_noise, ...); its clean error is the one torchvision states (top-1 56.522%). CIFAR-10-C and
CIFAR-100-C: the AlexNets whose results come with the released code of Park and Kim, where no clean error is given; there
is no relative mCE for these. Rows are types, columns severities 1 to 5.
"""

from __future__ import annotations

#: data set -> type -> error at each severity
ALEXNET: dict[str, dict[str, tuple[float, ...]]] = {
    "imagenet": {
        "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
        "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
        "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
        "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
        "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
        "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
        "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
        "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
        "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
        "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
        "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
        "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
        "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
        "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
        "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    },
    "cifar10": {
        "gaussian_noise": (0.1938, 0.2590, 0.3388, 0.3781, 0.4211),
        "shot_noise": (0.1721, 0.2013, 0.2828, 0.3243, 0.3933),
        "impulse_noise": (0.2186, 0.2883, 0.3663, 0.5034, 0.6005),
        "defocus_blur": (0.1455, 0.1499, 0.1591, 0.1689, 0.2035),
        "glass_blur": (0.2753, 0.2781, 0.2523, 0.3690, 0.3469),
        "motion_blur": (0.1634, 0.1859, 0.2223, 0.2256, 0.2578),
        "zoom_blur": (0.1605, 0.1561, 0.1597, 0.1626, 0.1722),
        "snow": (0.1815, 0.2403, 0.2589, 0.2782, 0.2829),
        "frost": (0.1676, 0.2035, 0.2572, 0.2648, 0.3301),
        "fog": (0.1487, 0.1626, 0.1903, 0.2462, 0.4039),
        "brightness": (0.1459, 0.1502, 0.1568, 0.1702, 0.2064),
        "contrast": (0.1509, 0.1874, 0.2238, 0.2891, 0.5546),
        "elastic_transform": (0.1891, 0.1801, 0.1789, 0.1982, 0.2338),
        "pixelate": (0.1527, 0.1652, 0.1728, 0.1771, 0.2499),
        "jpeg_compression": (0.1722, 0.1919, 0.2002, 0.2048, 0.2167),
    },
    "cifar100": {
        "gaussian_noise": (0.5262, 0.6469, 0.7588, 0.8000, 0.8329),
        "shot_noise": (0.4853, 0.5437, 0.6880, 0.7372, 0.8133),
        "impulse_noise": (0.5676, 0.7158, 0.8095, 0.9025, 0.9348),
        "defocus_blur": (0.4366, 0.4680, 0.5132, 0.5591, 0.6322),
        "glass_blur": (0.7110, 0.6955, 0.6221, 0.7811, 0.7203),
        "motion_blur": (0.4841, 0.5336, 0.5799, 0.5771, 0.6199),
        "zoom_blur": (0.5048, 0.5231, 0.5494, 0.5699, 0.6016),
        "snow": (0.4880, 0.5926, 0.5854, 0.6133, 0.6576),
        "frost": (0.4875, 0.5564, 0.6458, 0.6483, 0.7149),
        "fog": (0.4374, 0.4768, 0.5244, 0.6144, 0.7738),
        "brightness": (0.4336, 0.4471, 0.4711, 0.5036, 0.5866),
        "contrast": (0.4411, 0.5074, 0.5758, 0.6815, 0.8834),
        "elastic_transform": (0.5027, 0.5006, 0.5260, 0.5366, 0.5462),
        "pixelate": (0.4401, 0.4522, 0.4545, 0.4773, 0.5196),
        "jpeg_compression": (0.4703, 0.4890, 0.4987, 0.5096, 0.5237),
    },
}

#: data set -> error on clean images, where it is published
CLEAN = {"imagenet": 0.43478}
