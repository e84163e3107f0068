"""Judges every configuration that Hydra composes before Hydra acts on it.

Hydra creates its callbacks, launcher and sweeper, configures logging and sets environment variables before a command's
function is called, so that `validation.validate` would come too late. Importing this module makes Hydra's loader judge each
configuration that it returns: for a single run, a multirun, each job of one (also in a launcher's worker process), and
`hydra.compose`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import hydra_internals, instantiate, target_allowlist
from vitscope.runtime import trusted_packages
from vitscope.runtime.errors import ConfigError

#: targets that may be created below hydra.callbacks, hydra.launcher and hydra.sweeper
PLUGINS: dict[str, tuple[str, ...]] = {
    "callbacks": (
        "vitscope.sweep.hydra_multirun.Folder",
        hydra_internals.LOG_JOB_RETURN_CALLBACK,
    ),
    "launcher": (
        hydra_internals.BASIC_LAUNCHER,
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    ),
    "sweeper": (
        hydra_internals.BASIC_SWEEPER,
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    ),
}
_SAMPLER = re.compile(r"optuna\.samplers\.[A-Z]\w*Sampler")

#: environment variables that a configuration may set: none that names a program, a library, a server or a package
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT",
    "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "NUMEXPR_NUM_THREADS", "OMP_NUM_THREADS",
    "OMP_PROC_BIND", "OPENBLAS_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM",
    "TZ", "WANDB_MODE", "WANDB_SILENT",
}  # fmt: skip

#: classes that a logging configuration may name
HANDLERS = {
    "colorlog.ColoredFormatter", "logging.FileHandler", "logging.Formatter", "logging.NullHandler", "logging.StreamHandler",
    "logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler",
}  # fmt: skip
_STREAMS = {"ext://sys.stdout", "ext://sys.stderr"}
#: files that a logging configuration may write: logs in the folder where the command runs, or in Hydra's own. Any other name
#: would let a configuration put a text of its own into a file that a shell reads, or empty one with ``mode: w``
_LOG_FILE = re.compile(r"(\$\{hydra\.(runtime\.output_dir|run\.dir)\}/)?(\$\{hydra\.job\.name\}|[\w-]+)\.log")
#: stores of studies that a file may name: a server's could hold pickled objects
_LOCAL_STORE = re.compile(r"sqlite:///[\w./-]+")

#: keys of a launcher that reach a shell: taken from the command line only, never from a file
_SHELL = {"additional_parameters", "python", "setup", "srun_args", "slurm_python", "slurm_setup", "slurm_srun_args"}


def judge(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuse a composed configuration that would make Hydra run code, grant trust or write secrets down.

    The targets of the command's own groups are judged by `validation.validate`. Interpolations below ``hydra.callbacks``,
    ``hydra.launcher`` and ``hydra.sweeper`` are replaced by their values, so that what is created is what was judged.

    Args:
        cfg: The configuration as Hydra composed it, its ``hydra`` node included; changed in place.
        overrides: The overrides that it was composed with.

    Raises:
        ConfigError: Naming the key.
    """
    hydra = cfg.get("hydra")
    if OmegaConf.is_dict(hydra):
        _check_environment(hydra)
        for group in PLUGINS:
            _check_plugins(hydra, group, overrides)
        for key in ("job_logging", "hydra_logging"):
            _check_logging(hydra, key)
        if hydra.get("output_subdir") is not None:
            reason = "Hydra would write the configuration there, secrets included"
            raise ConfigError("hydra.output_subdir", hydra.output_subdir, reason, "set hydra.output_subdir=null")
        if OmegaConf.select(hydra, "job.chdir"):
            reason = "W&B and others read settings from the folder where they run, and run= and paths would mean other folders"
            raise ConfigError("hydra.job.chdir", True, reason, "set hydra.job.chdir=false")
        for place, node in instantiate.targets(_raw(hydra), "hydra"):
            if place.partition(".")[2].partition(".")[0] not in PLUGINS:
                _refuse(f"{place}._target_", node["_target_"], "nothing is created there")


def check_options(argv: Sequence[str]) -> None:
    """Refuse the option of Hydra that loads a pickle.

    Raises:
        ConfigError: Naming the option.
    """
    for argument in argv:
        option = argument.partition("=")[0]
        if option == "-er" or (len(option) > 3 and "--experimental-rerun".startswith(option)):
            raise ConfigError(option, None, "would load a pickle", "resume a run with run=<folder>")


def check_search_path(entries: Any) -> None:
    """Refuse packages in ``hydra.searchpath``: to look into one imports it.

    Raises:
        ConfigError: Naming the entry.
    """
    for entry in entries if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries]:
        scheme, separator, rest = str(entry).partition("://")
        package = re.split(r"[./]", rest)[0]
        if (
            separator
            and scheme not in ("file", "structured")
            and package not in {"vitscope", "hydra", *trusted_packages.packages()}
        ):
            raise ConfigError("hydra.searchpath", entry, "would import a package that is not trusted",
                              f"name a folder, or set VITSCOPE_TRUST={package} if it is your own")  # fmt: skip


def _check_environment(hydra: DictConfig) -> None:
    for key in ("env_set", "env_copy"):
        node = OmegaConf.select(hydra, f"job.{key}") if not OmegaConf.is_missing(hydra, "job") else None
        names = list(node) if node is not None else []
        for name in names:
            if str(name) not in VARIABLES:
                reason = "not a variable that a configuration may set"
                if "TRUST" in str(name).upper():
                    reason = "a configuration must not grant trust"
                raise ConfigError(f"hydra.job.{key}", name, reason, f"set {name} in the environment of the command")


