"""The stages in order, round after round, and nothing else: which there are, what each reads, which are done, and running the others."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trd_megatron import preflight
from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import Config, get, leaves, to_dict
from trd_megatron.data import sources
from trd_megatron.engine.engines import Engines
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.run_dir import IN_ROUND, Manifest, RunDir, StageFolder, file_sha256
from trd_megatron.stages import evaluate, export, prepare, refine, report, rollout, supervise, train

Run = Callable[..., dict[str, Any]]  # (Config, RunDir, Path), and Engines where the stage generates


@dataclass(frozen=True)
class Stage:
    """settings: the keys (or their sections) it reads; needs: the stages whose output it reads; rounds: in which of them it runs.
    generates: it asks engines for responses; every other stage may have the GPUs to itself."""

    name: str
    folder: str  # in the run directory
    run: Run
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    reads_data: bool = False
    reads_student: bool = False
    reads_teacher: bool = False
    reads_benchmarks: bool = False
    generates: bool = False
    kept: bool = True  # in stale/, when it was made with other settings
    rounds: Literal["each", "first", "last"] = "each"

    @property
    def group(self) -> str:
        """The name on the command line: evaluate for evaluate/base and evaluate/student."""
        return self.name.split("/")[0]

    def rounds_of(self, config: Config) -> range:
        """The rounds in which it runs."""
        return {"each": range(config.rounds), "first": range(1), "last": range(config.rounds - 1, config.rounds)}[self.rounds]


_TEACHER_PROMPT = ("refine.max_prompt_tokens", "refine.max_reference_tokens", "refine.initial_solution")
_PROMPT = ("data.prompt_format", "student", "seed", "engine")
STAGES = (
    Stage(
        "prepare", "problems", prepare.run,
        ("data.source", "data.world", "data.train_problems", "data.test_problems", "data.exclude_benchmarks", "task", "job",
         "mode", "seed"),
        reads_data=True, rounds="first",
    ),
    Stage("rollout", "rollouts", rollout.run, ("rollout", *_PROMPT), ("prepare",), reads_student=True, generates=True),
    Stage("refine", "refined", refine.run, ("refine", "mode", "teacher", *_PROMPT), ("rollout",), reads_teacher=True, generates=True),
    Stage(
        "train", "train", train.run,
        ("learner", "method", "mode", "teacher", "data.filter", "data.prompt_format", "seed", *_TEACHER_PROMPT),
        ("rollout", "refine"), reads_student=True, reads_teacher=True,
    ),
    Stage("export/adapter", "adapter", export.run_adapter, ("export", "learner.lora"), ("train",)),
    Stage("export/hf", "hf", export.run_hf, ("export", "learner.lora"), ("train",), reads_student=True),
    # In later rounds the base is the student of the round before, which was evaluated there.
    Stage("evaluate/base", "eval/base", evaluate.run_base, ("evaluate", *_PROMPT), ("prepare",), reads_student=True, reads_benchmarks=True,
          generates=True, rounds="first"),
    Stage("evaluate/student", "eval/student", evaluate.run_student, ("evaluate", *_PROMPT), ("export/hf",), reads_benchmarks=True,
          generates=True),
    Stage("evaluate/teacher", "eval/teacher", evaluate.run_teacher, ("evaluate", "teacher", *_PROMPT), ("prepare",), reads_teacher=True,
          reads_benchmarks=True, generates=True, rounds="first"),
    Stage("report", "report", report.run, ("name",),
          ("rollout", "refine", "train", "evaluate/base", "evaluate/student", "evaluate/teacher"), kept=False, rounds="last"),
)  # fmt: skip
_SUPERVISED = Stage(  # of job=sft
    "train", "train", supervise.run,
    ("learner", "student", "data.prompt_format", "seed", "rollout.max_prompt_tokens", "rollout.max_response_tokens"), ("prepare",),
    reads_student=True,
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(stage.group for stage in STAGES))


def wanted(config: Config) -> list[Stage]:
    """The stages of this configuration: a method that trains on y_o needs no refinement, a fully trained model has no adapter;
    job=sft trains on solutions instead of trajectories; job=evaluate has only the benchmarks of the model it is given, as base."""
    if config.job == "evaluate":
        return [stage for stage in STAGES if stage.name in ("evaluate/base", "report")]
    unwanted = set()
    if config.method.trajectory != "refined":
        unwanted.add("refine")
    if config.job == "sft":
        unwanted |= {"rollout", "refine"} | (set() if config.evaluate.benchmarks else {"evaluate/base", "evaluate/student"})
    if config.learner.trainable == "full":
        unwanted.add("export/adapter")
    if not config.evaluate.teacher:
        unwanted.add("evaluate/teacher")
    stages = [_SUPERVISED if stage.name == "train" and config.job == "sft" else stage for stage in STAGES]
    return [stage for stage in stages if stage.name not in unwanted]


def roles(config: Config, group: str) -> list[str]:
    """Whose engines the stages of a group ask: the student's, the teacher's."""
    writer = "student" if config.teacher.path is None else "teacher"
    found = {"rollout": ["student"], "refine": [writer], "evaluate": ["student"]}.get(group, [])
    return [*found, "teacher"] if group == "evaluate" and config.evaluate.teacher else found


def check_devices(config: Config, groups: Collection[str]) -> None:
    """Raises UserError if this machine has fewer GPUs than the stages of these groups use."""
    preflight.check_devices(config, {role for group in groups for role in roles(config, group)}, learner="train" in groups)


@cache
def _model_hash(path: str) -> str:
    return model_fingerprint(resolve_model(path))


def _under(name: str, keys: tuple[str, ...]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _unused(config: Config, stage: Stage) -> tuple[str, ...]:
    """Settings of engines that this stage does not ask, of data that do not come from the lab, and which stages there are."""
    others = ["evaluate.teacher"]
    if config.data.source != "lab":
        others.append("data.world")
    if config.job == "distill":  # as if there were no other
        others.append("job")
    if stage.name == "prepare" and (config.task != "code" or config.job == "sft"):  # only programs need a reference for one of the modes
        others.append("mode")
    if config.engine.kind == "local":
        return ("engine.student", "engine.teacher", "engine.deterministic", *others)
    of_teacher = stage.name in ("refine", "evaluate/teacher") and config.teacher.path is not None
    return ("engine.student" if of_teacher else "engine.teacher", "engine.batch_size", *others)


def _settings(config: Config, stage: Stage) -> dict[str, Any]:
    """Values of the result-changing settings that a stage reads. Paths are left out: what they lead to is hashed instead."""
    unused = _unused(config, stage)
    return {
        name: get(config, name)
        for name, field in leaves()
        if not field.metadata["layout"] and not name.endswith(".path") and _under(name, stage.settings) and not _under(name, unused)
    }


def _outside(config: Config, stage: Stage, student: str | None) -> dict[str, str]:
    """Hashes of what a stage reads from outside its round. student: the fingerprint of the stage that made the round's student."""
    inputs: dict[str, str] = {}
    if stage.reads_data:
        # Only what the user names by its path. A hub's repository may move on, what was prepared from it stays; the manifest says which
        # revision it was.
        inputs |= _hashes("data.path", sources.local_files(config.data.path) if config.data.path is not None else [])
        for spec in config.data.exclude_benchmarks:
            inputs |= _hashes(f"data.exclude_benchmarks.{benchmarks.name(spec)}", benchmarks.local_files(spec))
    if stage.reads_student:
        inputs["model.path"] = student or _model_hash(config.model.path)
    if stage.reads_teacher:
        self_taught = student if config.teacher.path is None else None
        inputs["teacher.path"] = self_taught or _model_hash(config.teacher.path or config.model.path)
    if stage.reads_benchmarks:
        for spec in config.evaluate.benchmarks:
            inputs |= _hashes(f"evaluate.benchmarks.{benchmarks.name(spec)}", [] if spec == "test" else benchmarks.local_files(spec))
    return inputs


