"""What rollout, refine and evaluate share: prompts in, graded trajectories out, shard by shard, resumable."""

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from trd_megatron.builtin_models import model_fingerprint
from trd_megatron.chat import Chat
from trd_megatron.config import Config, SamplingConfig
from trd_megatron.engine import make_engine
from trd_megatron.engine.base import EngineFailedError, Generation, Request, SamplingParams, Weights
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import digest, read_parquet, read_shards, shard_path, write_parquet
from trd_megatron.verify import MathVerifier, Verdict


@dataclass(frozen=True)
class Task:
    """One sample to draw. extra: further columns of the row."""

    problem: dict[str, Any]
    sample_index: int
    prompt: str
    prompt_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)


def weights(model: Path, version: int) -> Weights:
    """A model folder as an engine is to serve it."""
    return Weights(model, version, model_fingerprint(model))


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
    weights: Weights,
    model_name: str,
    chat: Chat,
) -> dict[str, Any]:
    """Fills `folder` with part-*.parquet; shards that are there already are kept. Returns the counts of all of them.
    stage: what the seeds are drawn from.

    Raises UserError if an existing shard is damaged, belongs to other tasks or was drawn from other weights, EngineFailedError if
    the engine draws from other weights.
    """
    shards = [tasks[start : start + shard_size] for start in range(0, len(tasks), shard_size)]
    pending = [index for index in range(len(shards)) if not shard_path(folder, index).exists()]
    if pending:
        seeds = [[sample_seed(config.seed, stage, t.problem["problem_id"], t.sample_index) for t in shards[i]] for i in pending]
        requests = [
            [Request(task.prompt_ids, seed) for task, seed in zip(shards[index], row, strict=True)]
            for index, row in zip(pending, seeds, strict=True)
        ]
        params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_response_tokens)
        done = sum(len(shard) for shard in shards) - sum(map(len, requests))
        with (
            closing(make_engine(config, weights)) as engine,
            MathVerifier(config.verify.workers, config.verify.timeout_s) as verifier,
            bar(stage, len(tasks), "samples", start=done) as progress,
        ):
            for position, generations in engine.generate(requests, params, progress.tokens):
                index = pending[position]
                for generation in generations:
                    if generation.weight_version != weights.version:
                        raise EngineFailedError(
                            f"{stage}: a sample was drawn from weights {generation.weight_version}, not {weights.version}; it is not kept"
                        )
                texts = [chat.decode(list(g.token_ids)) for g in generations]
                answers = [(text, task.problem["answer"]) for text, task in zip(texts, shards[index], strict=True)]
                verdicts = verifier.verify_many(answers)
                rows = [
                    _row(task, generation, text, verdict, seed, model_name, engine.name)
                    for task, generation, text, verdict, seed in zip(
                        shards[index], generations, texts, verdicts, seeds[position], strict=True
                    )
                ]
                write_parquet(shard_path(folder, index), rows, schema)
                progress.advance(len(rows))
    rows = []
    for index, shard in enumerate(shards):
        read = drawn(shard_path(folder, index), schema, weights.version)
        if [(row["problem_id"], row["sample_index"]) for row in read] != [(t.problem["problem_id"], t.sample_index) for t in shard]:
            raise UserError(f"{shard_path(folder, index)} holds other samples than this run's: delete it and run again")
        rows += read
    return counts(rows)


def drawn(path: Path, schema: pa.Schema, version: int) -> list[dict[str, Any]]:
    """The trajectories of a shard, or of all shards of a folder. Raises UserError if one was drawn from weights of another version."""
    rows = read_shards(path, schema) if path.is_dir() else read_parquet(path, schema)
    other = next((row["weight_version"] for row in rows if row["weight_version"] != version), None)
    if other is not None:
        raise UserError(f"{path} holds samples of weights {other}, not of {version}: move it away and run again")
    return rows


def _row(task: Task, generation: Generation, text: str, verdict: Verdict, seed: int, model: str, engine: str) -> dict[str, Any]:
    return {
        "problem_id": task.problem["problem_id"],
        "sample_index": task.sample_index,
        "prompt": task.prompt,
        "prompt_ids": task.prompt_ids,
        "response": text,
        "response_ids": generation.token_ids,
        "response_logprobs": generation.logprobs,
        "finish_reason": generation.finish_reason,
        "passed": verdict.passed,
        "verdict": verdict.verdict,
        "extracted_answer": verdict.extracted_answer,
        "model": model,
        "engine": engine,
        "weight_version": generation.weight_version,
        "seed": seed,
        **task.extra,
    }


def counts(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a set of trajectories for its manifest."""
    rows = list(rows)
    tokens = [len(row["response_ids"]) for row in rows]
    return {
        "samples": len(rows),
        "passed": sum(row["passed"] is True for row in rows),
        "response_tokens": sum(tokens),
        "mean_response_tokens": sum(tokens) / max(len(rows), 1),
        "finish_reasons": dict(Counter(row["finish_reason"] for row in rows)),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
    }
