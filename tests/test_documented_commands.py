"""Every command in README and the other documents: its programs, files, targets and overrides exist, compose and validate."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from vitscope.analyses import analysis_inputs
from vitscope.cli.main import COMMANDS
from vitscope.config import loading
from vitscope.config.loss import loss_overrides
from vitscope.config.validation import validate
from vitscope.reproduce import command_line, plan
from vitscope.runs import run_overrides
from vitscope.runtime.errors import VitscopeError

ROOT = Path(__file__).parents[1]
#: documents whose commands are run, not only composed: by tests/cli/test_own_code.py, and by docs/scripts/draw_gallery.py
RUN_ELSEWHERE = ("own_code.md", "gallery.md")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS += [path for path in sorted(ROOT.glob("docs/*.md")) if path.name not in RUN_ELSEWHERE]
DOCUMENTS += sorted(ROOT.glob("docs/diagnostics/*.md"))
HYDRA_OPTIONS = {"-m", "--multirun", "--help", "--cfg", "job", "--resolve"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(
    r"(\.venv/bin/)?(python|vitscope|make|torchrun|wandb|pip|pre-commit|git|sbatch|srun|npm|uv|conda)"
)
_SCRIPT = re.compile(r"[\w/]+\.py")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of a document: lines of shell blocks, and code in the text that runs a program."""
    for language, block in _FENCE.findall(text):
        if language in ("bash", "sh", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words
    for code in re.findall(r"`([^`]+)`", _FENCE.sub("", text)):
        words = _words(code)
        first = next((word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)), "")
        is_script = _SCRIPT.fullmatch(first) and len(words) > 1 and re.search(r"=|--", code)
        if len(words) > 1 and (_PROGRAM.fullmatch(first) or is_script):
            yield words
        elif re.fullmatch(r"\+?[a-z_/]+=[\w\[\],]+", code) and code.lstrip("+").split("=")[0] in _groups():
            yield ["python", "train.py", code]


def _words(code: str) -> list[str]:
    try:
        return shlex.split(" ".join(code.split()))
    except ValueError:  # an apostrophe in a text that is no command
        return []


def _groups() -> set[str]:
    return {path.name for path in loading.folder().iterdir() if path.is_dir()}


