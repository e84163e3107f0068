"""``analyze.py`` on trees in ImageNet's layout, with timm's own preprocessing; CIFAR's headline experiment on an archive."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

import vitscope as vs
from tests.fixtures.runs.run_folders import only_run

PRESENT = (7, 402, 990)
MODEL = ["model=timm", "model.name=resnet10t.c3_in1k", "data=imagenet", "data.transform=model", "data.num_workers=0",
         "device=cpu"]  # fmt: skip


@cache
def wnids() -> list[str]:
    names = ImageNetInfo("imagenet-1k").label_names()
    return [names[i] for i in PRESENT]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Validation images of three of the 1000 classes: the layout of ImageNet-A, and ImageNet-C's with one type."""
    rng = np.random.default_rng(0)
    (tmp_path / "imagenet-a").mkdir()
    (tmp_path / "imagenet-a/README.txt").write_text("as it is published: class folders and a text")
    for split in ("imagenet/val", "imagenet-a", "imagenet-c/weather/fog/3"):
        for name in wnids():
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                small = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
                size = (224, 224) if "-c" in split else (250, 240 + index)
                Image.fromarray(small).resize(size).save(tmp_path / split / name / f"{index}.JPEG")
    return tmp_path


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A network whose logits differ between images, and the file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t.c3_in1k").eval()
    torch.nn.init.normal_(model.fc.weight, std=0.5)
    torch.save(model.state_dict(), tmp_path / "resnet10t.pth")
    return tmp_path / "resnet10t.pth", model


def expected_logits(model: torch.nn.Module, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """By timm alone."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    files = [(f, i) for name, i in zip(wnids(), PRESENT) for f in sorted((folder / name).iterdir())]
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(f).convert("RGB")) for f, _ in files]))
    return logits, torch.tensor([i for _, i in files])


def top(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    return (logits.topk(k).indices == labels[:, None]).any(1).double().mean().item()


def test_top_1_and_top_5_with_timms_preprocessing(call: Callable[..., int], tree: Path, weights: tuple) -> None:
    file, model = weights
    logits, labels = expected_logits(model, tree / "imagenet" / "val")
    run = [*MODEL, f"ckpt_path={file}", "analysis=[evaluation]"]
    with pytest.warns(UserWarning, match="images of 3 of the model's 1000 classes"):
        assert call("analyze", *run, f"data.root={tree}/imagenet", f"run_dir={tree}/all") == 0
    masking = [*run, f"data.root={tree}/imagenet-a", "analysis.evaluation.classes=present"]
    assert call("analyze", *masking, f"run_dir={tree}/present") == 0
    everything, masked = (vs.load_results(tree / name)["evaluation"] for name in ("all", "present"))
    (everything,), (masked,) = everything.values(), masked.values()
    assert (everything.accuracy, everything.accuracy_top5) == (top(logits, labels, 1), top(logits, labels, 5))
    assert everything.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    logits, labels = expected_logits(model, tree / "imagenet-a")
    assert masked.n_images == len(labels) == 6
    only = torch.full_like(logits, float("-inf"))
    only[:, list(PRESENT)] = logits[:, list(PRESENT)]
    assert masked.accuracy == top(only, labels, 1)
    assert masked.nll == pytest.approx(torch.nn.functional.cross_entropy(only, labels).item(), rel=1e-5)
    assert (masked.classes.tolist(), masked.class_names) == (list(PRESENT), tuple(wnids()))


def test_imagenet_c_folders_get_the_labels_of_the_1000_classes(call: Callable[..., int], tree: Path, weights) -> None:
    file, model = weights
    options = ["analysis=[corruption]", f"analysis.corruption.root={tree}/imagenet-c", "analysis.corruption.types=[fog]",
               "analysis.corruption.severities=[3]", "analysis.corruption.probe.n_images=6",
               "data.transform=null", "data.image_size=224"]  # fmt: skip
    run = [*MODEL, f"data.root={tree}/imagenet", f"ckpt_path={file}", f"paths.runs={tree}/runs"]
    assert call("analyze", *run, *options) == 0
    (result,) = vs.load_results(only_run(tree))["corruption"].values()
    pixels, labels = [], []
    for name, i in zip(wnids(), PRESENT):
        for f in sorted((tree / "imagenet-c/weather/fog/3" / name).iterdir()):
            pixels.append(torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255)
            labels.append(i)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        logits = model((torch.stack(pixels) - mean) / std)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert result.nll[0, 0] == pytest.approx(loss, rel=1e-4)  # float32 pixels and logits
    assert result.mce is not None


@pytest.mark.slow
def test_a_model_of_one_size_is_built_at_the_size_of_its_weights(call: Callable[..., int], tree: Path) -> None:
    model = [*MODEL, "model.name=vit_tiny_patch16_384", f"data.root={tree}/imagenet", f"paths.runs={tree}/runs"]
    options = ["analysis=[evaluation]", "analysis.evaluation.probe.n_images=1", "analysis.evaluation.classes=present"]
    assert call("analyze", *model, *options) == 0
    (result,) = vs.load_results(only_run(tree))["evaluation"].values()
    assert (result.n_images, result.classes.tolist()) == (1, list(PRESENT))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["data.root=/nowhere"], 3, "error: data.root=/nowhere"),
        (["model.num_classes=10"], 2, "error: model.num_classes=10: data.num_classes is 1000"),
        (["data.transform=timm"], 2, "error: data.transform=timm: unknown transform"),
        (["model=alternet", "model.window_size=7", "model.stem=imagenet"], 2, "error: data.transform=model: AlterNet does not"),
        (["analysis.evaluation.classes=some"], 2, "analysis.evaluation.classes=some: no such choice; choose from all, present"),
        (["analysis.evaluation.classes=[n00000000]"], 2, "received 'n00000000'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(call: Callable[..., int], tree: Path, capsys, arguments, code, text) -> None:
    base = [a for a in MODEL if not (a.startswith("model") and any(b.startswith("model=") for b in arguments))]
    run = [*base, f"data.root={tree}/imagenet", "analysis=[evaluation]", f"paths.runs={tree}/runs"]
    assert call("analyze", *run, *arguments) == code
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert text in err


def test_a_folder_that_is_no_class_is_named(call: Callable[..., int], tree: Path, capsys) -> None:
    (tree / "imagenet/val/tabby").mkdir()
    (tree / "imagenet/val" / wnids()[0] / "0.JPEG").rename(tree / "imagenet/val/tabby/0.JPEG")
    assert (
        call("analyze", *MODEL, f"data.root={tree}/imagenet", "analysis=[evaluation]", f"paths.runs={tree}/runs") == 3
    )
    assert "'tabby' is not a class of imagenet-1k" in capsys.readouterr().err


@pytest.mark.slow
def test_the_headline_experiment_on_an_archive(call: Callable[..., int], write_cifar, tmp_path: Path) -> None:
    sums = write_cifar(tmp_path, "cifar100", archive=True)
    checksums = ",".join(f"{name}:'{md5}'" for name, md5 in sums.items())
    arguments = ["experiment=cifar100_alternet50", "caps=smoke", f"data.root={tmp_path}", "data.batch_size=4",
                 f"data.source.checksums={{{checksums}}}", "logger=none", f"paths.runs={tmp_path}/runs"]  # fmt: skip
    assert call("train", *arguments) == 0
    found = vs.load_results(only_run(tmp_path))
    assert set(found) == {"hessian", "landscape", "slice", "fourier"}
    assert found["hessian"]["end"].card.data == "cifar100"
