"""Base of displays that are drawn again and again on a terminal, and print plain lines elsewhere."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.live import Live


class LiveDisplay:
    """Holds a terminal while it is used as a context; a subclass draws.

    Args:
        console: Where to draw; there is nothing live where it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        """Take the terminal."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._live:
            self._live.stop()
