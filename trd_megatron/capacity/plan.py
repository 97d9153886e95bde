"""What a configuration needs, as tables: memory of a GPU (or of a process), what would run out and what to change, times and GPU-hours."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from trd_megatron.capacity import gpus, memory, speed
from trd_megatron.capacity.fit import ROOM, smallest_change
from trd_megatron.capacity.models import shape
from trd_megatron.config import Config, LearnerConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.run_dir import Manifest, RunDir

MEAN_SHARE = 0.4  # of the budget that a mean response has, where no manifest says how long they were; assumed
MEAN_PROMPT = 0.15  # of its budget, likewise
PROBLEMS = {"deepscaler": 40_315, "taco": 25_443, "human_eval": 164, "champ": 173}
BENCHMARK_PROBLEMS = {
    "aime24": 30, "aime25": 30, "hmmt25": 30, "beyondaime": 100, "amobench": 39, "math500": 500, "gsm8k": 1319, "humaneval_plus": 164,
    "mbpp_plus": 378, "livecodebench_v6": 1055,
}  # fmt: skip
PARTS = {
    "runtime": "context, libraries, buffers of the collectives",
    "weights": "of the student",
    "teacher": "weights of a teacher of its own",
    "adapters": "of LoRA, float32",
    "gradients": "",
    "optimizer": "two moments, and a float32 copy of half-precision parameters; dealt over data and context parallel ranks",
    "activations": "kept from forward to backward",
    "hidden": "final hidden states of student and teacher, their gradients",
    "chunk": "one chunk of logits; comes and goes",
    "layer": "one layer's backward; comes and goes",
    "update": "the optimizer's own; comes and goes",
    "slack": "what allocators lose",
}


@dataclass(frozen=True)
class Stage:
    """A stage of the run that takes time. samples: it draws, or trains on."""

    name: str
    samples: int
    lengths: speed.Lengths
    timing: speed.Timing


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence that the learner can meet: the larger prompt and response budgets."""
    prompts = max(config.rollout.max_prompt_tokens, config.refine.max_prompt_tokens if config.job == "distill" else 0)
    refined = config.job == "distill" and config.method.trajectory == "refined"
    return prompts + (config.refine if refined else config.rollout).max_response_tokens


def needs(config: Config, learner: LearnerConfig, student: Architecture, teacher: Architecture | None) -> memory.Memory:
    """Of a learner rank under full micro-batches, the responses as long as they may be."""
    refined = config.job == "distill" and config.method.trajectory == "refined"
    longest = (config.refine if refined else config.rollout).max_response_tokens
    tokens = learner.max_tokens_per_micro_batch
    load = memory.Load(tokens, max(longest, round(tokens * longest / longest_sequence(config))))
    return memory.learner_memory(learner, student, teacher, load, supervised=config.job == "sft")


def tables(config: Config) -> Iterator[RenderableType]:
    """Memory, then, for GPUs, times. Raises UserError if a model's shape is not known."""
    student = shape(config.model.path)
    teacher = None if config.teacher.path is None else shape(config.teacher.path)
    cuda = config.learner.device == "cuda"
    gpu = gpus.GPUS[config.cluster.gpu]
    if config.job != "evaluate":
        yield _learner_table(config, student, teacher, gpu if cuda else None)
    if config.engine.kind == "sglang" and config.engine.device == "cuda":
        yield _server_table(config, student, teacher, gpu)
    if cuda and config.job == "distill" and config.engine.kind == "sglang":
        yield _time_table(stages(config, student, teacher, gpu), config)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _learner_table(config: Config, student: Architecture, teacher: Architecture | None, gpu: gpus.GPU | None) -> Table:
    found = needs(config, config.learner, student, teacher)
    table = Table("part", "GiB", "", title="Memory of a learner rank" + ("" if gpu is None else f", {config.cluster.gpu}"))
    for name, note in PARTS.items():
        if getattr(found, name) >= 2**20:
            table.add_row(name, _gib(getattr(found, name)), note)
    if gpu is None:
        table.add_row("peak", _gib(found.total), f"of each of {config.learner.ranks} processes, with full micro-batches")
        return table
    table.add_row("peak", _gib(found.total), f"of {_gib(gpu.memory)} with full micro-batches; the largest of what comes and goes counts")
    if found.total > ROOM * gpu.memory:
        longest = longest_sequence(config)
        fix = smallest_change(
            config.learner, student, teacher, longest, gpu.memory, config.cluster.gpus_per_node,
            lambda learner: needs(config, learner, student, teacher),
        )  # fmt: skip
        if fix is None:
            text = "no layout of so many ranks fits: more ranks, shorter budgets, or a larger GPU (cluster.gpu)"
            table.add_row("[red]runs out[/red]", f"[red]{_gib(found.total - ROOM * gpu.memory)}[/red]", text)
        else:
            words = " ".join(f"learner.{key}={_word(value)}" for key, value in fix[0].items())
            note = f"the smallest change that fits: {words} ({_gib(fix[1].total)} GiB)"
            table.add_row("[red]runs out[/red]", f"[red]{_gib(found.total - ROOM * gpu.memory)}[/red]", note)
    return table


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _server_table(config: Config, student: Architecture, teacher: Architecture | None, gpu: gpus.GPU) -> Table:
    table = Table(
        "server of", "weights, GiB a GPU", "KV cache, tokens", "sequences at once", "", title=f"Memory of a server, {config.cluster.gpu}"
    )
    for role, model in {"student": student, "teacher": teacher}.items():
        if model is None:
            continue
        servers = getattr(config.engine, role)
        held = speed.serving(model, servers, config.engine, gpu, lengths(config, "rollout" if role == "student" else "refine"))
        note = ""
        if held.kv_tokens < held.sequences or held.sequences < 8:
            note = f"[red]too small: engine.{role}.tensor_parallel_size={2 * servers.tensor_parallel_size}[/red]"
        table.add_row(role, _gib(held.weights), f"{max(held.kv_tokens, 0):,.0f}", f"{max(held.sequences, 0):,.0f}", note)
    return table


