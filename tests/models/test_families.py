from __future__ import annotations

import pytest
import timm
import torch

from vitscope import models


def count(build, **options) -> int:
    with torch.device("meta"):
        model = build(**options)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "options", "n"),
    [  # docs/paper.md section 2
        (models.convnet, {"depth": 18}, 11_220_132),
        (models.convnet, {"depth": 34}, 21_328_292),
        (models.convnet, {"depth": 50}, 23_705_252),
        (models.convnet, {"depth": 101}, 42_697_380),
        (models.convnet, {"depth": 50, "num_classes": 10}, 23_520_842),
        (models.convnet, {"depth": 18, "num_classes": 10}, 11_173_962),
        (models.convnet, {"depth": 18, "preact": True}, 11_218_340),
        (models.preresnet, {"depth": 50}, 23_697_572),
        (models.resnext, {"depth": 50}, 23_177_124),
        (models.vit, {"size": "tiny"}, 5_403_172),
        (models.vit, {"size": "tiny", "num_classes": 10}, 5_385_802),
        (models.vit, {"size": "small"}, 21_423_076),
        (models.pit, {"size": "tiny"}, 4_582_436),
        (models.swin, {"size": "tiny"}, 27_562_126),
        (models.swin, {"size": "tiny", "num_classes": 10}, 27_492_916),
        (models.convit, {"patch_size": 2}, 5_403_172 - 2 * 192),  # ViT-Ti without class token and its position
    ],
)
def test_parameter_counts(build, options: dict, n: int) -> None:
    assert count(build, **{"num_classes": 100, **options}) == n


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.69), (34, 21.80), (50, 25.56), (101, 44.55)])
def test_parameter_counts_for_imagenet(depth: int, millions: float) -> None:
    n = count(models.convnet, depth=depth, num_classes=1000, image_size=224, stem="imagenet")
    assert round(n / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("build", "options", "name", "size"),
    [
        (models.convnet, {"depth": 18, "stem": "imagenet"}, "resnet18", 32),
        pytest.param(models.convnet, {"depth": 50, "stem": "imagenet"}, "resnet50", 32, marks=pytest.mark.slow),
        (models.preresnet, {"depth": 18, "stem": "imagenet"}, "resnetv2_18", 32),
        pytest.param(models.preresnet, {"depth": 50, "stem": "imagenet"}, "resnetv2_50", 32, marks=pytest.mark.slow),
        (models.resnext, {"depth": 50, "stem": "imagenet"}, "resnext50_32x4d", 32),
        (models.vit, {"patch_size": 16, "qkv_bias": True}, "vit_tiny_patch16_224", 64),
        (models.pit, {"patch_size": 16}, "pit_ti_224", 64),
        (models.swin, {"patch_size": 4, "qkv_bias": True}, "swin_tiny_patch4_window7_224", 64),
        (models.mixer, {"patch_size": 16}, "mixer_s16_224", 64),
        (models.convnext, {"patch_size": 4}, "convnext_atto", 32),
    ],
)
def test_the_model_is_timms(build, options: dict, name: str, size: int) -> None:
    ours = build(num_classes=10, image_size=size, **options).eval()
    sized = {} if name.startswith(("resn", "convnext")) else {"img_size": size}
    sized |= {"window_size": 4} if name.startswith("swin") else {}
    theirs = timm.create_model(name, num_classes=10, **sized).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_cifar_stem_keeps_the_resolution() -> None:
    assert models.convnet().forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    assert models.preresnet().forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)


def test_branches_of_a_fresh_resnet_are_not_zero() -> None:
    assert models.convnet().layer1[0].bn2.weight.abs().min() == 1
    assert models.convnet(zero_init_last=True).layer1[0].bn2.weight.abs().max() == 0


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (models.convnet, {"depth": 20}, "depth of ResNet to be one of .* received 20"),
        (models.convnet, {"stem": "deep"}, "stem to be cifar or imagenet, received 'deep'"),
        (models.resnext, {"depth": 18}, "depth of ResNeXt to be 50 or 101, received 18"),
        (models.vit, {"size": "nano"}, "size to be .* received 'nano'"),
        (models.vit, {"pool": "max"}, "pool to be .* received 'max'"),
        (models.vit, {"patch_size": 5}, "patch_size to divide the 32x32 image, received 5; .* 1, 2, 4, 8, 16, 32"),
        (models.vit, {"heads": 5}, "heads to divide the width 192, received 5"),
        (models.convit, {"kernel_size": 8}, "kernel_size to be odd or 'global', received 8"),
        (models.convit, {"padding": "same"}, "padding to be .* received 'same'"),
        (models.pit, {"size": "huge"}, "size to be .* received 'huge'"),
        (models.pit, {"patch_size": 64}, "from 1 to the 32x32 image"),
        (models.swin, {"size": "huge"}, "size to be .* received 'huge'"),
        (
            models.swin,
            {"window_size": 7},
            "window_size to divide the maps 32x32, .* received 7; .* that do: 2, 4, 8, 16, 32",
        ),
        (models.mixer, {"size": "tiny"}, "size to be .* received 'tiny'"),
        (models.mixer, {"patch_size": 5}, "patch_size to divide"),
        (models.convnext, {"size": "giant"}, "size to be .* received 'giant'"),
        (models.convnext, {"kernel_size": 4}, "kernel_size to be odd, received 4"),
        (models.convnext, {"patch_size": 8}, "at least 8 patches"),
    ],
)
def test_bad_options(build, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("kernel", [3, 15, 31])
def test_convnext_takes_any_odd_kernel(kernel: int) -> None:
    model = models.convnext(kernel_size=kernel)
    assert model.stages[0].blocks[0].conv_dw.kernel_size == (kernel, kernel)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_non_square_images() -> None:
    x = torch.zeros(1, 3, 32, 64)
    for model in (
        models.convnet(image_size=(32, 64)),
        models.vit(image_size=(32, 64), patch_size=8, depth=1),
        models.convit(image_size=(32, 64), patch_size=8, depth=1),
        models.pit(image_size=(32, 64), patch_size=8),
        models.swin(image_size=(32, 64), patch_size=4),
        models.mixer(image_size=(32, 64), patch_size=8),
    ):
        assert model(x).shape == (1, 10)


@pytest.mark.parametrize(("patch", "sizes"), [(1, [32, 16, 8, 4]), (2, [16, 8, 4, 2]), (4, [8, 4, 2, 1])])
def test_convnext_starts_at_image_over_patch(patch: int, sizes: list[int]) -> None:
    model = models.convnext(patch_size=patch)
    x, found = model.stem(torch.zeros(1, 3, 32, 32)), []
    for stage in model.stages:
        x = stage(x)
        found.append(x.shape[-1])
    assert found == sizes


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (models.convnet, {}),
        (models.vit, {"patch_size": 8, "depth": 3}),
        (models.swin, {"patch_size": 4, "size": "tiny"}),
        *(
            pytest.param(build, options, marks=pytest.mark.slow)
            for build, options in [
                (models.preresnet, {"depth": 18}),
                (models.convit, {"patch_size": 8, "depth": 2}),
                (models.mixer, {"patch_size": 8}),
                (models.convnext, {}),
            ]
        ),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(build, options: dict) -> None:
    plain, saving = build(**options), build(**options, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, kept = torch.randn(2, 3, 32, 32), []
    for model in (plain, saving):
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            kept.append([])
            loss = model(x).square().sum()
        loss.backward()
    assert sum(kept[1]) < 0.7 * sum(kept[0])  # activations that wait for the backward pass
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), name