def _check_plugins(hydra: DictConfig, group: str, overrides: Sequence[str]) -> None:
    if OmegaConf.is_missing(hydra, group) or hydra.get(group) is None:
        return
    path = f"hydra.{group}"
    try:
        tree = OmegaConf.to_container(hydra[group], resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(path, None, str(error).splitlines()[0], "correct the interpolation") from None
    for place, node in instantiate.targets(tree, path):
        _check_plugin(group, place, node["_target_"])
    if group == "launcher":
        _check_launcher(tree, overrides)
    if group == "sweeper" and isinstance(tree, Mapping):
        _check_sweeper(tree, overrides)
    if tree != _raw(hydra[group]) or OmegaConf.is_interpolation(hydra, group):
        with flag_override(hydra, ["struct", "readonly"], False):
            hydra[group] = tree


def _check_plugin(group: str, place: str, target: Any) -> None:
    depth = place.count(".")
    top = depth == (2 if group == "callbacks" else 1)
    if top and target in PLUGINS[group]:
        return
    if group == "sweeper" and isinstance(target, str) and _SAMPLER.fullmatch(target):
        return
    _check_trusted(f"{place}._target_", target, f"one of {', '.join(PLUGINS[group])}")


def _check_trusted(key: str, target: Any, expectation: str) -> None:
    """Refuse a dotted name that does not lead to a package which the user trusts."""
    if isinstance(target, str) and target.partition(".")[0] in trusted_packages.packages():
        target_allowlist.resolve(target, key.removesuffix("._target_"))
        return
    _refuse(key, target, f"not {expectation}")


def _refuse(key: str, target: Any, reason: str) -> None:
    top = target.partition(".")[0] if isinstance(target, str) else ""
    fix = f"leave it out, or set VITSCOPE_TRUST={top} if it is your own" if top.isidentifier() else "leave it out"
    raise ConfigError(key, target, reason, fix)


def _check_sweeper(tree: Mapping[str, Any], overrides: Sequence[str]) -> None:
    if tree.get("custom_search_space") is not None:
        _check_trusted("hydra.sweeper.custom_search_space", tree["custom_search_space"], "a function of your own")
    store = tree.get("storage")
    if store is None or "hydra.sweeper.storage" in _chosen(overrides):
        return
    if not (isinstance(store, str) and _LOCAL_STORE.fullmatch(store)):
        reason = "a store whose server could send pickled objects, so that no file may set it"
        raise ConfigError("hydra.sweeper.storage", None, reason, "set it on the command line, or use sqlite:///<file>")


def _chosen(overrides: Sequence[str]) -> set[str]:
    """Return the keys that a command line sets."""
    return {re.split(r"[=@]", override.lstrip("+~"))[0] for override in overrides}


def _check_launcher(tree: Any, overrides: Sequence[str]) -> None:
    overridden_keys = _chosen(overrides)
    shell_keys = _SHELL & set(tree) if isinstance(tree, Mapping) else set()
    for key in shell_keys:
        place = f"hydra.launcher.{key}"
        if tree[key] and not any(name == place or name.startswith(f"{place}.") for name in overridden_keys):
            raise ConfigError(place, None, "reaches a shell, so that no file may set it", "set it on the command line")
    for place, value in _leaves(tree, "hydra.launcher"):
        if isinstance(value, str) and any(ord(c) < 32 for c in value):
            raise ConfigError(
                place, repr(value), "holds a line break, which would add a line to a script", "use one line"
            )


def _check_logging(hydra: DictConfig, key: str) -> None:
    if OmegaConf.is_interpolation(hydra, key):
        raise ConfigError(f"hydra.{key}", "${...}", "an interpolation", "choose one by hydra/job_logging=none")
    if OmegaConf.is_missing(hydra, key) or hydra.get(key) is None:
        return
    for place, value in _leaves(_raw(hydra[key]), f"hydra.{key}"):
        name = place.rpartition(".")[2]
        text = str(value)
        if name in ("class", "()", "factory", "_target_", "queue", "listener") and text not in HANDLERS:
            raise ConfigError(place, value, f"not one of {', '.join(sorted(HANDLERS))}", "choose one, or leave it out")
        if name == "filename":
            if not _LOG_FILE.fullmatch(text):
                raise ConfigError(place, value, "not a log file in the folder of the command", "set it to train.log")
        elif (text.startswith("ext://") and text not in _STREAMS) or "${" in text:
            raise ConfigError(place, value, "could name any object", "use ext://sys.stdout or ext://sys.stderr")
        if any(part in ("()", ".", "listener", "queue") for part in place.split(".")[2:-1]):
            raise ConfigError(place, value, "builds an object of its own", "leave it out")


def _raw(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node


def install() -> None:
    """Let Hydra's loader judge every configuration that it composes."""
    hydra_internals.judge_compositions(_check_sources, judge)


def _check_sources(repository: Any, config_name: str | None, overrides: Sequence[str]) -> None:
    """Judge the search path before the loader looks into it."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+~") == "hydra.searchpath":
            check_search_path([entry.strip(" '\"") for entry in value.strip().strip("[]").split(",")])
    if config_name is None:
        return
    loaded = repository.load_config(config_path=config_name)
    if loaded is not None and OmegaConf.is_dict(loaded.config):
        check_search_path(OmegaConf.select(loaded.config, "hydra.searchpath") or [])


install()
