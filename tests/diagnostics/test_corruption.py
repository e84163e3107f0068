from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitscope import Probe
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.corruption import _scores
from vitscope.diagnostics.corruption._baselines import ALEXNET, CLEAN
from vitscope.diagnostics.corruption._severity_table import COMMON, SEVERITIES
from vitscope.diagnostics.corruption.corruption import corruption
from vitscope.diagnostics.corruption.plot import corruption as draw
from vitscope.runtime.errors import DataError


class ReadsPixels(nn.Module):
    """Predicts the class that the mean pixel of the image codes: 20 levels a class."""

    centers: torch.Tensor

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.register_buffer("centers", (20 * torch.arange(classes) + 10).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level = 255 * (0.25 * x + 0.5).mean((1, 2, 3))
        return -((level[:, None] - self.centers) ** 2)


def coded(classes: np.ndarray, side: int = 8) -> np.ndarray:
    """Return gray images (n, side, side, 3) uint8 that `ReadsPixels` takes for these classes."""
    return np.broadcast_to((20 * classes + 10)[:, None, None, None], (len(classes), side, side, 3)).astype(np.uint8)


def probe_of(labels: np.ndarray, size: int = 4, side: int = 8, **about: object) -> Probe:
    x = (torch.from_numpy(coded(labels, side)).double() / 255 - 0.5).permute(0, 3, 1, 2) / 0.25
    y = torch.from_numpy(labels)
    facts = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], **about}
    return Probe(ReadsPixels(), list(zip(x.split(size), y.split(size))), about=facts)


LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])


def predictions(kind: int, severity: int) -> np.ndarray:
    """Return classes of which the first ``kind + severity`` are wrong."""
    wrong = np.arange(10) < kind + severity
    return np.where(wrong, (LABELS + 1) % 5, LABELS)


def test_published_errors_have_the_published_means() -> None:
    # the normalizers in use everywhere (Hendrycks' evaluation code), in the order of COMMON
    known = (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324,
             0.564592, 0.853204, 0.646056, 0.717840, 0.606500)  # fmt: skip
    np.testing.assert_allclose([np.mean(ALEXNET["imagenet"][name]) for name in COMMON], known, atol=1e-9)
    assert np.mean([ALEXNET["cifar10"][name] for name in COMMON]) == pytest.approx(1 - 0.761, abs=5e-4)
    assert all(tuple(table) == COMMON for table in ALEXNET.values())


def test_corruption_errors_by_hand() -> None:
    base = _scores.Baseline("b", np.array([[0.5, 0.7], [0.4, 0.4]]), 0.3)
    error = np.array([[0.3, 0.6], [0.2, 0.6]])
    np.testing.assert_allclose(_scores.corruption_errors(error, base), [75.0, 100.0])
    np.testing.assert_allclose(_scores.relative_errors(error, 0.1, base), [100 * 0.7 / 0.6, 100 * 0.6 / 0.2])
    easy = base._replace(error=np.array([[0.3, 0.3], [0.4, 0.4]]))
    assert np.isnan(_scores.relative_errors(error, 0.1, easy)).tolist() == [True, False]  # it loses nothing there


def write_arrays(root: Path, names: tuple[str, ...], labels: int = 5) -> None:
    for kind, name in enumerate(names):
        np.save(root / f"{name}.npy", np.concatenate([coded(predictions(kind, s)) for s in SEVERITIES]))
    np.save(root / "labels.npy", np.tile(LABELS, labels).astype(np.uint8))


@pytest.mark.parametrize("labels", [5, 1])
def test_cifar_arrays(tmp_path: Path, labels: int) -> None:
    write_arrays(tmp_path, ("fog", "snow"), labels)
    probe = probe_of(LABELS, data="cifar10")
    result = corruption(probe, root=str(tmp_path), types=("fog", "snow"))
    expected = 1 - (np.arange(2)[:, None] + np.arange(1, 6)) / 10
    np.testing.assert_allclose(result.accuracy, expected)
    assert result.clean_accuracy == 1.0
    assert result.mean_accuracy == pytest.approx(expected.mean())
    wrong = np.mean([predictions(k, s) != LABELS for k in range(2) for s in SEVERITIES], axis=0)
    assert result.mean_accuracy_standard_error == pytest.approx(np.std(wrong, ddof=1) / np.sqrt(10))
    table = np.array([[predictions(k, s) != LABELS for s in SEVERITIES] for k in range(2)], dtype=float)
    for errors, axis in ((result.type_standard_error, 1), (result.severity_standard_error, 0)):
        np.testing.assert_allclose(errors, table.mean(axis=axis).std(axis=1, ddof=1) / np.sqrt(10))
    assert np.isnan(result.clean_standard_error)  # all images agree
    alexnet = [sum(ALEXNET["cifar10"][name]) for name in ("fog", "snow")]
    np.testing.assert_allclose(result.ce, 100 * (1 - expected).sum(1) / alexnet)
    assert result.mce == pytest.approx(result.ce.mean())
    assert result.relative_mce is None  # no clean error is published
    assert (result.source, result.n_images) == ("arrays", 10)
    assert result.scalars()["severity_2_accuracy"] == pytest.approx(expected[:, 1].mean())


