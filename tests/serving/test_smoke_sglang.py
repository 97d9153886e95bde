"""The whole pipeline on real SGLang servers that the run launches: a student, a teacher of its own, two rounds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from trd_megatron.builtin_models import resolve_model
from trd_megatron.config import EngineConfig

TEACHER = "builtin:tiny-qwen3-teacher"
OVERRIDES = (
    "experiment=smoke", "engine=sglang_cpu", "mode=opd", f"teacher.path={TEACHER}", "rounds=2", "data.train_problems=8",
    "learner.held_out_samples=2", "rollout.shard_size=3", "evaluate.shard_size=5",
)  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sglang_engine: EngineConfig) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "run"
    command = [sys.executable, "-m", "trd_megatron.cli", "run", *OVERRIDES, f"engine.python={sglang_engine.python}", f"run_dir={folder}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def rescored(model: Path, sample: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of a sample's response ids, by transformers in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
    with torch.no_grad():
        logprobs = loaded(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[len(sample["prompt_ids"]) - 1 :, 0]


def test_every_sample_is_there_once_and_carries_its_rounds_weights(run: Path) -> None:
    for number in range(2):
        folder = run / "rounds" / str(number)
        for stage, version in (("rollouts", number), ("refined", 0)):  # the teacher stays what it was
            found = rows(folder / stage)
            assert len({(row["problem_id"], row["sample_index"]) for row in found}) == len(found) == 8
            assert {(row["weight_version"], row["engine"]) for row in found} == {(version, "sglang")}
            for row in found:  # SGLang draws anew in each run: now and then the random model ends its turn early
                assert len(row["response_ids"]) == len(row["response_logprobs"])
                assert (len(row["response_ids"]) == 24) if row["finish_reason"] == "length" else (1 <= len(row["response_ids"]) <= 24)
        trained = rows(folder / "eval/student")
        assert len(trained) == 8
        assert {row["weight_version"] for row in trained} == {number + 1}
    assert {row["weight_version"] for row in rows(run / "rounds/0/eval/base")} == {0}


def test_logprobs_are_those_of_the_weights_that_each_round_names(run: Path) -> None:
    base, second = resolve_model("builtin:tiny-qwen3"), run / "rounds/0/hf"
    for model, other, folder in (
        (base, second, "rounds/0/rollouts"),
        (second, base, "rounds/1/rollouts"),
        (resolve_model(TEACHER), base, "rounds/0/refined"),
        (resolve_model(TEACHER), base, "rounds/1/refined"),
        (run / "rounds/1/hf", second, "rounds/1/eval/student"),
    ):
        for sample in rows(run / folder)[:3]:
            reported = torch.tensor(sample["response_logprobs"])
            assert (rescored(model, sample) - reported).abs().max() < 1e-3, folder
            assert (rescored(other, sample) - reported).abs().max() > 1e-3, folder


def test_manifests_say_what_served_and_nothing_is_left_running(run: Path) -> None:
    counts = json.loads((run / "rounds/1/rollouts/manifest.json").read_text())["counts"]
    assert counts["truncated_share"] == 1 and counts["aborted_share"] == 0
    assert counts["engines"][0]["sglang"].startswith("0.")
    assert {path.name for path in (run / "servers").glob("*.log")} == {"student-0.log", "teacher-0.log"}
    started = (run / "servers" / "student-0.log").read_text(errors="replace").count("starting with weights")
    assert started == 1  # the trained student came by /update_weights_from_disk
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(str(run) in word for word in p.info["cmdline"] or [])]
    assert not list(run.rglob(".finished"))