def _hashes(key: str, files: Sequence[Path]) -> dict[str, str]:
    """One hash under the key itself, several under the files' names."""
    return {key if len(files) == 1 else f"{key}/{file.name}": file_sha256(file) for file in files}


@dataclass(frozen=True, eq=False)
class Work:
    """One stage in one round. config: its model.path is the round's student. run_dir: the round's view. needs: whose output it reads."""

    name: str  # rollout; in a run of several rounds 1/rollout
    stage: Stage
    config: Config
    run_dir: RunDir
    folder: StageFolder
    needs: tuple["Work", ...]

    @property
    def group(self) -> str:
        """The name on the command line: train, or 1/train."""
        return self.name.removesuffix(self.stage.name) + self.stage.group

    def is_named(self, number: int | None, group: str) -> bool:
        return self.stage.group == group and number in (None, self.run_dir.round)


def works(config: Config, run_dir: RunDir) -> Iterator[Work]:
    """Every stage of this configuration in every round, in order. Fetches or makes models that are not there yet."""
    newest: dict[str, Work] = {}  # by stage
    scored: list[Work] = []
    for number in range(config.rounds):
        view = run_dir.in_round(number, config.rounds)
        student = newest.get("export/hf")  # None: the round starts from model.path
        start = config if student is None else replace(config, model=replace(config.model, path=str(student.folder.folder.resolve())))
        for stage in wanted(config):
            if number not in stage.rounds_of(config):
                continue
            needs = [newest[need] for need in stage.needs if need in newest]
            inputs = {need.stage.name: need.folder.fingerprint for need in needs}
            if stage.rounds == "last":  # it shows the scores of every round
                needs += scored[:-1]
                inputs |= {need.name: need.folder.fingerprint for need in scored[:-1]}
            inputs |= _outside(config, stage, student.folder.fingerprint if student else None)
            if student and (stage.reads_student or stage.reads_teacher):
                needs.append(student)
            place = view.folder(stage.folder)
            folder = StageFolder(run_dir, stage.name.replace("/", "-"), place, _settings(config, stage), inputs, stage.kept)
            several = config.rounds > 1 and stage.folder.split("/")[0] in IN_ROUND
            name = f"{number}/{stage.name}" if several else stage.name
            work = Work(name, stage, config if stage.rounds == "last" else start, view, folder, tuple(needs))
            newest[stage.name] = work
            if stage.name == "evaluate/student":
                scored.append(work)
            yield work


