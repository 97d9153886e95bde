"""`trd doctor --engine`: whether the engine and the learner give the same tokens the same log-probabilities.

The engine draws responses; the learner, in its own layout and precision, scores them. Where the two differ, training sees other
probabilities than those the responses were drawn with, and nothing else shows it.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat, teacher_prompt_ids
from trd_megatron.config import Config, SamplingConfig
from trd_megatron.engine.base import Engine, EngineFailedError, Generation, Request, SamplingParams
from trd_megatron.engine.engines import Engines, Role, weights_of
from trd_megatron.errors import UserError
from trd_megatron.learner.score import Score, score
from trd_megatron.records import PROBLEM
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import sample_seed
from trd_megatron.stages.rollout import student_tasks

PROMPTS, NEW_TOKENS = 8, 64


@dataclass(frozen=True)
class Bound:
    """What a role's differences may be at most. figure: of Figures, "maximum" or "mean"."""

    figure: str
    value: float

    @staticmethod
    def of(config: Config, value: float | None = None) -> "Bound":
        """In float32 on both sides the largest difference is bounded, to 1e-3: only the order of sums differs.

        In lower precision single tokens differ by 0.1 and more without anything being wrong, so the mean is bounded. Its default, 0.05, is
        what NeMo RL's own tests allow (mean of exp |difference| below 1.05, their token_mult_prob_error). Healthy runs of SGLang or vLLM
        beside Megatron in bfloat16 show 0.01 to 0.04 (slime's train_rollout_logprob_abs_diff, vllm-project/vime issue 64).
        """
        servers = (config.engine.student, config.engine.teacher) if config.engine.kind == "sglang" else ()
        exact = config.engine.dtype == "float32" and config.learner.dtype != "bfloat16" and not any(s.fp8 for s in servers)
        figure, default = ("maximum", 1e-3) if exact else ("mean", 0.05)
        return Bound(figure, default if value is None else value)


@dataclass(frozen=True)
class Drawn:
    """Responses of one role's engine under one way of sampling, with the prompts they were drawn under."""

    role: str
    engine: str
    model: Path
    temperature: float
    prompts: list[list[int]]
    generations: list[Generation]


@dataclass(frozen=True)
class Figures:
    """Of all tokens of one Drawn. A difference is the learner's log-probability minus the engine's."""

    role: str
    engine: str
    temperature: float
    responses: int
    tokens: int
    mean: float  # of |difference|
    maximum: float  # of |difference|
    signed: float  # mean difference
    ratio: float  # mean of exp(difference): the learner's probability over the engine's, as importance weights have it
    top_1: float | None  # share of tokens that are the learner's likeliest; None where the engine did not choose its own likeliest


def compare(drawn: Drawn, scores: Sequence[Score]) -> Figures:
    """Raises EngineFailedError if not a single token was drawn."""
    pairs = list(zip(drawn.generations, scores, strict=True))
    found = [ours - theirs for g, s in pairs for theirs, ours in zip(g.logprobs, s.logprobs, strict=True)]
    if not found:
        raise EngineFailedError(f"the {drawn.role}'s engine drew no token")
    same = [drew == best for g, s in pairs for drew, best in zip(g.token_ids, s.top_ids, strict=True)]
    differences = np.array(found)
    with np.errstate(over="ignore"):  # infinite is what it then is
        ratio = float(np.exp(differences).mean())
    return Figures(
        role=drawn.role,
        engine=drawn.engine,
        temperature=drawn.temperature,
        responses=len(pairs),
        tokens=len(found),
        mean=float(np.abs(differences).mean()),
        maximum=float(np.abs(differences).max()),
        signed=float(differences.mean()),
        ratio=ratio,
        top_1=sum(same) / len(same) if drawn.temperature == 0 else None,
    )


def wrong(figures: Sequence[Figures], bound: Bound) -> str | None:
    """One line about the first of `figures` that is above the bound, None if there is none."""
    for row in figures:
        value: float = getattr(row, bound.figure)
        if value <= bound.value:  # false for NaN too
            continue
        message = f"{row.role}: the {bound.figure} difference of log-probabilities at temperature {row.temperature:g} is {value:.2g}, "
        message += f"above {bound.value:g}: engine and learner must have the same weights and precision (engine.dtype, learner.dtype)"
        if row.engine == "sglang":
            message += "; servers that you started yourself must serve this very model"
        return message + "; to accept it: --max-difference X, or --go-on"
    return None


