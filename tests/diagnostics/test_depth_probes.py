"""Probes at every tap of a model: accuracies, folds, heads, training images of a run, two ranks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import NearestCentroid
from torch import nn

import vitscope as vs
from tests.fixtures.images.labeled_clusters import clusters
from tests.fixtures.oracles.result_checks import check_result
from tests.fixtures.programs.processes import on_ranks
from vitscope.analyses import arguments, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.config.validation import validate
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.depth_probes._classifiers import (
    PENALTIES,
    ridge,
)
from vitscope.diagnostics.depth_probes._logit_lens import find_head
from vitscope.diagnostics.depth_probes._tap_measurement import fold_numbers
from vitscope.diagnostics.depth_probes.plot import depth_probes as draw
from vitscope.runtime.errors import ConfigError


class Branch(nn.Module):
    """Two layers and a head on the mean over positions; takes features as maps of 1 x 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.head = nn.Linear(width, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def probe_of(model: nn.Module, n: int, seed: int, size: int = 25) -> vs.Probe:
    x, y = clusters(n, 6, seed)
    taps = [vs.Tap("a", "conv", 1, 0.0, model.first), vs.Tap("b", "conv", 1, 1.0, model.second)]
    return vs.Probe(model, list(zip(x[:, :, None, None].split(size), y.split(size))), taps=taps)


def measured(model: nn.Module, **options) -> vs.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        return vs.depth_probes(probe_of(model, 60, 2), **{"n_neighbors": 5, **options})


def test_accuracies_are_those_of_the_training_images_classifiers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branch(6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measured(model, train=probe_of(model, 150, 1))
    (x, y), (z, labels) = clusters(150, 6, 1), clusters(60, 6, 2)
    for index, (a, b) in enumerate(((x, z), (x.relu(), z.relu()))):
        squares = np.square(np.linalg.svd(a - a.mean(0), compute_uv=False)).mean()
        peer = RidgeClassifierCV(alphas=[p * squares for p in PENALTIES]).fit(a.numpy(), y.numpy())
        assert found.ridge_accuracy[index] == pytest.approx(peer.score(b.numpy(), labels.numpy()))
        assert found.center_accuracy[index] == pytest.approx(NearestCentroid().fit(a, y).score(b, labels))
    with torch.no_grad():
        lens = (model.head(z).argmax(1) == labels).double().mean().item()
    assert found.logit_lens_accuracy[0] == pytest.approx(lens)  # the head on the map before the activation
    assert found.logit_lens_accuracy[1] == found.model_accuracy
    assert np.isfinite(found.nc3).all()
    assert np.isnan(found.class_token_ridge_accuracy).all()
    assert (found.ridge_accuracy_interval[:, 0] < found.ridge_accuracy).all()
    assert np.isfinite(found.nc1).all()
    assert found.n_train == 150
    assert found.training_images == "train"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check_result(found, tmp_path)
    assert len(draw({"one": found}).axes) == 6
    compared = draw({"one": found, "two": found}).axes
    assert [ax.get_ylabel() for ax in compared[:3]] == ["Accuracy (Ridge)", "Accuracy (k-NN)", "Accuracy (Logit lens)"]
    assert len(compared) == 8


def test_without_training_images_each_fold_is_predicted_from_the_others() -> None:
    model = Branch(6)
    found = measured(model)
    x, y = clusters(60, 6, 2)
    folds = fold_numbers(y).numpy()
    right = [(ridge(x[folds != f], y[folds != f], x[folds == f]) == y[folds == f]).sum().item() for f in range(5)]
    assert found.ridge_accuracy[0] == pytest.approx(sum(right) / 60)
    assert (
        found.training_images
        == found.card.solver["training_images"]
        == "5 folds of the test images, each class divided alike"
    )
    # labels that nothing in the images tells are predicted at chance, not from the images themselves
    probe = probe_of(model, 200, 3)
    noise = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    shuffled = vs.Probe(
        model, [(x, noise[25 * i : 25 * i + 25]) for i, (x, _) in enumerate(probe.batches)], taps=probe.taps
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NullWarning)
        assert vs.depth_probes(shuffled).knn_accuracy.max() < 0.4


@pytest.mark.parametrize("order", ["in turn", "sorted", "random"])
def test_folds_divide_every_class_alike_whatever_the_order_of_images(order: str) -> None:
    """With image i in fold i mod 5, classes in turn (scikit-learn's digits) were never among the training images."""
    in_turn = torch.arange(103) % 5
    y = {"in turn": in_turn, "sorted": in_turn.sort().values, "random": in_turn[torch.randperm(103)]}[order]
    folds = fold_numbers(y)
    assert np.ptp(np.bincount(folds)) <= 1
    for label in range(5):
        assert np.ptp(np.bincount(folds[y == label], minlength=5)) <= 1
    torch.testing.assert_close(folds, fold_numbers(y))
    assert (folds != torch.arange(103) % 5).any()


def test_training_images_that_are_test_images_are_refused() -> None:
    model = Branch(6)
    probe = probe_of(model, 60, 2)
    same = probe_of(model, 60, 2)
    for train in (probe, same):
        with pytest.raises(ValueError, match="needs training images that are not its test images"):
            vs.depth_probes(probe, train=train, n_neighbors=5)
    with pytest.raises(ValueError, match="training images of the same model"):
        vs.depth_probes(probe, train=probe_of(Branch(6), 60, 1))
    with pytest.raises(ValueError, match="n_neighbors from 1 to the number of training images, 48, received 49"):
        vs.depth_probes(probe, n_neighbors=49)
    with pytest.raises(ValueError, match="at least 2 test images with a label, received 1"):
        vs.depth_probes(probe_of(model, 1, 2), n_neighbors=1)
    with pytest.raises(ValueError, match="needs .* GiB for 60 images at 2 taps"):
        vs.depth_probes(probe, max_memory=100.0)
    soft = vs.Probe(model, [(x, torch.eye(4, dtype=torch.float64)[y]) for x, y in probe.batches], taps=probe.taps)
    with pytest.raises(ValueError, match=r"needs class indices \(B,\), received targets \(25, 4\)"):
        vs.depth_probes(soft)
    partly = vs.Probe(model, [*probe_of(model, 60, 1).batches, next(iter(probe.batches))], taps=probe.taps)
    with pytest.warns(UserWarning, match="25 of 60 test images are among the training images"):
        vs.depth_probes(probe, train=partly, n_neighbors=5)


SWIN = {"img_size": 32, "window_size": 2, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}


@pytest.mark.parametrize(
    ("name", "options", "n_lens"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, None),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, None),
        ("vit_medium_patch16_reg4_gap_256", {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, None),
        ("resnet18", {}, 2),
        ("convnext_atto", {"depths": (1, 1, 1, 2), "dims": (8, 16, 24, 32)}, 3),
        ("swin_tiny_patch4_window7_224", SWIN, 3),
    ],
)  # fmt: skip
def test_the_head_of_timm_models_is_found_or_null(name: str, options: dict, n_lens: int | None) -> None:
    """The head has the model's own logits at the last tap; an attention pooling is one module of it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    x = torch.randn(20, 3, 32, 32)
    probe = vs.Probe(model, [(x, torch.arange(20) % 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = vs.depth_probes(probe, n_neighbors=3)
    finite = np.isfinite(found.logit_lens_accuracy)
    assert finite.sum() == (len(found.taps) if n_lens is None else n_lens)
    # the class token is one and the same vector after the stem, without class means that differ
    has_class_token = name == "vit_tiny_patch16_224"
    np.testing.assert_array_equal(np.isfinite(found.nc3)[has_class_token:], finite[has_class_token:])
    if n_lens != 0:
        assert found.logit_lens_accuracy[-1] == found.model_accuracy
    assert np.isfinite(found.class_token_ridge_accuracy).any() == has_class_token
    assert np.isfinite(found.ridge_accuracy).all()


@pytest.mark.parametrize("name", ["alternet", "resnetv2_50", "efficientnet_b0"])
def test_a_norm_with_an_activation_inside_belongs_to_the_head(name: str) -> None:
    """With statistics that differ from the initial ones, with which the norm is nearly the identity."""
    torch.manual_seed(0)
    options = {"width": 8, "window_size": 2, "n_msa": (0, 1, 1, 1), "dim_head": 4, "image_size": 16}
    model = (
        vs.models.alternet(num_classes=3, **options) if name == "alternet" else timm.create_model(name, num_classes=3)
    )
    side = 16 if name == "alternet" else 64
    model.train()(torch.randn(8, 3, side, side) + 1)
    x = torch.randn(6, 3, side, side)
    probe = vs.Probe(model.eval(), [(x, torch.arange(6) % 3)])
    with probe.guard() as guarded:
        head = find_head(guarded, x, probe.taps)
    assert head is not None
    assert any(isinstance(module, nn.BatchNorm2d) for module in head.modules)
    assert (head.classifier is None) == (name == "resnetv2_50")  # its classifier is a convolution


def test_a_head_of_no_sequence_of_modules_is_not_guessed() -> None:
    class Scaled(Branch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = Scaled(6)
    probe = probe_of(model, 10, 1)
    with torch.no_grad():
        assert find_head(model, next(iter(probe.batches))[0], probe.taps) is None
    with pytest.warns(NullWarning, match="logit_lens_accuracy, nc3 .what follows the last tap is no sequence"):
        vs.depth_probes(probe, n_neighbors=2)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_head_of_all_positions_takes_maps_of_their_size(pooled: bool) -> None:
    """A network that flattens its last map, in front of which the maps have as many values in another shape."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    layers = [
        nn.Conv2d(3, 4, 3, (1, 4), 1), nn.ReLU(), nn.Conv2d(4, 4, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(4, 4, 3, (2, 1), 1), *head,
    ]  # fmt: skip
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 if pooled else 8, 3)).double().eval()
    x, y = torch.randn(20, 3, 8, 4, dtype=torch.float64), torch.arange(20) % 3  # maps of 8 x 1, 4 x 1 and 2 x 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = vs.depth_probes(vs.Probe(model, [(x, y)]), n_neighbors=3)
    with torch.no_grad():
        first = model[0](x)
        expected = (model[-1](first.mean((2, 3))).argmax(1) == y).double().mean().item() if pooled else np.nan
        last = (model(x).argmax(1) == y).double().mean().item()
    np.testing.assert_array_equal(result.logit_lens_accuracy[[0, 2]], [expected, last])
    assert any("a map of another size than the head takes" in str(w.message) for w in told) == (not pooled)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Branch(6)
    torch.save(measured(model, train=probe_of(model, 150, 1)), f"{folder}/rank{rank}.pt")
    (x, y), *others = probe_of(model, 60, 2).batches
    one_soft = vs.Probe(model, [(x, torch.eye(4, dtype=torch.float64)[y]), *others], taps=probe_of(model, 60, 2).taps)
    with pytest.raises((ValueError, RuntimeError), match="class indices|another rank failed"):  # on both
        vs.depth_probes(one_soft, n_neighbors=5)
    dist.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    on_ranks(_rank, str(tmp_path))
    torch.manual_seed(0)
    model = Branch(6)
    alone = measured(model, train=probe_of(model, 150, 1))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for name, value in vars(alone).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                np.testing.assert_allclose(getattr(found, name), value, atol=1e-12, err_msg=name)


def test_a_run_supplies_clean_training_images(made: AnalysisContext) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "depth_probes"]
    assert analysis.options["train"]["n_images"] == 32  # capped
    supplied = arguments.options(analysis, made, None, str)["train"]
    assert (supplied.about["split"], supplied.n_images) == ("train", 32)
    assert supplied.about["augmentation"] == made.datamodule.describe("train", False)["augmentation"]
    divided = spec.replaced(analysis, options={**analysis.options, "train": "cross_validation"})
    assert arguments.options(divided, made, None, str)["train"] is None
    for value, text in (
        ({"split": "test"}, "no such key"),
        ({"n_images": "x"}, "not a whole number"),
        ("test", "not a group"),
    ):
        cfg = copy.deepcopy(made.cfg)
        cfg.analysis = {"depth_probes": {**cfg.analysis.depth_probes, "train": value}}
        with pytest.raises(ConfigError, match=text):
            validate(cfg)