def test_imagenet_folders(tmp_path: Path) -> None:
    classes = [f"n{i:08d}" for i in range(5)]
    for kind, name in enumerate(("gaussian_blur", "contrast")):
        for severity in SEVERITIES:
            for i, (label, image) in enumerate(zip(LABELS, coded(predictions(kind, severity), 12))):
                folder = tmp_path / ("extra" if kind == 0 else "digital") / name / str(severity) / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"ILSVRC2012_val_{i:08d}.png")
    probe = probe_of(LABELS, data="imagenet", class_names=tuple(classes))
    result = corruption(probe, root=str(tmp_path), types=("gaussian_blur", "contrast"))
    expected = 1 - (np.arange(2)[:, None] + np.arange(1, 6)) / 10
    np.testing.assert_allclose(result.accuracy, expected)  # also resized from 12 to 8 pixels
    assert result.source == "folders"
    lost = (1 - expected[1]).sum() / (sum(ALEXNET["imagenet"]["contrast"]) - 5 * CLEAN["imagenet"])
    assert result.relative_mce == pytest.approx(100 * lost)  # gaussian_blur is a validation type: not in the means
    assert np.isnan(result.ce[0])
    assert result.mean_accuracy == pytest.approx(expected[1].mean())
    wrong = np.array([predictions(1, severity) != LABELS for severity in SEVERITIES], dtype=float)
    np.testing.assert_allclose(result.severity_standard_error, wrong.std(axis=1, ddof=1) / np.sqrt(10))
    reversed_names = probe_of(LABELS, class_names=tuple(classes[::-1]))
    turned = corruption(reversed_names, root=str(tmp_path), types=("contrast",), severities=(1,))
    assert turned.accuracy[0, 0] != expected[1, 0]  # labels follow the names, not their order


def test_images_are_spread_over_a_published_set(tmp_path: Path) -> None:
    write_arrays(tmp_path, ("fog",))
    result = corruption(probe_of(LABELS), root=str(tmp_path), types="fog", n_images=5)
    np.testing.assert_allclose(result.accuracy[0], [0.8, 0.8, 0.6, 0.6, 0.4])  # images 0 2 4 6 8
    assert result.baseline == ""


def test_made_corruptions_do_not_depend_on_batches() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 12)
    options = {"types": ("fog", "brightness"), "severities": (1, 5)}
    a, b = (corruption(probe_of(labels, size), **options) for size in (12, 4))
    np.testing.assert_allclose(a.nll, b.nll, rtol=1e-12)
    assert a.accuracy.shape == (2, 2)
    assert a.clean_accuracy == 1.0
    assert a.accuracy[1, 1] == np.mean(labels == 4)  # 77 levels brighter: only the last class is still the nearest
    other_seed = corruption(probe_of(labels), seed=1, **options)
    assert other_seed.nll[0, 0] != a.nll[0, 0]
    assert other_seed.nll[1, 0] == pytest.approx(a.nll[1, 0])


def test_a_model_is_its_own_reference() -> None:
    probe = probe_of(LABELS)
    result = corruption(probe, other=probe_of(LABELS), types=("brightness", "frost"))
    assert result.ce.tolist() == result.relative_ce.tolist() == [100.0, 100.0]
    assert result.mce == result.relative_mce == 100.0
    assert result.baseline == "another model"
    with pytest.warns(NullWarning, match="contrast .the baseline has no errors"):
        assert corruption(probe, other=probe_of(LABELS), types=("contrast",)).mce is None


