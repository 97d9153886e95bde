"""Many runs of one experiment (`trd run --multirun`): one run directory for each combination of settings, and a report that compares them.

Each is a run like any other. What several of them would do alike (the same rollouts for every method, the same base) is done once and
linked into the others, and those that need as many ranks are trained by one group of processes.
"""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from trd_megatron import pipeline
from trd_megatron.config import Config, load, parse
from trd_megatron.errors import UserError
from trd_megatron.pipeline import Work
from trd_megatron.run_dir import Manifest, RunDir

# Stages that no training of the run's own comes before: where fingerprints are equal, so is what they made.
SHARED = ("prepare", "rollout", "refine", "evaluate/base", "evaluate/teacher")
OnStage = Callable[[Work, Manifest, bool], None]


@dataclass(frozen=True)
class Member:
    """One run of a sweep. label: the name of its folder."""

    label: str
    config: Config
    run_dir: RunDir


def members(overrides: Sequence[str]) -> tuple[Path, list[Member]]:
    """(folder of the sweep, its runs) of settings of which some have several values: method=trd,forward_kl or seed=range(0,3).

    Raises UserError as config.load does, if no setting has several values, if two runs would be the same, or if they have no folder in
    common (their experiments have names of their own, and no run_dir is given).
    """
    axes = [_choices(text) for text in overrides]
    if all(len(axis) == 1 for axis in axes):
        raise UserError("--multirun needs a setting with several values, e.g. method=trd,forward_kl or seed=0,1,2")
    found: list[Member] = []
    for chosen in itertools.product(*axes):
        config = load([text for text, _ in chosen])
        label = "-".join(name for axis, (_, name) in zip(axes, chosen, strict=True) if len(axis) > 1)
        folder = Path(config.run_dir)
        if (folder / "config.yaml").exists():
            raise UserError(f"run_dir={folder} holds a single run: choose another run_dir=PATH for --multirun")
        if any(label == member.label for member in found):
            raise UserError(f"two runs would be called {label}: give each value once")
        if found and folder != found[0].run_dir.path.parent:
            raise UserError(f"these runs would lie in {found[0].run_dir.path.parent}, {folder}, ...: give them one folder, run_dir=PATH")
        config = replace(config, run_dir=str(folder / label))
        found.append(Member(label, config, RunDir(config.run_dir, config.name)))
    return folder, found


def _choices(text: str) -> list[tuple[str, str]]:
    """[(setting with one of its values, what a folder's name calls it)]."""
    override = parse(text)
    if not override.is_sweep_override():
        return [(text, "")]
    key = override.key_or_group
    found = []
    for value in map(str, override.sweep_string_iterator()):
        word = re.sub(r"[^\w.+-]+", "_", value).strip("_.")
        found.append((f"{key}={value}", word if word[:1].isalpha() else f"{key.split('.')[-1]}{word}"))
    return found


def run(
    runs: Sequence[Member],
    *,
    on_run: Callable[[Member], None] = lambda member: None,
    on_stage: OnStage = lambda work, manifest, skipped: None,
    on_trained: OnStage = lambda work, manifest, skipped: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs what is not done yet of all runs: first what comes before training, then training, then the rest.

    on_run hears which run comes next, on_stage and say as in pipeline.run, on_trained of each training. Raises what pipeline.run raises;
    what is done stays.
    """
    together = [member for member in runs if member.config.job == "distill" and member.config.rounds == 1]
    for index, member in enumerate(runs):
        on_run(member)
        _adopt(member, runs[:index])
        until = None
        if member in together:
            until = "refine" if member.config.method.trajectory == "refined" else "rollout"
        pipeline.run(member.config, member.run_dir, until=until, on_stage=on_stage, say=say)
    for group in _by_ranks(together):
        pipeline.train_together([(member.config, member.run_dir) for member in group], on_trained)
    for index, member in enumerate(runs):
        if member in together:
            on_run(member)
            _adopt(member, runs[:index])
            pipeline.run(member.config, member.run_dir, on_stage=on_stage, say=say)


def _by_ranks(runs: Sequence[Member]) -> list[list[Member]]:
    """Runs whose learners are started alike."""
    groups: dict[tuple[str, int, int | None], list[Member]] = {}
    for member in runs:
        learner = member.config.learner
        groups.setdefault((learner.device, learner.ranks, learner.cpu_threads), []).append(member)
    return list(groups.values())


def _adopt(member: Member, others: Sequence[Member]) -> None:
    """Links what another run has done with the same settings and inputs. A file that is written anew replaces the link alone."""
    for work in pipeline.works(member.config, member.run_dir):
        if work.stage.name not in SHARED or work.run_dir.round or work.folder.state() not in ("missing", "stale"):
            continue
        for other in others:
            source = other.run_dir.in_round(0, other.config.rounds).folder(work.stage.folder)
            manifest = Manifest.read(source)
            if manifest is not None and manifest.status == "done" and manifest.fingerprint == work.folder.fingerprint:
                with member.run_dir.lock():
                    work.folder.bring(partial(_link, source))
                break


def _link(source: Path, target: Path) -> None:
    """`target` appears whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(source, temporary, dirs_exist_ok=True, copy_function=_link_file)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
