"""The replacements against PyTorch's own derivatives in float64, and what they leave alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitscope as vs
from vitscope.linalg.curvature.double_backward import REPLACEMENTS, BilinearConvDoubleBackward
from vitscope.linalg.curvature.operator_factory import curvatures

CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 5)),
    "stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "uneven stride": (nn.Conv2d(4, 6, 3, stride=(3, 2), padding=(1, 0)), (2, 4, 8, 7)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(6, 6, 7, groups=6, padding=3), (2, 6, 8, 8)),
    "no bias": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 6, 6)),
    "same, uneven": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 6, 6)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "patches": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
}


def second(layer, x, v, replaced, parameters=None):
    """Return the loss' value, gradient and second derivative along ``v`` with respect to input and parameters."""
    leaves = [x, *(layer.parameters() if parameters is None else parameters)]
    with BilinearConvDoubleBackward() if replaced else torch.enable_grad():
        loss = (layer(x).sin() ** 2).sum()
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        product = torch.autograd.grad(gradient, leaves, v, materialize_grads=True)
    return [loss, *gradient, *product]


def same(layer, shape, parameters=None):
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(layer.parameters() if parameters is None else parameters)]
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in leaves]
    for found, expected in zip(second(layer, x, v, True, parameters), second(layer, x, v, False, parameters)):
        # rounding of sums over a few hundred entries
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    same(*CONVOLUTIONS[name])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_convolutions_of_which_some_is_frozen(frozen):
    layer = nn.Conv2d(4, 6, 3)
    getattr(layer, frozen).requires_grad_(False)
    same(layer, (2, 4, 7, 7), [p for p in layer.parameters() if p.requires_grad])


def test_convolution_of_an_image_that_needs_no_gradient():
    layer = nn.Conv2d(4, 6, 3).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    found = []
    for context in (BilinearConvDoubleBackward(), torch.enable_grad()):
        with context:
            gradient = torch.autograd.grad((layer(x) ** 3).sum(), list(layer.parameters()), create_graph=True)
            ones = [torch.ones_like(g) for g in gradient]
            found.append(torch.autograd.grad(gradient, list(layer.parameters()), ones))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(options, training):
    layer = nn.BatchNorm2d(5, **options)
    if layer.track_running_stats:
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    if layer.affine:
        nn.init.normal_(layer.weight)
    same(layer.train(training), (3, 5, 4, 4))


def test_batch_norm_of_vectors():
    same(nn.BatchNorm1d(5).eval(), (7, 5))


def test_hard_sigmoid_has_a_second_derivative():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    with BilinearConvDoubleBackward():
        torch.testing.assert_close(F.hardsigmoid(x), nn.Hardsigmoid()(x))
    torch.testing.assert_close(REPLACEMENTS[F.hardsigmoid](x), F.hardsigmoid(x), rtol=1e-15, atol=1e-15)
    x.requires_grad_()
    with BilinearConvDoubleBackward():
        (gradient,) = torch.autograd.grad(F.hardsigmoid(x).square().sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), x)
    inside = (x > -3) & (x < 3)
    torch.testing.assert_close(curvature, inside * 2 / 36.0, check_dtype=False)


def test_what_is_not_known_is_left_alone():
    layer = nn.Conv2d(4, 6, 3)
    one = torch.randn(4, 6, 6)  # no batch
    z = torch.randn(2, 4, 6, 6, dtype=torch.complex64)
    with BilinearConvDoubleBackward():
        torch.testing.assert_close(layer(one), F.conv2d(one, layer.weight, layer.bias))
        assert F.conv2d(z, layer.weight.to(z.dtype)).is_complex()


def test_third_derivatives_are_right():
    layer = nn.Conv2d(2, 2, 3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (BilinearConvDoubleBackward(), torch.enable_grad()):
        with context:
            (one,) = torch.autograd.grad((layer(x) ** 4).sum(), x, create_graph=True)
            two = torch.autograd.grad(one.sum(), [x, layer.weight], create_graph=True)
            found.append(torch.autograd.grad(two, [x, layer.weight], [torch.ones_like(t) for t in two]))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Recomputed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem, self.norm, self.body = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)
        self.recompute = True

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        x = checkpoint(self.body, x, use_reentrant=self.use_reentrant) if self.recompute else self.body(x)
        return self.head(x.tanh().mean((2, 3)))


def operator_product(model, batch, v, **options):
    with curvatures(vs.Probe(model, [batch]), dtype="float64", **options) as made:
        operator = made.mean()
        return operator(v[: operator.size])


def images(n, size, classes):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def vector(model):
    n = sum(p.numel() for p in model.parameters())
    return torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_activation_checkpoints(kind, use_reentrant):
    torch.manual_seed(0)
    model, batch = Recomputed(use_reentrant), images(3, 10, 4)
    recomputed = operator_product(model, batch, vector(model), operator=kind)
    model.recompute = False
    kept = operator_product(model, batch, vector(model), operator=kind)
    torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)


MODELS = ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "test_efficientnet", "test_vit"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # one operator a model in CI: what differs between the operators is compared on small networks
        pytest.param(name, kind, marks=() if (i + j) % 2 == 0 and name != "convnext_atto" else pytest.mark.slow)
        for i, name in enumerate(MODELS)
        for j, kind in enumerate(("hessian", "ggn"))
    ],
)
def test_products_of_whole_models(name, kind):
    """Against the same operator without the replacements; MobileNetV3's Hessian needs the one of its hard sigmoid."""
    torch.manual_seed(0)
    model, batch = timm.create_model(name, num_classes=5).eval(), images(2, 64 if "vit" not in name else 160, 5)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # else its statistics are 0 and 1 and hide mistakes
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    v = vector(model)
    found = operator_product(model, batch, v, operator=kind)
    with pytest.MonkeyPatch.context() as patch:
        others = {F.hardsigmoid: REPLACEMENTS[F.hardsigmoid]}
        patch.setattr("vitscope.linalg.curvature.double_backward.REPLACEMENTS", others)
        expected = operator_product(model, batch, v, operator=kind)
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-11


@pytest.mark.parametrize("subset", ["layer:conv1", "*.bn1.weight", "layer:fc", ["layer:layer4", "layer:conv1"]])
def test_parameters_that_are_not_analyzed_need_no_gradient(subset):
    torch.manual_seed(0)
    model, batch = timm.create_model("resnet10t", num_classes=5).eval(), images(2, 32, 5)
    model.fc.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    subset = ["layer:conv1", "layer:fc"] if subset == "layer:fc" else subset
    probe = vs.Probe(model, [batch])
    with curvatures(probe, dtype="float64") as made:
        operator, names = made.mean(), list(made.parameters)
        sizes = [p.numel() for p in made.parameters.values()]
        whole = torch.zeros(operator.size, dtype=torch.float64)
        with curvatures(probe, dtype="float64", parameters=subset) as part:
            chosen = list(part.parameters)
            assert [n for n, p in part.model.named_parameters() if p.requires_grad] == chosen
            own = part.mean()
            v = torch.randn(own.size, dtype=torch.float64)
            found = own(v)
        mask = torch.cat([torch.full((n,), name in chosen) for n, name in zip(sizes, names)])
        whole[mask] = v
        torch.testing.assert_close(found, operator(whole)[mask], rtol=1e-9, atol=1e-12)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
