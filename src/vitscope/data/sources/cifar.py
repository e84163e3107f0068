"""`cifar10` and `cifar100`, read by torchvision; validation is a held-out part of the training set."""

from __future__ import annotations

import contextlib
import pickle
import socket
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5, check_integrity

from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.splits import hold_out, refuse_empty_validation
from vitscope.runtime.errors import ConfigError, DataError
from vitscope.runtime.value_ranges import Seed, ShareBelowOne

VARIANTS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_REACH_SECONDS = 5.0  # how long to wait for the server before saying that there is no network


def load(
    split: str,
    *,
    root: str | Path | None,
    split_seed: Seed = 0,
    variant: str = "cifar10",
    val_share: ShareBelowOne = 0.1,
    checksums: Mapping[str, str] | None = None,
) -> ArrayImages:
    """Return a split of CIFAR, downloaded to `root` where it is missing and there is a network.

    Args:
        split: `train`, `val` (a stratified part of CIFAR's training set) or `test` (CIFAR's test set).
        root: Folder that holds the archive or its extracted folder.
        split_seed: Chooses the held-out images.
        variant: `cifar10` or `cifar100`.
        val_share: Share of each class's training images that is held out, at least one of each class; 0 for none, so that all
            are training images and there is no validation split.
        checksums: MD5 by file name, for files in CIFAR's format that are not the published ones.

    Raises:
        ConfigError: No root, an unknown variant, or the validation split of ``val_share=0``.
        DataError: Unknown split; files missing or changed and no network; a root that cannot be written.
    """
    if variant not in VARIANTS:
        raise ConfigError("data.source.variant", variant, "unknown", f"choose one of {', '.join(VARIANTS)}")
    if split not in ("train", "val", "test"):
        raise DataError("data", variant, f"there is no split {split!r}", "choose one of train, val, test")
    if root is None:
        raise ConfigError("data.root", None, f"{variant} needs a folder", "set data.root")
    dataset = _dataset(_with_checksums(variant, checksums), Path(root), train=split != "test")
    labels = np.asarray(dataset.targets, dtype=np.int64)
    images = np.ascontiguousarray(np.asarray(dataset.data).transpose(0, 3, 1, 2))  # (N, 3, 32, 32)
    all_images = ArrayImages(torch.from_numpy(images), torch.from_numpy(labels), tuple(dataset.classes))
    if split == "test":
        return all_images
    refuse_empty_validation(split, val_share)
    if not val_share:
        return all_images
    train_indices, val_indices = hold_out(labels, val_share, seed=split_seed)
    return all_images.select(val_indices if split == "val" else train_indices)


