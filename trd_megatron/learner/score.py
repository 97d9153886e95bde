"""What the learner thinks of given responses: it is started as training starts it, and gives log-probabilities back through files.

Imports no Megatron; the ranks' part is score_rank.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trd_megatron.config import Config, to_dict
from trd_megatron.learner.job import SAMPLES, Job, run_ranks
from trd_megatron.records import SAMPLE, SCORE
from trd_megatron.run_dir import read_parquet, write_parquet

SCORES = "scores.parquet"


@dataclass(frozen=True)
class Score:
    """Of one response of R tokens. logprobs [R]: at temperature 1 over the full vocabulary. top_ids [R]: the likeliest in each place."""

    logprobs: list[float]
    top_ids: list[int]


def score(config: Config, model: Path, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], folder: Path) -> list[Score]:
    """Scores of (prompt ids, response ids) under the Hugging Face folder `model`, in order, in the learner's layout and precision.

    `folder` is made; it holds what goes to the ranks, what comes back, and their log. No sequence may be longer than
    learner.max_tokens_per_micro_batch. Raises UserError if the model does not fit
    the learner, LearnerFailedError if its ranks fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem_id": str(index),
            "sample_index": 0,
            "student_prompt_ids": list(prompt),
            "teacher_prompt_ids": list(prompt),
            "response_ids": list(response),
            "rollout_passed": None,
        }
        for index, (prompt, response) in enumerate(sequences)
    ]
    write_parquet(folder / SAMPLES, rows, SAMPLE)
    Job(to_dict(config), str(model), None, [], "score").write(folder)
    for _ in run_ranks(folder, config.learner):
        pass
    return [Score(row["logprobs"], row["top_ids"]) for row in read_parquet(folder / SCORES, SCORE)]
