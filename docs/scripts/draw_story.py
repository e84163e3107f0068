"""Draw README's three pictures from a study's runs: spectrum, loss landscape and Fourier figure of ConvNet, ViT and AlterNet.

Usage: python docs/scripts/draw_story.py --runs FOLDER [--seed 0] [--out docs/story] [--cache build/story] [--readme README.md]

The spectrum is the runs' own result. Loss landscape and Fourier analysis are measured on the last checkpoints, which takes about
three minutes on two cores, and saved in the cache by run and settings. Runs are only read. ``story.json`` beside the pictures
has their conditions, and the page between ``<!-- story -->`` and ``<!-- end of story -->`` shows them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

import vitscope as vs
from vitscope.reports.run_entry import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import study_runs
from docs.scripts.page_images import save_webp

_BLOCK = re.compile(r"(<!-- story -->\n).*?(<!-- end of story -->)", re.DOTALL)
FAMILIES = ("convnet", "vit", "alternet")


@dataclass(frozen=True)
class Picture:
    """A picture of the three networks.

    Attributes:
        name: Name of its file.
        title: Title, which the name of the data set follows.
        analysis: The runs' own analysis that it shows; empty for one that is measured here.
        measure: Function from a probe to the result that is shown.
        images: Arguments of `vitscope.load_probe`.
        settings: Arguments of the measure.
        plot: Options of `vitscope.plot`.
    """

    name: str
    title: str
    analysis: str = ""
    measure: Callable[..., Any] | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    plot: Mapping[str, Any] = field(default_factory=dict)


PICTURES = (
    Picture(
        "spectrum", "Leading Hessian eigenvalues of mini-batches", analysis="hessian", plot={"figsize": (6.6, 3.2)}
    ),
    Picture(
        "landscape",
        "NLL (nats) on a filter-normalized random plane",
        measure=vs.loss_landscape,
        images={"split": "train", "augment": True, "n_images": 256, "batch_size": 256},
        settings={"n": 9, "span": 0.5},
        plot={"kind": "surface", "figsize": (8.4, 3.3)},
    ),
    Picture(
        "fourier",
        "Relative log amplitude of feature maps",
        measure=vs.relative_log_amplitude,
        images={"split": "test", "n_images": 512, "batch_size": 128},
        plot={"view": "depth", "figsize": (6.6, 2.6)},
    ),
)


def result_of(picture: Picture, entry: Entry, cache: Path) -> Any:
    """Return what a picture shows of a run: its own result, or one of the cache, measured where it is not there.

    Raises:
        ValueError: The run lacks the analysis.
    """
    if picture.measure is None:
        file = study_runs.measured_file(entry, picture.analysis)
        if file is None:
            raise ValueError(
                f"Expected analysis={picture.analysis} at the end of run {entry.id}, received a run without it."
            )
        return vs.load_result(file)
    settings = json.dumps([dict(picture.images), dict(picture.settings)], sort_keys=True)
    file = cache / f"{picture.name}-{entry.id}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.npz"
    if not file.is_file():
        result = picture.measure(vs.load_probe(entry.run.path, **picture.images), **picture.settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        result.save(file)
    return vs.load_result(file)


def draw(picture: Picture, entries: Mapping[str, Entry], cache: Path, out: Path) -> dict[str, Any]:
    """Draw a picture; return its conditions."""
    results = {name: result_of(picture, entry, cache) for name, entry in entries.items()}
    data = ", ".join(sorted({entry.data for entry in entries.values()}))
    # BatchNorm has statistics in some of the networks alone, so that their cards differ
    figure = vs.plot(results, allow_different=True, title=f"{picture.title}: {data}", **picture.plot)
    for axes in figure.axes:
        if hasattr(axes, "set_zlabel"):  # the title says what the height is; side by side the label is cut
            axes.set_zlabel("")
    print(save_webp(figure, out / f"{picture.name}.webp"), flush=True)
    plt.close(figure)
    card = next(iter(results.values())).card
    keys = ("data", "split", "augmentation", "n_images", "batch_size")
    return {"title": picture.title, **{key: getattr(card, key) for key in keys}}


def page_block(facts: Mapping[str, Any], folder: str) -> str:
    """Return the pictures with their captions.

    Args:
        facts: Content of ``story.json``.
        folder: Path of the pictures from the page.
    """
    pictures = facts["pictures"]
    data = pictures["spectrum"]["data"]
    epochs = ", ".join(sorted({f"{float(value):g}" for value in facts["epochs"].values()}))
    accuracies = ", ".join(f"{name} {value:.2f}" for name, value in facts["accuracy"].items())
    lines = [
        f"![{picture['title']}, {', '.join(facts['accuracy'])}, {picture['data']}]({folder}/{name}.webp)\n"
        for name, picture in pictures.items()
    ]
    return "\n".join([
        *lines,
        f"{data}: the spectrum of {pictures['spectrum']['n_images']} training images, the loss of "
        f"{pictures['landscape']['n_images']}, the Fourier figure of {pictures['fourier']['n_images']} test images. Small "
        f"networks after {epochs} epochs, seed {facts['seed']}, test accuracy {accuracies}. The pictures are examples of one "
        "seed.",
        "[docs/findings.md](docs/findings.md) tests the paper's claims over seeds, [docs/gallery.md](docs/gallery.md) has more "
        "figures. Drawn by",
        "`python docs/scripts/draw_story.py --runs runs/reproduce-cifar10_small`.",
    ])  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the study's runs")
    parser.add_argument("--seed", type=int, help="seed of the three runs; default: the lowest that all three have")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "story")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "story")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the page that shows the pictures")
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    runs = study_runs.finished_runs(options.runs)
    seed = study_runs.common_seed(runs, FAMILIES) if options.seed is None else options.seed
    entries = {
        study_runs.NAMES[family]: entry
        for family in FAMILIES
        if seed is not None and (entry := study_runs.find_run(runs, family, seed, "hessian"))
    }
    if len(entries) < len(FAMILIES):
        print(
            f"error: --runs={options.runs}: expected finished runs of {', '.join(FAMILIES)} with one seed and analysis=hessian, "
            f"received {', '.join(entries) or 'none'} of seed {seed}; wait for them or choose another --seed",
            file=sys.stderr,
        )
        return 3
    facts = {
        "seed": seed,
        "accuracy": {name: entry.metrics.get("test/accuracy") for name, entry in entries.items()},
        "epochs": {name: (entry.config.get("trainer") or {}).get("max_epochs") for name, entry in entries.items()},
        "pictures": {p.name: draw(p, entries, options.cache, options.out) for p in PICTURES},
    }
    (options.out / "story.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    folder = Path(os.path.relpath(options.out.resolve(), options.readme.resolve().parent)).as_posix()
    text, n_blocks = _BLOCK.subn(lambda m: f"{m[1]}\n{page_block(facts, folder)}\n{m[2]}", options.readme.read_text())
    if n_blocks != 1:
        print(f"error: {options.readme}: expected one block <!-- story -->, received {n_blocks}", file=sys.stderr)
        return 2
    options.readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