def _with_checksums(variant: str, checksums: Mapping[str, str] | None) -> type[CIFAR10]:
    """Return torchvision's class, with other checksums where they are given."""
    published = VARIANTS[variant]
    if checksums is None:
        return published
    file_names = [name for name, _ in published.train_list + published.test_list]
    file_names += [published.meta["filename"], published.filename]
    if missing := [name for name in checksums if name not in file_names]:
        raise ConfigError("data.source.checksums", missing[0], "no such file", f"files are {', '.join(file_names)}")

    class WithChecksums(published):
        train_list: ClassVar = [[name, checksums.get(name, md5)] for name, md5 in published.train_list]
        test_list: ClassVar = [[name, checksums.get(name, md5)] for name, md5 in published.test_list]
        meta: ClassVar = {**published.meta, "md5": checksums.get(published.meta["filename"], published.meta["md5"])}
        tgz_md5 = checksums.get(published.filename, published.tgz_md5)

        def _check_integrity(self) -> bool:
            is_complete = super()._check_integrity()
            if is_complete:  # their checksums come from a configuration: what they hold is not known to be arrays
                for name in (*(name for name, _ in self.train_list + self.test_list), self.meta["filename"]):
                    _check_pickle(Path(self.root, self.base_folder, name))
            return is_complete

    return WithChecksums


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what CIFAR's files are made of; anything else is an error and is not run."""

    allowed = frozenset((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy", "_codecs")
                        for name in ("_reconstruct", "ndarray", "dtype", "encode"))  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return super().find_class(module, name)


def _check_pickle(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        return  # torchvision says so itself
    except Exception as error:
        raise DataError("data.root", path, f"not a file of CIFAR's format ({error})", "use another file") from None


def _dataset(kind: type[CIFAR10], root: Path, *, train: bool) -> CIFAR10:
    with contextlib.suppress(RuntimeError, OSError, EOFError):  # missing, changed or unreadable
        return _open_dataset(kind, root, train=train)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{kind.base_folder}.lock"):  # other runs and ranks wait instead of writing too
            archive = root / kind.filename
            if complete := check_integrity(archive, kind.tgz_md5):
                with tarfile.open(archive) as packed:  # torchvision would let an archive write outside of the folder
                    packed.extractall(root, filter="data")
                return _open_dataset(kind, root, train=train)
            _need_network(kind, root)
            socket.setdefaulttimeout(30.0)  # for a server that stops in the middle
            try:
                return _open_dataset(kind, root, train=train, download=True)
            finally:
                socket.setdefaulttimeout(None)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError("data.root", root, f"cannot be used ({error})", _remedy(kind)) from error
    except RuntimeError as error:
        problem = (
            f"{kind.filename} there does not hold the expected files" if complete else f"download failed ({error})"
        )
        raise DataError("data.root", root, problem, _remedy(kind)) from error


def _open_dataset(kind: type[CIFAR10], root: Path, **options: Any) -> CIFAR10:
    """Return torchvision's data set; what its files lack is a DataError."""
    try:
        return kind(str(root), **options)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, pickle.UnpicklingError) as error:
        defect = f"no key {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        path = root / kind.base_folder
        problem = (
            f"files there are not of CIFAR's format ({defect}; their keys are the texts data and labels or fine_labels)"
        )
        fix = "read them with encoding='bytes', decode the keys and write them again, or use the published files"
        raise DataError("data.root", path, problem, fix) from error


def _difference_text(differing: Mapping[str, str | None], folder: str) -> str:
    """Return which files of a folder differ from the published ones, and which have no checksum since they cannot be read."""
    missing = [name for name, md5 in differing.items() if md5 is None]
    other = [name for name, md5 in differing.items() if md5 is not None]
    texts = []
    if other:
        texts.append(f"{', '.join(other)} of {folder} differ")
    if missing:
        texts.append(f"{', '.join(missing)} of {folder} missing or not readable")
    return "; ".join(texts)


def _need_network(kind: type[CIFAR10], root: Path) -> None:
    try:
        request = urllib.request.Request(kind.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_REACH_SECONDS):
            return
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        folder, archive = root / kind.base_folder, root / kind.filename
        damaged = [path.name for path in (archive, folder) if path.exists()]
        problem = f"no {archive.name} there"
        if damaged:
            problem = f"{' and '.join(damaged)} there differ from the published files"
        problem += " and no network to download it"
        differing = _differing_files(kind, folder)
        if differing:
            problem += f" ({_difference_text(differing, kind.base_folder)})"
        fix = _remedy(kind)
        if differing and None not in differing.values():
            sums = ", ".join(f"{name}: {md5}" for name, md5 in differing.items())
            fix += f", or, where those files are what you want, set 'data.source.checksums={{{sums}}}'"
        raise DataError("data.root", root, problem, fix) from error


def _differing_files(kind: type[CIFAR10], folder: Path) -> dict[str, str | None]:
    """Return the MD5 of each file of a folder that is not the expected one, None for one that is missing or not readable."""
    if not folder.is_dir():
        return {}
    expected = dict(kind.train_list + kind.test_list)
    expected[kind.meta["filename"]] = kind.meta["md5"]
    differing: dict[str, str | None] = {}
    for name, md5 in expected.items():
        try:
            stored_md5 = calculate_md5(folder / name)
        except OSError:
            stored_md5 = None
        if stored_md5 != md5:
            differing[name] = stored_md5
    return differing


def _remedy(kind: type[CIFAR10]) -> str:
    return f"put {kind.filename} (from {kind.url}) or its folder {kind.base_folder} there"
