"""Draw the gallery: figures of trained networks and structures of timm's families, each with its card and the command.

Usage: python docs/scripts/draw_gallery.py [--runs FOLDER] [--study FOLDER] [--resnet20 FILE] [--timm] [--data FOLDER]
                                           [--out docs/gallery] [--cache build/gallery]

  --runs      run folders of ``make table-claims PROFILE=cifar10_small``; figures of their results, those of ``analyze.py`` too
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
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

import vitscope as vs
from vitscope.reports.figures import claims_figure
from vitscope.reports.run_entry import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import study_runs, write_findings
from docs.scripts.gallery_figures import RECEPTIVE, RESNET20, SIGHT, STUDY, TIMM, GalleryFigure
from docs.scripts.gallery_page import Text, card_of, page_text, read_texts, write_entry
from docs.scripts.structure_figure import draw_structures

OUT = ROOT / "docs" / "gallery"


def draw_study(runs: Path, out: Path) -> list[str]:
    """Draw the figures of a study's runs; return the names of those for which runs are missing."""
    entries, missing = study_runs.finished_runs(runs), []
    for shown in (*STUDY, *SIGHT):
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
        report = f"python report.py 'runs=[{folders}]' 'analyses=[{shown.analysis}]' allow_different=true"
        write_entry(out, figure, Text(
            f"{shown.group}-{shown.file}", shown.group, shown.title,
            f"{shown.caption} {seeds} Test accuracy: {accuracies}.",
            f"{_measurement(shown)}{report}", card_of(results),
        ))  # fmt: skip
    return missing


def _measurement(shown: GalleryFigure) -> str:
    """Return the command that measures what a training of the profile has not measured, empty where it has."""
    if shown.group == "study":
        return ""
    analysis = shlex.join([f"analysis=[{shown.analysis}]", *shown.overrides])
    return f"python analyze.py 'run=runs/<name>' {analysis}  # of each network\n"


def _runs_of(shown: GalleryFigure, entries: Sequence[Entry]) -> dict[str, Entry]:
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
        "Effect of every statistic of the paper's claims in standard deviations between seeds, with its 95 % t-interval over "
        "seeds; right of zero is as claimed.",
        f"make table-claims FROM={name}",
        {"data": ", ".join(data), "seeds": claims_figure.seeds_text(judged).removesuffix(" seeds")},
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
    contribution = (
        "analysis.effective_receptive_field.contribution=channels"  # LayerNorms make gradients of channels cancel
    )
    analysis = ["analysis=[effective_receptive_field]", contribution, "probe.split=test", "probe.n_images=8"]
    results = {}
    for model in RECEPTIVE:
        network = ["model=timm", f"model.name={model}", "data=photographs"]
        run_analysis(network, analysis, (cache / model).resolve())
        results[TIMM[model]] = newest_result(cache / model, "effective_receptive_field")
    figure = vs.plot(results, view="depth", title="Random weights, photographs", allow_different=True)
    write_entry(out, figure, Text(
        "timm-receptive-field", "timm", "Effective receptive fields (random weights)",
        "Radii around the central position of each stage's map that hold 50, 90 and 99 % of its dependence on the image, over "
        "depth. With random weights they follow from kernels, strides, windows and shortcuts alone. Squared gradients of "
        "channels are added, since a LayerNorm makes those of their sum cancel.",
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
