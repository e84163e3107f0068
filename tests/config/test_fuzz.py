"""Random input against the guards: bounded here, longer with ``make fuzz FUZZ=1000``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitscope.config import caps, error_translation, loading, target_allowlist
from vitscope.config.validation import validate
from vitscope.diagnostics.variance.feature_map_variance import FeatureMapVarianceResult
from vitscope.runs import result_store
from vitscope.runtime.errors import ConfigError, VitscopeError
from vitscope.training.lightning_module import Classifier

N_EXAMPLES = int(os.environ.get("FUZZ", "30"))
bounded = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SGD = functools.partial(torch.optim.SGD, lr=0.1)
VALUES = ["nan", "inf", "-inf", "-1", "0", "1", "2.5", "1e9", "1e-3", "null", "true", "abc", "''", "[]", "[1,2]", "{}",
          "{a:1}", "'a b'", "../../x", "\u00e9\u4e2d", "os.system", "0x10", "???", "${seed}", "${nothing}", "1_000"]  # fmt: skip


def leaves(node: DictConfig, prefix: str = "") -> list[str]:
    names = []
    for key in node:
        path = f"{prefix}{key}"
        if OmegaConf.is_dict(node) and isinstance(value := node._get_node(key), DictConfig) and len(value):
            names += leaves(value, f"{path}.")
        else:
            names.append(path)
    return names


@pytest.fixture(scope="module")
def base() -> list[str]:
    """Return every dotted key of the default configuration but folders, into which nothing may be written here."""
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        cfg = compose("train")
    return [key for key in leaves(cfg) if not key.startswith(("paths.", "run_dir", "data.root", "hydra"))]


def refusal(*overrides: str) -> BaseException | None:
    """Return what composing or validating raises."""
    try:
        with initialize_config_dir(str(loading.folder()), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides))
        caps.apply_caps(cfg)
        validate(cfg)
    except BaseException as error:
        return error
    return None


@bounded
@given(data=st.data())
def test_any_override_is_valid_or_gets_one_line(base: list[str], tmp_path: Path, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(base), label="key")
    value = data.draw(st.sampled_from(VALUES) | st.text("abc.-_0123456789", max_size=6), label="value")
    plus = data.draw(st.sampled_from(["", "", "", "+", "++", "~"]), label="sign")
    override = f"~{key}" if plus == "~" else f"{plus}{key}={value}"
    error = refusal(override, f"paths.runs={tmp_path}")
    if error is None:
        return
    known = error_translation.explain(error)
    assert known is not None, f"{override}: a traceback instead of a line: {type(error).__name__}: {error}"
    line = str(known)
    assert "\n" not in line, f"{override}: {line!r}"
    assert any(part in line for part in (key, *key.split("."))) or "config" in line, f"{override}: no key in {line!r}"


def reachable(package: str) -> list[str]:
    """Return the dotted names of all public attributes of a package's modules that are imported already or cheap to import."""
    root = __import__(package)
    names = [package]
    if hasattr(root, "__path__"):
        names += [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None)
                  if m.name in sys.modules]  # fmt: skip
    found = []
    for name in names:
        module = sys.modules.get(name)
        found += [f"{name}.{key}" for key in dir(module) if not key.startswith("_")] if module else []
    return found


@pytest.mark.parametrize("package", ["vitscope", "torch.nn", "torch.optim", "torchvision", "timm", "torchmetrics",
                                     "pytorch_lightning"])  # fmt: skip
def test_no_target_reaches_what_is_not_meant_to_be_configured(package: str) -> None:
    __import__(package)
    names = reachable(package)
    assert len(names) > 10
    accepted = []
    for name in names:
        with contextlib.suppress(ConfigError):
            accepted.append((name, target_allowlist.resolve(name, "model")))
    kinds = (nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset)
    dangerous = ("load", "save", "exec", "eval", "system", "popen", "download", "extract", "unpickle", "import_module",
                 "remove", "rmtree", "write", "open")  # fmt: skip
    for name, found in accepted:
        if found.__module__.startswith("vitscope.data.") or (inspect.isclass(found) and issubclass(found, kinds)):
            continue  # a data set's load() reads what data.root holds; the classes are what may be configured
        if found.__name__ == "load_official_state_dict":
            continue  # takes a model and tensors
        words = found.__name__.lower().split("_")
        assert not set(words) & set(dangerous), f"{name} was accepted"
        assert found.__module__.startswith(target_allowlist.PACKAGES), f"{name} is {found.__module__}"


def result(value: float) -> FeatureMapVarianceResult:
    three = np.full(3, value)
    return FeatureMapVarianceResult(
        taps=("a", "b", "c"),
        kinds=("conv", "msa", "head"),
        stages=np.arange(3),
        depths=three,
        map_sizes=np.ones((3, 2), dtype=int),
        variance=three,
        variance_half_width=three,
        log_variance_ratio=three,
        log_variance_ratio_half_width=three,
        level=0.95,
        n_images=2,
    )


@bounded
@given(at=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_result_is_the_old_one_or_the_new_one(tmp_path_factory: pytest.TempPathFactory, at: int, seed: int) -> None:
    """The disk fails at the ``at``-th call that could change it; what is read afterwards is whole."""
    folder = tmp_path_factory.mktemp("results")
    old, new = (result(float(value)) for value in (seed, seed + 1))
    result_store.save(folder, "end", old)
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync", "open"):
            original = getattr(os, name)

            def failing(*args, original=original, **kwargs):
                nonlocal calls
                calls += 1
                if calls > at:
                    raise OSError(28, "No space left on device")
                return original(*args, **kwargs)

            patch.setattr(os, name, failing)
        with contextlib.suppress(OSError, VitscopeError):
            result_store.save(folder, "end", new)
    value = result_store.load(folder / "end.npz").variance
    assert np.array_equal(value, old.variance) or np.array_equal(value, new.variance)


@bounded
@given(cuts=st.lists(st.integers(1, 23), max_size=4, unique=True), classes=st.integers(2, 8), seed=st.integers(0, 99))
def test_metrics_do_not_depend_on_how_images_are_shared_out(cuts: list[int], classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(24, classes, generator=generator)
    labels = torch.randint(classes, (24,), generator=generator)
    metrics = Classifier(nn.Identity(), num_classes=classes, optimizer=SGD).metrics["val_metrics"]["scores"]
    whole = metrics.clone()
    whole.update(logits.softmax(1), labels)
    bounds = [0, *sorted(cuts), 24]
    shards = []
    for first, end in itertools.pairwise(bounds):
        shards.append(metrics.clone())
        shards[-1].update(logits[first:end].softmax(1), labels[first:end])
    for name, metric in shards[0].items(keep_base=True):
        for other in shards[1:]:
            metric.merge_state(other[name])
    merged = shards[0].compute()
    for name, value in whole.compute().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
