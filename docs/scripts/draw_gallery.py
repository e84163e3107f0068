"""Draw the gallery: figures of trained networks and structures of timm's families, each with its card and the command.

Usage: python docs/scripts/draw_gallery.py [--runs FOLDER] [--study FOLDER] [--resnet20 FILE] [--timm] [--data FOLDER]
                                           [--out docs/gallery] [--cache build/gallery]

  --runs      run folders of ``make table-claims PROFILE=cifar10_small``; figures of their own results
  --study     a study that ``export=`` has written: the figure of all claims
  --resnet20  a checkpoint of He et al.'s ResNet-20 for CIFAR, measured on the images in ``--data`` (default: those of ``--runs``)
  --timm      structures of timm's families, with random weights
  --data      folder that holds ``cifar-10-batches-py``, CIFAR-10 encoded again as JPEG

Each entry is a figure ``<name>.webp`` and its text ``<name>.json`` in ``--out``; entries that are not drawn now stay. The page,
``<out>.md``, is written from all texts. Run folders are only read; what is measured here is kept in the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

import vitscope as vs
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.figures import claims_figure
from vitscope.reports.run_entry import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import study_runs, write_findings  # noqa: E402  needs the path above
from docs.scripts.page_images import save_webp  # noqa: E402  needs the path above
from docs.scripts.structure_figure import draw_structures  # noqa: E402  needs the path above

OUT = ROOT / "docs" / "gallery"
#: headings of the page in their order, by the group of an entry
GROUPS = {
    "study": "Small networks on CIFAR-10 (JPEG)",
    "resnet20": "A public ResNet-20 on CIFAR-10 (JPEG)",
    "timm": "Structures of timm's families",
}
INTRODUCTIONS = {
    "study": "Networks of the profile `cifar10_small`: 0.3 to 0.6 million parameters, few epochs, one seed a figure. One seed is "
    "an example and no evidence; [findings.md](findings.md) has intervals over seeds.",
    "resnet20": "A checkpoint of the ResNet for CIFAR of He et al. (2016), trained by others on the original CIFAR-10 (published "
    "test error 8.27 %). The images here are CIFAR-10 encoded again as JPEG: no number is comparable with published ones.",
    "timm": "Random weights: these figures show how the networks are built, and nothing that training has made.",
}
OPENING = """# Gallery

Figures of real networks, each with the conditions of its measurement and the command that makes it.
`python docs/scripts/draw_gallery.py --help` says how the page is made.
"""
#: keys of the card that the page states
CARD_KEYS = ("data", "split", "augmentation", "n_images", "batch_size", "mode", "dtype")


@dataclass(frozen=True)
class Text:
    """Text of an entry of the gallery.

    Attributes:
        name: Name of its files.
        group: Of `GROUPS`.
        title: Heading.
        caption: What is seen in the figure.
        command: The command that measures and draws the same.
        card: Conditions of the measurement.
    """

    name: str
    group: str
    title: str
    caption: str
    command: str
    card: Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A figure of results of one analysis.

    Attributes:
        analysis: The analysis.
        title: Heading of the entry and title of the figure.
        caption: What is seen.
        models: Families of `study_runs.NAMES`; for an AlterNet with something else in attention's place ``alternet:blur``.
        overrides: Settings of the measurement.
        plot: Options of `vitscope.plot`.
        name: Name of its files; the analysis by default.
    """

    analysis: str
    title: str
    caption: str
    models: Sequence[str] = ("convnet", "vit", "alternet")
    overrides: Sequence[str] = ()
    plot: Mapping[str, Any] | None = None
    name: str = ""

    @property
    def file(self) -> str:
        """Name of its files without the group."""
        return self.name or self.analysis


STUDY = (
    Shown("hessian", "Leading Hessian eigenvalues",
          "Density of the five leading eigenvalues of each mini-batch Hessian. Marks on the axis are the eigenvalues.",
          ("convnet", "vit", "pit", "swin", "alternet")),
    Shown("branch_transfer", "Frequencies that branches pass",
          "Transfer of residual branches, highest minus lowest third of the frequencies, trained minus initial, by unit and "
          "kind."),
    Shown("variance", "Variance of feature maps", "Spatial variance over depth, and its logarithmic ratio across each unit."),
    Shown("lesion", "Removal of single units", "Change of accuracy where one residual unit is removed from the trained network."),
    Shown("cka", "Similarity of layers", "Unbiased mini-batch CKA of every pair of feature maps."),
    Shown("frequency_noise", "Noise of one frequency band",
          "Change of accuracy under noise of equal root mean square in each band of frequencies.", ("convnet", "vit")),
    Shown("hessian", "Leading Hessian eigenvalues with and without attention",
          "The same for AlterNet and for other operations in the places of its attention.",
          ("alternet", "alternet:conv", "alternet:uniform", "alternet:blur"), name="mixers"),
    Shown("corruption", "Corrupted images", "Accuracy under 15 corruptions at 5 severities."),
)  # fmt: skip

