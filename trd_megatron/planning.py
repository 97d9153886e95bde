"""What a run would do and need (`trd plan`), and where a run stands (`trd status`). Reads only."""

import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trd_megatron import paper, preflight
from trd_megatron.builtin_models import resolve_model
from trd_megatron.capacity import plan
from trd_megatron.capacity.memory import BYTES
from trd_megatron.capacity.models import KNOWN, is_here, shape
from trd_megatron.chat import Chat, coloured, sequence
from trd_megatron.config import Config, of_run
from trd_megatron.data import sources
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.learner.checkpoint_files import saved_steps
from trd_megatron.learner.stack import precision
from trd_megatron.pipeline import wanted, works
from trd_megatron.prompts import student_prompt
from trd_megatron.run_dir import Manifest, RunDir
from trd_megatron.stages import prepare, supervise
from trd_megatron.stages.train import build_samples

MEANING = {
    "done": "[green]cached[/green], would be skipped",
    "running": "[yellow]begun[/yellow], would go on",
    "stale": "[yellow]made with other settings[/yellow], kept in stale/, would run anew",
    "missing": "would run",
}


def gib(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _settings_line(config: Config, stage: str) -> str:
    """What a stage works with, in a few words."""
    learner, trained_on = config.learner, config.method.name if config.job == "distill" else "worked solutions"
    return {
        "prepare": f"{config.data.source} {config.data.world if config.data.source == 'lab' else config.data.path or ''}",
        "rollout": f"{config.rollout.samples_per_problem} per problem, up to {config.rollout.max_response_tokens} tokens",
        "refine": f"by {config.teacher.path or 'the student itself'}, up to {config.refine.max_response_tokens} tokens",
        "train": f"{trained_on}, TP {learner.tensor_model_parallel_size} x CP {learner.context_parallel_size} x DP "
        f"{learner.data_parallel_size}{', sequence parallel' if learner.sequence_parallel else ''}, "
        f"{learner.dtype} on {learner.device}, recompute {learner.recompute}, {learner.global_batch_size} sequences a step",
        "export/adapter": f"checkpoint {config.export.checkpoint}, as a PEFT adapter",
        "export/hf": f"checkpoint {config.export.checkpoint}, merged",
        "report": "report.html, report.json",
    }.get(stage, f"{', '.join(config.evaluate.benchmarks)}, {config.evaluate.samples} samples a problem")


def tables(config: Config) -> Iterator[RenderableType]:
    """Stages and their state; sizes, memory and disk. Raises UserError as the run itself would."""
    run_dir = RunDir(config.run_dir, config.name)
    paths = [path for path in (config.model.path, config.teacher.path) if path is not None]
    away = [path for path in paths if path in KNOWN and not is_here(path)]
    for path in paths:
        if path not in away:
            resolve_model(path, download=False)
    if not away:
        preflight.check_inputs(config)
    stages = Table("stage", "state", "works with", title=f"{config.name} in {run_dir.path}")
    if away:  # what is done cannot be told: it depends on the models' files
        for stage in wanted(config):
            stages.add_row(stage.name, "", _settings_line(config, stage.name))
    for work in [] if away else works(config, run_dir):
        stages.add_row(work.name, MEANING[work.folder.state()], _settings_line(config, work.stage.name))
    yield stages
    place = paper.describe(config)
    if place is not None:
        yield Text(f"{config.name}: {place}")
    if away:
        yield Text(
            f"{', '.join(away)}: not downloaded yet; the sizes below are of the published configuration, and what is done is not shown."
        )
    if config.job == "evaluate":  # the sizes are those of training
        return
    yield _needs(config, run_dir)
    yield from plan.tables(config)


def _needs(config: Config, run_dir: RunDir) -> Table:
    """Sizes of models and of the disk; memory is in capacity/."""
    student = shape(config.model.path)
    teacher = shape(config.teacher.path) if config.teacher.path else student
    learner, engine = config.learner, config.engine
    full = learner.trainable == "full"
    trained = student.parameter_count() if full else student.adapter_parameters(learner.lora.rank, learner.lora.targets)
    generating = (config.rollout, config.refine, config.evaluate) if config.job == "distill" else (config.evaluate,)
    longest = max(section.max_prompt_tokens + section.max_response_tokens for section in generating)
    cache = 2 * teacher.num_layers * teacher.num_query_groups * teacher.head_dim * BYTES[engine.dtype] * longest * engine.batch_size
    served = max(student.parameter_count(), teacher.parameter_count()) * BYTES[engine.dtype]
    checkpoints = learner.keep_checkpoints * trained * 12
    disk = config.rounds * (checkpoints + student.parameter_count() * 4 + (0 if full else trained * 4))
    place = run_dir.path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free

    table = Table("what", "size", "note", title="Sizes")
    table.add_row(
        "student",
        f"{student.parameter_count():,} parameters",
        f"{student.model_type}, {student.num_layers} layers, vocabulary {student.vocab_size:,}",
    )
    if config.teacher.path:
        table.add_row("teacher", f"{teacher.parameter_count():,} parameters", f"{teacher.model_type}, {teacher.num_layers} layers")
    lora = learner.lora
    note = "all of the student" if full else f"adapters of rank {lora.rank} on {', '.join(lora.targets)}; dropout {lora.dropout:g}"
    table.add_row("trained", f"{trained:,} parameters", note)
    table.add_row("precision", learner.dtype if learner.fp8 == "none" else f"fp8, {learner.fp8}", precision(learner))
    if (run_dir.problems / "manifest.json").exists():
        manifest = Manifest.read(run_dir.problems)
        if manifest is not None and manifest.status == "done":
            table.add_row("problems", f"{manifest.counts['train_problems']}", f"{manifest.counts['test_problems']} held out")
    if engine.kind == "local":
        note = f"weights and the cache of {engine.batch_size} sequences of full length"
        table.add_row("memory of the engine", f"at most {gib(served + cache)}", note)
    if learner.device == "cuda":
        table.add_row("GPUs for the learner", f"{learner.ranks}", f"this machine has {torch.cuda.device_count()}")
    else:
        table.add_row("memory of this machine", gib(psutil.virtual_memory().total), f"{gib(psutil.virtual_memory().available)} available")
    of_each = f" of each of {config.rounds} rounds" if config.rounds > 1 else ""
    table.add_row(
        "disk for the run",
        f"about {gib(disk)}",
        f"{learner.keep_checkpoints} checkpoints and the exported model{of_each}; {gib(free)} free at {place}",
    )
    if disk > free:
        table.add_row(
            "[red]disk[/red]",
            f"[red]{gib(disk - free)} short[/red]",
            "free some, lower learner.keep_checkpoints, or choose another run_dir",
        )
    return table


def sample(config: Config) -> Text:
    """One training sequence of the first round: a real one where rollouts (and rewrites) are there, else a problem with its reference.

    Raises UserError where even the problems would have to be downloaded first.
    """
    if config.job == "evaluate":
        raise UserError("--show-sample shows a training sequence, and job=evaluate trains nothing")
    run_dir = RunDir(config.run_dir, config.name).in_round(0, config.rounds)
    chat = Chat(resolve_model(config.model.path), config.data.prompt_format, config.student.chat_template_kwargs)
    first = (work for work in works(config, run_dir) if work.run_dir.round == 0)
    if config.job == "sft" and next(first).folder.state() == "done":
        row = supervise.build_samples(config, run_dir)[0][0]
        return coloured(chat, sequence(row["student_prompt_ids"], row["response_ids"]))
    current = {work.stage.name for work in first if work.folder.state() == "done" and work.folder.folder.exists()}
    if {"prepare", "rollout", "refine" if config.method.trajectory == "refined" else "rollout"} <= current:
        rows = list(islice(build_samples(config, run_dir, Counter()), 1))
        if not rows:
            raise UserError(f"--show-sample: no trajectory to train on is left (data.filter={config.data.filter})")
        return coloured(chat, sequence(rows[0]["student_prompt_ids"], rows[0]["response_ids"]))
    if not sources.is_cached(config.data) or not all(map(benchmarks.is_cached, config.data.exclude_benchmarks)):
        raise UserError("--show-sample needs problems, and the benchmarks they are checked against: `trd prepare ...` downloads them")
    problem = prepare.load(config)[0]
    prompt = chat.prompt_ids(student_prompt(config.task, problem["problem"], problem.get("starter_code")))
    return coloured(chat, sequence(prompt, chat.encode(problem.get("reference_solution") or problem["answer"])))


def _does(config: Config) -> str:
    others = {"evaluate": f"evaluates {config.model.path}", "sft": f"trains {config.model.path} on worked solutions"}
    return others.get(config.job, f"method {config.method.name}")


def status(run_path: Path) -> Table:
    """The stages of a run with counts and rates. Raises UserError if `run_path` is no run."""
    config = of_run(run_path)
    table = Table("stage", "state", "done", "rate", "seconds", title=f"{config.name}, {_does(config)}, in {run_path}")
    for work in works(config, RunDir(run_path, config.name)):
        folder = work.folder
        manifest = Manifest.read(folder.folder)
        if manifest is None or manifest.fingerprint != folder.fingerprint:
            text = {"missing": "[dim]not begun[/dim]", "stale": "[yellow]made with other settings[/yellow]"}
            table.add_row(work.name, text.get(folder.state(), "[dim]in stale/[/dim]"), "", "", "")
            continue
        state = "[green]done[/green]" if manifest.status == "done" else "[yellow]begun[/yellow]"
        table.add_row(work.name, state, *_progress(work.stage.name, folder.folder, manifest))
    return table


def _progress(stage: str, folder: Path, manifest: Manifest) -> tuple[str, str, str]:
    """(what is done, rate, seconds) of a begun stage."""
    counts, seconds = manifest.counts, manifest.seconds
    if manifest.status != "done":
        steps = saved_steps(folder / "checkpoints")
        shards = len(list(folder.rglob("part-*.parquet")))
        return (f"checkpoint at step {steps[-1]}" if steps else f"{shards} shards" if shards else "", "", "")
    if stage.startswith(("rollout", "refine", "evaluate")):
        parts = list(counts.values()) if stage.startswith("evaluate") else [counts]  # one for each benchmark
        done = f"{sum(part['samples'] for part in parts)} samples"
        rate = f"{sum(part['response_tokens'] for part in parts) / max(seconds, 1e-9):.0f} tok/s"
    elif stage == "train":
        done, rate = f"{counts['steps']} steps", f"{counts['tokens'] / max(counts['seconds'], 1e-9):.0f} tok/s"
    else:
        done, rate = ", ".join(f"{key} {value}" for key, value in counts.items() if not isinstance(value, dict)), ""
    return done, rate, f"{seconds:.1f}"
