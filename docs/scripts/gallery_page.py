"""The page of the gallery, written from the texts of its entries: title, caption, command and card of each figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from docs.scripts.gallery_figures import CURVATURE, GROUPS, INTRODUCTIONS, RESNET20, SIGHT, STUDY
from docs.scripts.page_images import save_webp
from vitscope.core.objective_card import ObjectiveCard

OPENING = """# Gallery

This page shows figures of real networks, each with the conditions of its measurement and the command that makes it.
`python docs/scripts/draw_gallery.py --help` says how the page is made.
"""
#: keys of the card that the page states
CARD_KEYS = ("data", "split", "augmentation", "n_images", "batch_size", "mode", "dtype")


@dataclass(frozen=True)
class Text:
    """Text of an entry of the gallery.

    Attributes:
        name: Name of its files.
        group: One of `GROUPS`.
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
    order = [
        *(f"{shown.group}-{shown.file}" for shown in (*STUDY, *SIGHT)),
        *(f"curvature-{name}" for name in CURVATURE),
        *(f"resnet20-{shown.analysis}" for shown in RESNET20),
    ]
    return sorted(texts, key=lambda text: order.index(text["name"]) if text["name"] in order else len(order))