def table(figures: Sequence[Figures], bound: Bound) -> Table:
    """Two rows for each role: as its stage samples, and greedy."""
    limit = f"the {bound.figure} may be {bound.value:g}"
    rows = Table("role", "engine", "drawn", title="log-probabilities: learner minus engine", caption=f"natural logarithms; {limit}")
    for column in ("responses", "tokens", "mean |diff|", "max |diff|", "mean diff", "mean ratio", "same top-1"):
        rows.add_column(column, justify="right")
    for row in figures:
        how = f"temperature {row.temperature:g}" if row.temperature else "greedy"
        top_1 = "–" if row.top_1 is None else f"{100 * row.top_1:.1f} %"
        numbers = (f"{row.mean:.2g}", f"{row.maximum:.2g}", f"{row.signed:+.2g}", f"{row.ratio:.6f}", top_1)
        rows.add_row(row.role, row.engine, how, str(row.responses), str(row.tokens), *numbers)
    return rows


def check(config: Config, say: Callable[[str], None]) -> list[Figures]:
    """Draws with the student's engine (in OPD with the teacher's too), scores with the learner. Two Figures for each role.

    Engines are closed before the learner starts, so that both may need the same GPUs. Raises UserError, EngineFailedError and
    LearnerFailedError; then the folder with the logs is kept.
    """
    folder = Path(tempfile.mkdtemp(prefix="trd-doctor-"))
    drawn = _draw_all(config, folder, say)
    figures = []
    for model in dict.fromkeys(part.model for part in drawn):
        parts = [part for part in drawn if part.model == model]
        say(f"the learner scores {sum(len(part.generations) for part in parts)} responses of the {parts[0].role}")
        sequences = [(ids, g.token_ids) for part in parts for ids, g in zip(part.prompts, part.generations, strict=True)]
        scores = iter(score(config, model, sequences, folder / f"{parts[0].role}-scores"))
        figures += [compare(part, [next(scores) for _ in part.generations]) for part in parts]
    shutil.rmtree(folder)
    return figures


def _draw_all(config: Config, folder: Path, say: Callable[[str], None]) -> list[Drawn]:
    student_path = resolve_model(config.model.path)
    chat = Chat(student_path, config.data.prompt_format, config.student.chat_template_kwargs)
    rows = [dict.fromkeys(PROBLEM.names) | problem | {"task": config.task} for problem in prepare.load(config)]
    training = [row for row in rows if row["split"] == "train"]
    tasks, _ = student_tasks(chat, training, 1, config.rollout.max_prompt_tokens, "rollout.max_prompt_tokens")
    tasks = tasks[:PROMPTS]
    with Engines(config, folder, say) as engines:

        def draw(role: Role, model: Path, prompts: list[list[int]], sampling: SamplingConfig) -> list[Drawn]:
            tokens, weights = min(NEW_TOKENS, sampling.max_response_tokens), weights_of(model, 0)
            seeds = [sample_seed(config.seed, "doctor", str(index), 0) for index in range(len(prompts))]
            requests = [Request(ids, seed) for ids, seed in zip(prompts, seeds, strict=True)]
            as_the_stage = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, tokens)
            greedy = SamplingParams(0.0, 1.0, -1, tokens)  # the ids are the engine's likeliest: nothing else says which those are
            with closing(engines.open(role, weights, folder / f"{role}.journal")) as engine:
                say(f"{engine.name} draws {2 * len(prompts)} responses of the {role}")
                return [
                    Drawn(role, engine.name, model, params.temperature, prompts, _generations(engine, requests, params))
                    for params in (as_the_stage, greedy)
                ]

        drawn = draw("student", student_path, [list(task.prompt_ids) for task in tasks], config.rollout)
        if config.teacher.path is not None:
            teacher_path = resolve_model(config.teacher.path)
            teacher_chat = Chat(teacher_path, config.data.prompt_format, config.teacher.chat_template_kwargs)
            attempts = [chat.decode(list(generation.token_ids)) for generation in drawn[0].generations]
            found = [teacher_prompt_ids(config, teacher_chat, t.problem, text) for t, text in zip(tasks, attempts, strict=True)]
            prompts = [ids for ids in found if ids is not None]
            if not prompts:
                raise UserError(f"no rollout can be refined: all are over refine.max_prompt_tokens={config.refine.max_prompt_tokens}")
            drawn += draw("teacher", teacher_path, prompts, config.refine)
    return drawn


def _generations(engine: Engine, requests: list[Request], params: SamplingParams) -> list[Generation]:
    """Raises EngineFailedError if one was aborted."""
    generations = [generation for _, shard in engine.generate([requests], params) for generation in shard]
    for generation in generations:
        if generation.finish_reason == "abort":
            raise EngineFailedError(f"{engine.name} gave up on a request: {generation.abort_reason}")
    return generations
