"""The part of the page that shows one image through all models: attention, token norms, receptive field and patch PCA."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from vitscope.reports.figures.figure_captions import DrawnPanel
from vitscope.runtime.errors import StorageError

#: models side by side
MOST_MODELS = 6

#: decades of a receptive field below its largest value
DECADES = 4

#: mean difference of gray levels up to which two pictures are of one image, in two normalizations
SAME_IMAGE = 2.0


@dataclass(frozen=True)
class Cell:
    """One model's pictures of one measure.

    Attributes:
        pictures: Data address for each image; empty where there is none.
        text: Words below the picture, or why there is none.
    """

    pictures: Sequence[str]
    text: str


@dataclass(frozen=True)
class Microscope:
    """Content of the section.

    Attributes:
        models: Labels of the columns.
        n_images: Number of images to choose from.
        images: Data address of each image; empty where no result holds pixels.
        rows: Title of each measure and its cell for each model.
        left_out: Models beyond the most that stand side by side.
    """

    models: Sequence[str]
    n_images: int
    images: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    left_out: Sequence[str]

    def pictures(self) -> list[Sequence[str]]:
        """Return the pictures of each cell in the order of the page."""
        return [cell.pictures for _, cells in self.rows for cell in cells]


def microscope(drawn: Sequence[DrawnPanel]) -> Microscope | None:
    """Return the section for the results in the figures of a report; None where none of the four measures is there.

    Of a model with several results of a measure, the last figure's is shown.
    """
    results: dict[str, dict[str, Any]] = {}
    for panel in drawn:
        for curve in panel.panel.curves:
            if curve.measured.measure in ROWS:
                results.setdefault(curve.label, {})[curve.measured.measure] = curve.measured
    if not results:
        return None
    models, left_out = list(results)[:MOST_MODELS], list(results)[MOST_MODELS:]
    loaded = {model: {name: _loaded(measured) for name, measured in results[model].items()} for model in models}
    pictured = [of_model.get(name) for of_model in loaded.values() for name in PICTURED]
    pictured = [result for result in pictured if result is not None and len(result.images)]
    pixels = pictured[0].images if pictured else np.zeros((0, 1, 1, 3), np.uint8)
    norms = [of_model.get("token_norms") for of_model in loaded.values()]
    n_images = len(pixels) or min([8, *(result.n_norm_images for result in norms if result is not None)])
    reference = _Reference(pixels, pictured, n_images)
    rows = []
    for name, (title, pictures_of) in ROWS.items():
        if any(name in results[model] for model in models):
            cells = [_cell(loaded[model].get(name), name in results[model], reference, pictures_of) for model in models]
            rows.append((title, cells))
    return Microscope(models, n_images, [_address(image) for image in pixels], rows, left_out)


@dataclass(frozen=True)
class _Reference:
    """The images of the page, and all results that hold pixels: the first images of their selection."""

    pixels: np.ndarray
    pictured: Sequence[Any]
    n_images: int

    def places(self, result: Any) -> list[int | None]:
        """Return the place of each image of the page among those of a result; None for one that it does not hold.

        Images are found by their pixels; those of a result without any by a result of the same selection that has them.
        """
        if not len(self.pixels):
            return list(range(self.n_images))
        candidates = [result, *(other for other in self.pictured if _selection(other) == _selection(result))]
        for other in candidates:
            images = getattr(other, "images", None)
            if images is not None and len(images):
                return [_place(image, images) for image in self.pixels]
        return [None] * self.n_images


def _place(image: np.ndarray, images: np.ndarray) -> int | None:
    if image.shape != images.shape[1:]:
        return None
    differences = np.abs(images.astype(float) - image).mean(axis=(1, 2, 3))
    return int(differences.argmin()) if differences.min() < SAME_IMAGE else None


def _selection(result: Any) -> tuple[Any, ...]:
    card = result.card
    return (card.data, card.split, card.augmentation, card.n_images) if card is not None else ()


def _loaded(measured: Any) -> Any:
    try:
        return measured.load()
    except StorageError:
        return None  # the figure of the same file says it


def _cell(result: Any, is_measured: bool, reference: _Reference, pictures_of: Callable[..., Cell]) -> Cell:
    if result is None:
        return Cell((), "cannot be read" if is_measured else "no result")
    return pictures_of(result, reference)


def _attention(result: Any, reference: _Reference) -> Cell:
    if not len(result.units):
        return Cell((), "no attention that can be read")
    if result.rollout is not None:
        maps, text = np.asarray(result.rollout), "rollout"
    else:
        maps, text = np.asarray(result.maps[-1]).mean(axis=1), f"{result.units[-1]}, mean over heads"
    return _maps(maps, reference.places(result), f"{text}, query: {result.query}")


def _norms(result: Any, reference: _Reference) -> Cell:
    rows, columns = (int(n) for n in result.map_sizes[-1])
    norms = np.asarray(result.norms_patch[-1])
    return _maps(norms.reshape(len(norms), rows, columns), reference.places(result), result.taps[-1])


def _field(result: Any, reference: _Reference) -> Cell:
    field = result.field[-1]
    if not np.isfinite(field).all() or not field.any():
        return Cell((), "null")
    logs = np.log10(np.maximum(field / field.max(), 10.0**-DECADES))
    text = f"{result.taps[-1]}, all images, {DECADES} decades; r50 = {result.radius_50[-1]:.1f} px"
    return Cell([_address(_colored(logs, -DECADES, 0))] * reference.n_images, text)


def _components(result: Any, reference: _Reference) -> Cell:
    if not np.isfinite(result.colors).all():
        return Cell((), "null")
    ratios = ", ".join(f"{100 * ratio:.0f}" for ratio in result.explained_variance_ratio)
    pictures = [(255 * colors).round().astype(np.uint8) for colors in result.colors]
    return _placed(pictures, reference.places(result), f"{result.taps[-1]}, {ratios} % of the variance")


def _maps(maps: np.ndarray, places: Sequence[int | None], text: str) -> Cell:
    """Return the pictures of maps ``(n, h, w)`` on one scale, with its ends in the text."""
    if not np.isfinite(maps).any():
        return Cell((), "null")
    used_maps = maps[[place for place in places if place is not None and place < len(maps)]]
    if not used_maps.size:
        return Cell((), "measured on other images")
    low, high = float(np.nanmin(used_maps)), float(np.nanmax(used_maps))
    return _placed([_colored(image, low, high) for image in maps], places, f"{text}, {low:.3g} to {high:.3g}")


def _placed(pictures: Sequence[np.ndarray], places: Sequence[int | None], text: str) -> Cell:
    addresses = [_address(pictures[place]) if place is not None and place < len(pictures) else "" for place in places]
    return Cell(addresses, text) if any(addresses) else Cell((), "measured on other images")


def _colored(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the colors ``(h, w, 3)`` uint8 of values; gray where they are not finite."""
    shares = (np.nan_to_num(values, nan=low) - low) / (high - low or 1.0)
    colors = np.asarray(matplotlib.colormaps["viridis"](np.clip(shares, 0, 1), bytes=True))[..., :3]
    return np.where(np.isfinite(values)[..., None], colors, 204).astype(np.uint8)


def _address(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "png")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


#: title and pictures of each measure, in the order of the page
ROWS: Mapping[str, tuple[str, Callable[..., Cell]]] = {
    "attention_maps": ("Attention", _attention),
    "token_norms": ("Token norms", _norms),
    "effective_receptive_field": ("Receptive field", _field),
    "patch_pca": ("Patch PCA", _components),
}

#: measures whose results hold the images, the first ones of a selection first
PICTURED = ("patch_pca", "attention_maps")
