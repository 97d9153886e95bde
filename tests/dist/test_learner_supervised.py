"""Training without a teacher: the loop's files, and that it goes on from a checkpoint as if it had not stopped."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner_oracle import config_of, random_samples, supervised
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
