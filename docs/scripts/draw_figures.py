"""Draw the figures of the diagnostics' pages into ``docs/figures``: two networks are trained once, then measured.

Usage: python docs/scripts/draw_figures.py [--runs=FOLDER] [--missing] [analysis ...]

Without names every figure is drawn, with ``--missing`` those that are not there. The settings of each stand in its source in
``docs/diagnostics``. Runs are kept in ``runs/docs`` and results in them, so that a figure is drawn again in seconds. Training
takes about five minutes on two cores, all measurements about half an hour.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

import vitscope as vs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts import diagnostic_pages

#: settings of the training of each run, and the name in figures
RUNS = {
    "convnet": ("ConvNet-18", ["model=convnet", "data=photos", "trainer.max_epochs=4"]),
    "vit": ("ViT-Ti/4, 6 layers", ["model=vit", "model.depth=6", "data=photos", "trainer.max_epochs=8"]),
    "shapes": ("ConvNet-18", ["model=convnet", "data=shapes"]),
    # measured while it trains, by full-batch gradient descent
    "descent": (
        "ViT-Ti/8, 2 layers",
        ["experiment=edge_of_stability", "model=vit", "model.depth=2", "model.patch_size=8", "data=photos",
         "data.fraction=0.0125", "data.batch_size=256", "optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=0.02",
         "trainer.check_val_every_n_epoch=100",
         "analysis.edge_of_stability.probe.n_images=null", "analysis.edge_of_stability.probe.batch_size=256"],
    ),
}  # fmt: skip
#: pixels of a figure's larger side at most
SIZE = 1200
#: bytes of all figures at most
LIMIT = 3_000_000


def run_script(script: str, arguments: list[str]) -> None:
    """Run `train.py` or `analyze.py`; its messages go to this program's output."""
    words = [sys.executable, str(ROOT / script), *arguments, "logger=none"]
    if subprocess.run(words, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {' '.join(words)}")


def trained(name: str, folder: Path) -> Path:
    """Return the folder of a run, trained where it is not there."""
    run = folder / name
    if not (run / "checkpoints" / "last.ckpt").is_file():
        analyses = [] if name == "descent" else ["callbacks.checkpoint.snapshots=log", "analysis=[]"]
        run_script("train.py", [*RUNS[name][1], *analyses, f"run_dir={run}"])
    return run


def measure(analyses: list[str], folder: Path) -> None:
    """Measure what the figures of some pages show, with one command for each run."""
    sources = [diagnostic_pages.read_source(analysis) for analysis in analyses]
    for name in RUNS:
        chosen = [source for source in sources if name in source.figure.models]
        if chosen and name == "descent":
            trained(name, folder)
        elif chosen:
            overrides = [override for source in chosen for override in source.figure.overrides]
            names = ",".join(source.analysis for source in chosen)
            run_script("analyze.py", [f"run={trained(name, folder)}", f"analysis=[{names}]", *overrides])


def draw(analysis: str, folder: Path) -> Path:
    """Draw the figure of a page from the newest results."""
    settings = diagnostic_pages.read_source(analysis).figure
    results = {}
    for name in settings.models:
        files = (folder / name / "results" / analysis).glob("*.npz")
        results[RUNS[name][0]] = vs.load_result(max(files, key=lambda file: file.stat().st_mtime))
    # the two networks need not share a card: BatchNorm has statistics in one of them alone
    figure = vs.plot(results, allow_different=True, **settings.plot)
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=200, format="png")
    plt.close(figure)
    image = Image.open(pixels).convert("RGB")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    file = diagnostic_pages.FIGURES / f"{analysis}.webp"
    file.parent.mkdir(exist_ok=True)
    image.save(file, quality=82, method=6)
    return file


def main(arguments: list[str]) -> None:
    """Draw the figures that are named."""
    folder = ROOT / "runs" / "docs"
    names = [argument for argument in arguments if not argument.startswith("--")]
    for argument in arguments:
        if argument.startswith("--runs="):
            folder = Path(argument.partition("=")[2]).resolve()
    names = names or diagnostic_pages.analyses()
    if "--missing" in arguments:
        names = [name for name in names if not (diagnostic_pages.FIGURES / f"{name}.webp").is_file()]
    measure(names, folder)
    for analysis in names:
        print(draw(analysis, folder), flush=True)
    total = sum(file.stat().st_size for file in diagnostic_pages.FIGURES.iterdir())
    if total > LIMIT:
        sys.exit(f"the figures have {total} bytes together, more than {LIMIT}")


if __name__ == "__main__":
    main(sys.argv[1:])
