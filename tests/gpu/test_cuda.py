"""NUM_GPUS = 1. On a GPU as on the CPU: the local engine, training as the pipeline starts it (torchrun), the loss's benchmark."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from tests.gpu.devices import cpu, cuda
from trd_megatron import pipeline
from trd_megatron.builtin_models import resolve_model
from trd_megatron.config import load
from trd_megatron.engine.base import Request, SamplingParams
from trd_megatron.engine.local import LocalEngine
from trd_megatron.learner.flops import peak_tflops
from trd_megatron.learner.log import METRICS, read_metrics
from trd_megatron.learner.packing import Sample
from trd_megatron.run_dir import RunDir
from trd_megatron.stages.train import build_samples


@pytest.mark.parametrize("device", [cpu(), cuda()])
def test_the_local_engine_draws_the_same_ids(device: Any) -> None:
    """Greedy, and at a temperature: the random numbers come from the CPU. Log-probabilities within float32's rounding."""
    model = resolve_model("builtin:tiny-qwen3")
    shard = [Request(list(range(3, 3 + length)), seed=length) for length in (5, 9, 17)]
    samplings = [
        SamplingParams(temperature=0, top_p=1, top_k=-1, max_new_tokens=16),
        SamplingParams(temperature=1.0, top_p=0.95, top_k=20, max_new_tokens=16),
    ]
    drawn: list[list[Any]] = []
    for where in ("cpu", device):
        engine = LocalEngine(model, device=where)
        drawn.append([one for sampling in samplings for _, generations in engine.generate([shard], sampling) for one in generations])
        engine.close()
    for one, other in zip(*drawn, strict=True):
        assert one.token_ids == other.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def figures(train: Path) -> torch.Tensor:
    """[steps, 2]: loss and gradient norm."""
    return torch.tensor([[line[name] for name in ("loss", "grad_norm")] for line in read_metrics(train / METRICS)])


@pytest.mark.parametrize("device", [cpu(), cuda()])
def test_the_pipeline_trains_as_a_rank_on_the_cpu_does(device: str, tmp_path: Path) -> None:
    """Engine and learner on the device, the learner started by torchrun; then a CPU rank on the samples that came out."""
    run, alone = RunDir(tmp_path / "run", "smoke"), tmp_path / "alone"
    overrides = [f"engine.device={device}", f"learner.device={device}", "learner.dtype=float32"]
    config = load(["experiment=smoke", f"run_dir={tmp_path / 'run'}", *overrides])
    pipeline.run(config, run, until="train")
    samples = [Sample(**row) for row in build_samples(config, run, Counter())]
    on_cpu = replace(config, learner=replace(config.learner, device="cpu"))
    alone.mkdir()
    run_ranks(1, cases.train_in, ("alone", on_cpu, samples, resolve_model(config.model.path), None), [(alone, (1, False, 1))])
    torch.testing.assert_close(figures(tmp_path / "run" / "train"), figures(alone), rtol=1e-3, atol=1e-6)
    known = device == "cuda" and peak_tflops(torch.cuda.get_device_name(), "float32") is not None
    for line in read_metrics(tmp_path / "run" / "train" / METRICS):
        assert 0 < line["mfu"] < 1 if known else line["mfu"] is None


@pytest.mark.parametrize("device", [cpu(), cuda()])
def test_the_loss_is_measured_on_the_device(device: str, tmp_path: Path) -> None:
    """`trd bench kl`, which fails if its sides disagree on the loss."""
    tokens, vocab = (4096, 151_936) if device == "cuda" else (64, 2048)
    sizes = ["--tokens", str(tokens), "--vocab", str(vocab), "--hidden", "128", "--threads", "1", "--repeats", "1"]
    command = [sys.executable, "-m", "trd_megatron.cli", "bench", "kl", "--device", device, *sizes, "--sides", "linear_kl", "plain"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True)
    report = json.loads((tmp_path / "bench_kl.json").read_text())
    assert (report["machine"]["gpu"] is not None) is (device == "cuda")
    ours, plain = report["results"]
    assert ours["status"] == plain["status"] == "measured"
    if device == "cuda":  # on the CPU it is the process's memory, which these sizes hardly change
        assert 0 < ours["memory_bytes"] < plain["memory_bytes"]
