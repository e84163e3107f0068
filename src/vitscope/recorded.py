"""What an analysis leaves behind: its scalars in the journal and the mirror, its figure, or the reason why it failed."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitscope import config, results, run_files, secrecy
from vitscope.distributed import rank
from vitscope.errors import StorageError
from vitscope.journal import Journal
from vitscope.plotting import plot, save_figure

if TYPE_CHECKING:
    from vitscope.analyses import Analysis, Place


def failure(analysis: Analysis, place: Place, folder: Path, stem: str, error: Exception) -> None:
    """Record a null result with its reason, and go on."""
    text = secrecy.masked(str(error)).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    warnings.warn(f"analysis.{analysis.name} failed at {place.tag}: {reason}; recorded as null", stacklevel=3)
    if rank() == 0:
        record = {"measure": analysis.measure.__name__, "error": reason, "scalars": None}
        results.write_atomically(folder / f"{stem}.json", config.json.dumps(record, indent=2).encode())
        trace = secrecy.masked("".join(traceback.format_exception(error)))
        run_files.append_text(place.run.log, f"analysis.{analysis.name} at {place.tag}\n{trace}\n")


def publish(analysis: Analysis, place: Place, result: Any) -> None:
    """Journal first, then figures, then the mirror."""
    scalars = {f"{analysis.name}/{name}": value for name, value in result.scalars().items()}
    journal = Journal(place.run.journal)
    journal.append(place.step, place.epoch, {**scalars, "tag": place.tag})
    journal.close()
    place.mirror.log({k: v for k, v in scalars.items() if np.isfinite(v)}, place.step)
    eigenvalues = getattr(result, "eigenvalues", None)
    if eigenvalues is not None and np.isfinite(eigenvalues).any():
        place.mirror.histogram(f"{analysis.name}/eigenvalues", eigenvalues[np.isfinite(eigenvalues)], place.step)
    try:
        png, _ = save_figure(plot(result), place.run.figures / f"{analysis.name}-{place.tag}")
    except Exception as error:  # a figure that cannot be drawn must not cost the numbers
        if isinstance(error, OSError):
            raise StorageError("paths.runs", place.run.figures, str(error.strerror), "free space") from error
        warnings.warn(f"analysis.{analysis.name}: no figure ({type(error).__name__}: {error})", stacklevel=3)
        return
    place.mirror.image(f"{analysis.name}/figure", png, place.step)