def _read_name(name: str, config: Config) -> tuple[int | None, str]:
    """(round, group) of a stage on the command line: train, or 1/train. Raises UserError if this configuration has no such stage."""
    first, _, rest = name.partition("/")
    number, group = (int(first), rest) if first.isdigit() else (None, name)
    if group not in GROUPS:
        raise UserError(f"no stage '{name}': stages are {', '.join(GROUPS)}")
    stages = [stage for stage in wanted(config) if stage.group == group]
    if not stages:
        why = f"method={config.method.name} trains on y_o and" if config.job == "distill" else f"job={config.job}"
        raise UserError(f"{why} has no stage {group}")
    if number is not None and not any(number in stage.rounds_of(config) for stage in stages):
        raise UserError(f"no stage '{name}': with rounds={config.rounds}, {group} is in round {_span(stages[-1].rounds_of(config))}")
    return number, group


def _groups(config: Config, end: tuple[int | None, str] | None, chosen: tuple[int | None, str] | None) -> list[str]:
    """Of the stages that `run` comes to: all, those up to the end, or the chosen one."""
    if chosen is not None:
        return [chosen[1]]
    groups = list(dict.fromkeys(stage.group for stage in wanted(config)))
    if end is None or end[0]:  # in a later round all have had their turn
        return groups
    return groups[: 1 + groups.index(end[1])]


