"""Training without a teacher: the loop's files, and that it goes on from a checkpoint as if it had not stopped."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner import ONE, PAIRS
from tests.dist.test_learner_oracle import Oracle, config_of, random_samples, supervised
from trd_megatron.learner.log import read_metrics


def test_the_loop_reports_what_there_is_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    student = tiny.make("qwen3", tmp_path / "student")
    config = config_of("trd", trainable="full", held_out_samples=4, global_batch_size=6, max_steps=4, eval_interval=2, checkpoint_interval=2)
    config = replace(config, learner=replace(config.learner, learning_rate=1e-2))
    samples = supervised(random_samples(5))
    case: cases.Case = ("sft", config, samples, student, None)
    whole, again = tmp_path / "whole", tmp_path / "again"
    [[summary]] = run_ranks(1, cases.train_each, [(case, whole)])
    shutil.copytree(whole, again)
    newest = again / "checkpoints" / "step_4"
    assert newest.is_dir()
    newest.rename(again / "gone")
    run_ranks(1, cases.train_each, [(case, again)])

    assert json.loads((whole / "summary.json").read_text()) == summary
    assert summary["nll_fixed_batch_after"] < summary["nll_fixed_batch_before"]
    assert summary["perplexity_fixed_batch_after"] == pytest.approx(math.exp(summary["nll_fixed_batch_after"]))
    assert not [name for name in summary if name.startswith("kl")]
    lines, resumed = read_metrics(whole / "metrics.jsonl"), read_metrics(again / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert lines[-1]["held_out_nll"] == summary["nll_fixed_batch_after"]
    assert not [name for name in lines[0] if name.startswith(("kl", "teacher", "epistemic", "clipped"))]
    for line, other in zip(lines, resumed, strict=True):
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert other["loss"] == line["loss"]


def test_probabilities_of_whole_responses_by_source(tmp_path: Path) -> None:
    student = tiny.make("qwen3", tmp_path / "student")
    config = config_of("trd", trainable="full", max_tokens_per_micro_batch=96)
    samples = [
        replace(sample, response_ids=sample.response_ids[:2], source=(None, "a", "b")[i % 3])
        for i, sample in enumerate(supervised(random_samples(9))[:11])
    ]
    expected: dict[str, list[float]] = {"a": [], "b": []}
    oracle = Oracle(student)
    for sample in samples:
        with torch.no_grad():
            logprobs = oracle.logits(sample.student_prompt_ids, sample.response_ids).log_softmax(-1)
        if sample.source is not None:
            probability = logprobs.gather(1, torch.tensor(sample.response_ids)[:, None]).sum().exp()
            expected[sample.source].append(float(probability))
    means = {source: sum(values) / len(values) for source, values in expected.items()}
    case: cases.Case = ("sft", config, samples, student, None)
    pairs: list[tuple[cases.Layout, dict[str, Any]]] = [*((pair, {}) for pair in PAIRS), (ONE, {"context_parallel_size": 2})]
    found = run_ranks(1, cases.held_out, case, [(ONE, {})])[0] + run_ranks(2, cases.held_out, case, pairs)[1]
    assert len(found) == 5
    for nll, probabilities in found:
        assert nll == pytest.approx(found[0][0], rel=1e-5)
        assert probabilities == pytest.approx(means, rel=1e-4)


def test_the_rate_falls_from_the_step_that_is_good_enough_and_training_ends(tmp_path: Path) -> None:
    student = tiny.make("qwen3", tmp_path / "student")
    settings = {"global_batch_size": 2, "eval_interval": 2, "checkpoint_interval": 2, "decay_steps": 3, "warmup_ratio": 0.1}
    config = config_of("trd", trainable="full", decay_when={"a": 0.0}, **settings)
    samples = supervised(random_samples(5))
    samples = samples[:-2] + [replace(sample, source="a") for sample in samples[-2:]]
    whole, again, never = tmp_path / "whole", tmp_path / "again", tmp_path / "never"
    wanting = replace(config, learner=replace(config.learner, decay_when={"a": 1.0}, max_steps=3))
    [[summary], [other]] = [
        run_ranks(1, cases.train_each, [(("sft", one, samples, student, None), folder)])[0] for one, folder in ((config, whole), (wanting, never))
    ]
    assert (summary["decay_from"], summary["steps"], summary["held_out_samples"]) == (2, 5, 2)
    assert (other["decay_from"], other["steps"]) == (None, 3)
    lines = read_metrics(whole / "metrics.jsonl")
    peak, low = config.learner.learning_rate, config.learner.learning_rate * config.learner.min_learning_rate_ratio
    assert [line["lr"] for line in lines[:2]] == [peak / 2, peak]  # two steps of warm-up
    assert lines[2]["lr"] < peak
    assert lines[4]["lr"] == pytest.approx(low)
    assert 0 < lines[1]["held_out_probability/a"] < 1
    assert "held_out_probability/a" not in lines[0]
    shutil.copytree(whole, again)
    for step in (4, 5):
        (again / "checkpoints" / f"step_{step}").rename(again / f"gone_{step}")
    run_ranks(1, cases.train_each, [(("sft", config, samples, student, None), again)])
    resumed = read_metrics(again / "metrics.jsonl")
    assert [(line["loss"], line["lr"]) for line in resumed] == [(line["loss"], line["lr"]) for line in lines]
