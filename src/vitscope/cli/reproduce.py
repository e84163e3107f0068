"""``vitscope reproduce fig4 profile=smoke``: a figure or table of the paper by its name, from nothing or from what is there."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitscope.cli import exit_codes
from vitscope.config import error_translation, loading
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce.plan import Outcome, Target, Trial
from vitscope.runtime import errors, stop_flag
from vitscope.runtime.errors import ConfigError, DataError
from vitscope.runtime.logging import log_problem
from vitscope.runtime.stop_flag import Interrupted

_logger = logging.getLogger(__name__)

OPTIONS = {"profile": "smoke", "seeds": "1", "runs": "", "out": ""}

Work = Callable[[Sequence[Trial], Path], Iterator[tuple[Trial, Outcome]]]


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(lambda: reproduce(*arguments(sys.argv[1:])))


def arguments(argv: Sequence[str]) -> tuple[list[str], str, int, Path, Path]:
    """Return targets, profile, number of seeds, the folder of runs and that of figures from a command line.

    Raises:
        ConfigError: an unknown option, or seeds that are no number.
    """
    if not argv or argv[0] in ("-h", "--help"):
        target_names = " ".join(reproduction.read()["targets"])
        print("usage: vitscope reproduce TARGET ... [profile=smoke] [seeds=1] [runs=FOLDER] [out=FOLDER]")
        print(f"targets: all {target_names}")
        raise SystemExit(0)
    names = [a for a in argv if "=" not in a]
    options = {key: value for key, _, value in (a.partition("=") for a in argv if "=" in a)}
    for key in options:
        if key not in OPTIONS:
            raise ConfigError(key, options[key], "no such option", errors.nearest(key, OPTIONS))
    settings = {**OPTIONS, **options}
    if not settings["seeds"].isdigit() or int(settings["seeds"]) < 1:
        raise ConfigError("seeds", settings["seeds"], "not a number of at least 1", "give one, such as seeds=5")
    root = Path(settings["runs"] or f"runs/reproduce-{settings['profile']}")
    return (
        names,
        settings["profile"],
        int(settings["seeds"]),
        root,
        Path(settings["out"] or f"figures/{settings['profile']}"),
    )


def reproduce(names: Sequence[str], profile: str, seeds: int, root: Path, out: Path, work: Work | None = None) -> None:
    """Train and measure what the targets lack, draw them, and name every cell that is missing.

    Args:
        names: of targets; ``all``, or a figure for all its parts.
        profile: of ``conf/reproduce.yaml``.
        seeds: of each experiment.
        root: the folder of runs.
        out: the folder of figures, a folder a target in it.
        work: performs trials; other processes do by default.

    Raises:
        ConfigError: an unknown target or profile.
        DataError: numbers or figures are missing; each is named on stderr.
        Interrupted: a stop was asked for; what was finished is kept.
    """
    plan = reproduction.read()
    targets = [reproduction.target(name, plan, profile, seeds) for name in reproduction.select(names, plan)]
    from vitscope.reproduce import draw as drawing  # imports torch; a target that does not exist has been refused

    trials = list(dict.fromkeys(trial for target in targets for trial in target.trials))
    outcomes: dict[Trial, Outcome] = {}
    waiting = list(targets)
    problems: list[str] = []
    started = time.monotonic()
    for trial, outcome in (work or in_processes)(trials, root):
        outcomes[trial] = outcome
        state = "failed" if outcome.problems else "done"
        _logger.info(f"[{len(outcomes)}/{len(trials)}, {time.monotonic() - started:.0f} s] {state}: {trial.name}")
        for target in [t for t in waiting if all(needed in outcomes for needed in t.trials)]:
            waiting.remove(target)
            problems += _drawn(target, outcomes, out, drawing.draw)
    for target in waiting:
        problems += _drawn(target, outcomes, out, drawing.draw)
    if "all" in names:
        _page(root, out)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        log_problem(_logger, problem)
    if problems:
        raise DataError("target", " ".join(names), f"{len(problems)} missing or failed, named above",
                        "see the runs' log.txt and run the same command again")  # fmt: skip


def in_processes(trials: Sequence[Trial], root: Path) -> Iterator[tuple[Trial, Outcome]]:
    """Perform trials in one other process, which pays for imports once; one that dies is replaced for those left.

    Raises:
        Interrupted: a stop was asked for; the trial that ran has saved its checkpoint.
    """
    remaining_trials = list(trials)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    while remaining_trials:
        parent_end, child_end = context.Pipe()
        process = context.Process(target=_serve, args=(child_end, list(remaining_trials), root))
        process.start()
        child_end.close()
        try:
            while remaining_trials:
                outcome = _awaited(parent_end)
                yield remaining_trials.pop(0), outcome
        except EOFError:  # killed, out of memory, a crash in a library
            process.join()
            name = remaining_trials[0].name
            yield (
                remaining_trials.pop(0),
                Outcome(None, (f"failed: {name} (its process ended with {process.exitcode})",)),
            )
        except (Interrupted, GeneratorExit):
            process.terminate()  # it saves, then ends
            raise
        finally:
            process.join()


def _awaited(pipe: Any) -> Outcome:
    stop_flag.check()
    while not pipe.poll(0.5):
        stop_flag.check()
    received = pipe.recv()
    if isinstance(received, int):
        raise Interrupted(received)
    return received


def _serve(pipe: Any, trials: Sequence[Trial], root: Path) -> None:
    """Perform trials and send what became of each; stop at a signal."""
    for trial in trials:
        outcomes: list[Outcome] = []
        code = exit_codes.run_command(lambda trial=trial, outcomes=outcomes: outcomes.append(attempted(trial, root)))
        if stop_flag.requested() is not None:
            pipe.send(stop_flag.requested())
            return
        pipe.send(outcomes[0] if outcomes else Outcome(None, (f"failed: {trial.name} (exit code {code}, see above)",)))


def attempted(trial: Trial, root: Path) -> Outcome:
    """Perform a trial; one that fails is an outcome with its reason, and its traceback goes where errors go."""
    from vitscope.reproduce.trial import perform  # imports torch, which the process that starts trials does not need

    try:
        return perform(trial, root)
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        explained = error_translation.explain(error)
        _logger.error(str(explained or repr(error)))
        return Outcome(None, (f"{trial.name} ({explained or repr(error)})",))


def _drawn(target: Target, outcomes: dict[Trial, Outcome], out: Path, draw: Callable[..., list[str]]) -> list[str]:
    finished = {trial: outcomes[trial] for trial in target.trials if trial in outcomes}
    problems = [f"failed: {target.name}: {p}" for outcome in finished.values() for p in outcome.problems]
    problems += [f"missing: {target.name}: {trial.name}" for trial in target.trials if trial not in outcomes]
    return problems + draw(target, [outcome for outcome in finished.values() if outcome.run is not None], out)


def _page(root: Path, out: Path) -> None:
    from hydra import compose

    from vitscope.config import hydra_internals
    from vitscope.reports.report_run import report

    overrides = [f"paths.runs={root.absolute()}", f"out={out.absolute()}", "tag=end"]
    with hydra_internals.composing_from(str(loading.folder()), "report"):
        cfg = compose("report", overrides=overrides)
    report(cfg)