def test_finished_conditions_are_not_computed_again() -> None:
    probe, partial = probe_of(LABELS), {}
    first = corruption(probe, types=("fog",), partial=partial)
    assert set(partial) == {"model clean 0", *(f"model fog {s}" for s in SEVERITIES)}
    calls: list[int] = []
    probe.model.register_forward_pre_hook(lambda *_: calls.append(1))
    del partial["model fog 3"]
    second = corruption(probe, types=("fog",), partial=partial)
    assert len(calls) == 3  # three batches; that the model repeats itself is known
    np.testing.assert_array_equal(first.nll, second.nll)


def test_damaged_or_missing_data(tmp_path: Path) -> None:
    probe = probe_of(LABELS)
    with pytest.raises(DataError, match=r"analysis.corruption.root=.*there is no such folder"):
        corruption(probe, root=str(tmp_path / "none"))
    write_arrays(tmp_path, ("fog", "snow"))
    with pytest.raises(DataError, match="gaussian_noise, shot_noise, impulse_noise and more missing"):
        corruption(probe, root=str(tmp_path))
    np.save(tmp_path / "fog.npy", np.zeros((7, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"fog.npy holds uint8 \(7, 8, 8, 3\), not uint8"):
        corruption(probe, root=str(tmp_path), types="fog")
    np.save(tmp_path / "snow.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"snow.npy cannot be read"):
        corruption(probe, root=str(tmp_path), types="snow")
    write_arrays(tmp_path, ("frost",))
    np.save(tmp_path / "labels.npy", np.zeros(3, np.uint8))
    with pytest.raises(DataError, match=r"labels.npy holds 3 labels for 10 images"):
        corruption(probe, root=str(tmp_path), types="frost")


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "fog" / "1" / "n0"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="there is no image in fog/1"):
        corruption(probe_of(LABELS), root=str(tmp_path), types="fog", severities=(1,))
    (folder / "a.jpeg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpeg cannot be read as an image"):
        corruption(probe_of(LABELS), root=str(tmp_path), types="fog", severities=(1,))
    with pytest.raises(DataError, match="there is no fog/2"):
        corruption(probe_of(LABELS), root=str(tmp_path), types="fog", severities=(2,))
    with pytest.raises(DataError, match="fog/1 has the class 'n0', the data has a, b, c, d, e"):
        corruption(probe_of(LABELS, class_names=tuple("abcde")), root=str(tmp_path), types="fog", severities=(1,))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="received 'rain'"):
        corruption(probe_of(LABELS), types=("rain",))
    with pytest.raises(ValueError, match=r"severities from 1 to 5, received \[0\]"):
        corruption(probe_of(LABELS), severities=(0,))
    with pytest.raises(ValueError, match="baseline to be auto, none, imagenet, cifar10, cifar100, received 'resnet'"):
        corruption(probe_of(LABELS), types="fog", baseline="resnet")
    bare = probe_of(LABELS)
    bare.about.clear()
    with pytest.raises(ValueError, match=r"pass mean=\.\.\. and std=\.\.\."):
        corruption(bare, types="fog")
    with pytest.raises(ValueError, match="one mean and one std above 0"):
        corruption(bare, types="fog", mean=[0.5], std=[0.0])


def test_plots() -> None:
    result = corruption(probe_of(LABELS), types=("fog", "contrast"))
    figure = draw({"a": result, "b": result})
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["fog", "contrast"]
    assert len(figure.axes[1].patches) == 4
    shown = np.asarray(figure.axes[0].lines[0].get_ydata())
    np.testing.assert_allclose(shown[1:], 100 * result.accuracy.mean(0))
    assert [len(draw({"": result}, view=view).axes) for view in ("severity", "type")] == [1, 1]
    with pytest.raises(ValueError, match="view to be one of both, severity, type, received 'x'"):
        draw({"": result}, view="x")


def test_means_of_the_figure_are_those_of_the_common_types() -> None:
    """Validation types are measured, and shown by themselves; the mean at a severity leaves them out, as all means do."""
    result = corruption(probe_of(LABELS), types=("brightness", "saturate"), severities=(1, 5))
    np.testing.assert_array_equal(result.severity_accuracy, result.accuracy[0])
    assert result.accuracy[0, 1] != result.accuracy[1, 1]
    line = draw({"a": result}, view="severity").axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array([result.clean_accuracy, *result.accuracy[0]]))
    alone = corruption(probe_of(LABELS), types=("brightness",), severities=(1, 5))
    np.testing.assert_array_equal(result.severity_standard_error, alone.severity_standard_error)