RESNET20 = (
    Shown("hessian", "ResNet-20: leading Hessian eigenvalues",
          "Density of the five leading eigenvalues of each mini-batch Hessian of 16 images.",
          overrides=("analysis.hessian.probe.n_images=160",)),
    Shown("spectral_density", "ResNet-20: density of all eigenvalues",
          "Density of the Hessian's spectrum by stochastic Lanczos quadrature.",
          overrides=("analysis.spectral_density.probe.n_images=64", "analysis.spectral_density.n_vectors=2")),
    Shown("landscape", "ResNet-20: loss landscape", "Loss over a filter-normalized random plane through the trained weights.",
          overrides=("analysis.landscape.n=11", "analysis.landscape.span=0.5", "analysis.landscape.probe.n_images=128",
                     "analysis.landscape.probe.batch_size=128")),
    Shown("fourier", "ResNet-20: frequencies of feature maps",
          "Relative log amplitude of the feature maps over frequency, and at the highest frequency over depth.",
          overrides=("analysis.fourier.probe.n_images=256",)),
    Shown("effective_receptive_field", "ResNet-20: effective receptive field",
          "Pixels that the central position of the last feature map depends on, with the radii of 50, 90 and 99 %; below "
          "it, the change by training.",
          overrides=("analysis.effective_receptive_field.probe.n_images=64",)),
    Shown("lesion", "ResNet-20: removal of single blocks", "Change of accuracy where one block's branch is removed.",
          overrides=("analysis.lesion.probe.n_images=500",), plot={"title": "ResNet-20, CIFAR-10 (JPEG)"}),
    Shown("cka", "ResNet-20: similarity of layers", "Unbiased mini-batch CKA of every pair of feature maps.",
          overrides=("analysis.cka.probe.n_images=400",)),
    Shown("calibration", "ResNet-20: calibration",
          "Reliability diagram on all test images, before and after temperature scaling fitted on held-out images."),
)  # fmt: skip