class Checker:
    """Checks one command after the other; an error names what is wrong.

    Args:
        folder: Folder of runs and data that commands name by a placeholder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: dict[str, Callable[[list[str]], None]] = {
            "python": self.python, "vitscope": self.vitscope, "make": self.make, "torchrun": self.torchrun,
            "wandb": self.wandb, "pip": self.pip, "pre-commit": self.pre_commit, "sbatch": self.sbatch,
            "srun": self.srun,
        }  # fmt: skip

    def check(self, words: Sequence[str]) -> None:
        words = [word for i, word in enumerate(words) if not (i == 0 and re.fullmatch(r"VITSCOPE_\w+=\S*", word))]
        program = words[0].removeprefix(".venv/bin/")
        if program.endswith(".py"):
            self.python(words)
            return
        assert program in self.programs, f"no check for {program}: add one for `{' '.join(words)}`"
        self.programs[program](list(words[1:]))

    def python(self, words: list[str]) -> None:
        script, arguments = ROOT / words[0], words[1:]
        if not script.is_file():  # documents leave out the folder of a benchmark
            script = ROOT / "benchmarks" / words[0]
        assert script.is_file(), f"there is no {words[0]}"
        if script.parent == ROOT:
            self.command(script.stem, arguments)
            return
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in script.read_text(), f"{words[0]} has no option {option}"

    def vitscope(self, words: list[str]) -> None:
        if "|" in words:
            assert set(words) - {"|"} <= set(COMMANDS)
            return
        assert words[0] in COMMANDS, f"vitscope has no command {words[0]}"
        if words[0] in ("train", "analyze", "report"):
            self.command(words[0], words[1:])
        if words[0] == "reproduce" and len(words) > 1 and "--help" not in words:
            request = command_line.parse(words[1:])
            planned = plan.read()
            targets = plan.select(request.names, planned)
            assert [plan.target(name, planned, request.profile, 1, request.overrides) for name in targets]

    def command(self, name: str, words: list[str]) -> None:
        """Compose and validate what `train`, `analyze` or `report` would run."""
        options = [word for word in words if word.startswith("-") or "=" not in word]
        assert set(options) <= HYDRA_OPTIONS, f"{name}.py has no options {options}"
        given = loss_overrides.joined([self.filled(word) for word in words if word not in options])
        named, given = [a for a in given if a.startswith("run=")], [a for a in given if not a.startswith("run=")]
        given.append(f"paths.runs={self.folder}/runs")
        if name == "report":
            self.composed(name, given)
        elif named and name == "train":
            cfg = self.composed("train", [])
            run_overrides.apply(cfg, given)
            validate(cfg)
        elif named:
            outer, inside = run_overrides.split(given, run_overrides.RUN_GROUPS)
            chosen = [argument.partition("=")[0] for argument in outer]
            cfg = analysis_inputs.merge_run_values(self.composed("analyze", outer), self.composed("train", []), chosen)
            run_overrides.apply(cfg, inside)
            validate(cfg)
        else:
            validate(self.composed(name, given))

    def composed(self, name: str, arguments: list[str]) -> DictConfig:
        single = []
        for argument, override in zip(arguments, OverridesParser.create().parse_overrides(arguments)):
            first = next(iter(override.sweep_string_iterator())) if override.is_sweep_override() else None
            single.append(argument if first is None else f"{override.get_key_element()}={first}")
        with initialize_config_dir(str(loading.folder()), version_base="1.3"):
            return compose(name, overrides=single)

    def filled(self, argument: str) -> str:
        """Return an override with a run or data folder for each placeholder."""
        (self.folder / "data").mkdir(exist_ok=True)
        (self.folder / "runs/one/checkpoints").mkdir(parents=True, exist_ok=True)
        (self.folder / "runs/one/checkpoints/last.ckpt").touch()
        argument = re.sub(r"data\.root=\.\.\.", f"data.root={self.folder}/data", argument)
        argument = re.sub(r"runs/<\w+>|(?<=run=)\.\.\.", str(self.folder / "runs/one"), argument)
        assert "..." not in argument, f"no value for {argument}"
        assert "<" not in argument, f"no value for {argument}"
        return argument

    def make(self, words: list[str]) -> None:
        targets = [word for word in words if "=" not in word]
        lines = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert lines.returncode == 0, lines.stderr
        known = set(yaml.safe_load((loading.folder() / "reproduce.yaml").read_text())["targets"])
        for target in targets:
            if re.match(r"fig\d|fig[A-Z]|table-", target):
                assert any(name == target or name.startswith(target) for name in known), f"nothing makes {target}"
        for word in words:
            if word.startswith("SWEEP="):
                assert (ROOT / word.partition("=")[2]).is_file(), word

    def torchrun(self, words: list[str]) -> None:
        script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        assert all(re.fullmatch(r"--nproc-per-node=\d+", word) for word in words[:script])
        if words[script] == "-m":
            assert words[script + 1] == "vitscope"
            self.vitscope(words[script + 2 :])
        else:
            self.python(words[script:])

    def srun(self, words: list[str]) -> None:
        program = words.index("vitscope")
        assert all(re.fullmatch(r"--ntasks=\d+", word) for word in words[:program])
        self.vitscope(words[program + 1 :])

    def wandb(self, words: list[str]) -> None:
        assert words[0] in ("sweep", "agent", "login", "sync")
        assert words[0] != "sweep" or (ROOT / words[1]).is_file()

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words[1:]:
            for extra in re.findall(r"(?:vitscope|\.)\[([\w,-]+)\]", word):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), word
            assert not word.endswith(".txt") or (ROOT / word).is_file(), word

    def sbatch(self, words: list[str]) -> None:
        script = (ROOT / words[0]).read_text()
        assert script.startswith("#!/bin/bash\n")
        subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)
        if 'vitscope train "$@"' in script:
            self.command("train", [*words[1:], "trainer=slurm", "ckpt_path=auto"])
        if 'vitscope analyze "$@"' in script:
            self.command("analyze", [*words[1:], "trainer=slurm"])

    def pre_commit(self, words: list[str]) -> None:
        assert (ROOT / ".pre-commit-config.yaml").is_file()


DOCUMENTED = [(document.name, words) for document in DOCUMENTS for words in commands(document.read_text())]


#: every experiment is composed for `all`: two seconds each; the pages of diagnostics have many like commands
SLOW = [
    (name == "reproduce.md" and "all" in words) or (ROOT / "docs" / "diagnostics" / name).is_file()
    for name, words in DOCUMENTED
]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        pytest.param(name, words, id=f"{name}: {' '.join(words)[:60]}", marks=pytest.mark.slow if is_slow else ())
        for (name, words), is_slow in zip(DOCUMENTED, SLOW)
    ],
)
def test_a_documented_command_composes(
    document: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own := re.fullmatch(r"VITSCOPE_TRUST=(\w+)", words[0]):  # the user's own package
        monkeypatch.setenv("VITSCOPE_TRUST", own[1])
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / f"{own[1]}.py").write_text(
            "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, **options):\n        super().__init__()\n"
            "class losses:\n    def focal(outputs, targets, gamma=1.0):\n        return outputs.sum(1)\n"
        )
    Checker(tmp_path).check(words)


def test_the_commands_of_the_documents_are_all_read() -> None:
    lines = [" ".join(words) for _, words in DOCUMENTED]
    for start in ("make demo", "python train.py model=alternet", "python analyze.py run=runs/<id>", "python report.py",
                  "vitscope train", "torchrun --nproc-per-node=4", "python train.py data=photographs", "pip install -c",
                  "benchmarks/passed_over.py --networks"):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nnpm start\n```", "```bash\npython trian.py model=vit\n```", "Run `python train.py model=vitt`.",
        "`python train.py model.patch_sise=4`", "`make fig99`", "`make no-such-target`", "`vitscope trian x=1`",
        "`make sweep SWEEP=sweeps/none.yaml`", "`benchmarks/hessian.py --no-such-option 1`", "`data=no_such_set`",
        "`analyze.py 'analysis=[no_such]'`", "`python analyze.py data.root=<folder>`", "`pip install 'vitscope[none]'`",
    ],
)  # fmt: skip
def test_a_command_that_does_not_work_fails(text: str, tmp_path: Path) -> None:
    found = list(commands(text))
    assert len(found) == 1
    with pytest.raises((AssertionError, VitscopeError, HydraException)):
        Checker(tmp_path).check(found[0])


def test_photographs_are_measured(call: Callable[..., int], tmp_path: Path) -> None:
    options = ["model=vit", "model.depth=1", "model.patch_size=8", "data.image_size=16", "device=cpu"]
    assert call("analyze", *options, "data=photographs", "analysis=[evaluation]", f"paths.runs={tmp_path}/runs") == 0
    result = next(tmp_path.glob("runs/*/results/evaluation/*.json"))
    assert '"n_images": 16' in result.read_text()


def test_a_split_that_lacks_is_refused_before_the_first_analysis(
    call: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["model=vit", "model.depth=1", "model.patch_size=8", "data.image_size=16", "device=cpu"]
    analyses = "analysis=[evaluation,depth_probes]"  # the second one reads training images
    assert call("analyze", *options, "data=photographs", analyses, f"paths.runs={tmp_path}/runs") == 3
    assert "16 photographs have no train split; measure on split=test" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/results/*"))


def test_training_on_photographs_is_one_line(
    call: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("train", "model=vit", "data=photographs", "logger=none", f"paths.runs={tmp_path}/runs") == 3
    assert "16 photographs have no train split; measure on split=test; train on data=photos" in capsys.readouterr().err


def test_a_folder_of_images_is_measured(call: Callable[..., int], tmp_path: Path) -> None:
    for name, data in ((("cat", "dog"), "folder"), (ImageNetInfo("imagenet-1k").label_names()[:2], "imagenet")):
        for number in range(2):
            for label in name:
                (tmp_path / data / "val" / label).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (90 * number, 0, 0)).save(tmp_path / data / "val" / label / f"{number}.png")
        classes = ["data.num_classes=2"] if data == "folder" else ["analysis.evaluation.classes=present"]
        options = ["model=vit", "model.depth=1", "model.patch_size=8", "data.image_size=16", "data.num_workers=0"]
        options += [
            f"data={data}",
            f"data.root={tmp_path}/{data}",
            "analysis=[evaluation]",
            f"paths.runs={tmp_path}/{data}-runs",
        ]
        assert call("analyze", *options, *classes, "device=cpu") == 0
        assert list(tmp_path.glob(f"{data}-runs/*/results/evaluation/*.json"))
