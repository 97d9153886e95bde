"""What rollout, refine and evaluate share: prompts in, graded trajectories out, shard by shard, resumable."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trd_megatron.chat import Chat
from trd_megatron.config import Config, SamplingConfig
from trd_megatron.engine.base import EngineFailedError, Generation, Request, SamplingParams, Weights
from trd_megatron.engine.engines import Engines, Role
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import atomic_write, digest, origins, read_columns, shard_path, with_origins, write_parquet
from trd_megatron.verify import Verdict
from trd_megatron.verify.grader import Grader, kind

WEIGHTS = ".weights"  # in a stage's folder: the label of those it draws from
JOURNAL = ".finished"  # in a stage's folder: samples that an engine has finished, of shards that it has not
GRADED_COLUMNS = ("problem_id", "sample_index", "finish_reason", "passed", "verdict", "response_ids")


@dataclass(frozen=True)
class Task:
    """One sample to draw. prompt: its text (None: the text of prompt_ids). extra: further columns of the row."""

    problem: dict[str, Any]
    sample_index: int
    prompt: str | None
    prompt_ids: Sequence[int]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        return self.problem["problem_id"], self.sample_index


@dataclass(frozen=True)
class Author:
    """Who responds: the engines of a role with these weights. name: how rows call the model. chat: its tokenizer."""

    role: Role
    weights: Weights
    name: str
    chat: Chat


def packed(ids: list[int]) -> "array[int]":
    """The same ids in 4 bytes each: a list of Python integers takes 36."""
    return array("i", ids)


def seed_name(stage: str, round: int) -> str:
    """What the seeds of rollout and refine are drawn from, so that every round has its own."""
    return f"{round}/{stage}" if round else stage


def sample_seed(seed: int, stage: str, problem_id: str, sample_index: int) -> int:
    """The seed of one sample, the same in every attempt at the stage. 63 bits."""
    return int(digest([seed, stage, problem_id, sample_index])[:16], 16) >> 1


def generate(
    config: Config,
    stage: str,
    folder: Path,
    tasks: list[Task],
    sampling: SamplingConfig,
    shard_size: int,
    schema: pa.Schema,
    engines: Engines,
    author: Author,
) -> dict[str, Any]:
    """Fills `folder` with part-*.parquet; shards that are there already are kept. Returns the counts of all of them.
    stage: what the seeds are drawn from.

    The engine is opened only if something is left to draw. Raises UserError if an existing shard is damaged, belongs to other tasks
    or was drawn from other weights, EngineFailedError if the engine draws from other weights, and what the engine itself raises;
    what it had finished by then is kept.
    """
    version, chat = author.weights.version, author.chat
    shards = [tasks[start : start + shard_size] for start in range(0, len(tasks), shard_size)]
    pending = [index for index in range(len(shards)) if not shard_path(folder, index).exists()]
    if pending:
        params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_response_tokens)
        requests = [[Request(task.prompt_ids, sample_seed(config.seed, stage, *task.key)) for task in shards[index]] for index in pending]
        with (
            closing(engines.open(author.role, author.weights, folder / JOURNAL)) as engine,
            Grader(config.verify) as grader,
            bar(stage, len(tasks), "samples", start=len(tasks) - sum(map(len, requests))) as progress,
        ):
            for position, generations in engine.generate(requests, params, progress.tokens):
                shard = shards[pending[position]]
                for generation in generations:
                    if generation.weight_version != version:
                        raise EngineFailedError(
                            f"{stage}: a sample was drawn from weights {generation.weight_version}, not {version}; it is not kept"
                        )
                texts = [chat.decode(list(generation.token_ids)) for generation in generations]
                verdicts = _grade(grader, shard, generations, texts)
                rows = [
                    _row(chat, task, request.seed, generation, text, verdict) | {"model": author.name, "engine": engine.name}
                    for task, request, generation, text, verdict in zip(
                        shard, requests[position], generations, texts, verdicts, strict=True
                    )
                ]
                graders = grader.facts({which for task in shard if (which := kind(task.problem)) is not None})
                made_by = {"engines": [{"name": engine.name, "weights": author.weights.label, **engine.facts}], "graders": [graders]}
                write_parquet(shard_path(folder, pending[position]), rows, with_origins(schema, made_by))
                progress.advance(len(rows))
    (folder / JOURNAL).unlink(missing_ok=True)  # every shard holds its samples now
    table = pa.concat_tables([_checked(folder, index, shard, schema, version) for index, shard in enumerate(shards)])
    return counts(table) | origins([shard_path(folder, index) for index in range(len(shards))])


def claim(folder: Path, weights: Weights) -> None:
    """Notes in a stage's folder which weights its samples are drawn from. Raises UserError if it holds samples of others: weights that
    were made again with the same settings need not be the same."""
    path = folder / WEIGHTS
    if not path.exists():
        with atomic_write(path) as file:
            file.write(weights.label)
    elif (found := path.read_text(encoding="utf-8")) != weights.label:
        raise UserError(f"{folder} holds samples of weights {found}, not of {weights.label}: move it away and run again")


def _grade(grader: Grader, shard: list[Task], generations: list[Generation], texts: list[str]) -> list[Verdict | None]:
    """A verdict for each sample; aborted ones, and those of problems without answer and tests, are not graded."""
    graded = [index for index, generation in enumerate(generations) if generation.finish_reason != "abort"]
    found = grader.grade([(shard[index].problem, texts[index]) for index in graded])
    by_index = dict(zip(graded, found, strict=True))
    return [by_index.get(index) for index in range(len(shard))]


def _row(chat: Chat, task: Task, seed: int, generation: Generation, text: str, verdict: Verdict | None) -> dict[str, Any]:
    return {
        "problem_id": task.problem["problem_id"],
        "sample_index": task.sample_index,
        "prompt": chat.decode(list(task.prompt_ids), special=True) if task.prompt is None else task.prompt,
        "prompt_ids": list(task.prompt_ids),
        "response": text,
        "response_ids": list(generation.token_ids),
        "response_logprobs": list(generation.logprobs),
        "finish_reason": generation.finish_reason,
        "abort_reason": generation.abort_reason,
        "passed": verdict and verdict.passed,
        "verdict": verdict and verdict.verdict,
        "extracted_answer": verdict and verdict.extracted_answer,
        "weight_version": generation.weight_version,
        "seed": seed,
        **task.extra,
    }


def _checked(folder: Path, index: int, shard: list[Task], schema: pa.Schema, version: int) -> pa.Table:
    """The graded columns of a shard, without the ids. Raises UserError unless it holds exactly these tasks, of these weights."""
    path = shard_path(folder, index)
    check_version(path, schema, version)
    table = graded_columns(path, schema)
    keys = list(zip(table["problem_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    if keys != [task.key for task in shard]:
        raise UserError(f"{path} holds other samples than this run's: delete it and run again")
    return table


def check_version(path: Path, schema: pa.Schema, version: int) -> None:
    """Raises UserError if a sample of the file was drawn from weights of another version."""
    found = pc.unique(read_columns(path, schema, ["weight_version"])["weight_version"]).to_pylist()
    if found != [version]:
        raise UserError(f"{path} holds samples of weights {', '.join(map(str, found))}, not of {version}: move it away and run again")


def drawn(folder: Path, schema: pa.Schema, version: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of the trajectories of all shards of a folder, a shard in memory at a time. Raises UserError if one was drawn from
    weights of another version, before it gives any."""
    paths = sorted(folder.glob("part-*.parquet"))
    for path in paths:
        check_version(path, schema, version)
    return (row for path in paths for row in read_columns(path, schema, columns).to_pylist())