#: timm's models of the structure figures and their names
TIMM = {
    "resnet50": "ResNet-50", "convnext_tiny": "ConvNeXt-T", "vit_small_patch16_224": "ViT-S/16",
    "swin_tiny_patch4_window7_224": "Swin-T", "mixer_b16_224": "Mixer-B/16", "coatnet_0_224": "CoAtNet-0",
}  # fmt: skip
RECEPTIVE = ("resnet50", "convnext_tiny", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def write_entry(out: Path, figure: Figure, text: Text) -> None:
    """Write an entry's figure and text."""
    print(save_webp(figure, out / f"{text.name}.webp"), flush=True)
    plt.close(figure)
    (out / f"{text.name}.json").write_text(json.dumps(asdict(text), indent=1) + "\n", encoding="utf-8")


def card_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions that results share, the checkpoint of each, and the measure's options."""
    cards: dict[str, ObjectiveCard] = {name: result.card for name, result in results.items()}
    first = next(iter(cards.values()))
    card = {key: getattr(first, key) for key in CARD_KEYS if len({getattr(c, key) for c in cards.values()}) == 1}
    card["objective"] = f"{first.loss}, l2 {first.l2}, weight decay {first.weight_decay:g}"
    options = {key: value for key, value in (first.options or {}).items() if isinstance(value, (int, float, str, bool))}
    return {**card, "options": options, "checkpoints": {name: c.checkpoint for name, c in cards.items()}}


def page_text(texts: Iterable[Mapping[str, Any]], folder: str) -> str:
    """Return the page.

    Args:
        texts: Texts of the entries, as `Text` has them.
        folder: Path of the figures from the page.
    """
    lines = [OPENING]
    texts = list(texts)
    for group, heading in GROUPS.items():
        members = [text for text in texts if text["group"] == group]
        if not members:
            continue
        lines += [f"## {heading}", "", INTRODUCTIONS[group], ""]
        for text in members:
            lines += [
                f"### {text['title']}", "", f"![{text['title']}]({folder}/{text['name']}.webp)", "", text["caption"], "",
                "```bash", text["command"], "```", "", f"Card: {_card_text(text['card'])}.", "",
            ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _card_text(card: Mapping[str, Any]) -> str:
    parts = []
    for key, value in card.items():
        if isinstance(value, Mapping):
            if value:
                parts.append(f"{key} ({', '.join(f'{name} {_value(v)}' for name, v in value.items())})")
        else:
            parts.append(f"{key.replace('_', ' ')} {_value(value)}")
    return "; ".join(parts)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_texts(out: Path) -> list[dict[str, Any]]:
    """Return the texts of all entries in the order of the page."""
    texts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    order = [f"study-{shown.file}" for shown in STUDY] + [f"resnet20-{shown.analysis}" for shown in RESNET20]
    return sorted(texts, key=lambda text: order.index(text["name"]) if text["name"] in order else len(order))


def draw_study(runs: Path, out: Path) -> list[str]:
    """Draw the figures of a study's runs; return the names of those for which runs are missing."""
    entries, missing = study_runs.finished_runs(runs), []
    for shown in STUDY:
        chosen = _runs_of(shown, entries)
        if not chosen:
            missing.append(shown.file)
            continue
        results = {}
        for name, entry in chosen.items():
            file = study_runs.measured_file(entry, shown.analysis)
            assert file is not None
            results[name] = vs.load_result(file)
        first = next(iter(chosen.values()))
        figure = vs.plot(results, allow_different=True, title=first.data, **(shown.plot or {}))
        folders = ",".join(f"runs/<{name}>" for name in chosen)
        seeds = f"Seed {first.seed}, {(first.config.get('trainer') or {}).get('max_epochs')} epochs."
        accuracies = ", ".join(
            f"{name} {entry.metrics['test/accuracy']:.3f}"
            for name, entry in chosen.items()
            if entry.metrics.get("test/accuracy")
        )
        write_entry(out, figure, Text(
            f"study-{shown.file}", "study", shown.title, f"{shown.caption} {seeds} Test accuracy: {accuracies}.",
            f"python report.py 'runs=[{folders}]' 'analyses=[{shown.analysis}]' allow_different=true", card_of(results),
        ))  # fmt: skip
    return missing


def _runs_of(shown: Shown, entries: Sequence[Entry]) -> dict[str, Entry]:
    """Return the runs of a figure with their names: of the lowest seed of which all are there, {} without one."""
    for seed in sorted({entry.seed for entry in entries}):
        chosen = {}
        for model in shown.models:
            family, _, mixer = model.partition(":")
            entry = study_runs.find_run(entries, family, seed, shown.analysis, mixer or "msa")
            if entry is not None:
                chosen[study_runs.NAMES[family] + (f", {mixer}" if mixer else "")] = entry
        if len(chosen) == len(shown.models):
            return chosen
    return {}


def draw_claims(study: Path, out: Path) -> None:
    """Draw the effects of all statistics of a study's claims."""
    judged, entries = write_findings.judge_study(study)
    data = write_findings.study_export.data_names(entries)
    figure = claims_figure.draw(judged, data)
    if figure is None:
        print(f"no figure of the claims: {study} has one seed", file=sys.stderr)
        return
    name = study.relative_to(ROOT).as_posix() if study.is_relative_to(ROOT) else study.name
    write_entry(out, figure, Text(
        "study-claims", "study", "Effects of all claims",
        "Effect of every statistic of the paper's claims in standard deviations between seeds, with its 95 % interval; right of "
        "zero is as claimed.",
        f"make table-claims FROM={name}", {"data": ", ".join(data), "seeds": len({entry.seed for entry in entries})},
    ))  # fmt: skip


def run_analysis(network: Sequence[str], analyses: Sequence[str], run: Path) -> None:
    """Run `analyze.py` with a network of this folder; a run folder that is there goes on, with the results that it has.

    Args:
        network: Arguments that choose the network, its weights and the images.
        analyses: Arguments that choose the analyses and their settings.
        run: The run folder.
    """
    place = [f"run={run}"] if (run / "config.yaml").is_file() else [*network, "logger=none", f"run_dir={run}"]
    words = [sys.executable, str(ROOT / "analyze.py"), *place, *analyses]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "docs" / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"VITSCOPE_TRUST": "cifar_resnet", "PYTHONPATH": path}
    if subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"failed: {shlex.join(words)}")


def newest_result(run: Path, analysis: str) -> Any:
    """Return the newest result of an analysis in a run folder."""
    return vs.load_result(max((run / "results" / analysis).glob("*.npz"), key=lambda file: file.stat().st_mtime))


def checksums(data: Path) -> str:
    """Return the override that admits the files of a data folder in CIFAR's format."""
    files = sorted((data / "cifar-10-batches-py").iterdir())
    sums = {file.name: hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() for file in files}
    return f"data.source.checksums={{{','.join(f'{name}:{value}' for name, value in sums.items())}}}"


