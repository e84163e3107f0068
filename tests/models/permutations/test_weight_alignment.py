"""Permutations of units: exact on permuted copies, and without an effect on the function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, snapshot
from vitscope.models.permutations.unit_symmetry import Permutations, UnitSymmetry, run_recorded, unit_symmetry
from vitscope.runtime.errors import NumericalError, StructureError


def small_resnet() -> nn.Module:
    net = ResNet(BasicBlock, layers=(1, 1, 1, 1), num_classes=5, channels=(8, 12, 12, 16))
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def small_vit() -> nn.Module:
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, qkv_bias=True
    )


def torchvision_vit() -> nn.Module:
    return TorchvisionViT(16, 4, 2, 2, 16, 32, num_classes=5)


def per_head_alternet() -> nn.Module:
    return vs.models.alternet(
        depth=18, image_size=16, window_size=2, dim_head=8, position_bias="per_head", num_classes=5
    )


#: number of groups: branches of the blocks and residual streams; of a ViT the stream, and the MLP and the heads of each block
NETWORKS = {"resnet": (small_resnet, 9), "vit": (small_vit, 5), "torchvision_vit": (torchvision_vit, 5)}


def generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in float64 with no two equal units, biases and running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=generator)
                t.copy_(0.5 + noise.abs() if name.endswith("running_var") else t + 0.1 * noise)
    return model.double().eval()


def random_permutations(symmetry: UnitSymmetry, seed: int = 1) -> Permutations:
    generator = torch.Generator().manual_seed(seed)
    permutations = symmetry.identity()
    for group in symmetry.groups:
        permutations[group.label] = torch.randperm(group.label.size, generator=generator)
        for label in group.channels:
            rows = [torch.randperm(label.size, generator=generator) for _ in range(group.label.size)]
            permutations[label] = torch.stack(rows)
    return permutations


def permuted_copy(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], UnitSymmetry]:
    symmetry = unit_symmetry(model, images)
    permutations = random_permutations(symmetry)
    return {name: symmetry.permuted(name, t, permutations) for name, t in model.state_dict().items()}, symmetry


@pytest.mark.parametrize("method", ["weights", "activations"])
@pytest.mark.parametrize("name", [*NETWORKS, pytest.param("alternet", marks=pytest.mark.slow)])
def test_a_permuted_copy_is_undone_exactly(name: str, method: str):
    build, n_groups = {**NETWORKS, "alternet": (per_head_alternet, 15)}[name]
    torch.manual_seed(0)
    model = generic(build())
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    copy, symmetry = permuted_copy(model, images)
    assert len(symmetry.groups) == n_groups
    before = snapshot(model)
    with torch.no_grad():
        expected = model(images)
        model.load_state_dict(copy)
        # sums in another order: a rounding of 1e-16 at each of about a hundred sums
        assert float((model(images) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
        model.load_state_dict(before)
    aligned = vs.align_weights(model, copy, method=method, images=images)
    for key, value in before.items():
        assert torch.equal(aligned.state_dict[key], value), key
    assert aligned.distance_before > 1
    assert aligned.distance_after < 1e-5  # the root of a difference of squares
    assert aligned.converged
    assert aligned.function_change < 1e-12
    assert_untouched(model, before)


def test_the_distance_of_two_networks_never_grows_and_their_functions_stay():
    torch.manual_seed(1)
    model, other = generic(small_vit(), 2), generic(small_vit(), 3)
    aligned = vs.align_weights(model, other)
    distances = [
        sum(float((p.detach() - state[name]).square().sum()) for name, p in model.named_parameters()) ** 0.5
        for state in (other.state_dict(), aligned.state_dict)
    ]
    assert [aligned.distance_before, aligned.distance_after] == pytest.approx(distances, rel=1e-12)
    assert distances[1] < distances[0]
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = other(x)
        other.load_state_dict(aligned.state_dict)
        assert float((other(x) - expected).abs().max()) < 1e-12 * float(expected.abs().max())


def test_one_hidden_layer_is_the_assignment_of_scipy():
    torch.manual_seed(2)
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 3)).double() for _ in range(2))
    aligned = vs.align_weights(a, b, images=torch.randn(2, 3, 2, 2, dtype=torch.float64))
    with torch.no_grad():
        score = a[1].weight @ b[1].weight.T + torch.outer(a[1].bias, b[1].bias) + a[3].weight.T @ b[3].weight
    expected = linear_sum_assignment(score.numpy(), maximize=True)[1]
    np.testing.assert_array_equal(aligned.permutations["1.weight, axis 0"], expected)
    np.testing.assert_array_equal(aligned.state_dict["3.weight"], b[3].weight.detach()[:, expected])


class Shuffled(nn.Module):
    """Channels are sorted by their values, which no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).mean((2, 3)).sort(dim=1).values)


class Reinterpreted(Shuffled):
    """Halves of the bits of values become values of their own, which is no reshape."""

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x).view(torch.int16)  # (B, C, h, 2 w)
        return self.head(halves.to(x.dtype).mean((2, 3)))


