"""Draw the gallery's figures of curvature: stability over steps, block spectra, barriers and exponents.

Usage: python docs/scripts/draw_curvature.py [--results FOLDER] [--gap FOLDER] [--out docs/gallery]

  --results  results of ``docs/scripts/curvature_results.py``; without it only the figure of stability is drawn, from the
             series that ``docs/scripts/stability_runs.py`` has written to ``docs/gallery/series``
  --gap      run folders of ``make sharpness-gap PROFILE=cifar10_small``

Each entry is a figure and its text, as those of ``docs/scripts/draw_gallery.py``; the page is written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import vitscope as vs
from vitscope.plotting.api import STYLE
from vitscope.plotting.style import KIND_LABELS
from vitscope.reports.figures import run_correlations, scatter_figures
from vitscope.reports.value_lookup import Selection
from vitscope.reproduce import plan

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import stability_runs, study_runs
from docs.scripts.gallery_page import Text, card_of, page_text, read_texts, write_entry
from docs.scripts.study_runs import NAMES

OUT = ROOT / "docs" / "gallery"
SHARPNESS_COLOR, LIMIT_COLOR, RATE_COLOR = "#0072B2", "#D55E00", "0.35"


def _complete_optimizers(series: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each optimizer of which all networks have a series."""
    return {
        optimizer: name
        for optimizer, (name, _) in stability_runs.OPTIMIZERS.items()
        if all(f"{network}-{optimizer}" in series for network in stability_runs.NETWORKS)
    }


