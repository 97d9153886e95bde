"""Scores of given responses, from ranks that are started as training starts them, against transformers."""

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from trd_megatron import cli
from trd_megatron.config import load
from trd_megatron.learner.score import score

# At most 123 tokens in a micro-batch: several of them, some with two sequences. `trd doctor --engine` is tested on one rank, below.
BUDGETS = [f"{stage}.max_{part}_tokens={n}" for stage in ("rollout", "refine") for part, n in (("prompt", 50), ("response", 73))]
SMALL = ["learner.max_tokens_per_micro_batch=123", "learner.kl_chunk_tokens=16", *BUDGETS]


@pytest.mark.parametrize("layout", ["context_parallel_size=2", "tensor_model_parallel_size=2 sequence_parallel=true"])
def test_scores_equal_transformers(layout: str, tmp_path: Path) -> None:
    draw = random.Random(3)
    lengths = [(7, 31), (1, 1), (50, 73), (11, 64), (3, 5)]
    sequences = [([draw.randrange(259) for _ in range(p)], [draw.randrange(259) for _ in range(r)]) for p, r in lengths]
    folder = tiny.make("qwen3", tmp_path / "model")
    config = load(["experiment=smoke", *SMALL, *(f"learner.{key}" for key in layout.split())])
    scores = score(config, folder, sequences, tmp_path / "score")
    assert len(scores) == len(sequences)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (prompt, response), ours in zip(sequences, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(ours.logprobs), expected, rtol=0, atol=1e-4)
        assert ours.top_ids == logits.argmax(-1).tolist()


def test_doctor_compares_the_local_engine_with_the_learner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trd", "doctor", "--engine", "experiment=smoke"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code is None, err
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "student" in line]
    assert [row[1:6] for row in rows] == [["student", "local", how, "8", "192"] for how in ("temperature 0.6", "greedy")]
    assert all(0 < float(row[7]) < 1e-4 for row in rows)  # the largest difference: two implementations, not one
    assert rows[1][-2] == "100.0 %"
    assert "engine and learner agree" in err
