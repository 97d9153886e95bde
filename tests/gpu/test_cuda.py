"""NUM_GPUS = 1. The same pipeline parts on a GPU and on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trd_megatron.builtin_models import resolve_model
from trd_megatron.engine.base import Request, SamplingParams
from trd_megatron.engine.local import LocalEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_the_local_engine_draws_the_same_greedy_ids() -> None:
    model = resolve_model("builtin:tiny-qwen3")
    shard = [Request(list(range(3, 3 + length)), seed=length) for length in (5, 9, 17)]
    greedy = SamplingParams(temperature=0, top_p=1, top_k=-1, max_new_tokens=16)
    drawn = []
    for device in ("cpu", "cuda"):
        engine = LocalEngine(model, device=device)  # type: ignore[arg-type]
        [(_, generations)] = engine.generate([shard], greedy)
        drawn.append([generation.token_ids for generation in generations])
        engine.close()
    assert drawn[0] == drawn[1]


def test_the_learner_takes_the_same_steps(tmp_path: Path) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        overrides = [f"run_dir={tmp_path / device}", f"learner.device={device}", "learner.dtype=float32"]
        subprocess.run([sys.executable, "-m", "trd_megatron.cli", "run", "experiment=smoke", *overrides, "--until", "train"], check=True)
        lines = (tmp_path / device / "train/metrics.jsonl").read_text().splitlines()
        curves.append([[json.loads(line)[name] for name in ("loss", "grad_norm")] for line in lines])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=1e-6)
