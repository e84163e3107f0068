"""A data module of a folder of images."""

from __future__ import annotations

from vitscope.data import DataModule
from vitscope.data.sources import folder


def module(root, **options):
    arguments = {"name": "folder", "num_classes": 2, "image_size": 16, "batch_size": 4, **options}
    return DataModule(folder.load, root=str(root), **arguments)