def lengths(config: Config, section: str) -> speed.Lengths:
    """Means of what the run has drawn, or assumed shares of the budgets."""
    budget = getattr(config, section)
    run_dir = RunDir(config.run_dir, config.name).in_round(0, config.rounds)
    folder = {"rollout": run_dir.rollouts, "refine": run_dir.refined}.get(section)
    manifest = None if folder is None else Manifest.read(folder)
    response = budget.max_response_tokens * MEAN_SHARE
    if manifest is not None and manifest.status == "done":
        response = manifest.counts["mean_response_tokens"]
    prompt = budget.max_prompt_tokens * MEAN_PROMPT
    if section == "refine":  # y_o stands in it
        prompt = min(lengths(config, "rollout").response + 1024, budget.max_prompt_tokens)
    return speed.Lengths(prompt, response, budget.max_response_tokens)


def stages(config: Config, student: Architecture, teacher: Architecture | None, gpu: gpus.GPU) -> list[Stage]:
    """Of the first round, in order. Grading and the start of servers are not counted."""
    engine, evaluated = config.engine, config.evaluate
    problems = config.data.train_problems or PROBLEMS.get(config.data.source, 0)
    drawn = problems * config.rollout.samples_per_problem
    rollout, refine = lengths(config, "rollout"), lengths(config, "refine")
    refined = config.method.trajectory == "refined"
    found = [Stage("rollout", drawn, rollout, speed.generation(student, engine.student, engine, gpu, rollout, drawn))]
    writer, servers = (student, engine.student) if teacher is None else (teacher, engine.teacher)
    if refined:
        found.append(Stage("refine", drawn, refine, speed.generation(writer, servers, engine, gpu, refine, drawn)))
    trained = refine if refined else rollout
    teacher_prompt = refine.prompt if refined else rollout.prompt * 2
    timing = speed.training(
        config.learner, student, teacher or student, gpu, (rollout.prompt, teacher_prompt), trained.response, drawn,
        config.cluster.gpus_per_node,
    )  # fmt: skip
    found.append(Stage("train", drawn * config.learner.epochs, replace(trained, prompt=rollout.prompt), timing))
    questions = sum(config.data.test_problems if name == "test" else BENCHMARK_PROBLEMS.get(name, 0) for name in evaluated.benchmarks)
    if questions:
        of = lengths(config, "evaluate")
        twice = 2 * questions * evaluated.samples  # the base and the student
        found.append(Stage("evaluate", twice, of, speed.generation(student, engine.student, engine, gpu, of, twice)))
    return found


def _time_table(found: list[Stage], config: Config) -> Table:
    table = Table(
        "stage", "samples", "mean tokens", "GPUs", "hours", "GPU-hours", "most of it", title="Time, estimated and never measured on a GPU"
    )
    for stage in found:
        mean = f"{stage.lengths.prompt:,.0f} + {stage.lengths.response:,.0f}"
        timing = stage.timing
        cells = [f"{timing.seconds / 3600:.2f}", f"{timing.gpu_hours:,.1f}", timing.limit]
        table.add_row(stage.name, f"{stage.samples:,}", mean, f"{timing.gpus}", *cells)
    # The base is evaluated in the first round alone.
    times = [1 + (config.rounds - 1) * (0.5 if stage.name == "evaluate" else 1) for stage in found]
    total = sum(stage.timing.seconds * count for stage, count in zip(found, times, strict=True)) / 3600
    used = sum(stage.timing.gpu_hours * count for stage, count in zip(found, times, strict=True))
    table.add_row("all", "", "", "", f"{total:.2f}", f"{used:,.1f}", f"{config.rounds} rounds" if config.rounds > 1 else "")
    return table
