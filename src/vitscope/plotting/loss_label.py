"""Labels of axes that show a loss: NLL in nats for a cross entropy, the loss for any other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: beginnings of what a card states of losses that are negative log likelihoods in nats, and of a result without a card
_LIKELIHOODS = ("cross entropy", "unknown")


def loss_label(text: str, results: Iterable[Any]) -> str:
    """Return a label that speaks of the NLL in nats, with ``loss`` in its place where a result has another loss.

    Args:
        text: The label's text, such as ``NLL (nats)``.
        results: The results that are drawn; their cards state the loss.
    """
    cards = [getattr(result, "card", None) for result in results]
    if all(card is None or card.loss.startswith(_LIKELIHOODS) for card in cards):
        return text
    return text.replace("NLL", "loss").replace(" (nats)", "")