def draw_resnet20(checkpoint: Path, data: Path, cache: Path, out: Path) -> None:
    """Measure the public ResNet-20 and draw its figures."""
    model = ["model=module", "model._target_=cifar_resnet.CifarResNet", "data=cifar10_jpeg",
             "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"]  # fmt: skip
    place = [f"ckpt_path={checkpoint.resolve()}", f"data.root={data.resolve()}", checksums(data)]
    run = (cache / "resnet20").resolve()
    names = ",".join(["evaluation", *(shown.analysis for shown in RESNET20)])
    overrides = [override for shown in RESNET20 for override in shown.overrides]
    run_analysis([*model, *place], [f"analysis=[{names}]", *overrides], run)
    accuracy = newest_result(run, "evaluation").accuracy
    for shown in RESNET20:
        results = {"ResNet-20, CIFAR-10 (JPEG)": newest_result(run, shown.analysis)}
        figure = vs.plot(results, **(shown.plot or {}))
        command = (
            "VITSCOPE_TRUST=cifar_resnet PYTHONPATH=docs/scripts python analyze.py "
            + shlex.join([*model, "ckpt_path=cifar10_resnet20.th", "data.root=data"])
            + " 'data.source.checksums={...}' "
            + shlex.join([f"analysis=[{shown.analysis}]", *shown.overrides])
        )
        write_entry(out, figure, Text(
            f"resnet20-{shown.analysis}", "resnet20", shown.title,
            f"{shown.caption} Accuracy on all {newest_result(run, 'evaluation').n_images:,} test images: {accuracy:.4f}.",
            command, card_of(results),
        ))  # fmt: skip


def draw_timm(cache: Path, out: Path) -> None:
    """Draw structures and effective receptive fields of timm's families with random weights."""
    import timm

    structures = {name: vs.structure(timm.create_model(model)) for model, name in TIMM.items()}
    note = {"weights": "random", "package": f"timm {timm.__version__}"}
    write_entry(out, draw_structures(structures), Text(
        "timm-structure", "timm", "Units over depth (random weights)",
        "Each bar is one unit of the network in its order; its height is the unit's number of parameters on a logarithmic scale, "
        "its color the kind of unit. Vertical lines are boundaries of stages.",
        "python -c \"import timm, vitscope as vs; print(vs.structure(timm.create_model('swin_tiny_patch4_window7_224')))\"",
        {**note, "models": {name: model for model, name in TIMM.items()}},
    ))  # fmt: skip
    analysis = ["analysis=[effective_receptive_field]", "probe.split=test", "probe.n_images=8"]
    results = {}
    for model in RECEPTIVE:
        network = ["model=timm", f"model.name={model}", "data=photographs"]
        run_analysis(network, analysis, (cache / model).resolve())
        results[TIMM[model]] = newest_result(cache / model, "effective_receptive_field")
    figure = vs.plot(results, view="depth", title="Random weights, photographs", allow_different=True)
    write_entry(out, figure, Text(
        "timm-receptive-field", "timm", "Effective receptive fields (random weights)",
        "Radii around the central position of each stage's map that hold 50, 90 and 99 % of its dependence on the image, over "
        "depth. With random weights they follow from kernels, strides, windows and shortcuts alone.",
        "python analyze.py model=timm model.name=resnet50 data=photographs " + shlex.join(analysis),
        {**card_of(results), **note},
    ))  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Draw what is named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("runs", "study", "resnet20", "data"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--timm", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gallery")
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    if options.runs:
        missing = draw_study(options.runs, options.out)
    if options.study:
        draw_claims(options.study.resolve(), options.out)
    if options.resnet20:
        data = options.data or (options.runs and _data_root(options.runs))
        if not data:
            print("error: --data: expected the folder that holds cifar-10-batches-py, received none", file=sys.stderr)
            return 2
        draw_resnet20(options.resnet20, data, options.cache, options.out)
    if options.timm:
        draw_timm(options.cache, options.out)
    page = options.out.parent / f"{options.out.name}.md"
    page.write_text(page_text(read_texts(options.out), options.out.name), encoding="utf-8")
    print(page)
    for analysis in missing:
        print(
            f"missing: {analysis}: no seed of {options.runs} has finished runs of all of its networks", file=sys.stderr
        )
    return 3 if missing else 0


def _data_root(runs: Path) -> Path | None:
    """Return where the runs' images are."""
    roots = [(entry.config.get("data") or {}).get("root") for entry in study_runs.finished_runs(runs)]
    return next((Path(root) for root in roots if root), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
