"""The stages in order, and nothing else: which there are, what each reads, which are done, and running the others."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trd_megatron import preflight
from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import Config, get, leaves, to_dict
from trd_megatron.data.parquet import locate
from trd_megatron.engine.engines import Engines
from trd_megatron.errors import UserError
from trd_megatron.run_dir import Manifest, RunDir, StageFolder, file_sha256
from trd_megatron.stages import evaluate, export, prepare, refine, report, rollout, train

Run = Callable[..., dict[str, Any]]  # (Config, RunDir, Path), and Engines where the stage generates


@dataclass(frozen=True)
class Stage:
    """settings: the keys (or their sections) it reads; models: the folders it reads; needs: the stages whose output it reads.
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

    @property
    def group(self) -> str:
        """The name on the command line: evaluate for evaluate/base and evaluate/student."""
        return self.name.split("/")[0]


_TEACHER_PROMPT = ("refine.max_prompt_tokens", "refine.max_reference_tokens", "refine.initial_solution")
_PROMPT = ("data.prompt_format", "student", "seed", "engine", "verify")
STAGES = (
    Stage("prepare", "problems", prepare.run, ("data.source", "data.train_problems", "data.test_problems", "task", "seed"),
          reads_data=True),
    Stage("rollout", "rollouts", rollout.run, ("rollout", *_PROMPT), ("prepare",), reads_student=True, generates=True),
    Stage("refine", "refined", refine.run, ("refine", "mode", "teacher", *_PROMPT), ("rollout",), reads_teacher=True, generates=True),
    Stage(
        "train", "train", train.run, ("learner", "method", "mode", "teacher", "data.prompt_format", "seed", *_TEACHER_PROMPT),
        ("rollout", "refine"), reads_student=True, reads_teacher=True,
    ),
    Stage("export/adapter", "adapter", export.run_adapter, ("export", "learner.lora"), ("train",)),
    Stage("export/hf", "hf", export.run_hf, ("export", "learner.lora"), ("train",), reads_student=True),
    Stage("evaluate/base", "eval/base", evaluate.run_base, ("evaluate", *_PROMPT), ("prepare",), reads_student=True, reads_benchmarks=True,
          generates=True),
    Stage("evaluate/student", "eval/student", evaluate.run_student, ("evaluate", *_PROMPT), ("export/hf",), reads_benchmarks=True,
          generates=True),
    Stage("report", "report", report.run, ("name",), ("rollout", "refine", "train", "evaluate/base", "evaluate/student"), kept=False),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(stage.group for stage in STAGES))


def wanted(config: Config) -> list[Stage]:
    """The stages of this configuration: a method that trains on y_o needs no refinement, a fully trained model has no adapter."""
    unwanted = set()
    if config.method.trajectory != "refined":
        unwanted.add("refine")
    if config.learner.trainable == "full":
        unwanted.add("export/adapter")
    return [stage for stage in STAGES if stage.name not in unwanted]


@cache
def _model_hash(path: str) -> str:
    return model_fingerprint(resolve_model(path))


def _settings(config: Config, keys: tuple[str, ...]) -> dict[str, Any]:
    """Values of the result-changing settings under `keys`. Paths are left out: what they lead to is hashed instead."""
    return {
        name: get(config, name)
        for name, field in leaves()
        if not field.metadata["layout"] and not name.endswith(".path") and any(name == key or name.startswith(f"{key}.") for key in keys)
    }


def _outside(config: Config, stage: Stage) -> dict[str, str]:
    """Hashes of what a stage reads from outside the run."""
    inputs = {}
    if stage.reads_data and config.data.path is not None:
        inputs["data.path"] = file_sha256(locate(config.data.path))
    if stage.reads_student:
        inputs["model.path"] = _model_hash(config.model.path)
    if stage.reads_teacher:
        inputs["teacher.path"] = _model_hash(config.teacher.path or config.model.path)
    if stage.reads_benchmarks:
        for benchmark in config.evaluate.benchmarks:
            if benchmark != "test":
                inputs[f"evaluate.benchmarks.{Path(benchmark).name}"] = file_sha256(locate(benchmark))
    return inputs


def folders(config: Config, run_dir: RunDir) -> Iterator[tuple[Stage, StageFolder]]:
    """Every stage of this configuration with its folder and fingerprint. Fetches or makes models that are not there yet."""
    fingerprints: dict[str, str] = {}
    for stage in wanted(config):
        inputs = {need: fingerprints[need] for need in stage.needs if need in fingerprints}
        folder = StageFolder(
            run_dir,
            stage.name.replace("/", "-"),
            run_dir.path / stage.folder,
            _settings(config, stage.settings),
            inputs | _outside(config, stage),
            stage.kept,
        )
        fingerprints[stage.name] = folder.fingerprint
        yield stage, folder


def _work(stage: Stage, config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    if stage.generates:
        return stage.run(config, run_dir, folder, engines)
    if stage.name == "train":
        engines.release()
    return stage.run(config, run_dir, folder)


def run(
    config: Config,
    run_dir: RunDir,
    *,
    until: str | None = None,
    only: str | None = None,
    again: bool = False,
    on_stage: Callable[[Stage, Manifest, bool], None] = lambda stage, manifest, skipped: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs what is not done yet, in order. until: stop after this stage. only: this stage alone, its inputs must be done.
    again: also where it is done already.

    on_stage hears of each stage as it ends: (stage, manifest, whether it was skipped); say, of what happens to servers.
    """
    for name in (until, only):
        if name is not None and name not in GROUPS:
            raise UserError(f"no stage '{name}': stages are {', '.join(GROUPS)}")
        if name is not None and name not in {stage.group for stage in wanted(config)}:
            raise UserError(f"method={config.method.name} trains on y_o and has no stage {name}")
    preflight.check_devices(config)
    preflight.check_inputs(config)
    todo = list(folders(config, run_dir))
    names = list(GROUPS)
    trains = only in (None, "train") and (until is None or names.index(until) >= names.index("train"))
    if trains and any(stage.name == "train" and (again or folder.state() != "done") for stage, folder in todo):
        preflight.check_training(config)
    with run_dir.lock(), Engines(config, run_dir.path / "servers", say) as engines:
        run_dir.write_config(to_dict(config))
        done: set[str] = set()
        for stage, folder in todo:
            if only is not None and stage.group != only:
                if folder.state() == "done":
                    folder.open()  # brings it back, if it lies in stale/
                    done.add(stage.name)
                continue
            missing = [need for need in stage.needs if need not in done and any(s.name == need for s, _ in todo)]
            if missing:
                raise UserError(
                    f"stage {stage.name} reads {missing[0]}, which is not done: run it first (--until {missing[0].split('/')[0]})"
                )
            manifest = folder.open()
            skipped = manifest.status == "done" and not again
            if not skipped:
                started = time.monotonic()
                try:
                    counts = _work(stage, config, run_dir, folder.folder, engines)
                except BaseException:
                    folder.pause(manifest, time.monotonic() - started)
                    raise
                folder.close(manifest, counts, time.monotonic() - started)
            done.add(stage.name)
            if stage.group == "evaluate":
                evaluate.write_summary(run_dir, {name.split("/")[1] for name in done if name.startswith("evaluate/")})
            on_stage(stage, manifest, skipped)
            if until is not None and stage.group == until and not any(s.group == until and s.name not in done for s, _ in todo):
                return
