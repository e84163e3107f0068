"""Images: one `DataModule`, one file per family of data sets, augmentation as a function of (seed, epoch, index)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscope.data.datamodule import DataModule

__all__ = ["DataModule"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the data sets themselves need no Lightning.
    if name == "DataModule":
        from vitscope.data.datamodule import DataModule

        return DataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