def graded_columns(path: Path, schema: pa.Schema) -> pa.Table:
    """problem_id, sample_index, finish_reason, passed, verdict and response_tokens of a file of trajectories."""
    table = read_columns(path, schema, GRADED_COLUMNS)
    lengths = pc.list_value_length(table["response_ids"])
    return table.drop_columns(["response_ids"]).append_column("response_tokens", lengths)


def counts(table: pa.Table) -> dict[str, Any]:
    """Figures of a set of trajectories (graded_columns) for its manifest.

    Shares of all samples, between 0 and 1: truncated (the response budget ended it), aborted (no server gave an answer),
    unparsable (graded, but no answer was found in it), error (its grading failed: neither right nor wrong).
    """
    samples, tokens = table.num_rows, pc.sum(table["response_tokens"]).as_py() or 0
    finish_reasons = Counter(table["finish_reason"].to_pylist())
    verdicts = Counter(table["verdict"].to_pylist())
    return {
        "samples": samples,
        "passed": pc.sum(table["passed"]).as_py() or 0,
        "response_tokens": tokens,
        "mean_response_tokens": tokens / max(samples, 1),
        "finish_reasons": dict(finish_reasons),
        "verdicts": {str(name or "not_graded"): count for name, count in verdicts.items()},
        "truncated_share": finish_reasons["length"] / max(samples, 1),
        "aborted_share": finish_reasons["abort"] / max(samples, 1),
        "unparsable_share": verdicts["no_answer"] / max(samples, 1),
        "error_share": verdicts["error"] / max(samples, 1),
    }