def test_what_is_not_understood_is_refused_by_its_name():
    with pytest.raises(StructureError, match=r"Shuffled: its units cannot be followed through sort;"):
        vs.align_weights(Shuffled(), Shuffled(), images=torch.zeros(2, 3, 8, 8))
    with pytest.raises(StructureError, match=r"Reinterpreted: its units cannot be followed through view;"):
        vs.align_weights(Reinterpreted(), Reinterpreted(), images=torch.zeros(2, 3, 8, 8))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(StructureError, match="no units were found"):
        vs.align_weights(linear, linear, images=torch.zeros(2, 3, 2, 2))


def test_bad_arguments_are_refused():
    net, other = small_resnet(), ResNet(BasicBlock, layers=(1, 1, 1, 1), num_classes=5)
    with pytest.raises(ValueError, match="Expected method to be weights or activations, received 'magic'"):
        vs.align_weights(net, net, method="magic")
    with pytest.raises(ValueError, match="Expected images for method='activations'"):
        vs.align_weights(net, net, method="activations")
    with pytest.raises(ValueError, match="in the other network"):
        vs.align_weights(net, other)
    broken = {name: t * float("nan") for name, t in net.state_dict().items()}
    with pytest.raises(NumericalError, match="not finite"):
        vs.align_weights(net, broken, images=torch.zeros(2, 3, 16, 16))


def test_grouped_channels_stay_in_place_and_are_listed():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 8, 1),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))  # fmt: skip
    symmetry = unit_symmetry(model, torch.zeros(2, 3, 8, 8))
    assert [group.name for group in symmetry.groups] == ["4.weight, axis 0"]
    assert symmetry.fixed["0.weight"] == "conv2d in 2 has groups of channels"


def test_a_function_that_changes_is_an_error(monkeypatch: pytest.MonkeyPatch):
    model = generic(small_resnet())
    original = UnitSymmetry.permuted

    def wrong(self: UnitSymmetry, name: str, tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        return tensor if name == "layer1.0.bn1.bias" else original(self, name, tensor, *args, **kwargs)

    copy, _ = permuted_copy(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    monkeypatch.setattr(UnitSymmetry, "permuted", wrong)
    with pytest.raises(NumericalError, match="outputs differ"):
        vs.align_weights(model, copy, images=torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_a_barrier_between_permuted_copies_is_undone():
    torch.manual_seed(3)
    model = generic(small_resnet())
    with torch.no_grad():
        model.fc.weight.mul_(50)  # sure of its answers
    x = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    copy, _ = permuted_copy(model, x)
    probe = vs.Probe(model, [(x, model(x).argmax(1))])
    before = snapshot(model)
    for alignment in ("weights", "activations"):
        for bn in ("eval", "recalibrate"):
            r = vs.loss_barrier(probe, checkpoints=[("copy", copy)], n=3, bn=bn, alignment=alignment)
            assert np.abs(r.nll_unaligned[1] - r.nll_unaligned[0]) > 0.1
            assert (
                bn == "recalibrate" or r.barrier_unaligned > 0.1
            )  # with the statistics of 12 images, its answers are others
            assert r.barrier < 1e-12
            assert r.distance < 1e-6 < r.distance_unaligned
            assert r.scalars()["barrier_unaligned"] == r.barrier_unaligned
            assert len(vs.plot(r).axes[0].lines) == 4
    plain = vs.loss_barrier(probe, checkpoints=[("copy", copy)], n=3)
    assert (
        plain.barrier
        == vs.loss_barrier(probe, checkpoints=[("copy", copy)], n=3, alignment="weights").barrier_unaligned
    )
    assert vs.linear_interpolation(probe, checkpoints=[("copy", copy)], n=3, alignment="weights").distance < 1e-6
    with pytest.raises(ValueError, match="Expected alignment to be one of none, weights, activations, received 'x'"):
        vs.loss_barrier(probe, checkpoints=[("copy", copy)], n=3, alignment="x")
    assert_untouched(model, before)


def test_memory_that_runs_out_is_no_fault_of_the_model() -> None:
    class Starved(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        run_recorded(Starved(), torch.zeros(2, 3, 8, 8))


class Fixed(nn.Module):
    """A network for images of 8x8 that returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits ``(B, 3)`` of images ``(B, 3, 8, 8)``."""
        return {"logits": self.head(self.hidden(self.conv(x).relu().flatten(1)).relu())}


def test_the_function_of_a_network_with_one_size_and_a_mapping_for_output_is_checked() -> None:
    torch.manual_seed(0)
    model, other = Fixed().double(), Fixed().double()
    for images in (None, torch.rand(2, 3, 8, 8, dtype=torch.float64)):
        aligned = vs.align_weights(model, other, images=images)
        assert aligned.function_change < 1e-12
        assert aligned.distance_after <= aligned.distance_before