def _span(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def write_summary(done: Iterable[Work], view: RunDir) -> None:
    """eval/summary.json of the view's round, of the evaluations among `done`: the base's, the teacher's, and of this round's student."""
    scored = [work for work in done if work.stage.group == "evaluate" and (work.stage.rounds == "first" or work.run_dir == view)]
    base = [work.run_dir for work in scored if work.stage.name == "evaluate/base"]
    evaluate.write_summary(base[0] if base else view, view, {work.stage.name.split("/")[1] for work in scored})


def _do(work: Work, engines: Engines) -> dict[str, Any]:
    if work.stage.generates:
        return work.stage.run(work.config, work.run_dir, work.folder.folder, engines)
    if work.stage.name == "train":
        engines.release()
    return work.stage.run(work.config, work.run_dir, work.folder.folder)


def _working_time(manifest: Manifest, started: float, engines: Engines) -> float:
    """Seconds since `started`, without those for which servers started: the manifest counts them apart."""
    manifest.server_start_seconds += engines.start_seconds
    return time.monotonic() - started - engines.start_seconds


def train_together(
    runs: Sequence[tuple[Config, RunDir]],
    on_stage: Callable[[Work, Manifest, bool], None] = lambda work, manifest, skipped: None,
) -> None:
    """The train stage of several runs of one round, by one group of ranks. Of each all that it reads must be done.

    Raises what the stage raises; what was trained before is kept. seconds of a manifest: its own, and an equal share of the start.
    """
    with contextlib.ExitStack() as locks:
        opened: list[tuple[Work, Manifest]] = []
        for config, run_dir in runs:
            [work] = [work for work in works(config, run_dir) if work.stage.name == "train"]
            if work.folder.state() != "done":
                preflight.check_training(config)
                locks.enter_context(run_dir.lock())
                opened.append((work, work.folder.open()))
        jobs = [_write_job(work) for work, _ in opened]
        waiting, since = list(opened), time.monotonic()
        try:
            for counts, seconds in train.learn(jobs):
                work, manifest = waiting.pop(0)
                since = time.monotonic()
                work.folder.close(manifest, counts, seconds)
                on_stage(work, manifest, False)
        except BaseException:
            if waiting:  # the first of them was being trained
                work, manifest = waiting[0]
                work.folder.pause(manifest, time.monotonic() - since)
            raise


def _write_job(work: Work) -> train.Prepared:
    try:
        return train.write(work.config, work.run_dir, work.folder.folder)
    except UserError as error:
        raise UserError(f"{work.run_dir.path}: {error}") from None


def run(
    config: Config,
    run_dir: RunDir,
    *,
    until: str | None = None,
    only: str | None = None,
    again: bool = False,
    on_stage: Callable[[Work, Manifest, bool], None] = lambda work, manifest, skipped: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs what is not done yet, in order. until: stop after this stage, the first round's if it names none. only: this stage
    alone, its inputs must be done; if it names no round, in every later one too whose inputs are. again: also where it is done already.

    on_stage hears of each stage as it ends: (work, manifest, whether it was skipped); say, of what happens to servers.
    """
    end, chosen = (None if name is None else _read_name(name, config) for name in (until, only))
    check_devices(config, _groups(config, end, chosen))
    preflight.check_inputs(config)
    if run_dir.path.exists():
        with run_dir.lock():
            run_dir.gather_rounds(config.rounds)
    todo = list(works(config, run_dir))
    if end is not None:
        named = [index for index, work in enumerate(todo) if work.is_named(*end)]
        todo = todo[: 1 + max(index for index in named if todo[index].run_dir.round == todo[named[0]].run_dir.round)]
    runs = [work for work in todo if chosen is None or work.is_named(*chosen)]
    working = [work.stage for work in runs if again or work.folder.state() != "done"]
    if any(stage.name == "train" for stage in working):
        preflight.check_training(config)
    if any(stage.generates for stage in working):
        preflight.check_grading(config)
    with run_dir.lock(), Engines(config, run_dir.path / "servers", say) as engines:
        run_dir.write_config(to_dict(config))
        done: set[Work] = set()
        for work in todo:
            stage, folder, view = work.stage, work.folder, work.run_dir
            if work not in runs:
                if folder.state() == "done":
                    folder.open()  # brings it back, if it lies in stale/
                    done.add(work)
                continue
            missing = [need for need in work.needs if need not in done]
            if missing and only is not None and view.round > runs[0].run_dir.round:
                continue
            if missing:
                raise UserError(f"stage {work.name} reads {missing[0].name}, which is not done: run it first (--until {missing[0].group})")
            manifest = folder.open()
            skipped = manifest.status == "done" and not again
            if not skipped:
                started, engines.start_seconds = time.monotonic(), 0.0
                try:
                    counts = _do(work, engines)
                except BaseException:
                    folder.pause(manifest, _working_time(manifest, started, engines))
                    raise
                folder.close(manifest, counts, _working_time(manifest, started, engines))
            done.add(work)
            if stage.group == "evaluate":
                write_summary(done, view)
            on_stage(work, manifest, skipped)