def draw_stability(series: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw sharpness, limit and learning rate over steps: a row an optimizer, a column a network."""
    optimizers, networks = _complete_optimizers(series), stability_runs.NETWORKS
    figure = Figure(figsize=(7.0, 2.0 * len(optimizers) + 0.3), layout="constrained")
    panels = figure.subplots(
        2 * len(optimizers), len(networks), sharex=True, height_ratios=[3.2, 1.0] * len(optimizers), squeeze=False
    )
    for row, (optimizer, optimizer_name) in enumerate(optimizers.items()):
        for column, (network, (network_name, _)) in enumerate(networks.items()):
            upper, lower = panels[2 * row : 2 * row + 2, column]
            _draw_run(upper, lower, series[f"{network}-{optimizer}"])
            if row == 0:
                upper.set_title(network_name)
            if column == 0:
                upper.set_ylabel(f"{optimizer_name}\nSharpness")
                lower.set_ylabel("Rate")
    for ax in panels[-1]:
        ax.set_xlabel("Optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles = [
        Line2D([], [], color=SHARPNESS_COLOR, marker="o", markersize=2.5, linewidth=1.0),
        Line2D([], [], color=LIMIT_COLOR, linestyle="--", linewidth=1.0),
        Line2D([], [], color=RATE_COLOR, linewidth=1.0),
    ]
    labels = ["Sharpness (AdamW: of the preconditioned Hessian)", "Limit of stability", "Learning rate"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.align_ylabels(panels[:, 0])
    return figure


def _draw_run(upper: Axes, lower: Axes, run: Mapping[str, Any]) -> None:
    steps, sharpness, limit, rate = (np.array(run[name], dtype=float) for name in ("steps", "sharpness", "limit", "lr"))
    is_known = np.isfinite(limit)  # Adam has no preconditioner before its first step
    is_shown = is_known & (sharpness > 0)
    upper.errorbar(
        steps[is_shown], sharpness[is_shown], np.array(run["sharpness_error"], dtype=float)[is_shown],
        color=SHARPNESS_COLOR, marker="o", markersize=2.2, linewidth=1.0, elinewidth=0.7, capsize=0,
    )  # fmt: skip
    is_open = is_shown & ~np.array(run["sharpness_converged"], dtype=bool)
    upper.plot(steps[is_open], sharpness[is_open], "o", color=SHARPNESS_COLOR, markerfacecolor="white", markersize=3)
    upper.step(steps[is_known], limit[is_known], where="post", color=LIMIT_COLOR, linestyle="--", linewidth=1.0)
    upper.set_yscale("log")
    shown = np.concatenate([sharpness[is_shown], limit[is_known]])
    upper.set_ylim(0.6 * shown.min(), 1.8 * shown.max())
    lower.step(steps, rate, where="post", color=RATE_COLOR, linewidth=1.0)
    lower.set_ylim(0, 1.3 * rate.max())
    lower.set_yticks([rate.max()], [f"{rate.max():g}"])


def stability_text(series: Mapping[str, Mapping[str, Any]]) -> Text:
    """Return the caption of the figure of stability, with the numbers of each run."""
    optimizers, networks = _complete_optimizers(series), stability_runs.NETWORKS
    parts = []
    for optimizer, optimizer_name in optimizers.items():
        texts = [f"{name} {_ratio_text(series[f'{network}-{optimizer}'])}" for network, (name, _) in networks.items()]
        parts.append(f"{optimizer_name}: {'; '.join(texts)}")
    caption = (
        "Largest eigenvalue of the Hessian of the training loss (SGD), or of the Hessian with AdamW's preconditioner, every 6 "
        "steps of full-batch training on 100 training images (10 of each class) of CIFAR-10 (JPEG), and the limit above which "
        "the optimizer's steps diverge on a quadratic loss. Each panel is one run with one seed and 120 steps; the learning rate "
        "is halved after step 90, which doubles the limit. Even steps alone are measured: where the weights oscillate with "
        "period two, they are of one phase. ConvNet-18 of width 8 (176,402 parameters), ViT of width 48 with 3 "
        "blocks (90,490), AlterNet-18 of width 8 (95,797). Cross entropy, no augmentation, no weight decay, BatchNorm with the "
        "statistics of the batch of all images. Learning rates were chosen with short runs so that the limit is in reach. "
        "Sharpness over its limit, first known value, median and range of steps 48 to 84, and last value: "
        + ". ".join(parts)
        + "."
    )
    return Text(
        "curvature-stability", "curvature", "Sharpness and the limit of stability", caption,
        "python docs/scripts/stability_runs.py --data data && python docs/scripts/draw_curvature.py",
        {"data": "CIFAR-10 (JPEG)", "split": "train", "augmentation": "none", "n_images": 100, "batch_size": 100,
         "bn": "batch", "dtype": "float32", "objective": "cross entropy", "seed": 0,
         "learning rates": {f"{network}-{optimizer}": rates[optimizer] for network, rates in stability_runs.RATES.items()
                            for optimizer in optimizers},
         "last training loss": {name: round(run["last_loss"], 2) for name, run in series.items()}},
    )  # fmt: skip


def _ratio_text(run: Mapping[str, Any]) -> str:
    steps = np.array(run["steps"])
    ratio = np.array(run["sharpness"], dtype=float) / np.array(run["limit"], dtype=float)
    late = ratio[(steps >= 48) & (steps < 90)]
    first = ratio[np.isfinite(ratio)][0]
    return f"{first:.2f}, {np.median(late):.2f} [{late.min():.2f}, {late.max():.2f}], {ratio[-1]:.2f}"


def draw_results(folder: Path, out: Path) -> None:
    """Draw barriers, exponents and block spectra from saved results."""
    for measure, title in (
        ("barrier", "Barriers between two seeds"),
        ("exponents", "Exponents of curvature"),
        ("blocks", "Spectra of the Hessian's blocks"),
    ):
        files = {name: folder / f"{measure}-{family}.npz" for family, name in NAMES.items()}
        results = {name: vs.load_result(file) for name, file in files.items() if file.is_file()}
        if not results:
            continue
        figure = vs.plot(results, allow_different=True)
        caption = {"barrier": _barrier_text, "exponents": _exponents_text, "blocks": _blocks_text}[measure](
            results, folder
        )
        command = (
            f"python docs/scripts/curvature_results.py --runs RUNS --only {measure} && "
            "python docs/scripts/draw_curvature.py --results build/curvature"
        )
        write_entry(out, figure, Text(f"curvature-{measure}", "curvature", title, caption, command, card_of(results)))


def _barrier_text(results: Mapping[str, Any], folder: Path) -> str:
    numbers = ". ".join(
        f"{name}: {r.barrier_unaligned:.2f} nats without and {r.barrier:.2f} with matched units (accuracy "
        f"{r.accuracy[0]:.3f} and {r.accuracy[-1]:.3f} at the ends, Euclidean distance {r.distance_unaligned:.1f} and "
        f"{r.distance:.1f})"
        for name, r in results.items()
    )
    return (
        "Loss of 512 test images on the straight way between the networks of seeds 0 and 1, as they are and after the "
        "units of one were permuted to match the other by their weights (`vs.align_weights`); the ConvNet's BatchNorm statistics "
        f"are recomputed at each point. One pair of seeds a network, trained for 2 epochs. Barriers: {numbers}."
    )


def _exponents_text(results: Mapping[str, Any], folder: Path) -> str:
    texts = []
    for operator, file in (("Hessian", "exponents"), ("Gauss-Newton matrix", "exponents_ggn")):
        for family, name in NAMES.items():
            path = folder / f"{file}-{family}.npz"
            if path.is_file():
                texts.append(f"{operator}, {name}: {_kinds_text(vs.load_result(path))}")
    return (
        "Slope of the logarithm of the curvature along singular directions of each layer's gradient on that of the singular "
        "values, with 95 % intervals of the fits over 10 directions; seed 0 after 2 epochs, 32 training images. Mean over the "
        "layers of a kind with its 95 % interval over layers: " + ". ".join(texts) + "."
    )


def _kinds_text(result: Any) -> str:
    parts = []
    for kind, mean, (low, high) in zip(result.groups, result.mean_exponents, result.mean_exponent_intervals):
        exponents = result.exponents[[k == kind for k in result.kinds]]
        n = int(np.isfinite(exponents).sum())
        interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
        parts.append(f"{KIND_LABELS.get(kind, kind)} {mean:.2f}{interval} ({n} of {len(exponents)} layers)")
    return ", ".join(parts)


def _blocks_text(results: Mapping[str, Any], folder: Path) -> str:
    numbers = ". ".join(
        f"{name}: mean distance {r.mean_js:.3f} [{r.mean_js_interval[0]:.3f}, {r.mean_js_interval[1]:.3f}] over {len(r.blocks)} "
        f"blocks, distance between halves of the vectors {np.mean(r.js_noise):.3f}"
        for name, r in results.items()
    )
    return (
        "Jensen-Shannon distances between the spectral densities of the Hessian's diagonal blocks (a block: a weight matrix or "
        "kernel with its bias), eigenvalues over the largest magnitude of their block, so that shapes are compared; below, the "
        "largest and the mean eigenvalue of each block, without a point where the mean is not positive. Seed 0 after 2 epochs, "
        f"32 training images, no weight decay, 2 probe vectors of 10 Lanczos steps a block. {numbers}."
    )


def draw_gap(runs: Path, out: Path) -> None:
    """Draw measures of sharpness against the generalization gap of the runs of ``make sharpness-gap``."""
    relation = plan.target("sharpness-gap", plan.read(), "cifar10_small").relations[0]
    selection = Selection(study_runs.finished_runs(runs))
    points, _ = scatter_figures.collect(selection, relation.x, relation.y, "gap")
    correlations = run_correlations.correlations(selection, relation.x, relation.y)
    texts = [run_correlations.text(correlation) for correlation in correlations.values()]
    figure = scatter_figures.draw(points, relation.x, relation.y, texts)
    first = selection.entries[0]
    write_entry(out, figure, Text(
        "curvature-gap", "curvature", "Sharpness and the generalization gap",
        "Adaptive measures of sharpness and the mean rise of the NLL over the accuracy on clean training images minus that on "
        f"test images; two networks, two recipes and three learning rates, seed {first.seed}. The sampling error of a gap is "
        "about 0.007.",
        "make sharpness-gap PROFILE=cifar10_small",
        {"data": first.data, "runs": len(selection.entries), "epochs": (first.config.get("trainer") or {}).get("max_epochs")},
    ))  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw what there is, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--gap", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.gap:
        draw_gap(options.gap, options.out)
    if stability_runs.SERIES.is_file():
        series = json.loads(stability_runs.SERIES.read_text(encoding="utf-8"))
        with style.context(STYLE):
            write_entry(options.out, draw_stability(series), stability_text(series))
    if options.results:
        draw_results(options.results, options.out)
    page = options.out.parent / f"{options.out.name}.md"
    page.write_text(page_text(read_texts(options.out), options.out.name), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
