"""NUM_GPUS = 1. The whole learner on a GPU against the float32 CPU path. The CPU runs the same bodies at the same small size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner_oracle import ONE, distance, random_samples
from tests.gpu.devices import cpu, cuda, transformer_engine
from trd_megatron.config import Config, load
from trd_megatron.convert.parameters import read_tensors
from trd_megatron.learner.checkpoint_files import saved_steps, step_folder
from trd_megatron.learner.packing import Sample
from trd_megatron.learner.stack import FP8_RECIPES

# What fp8 by blocks of 128 needs; head_dim is not hidden / heads.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
RATES = [0.0, 2e-3, 2e-3]  # the first two steps have the same weights: by the second one delayed scaling has seen a gradient


class Bounds(NamedTuple):
    """Relative differences from float32 on the CPU: of a step's loss; of its gradients and of the change of all weights, in norm."""

    loss: float
    gradients: float
    change: float


FLOAT32 = Bounds(1e-4, 1e-4, 1e-2)
BFLOAT16 = Bounds(1e-2, 5e-2, 0.5)
FP8 = Bounds(0.1, 0.5, 1.0)


class Precision(NamedTuple):
    learner: dict[str, Any]
    bounds: Bounds


PRECISIONS = {
    "float32": Precision({"dtype": "float32"}, FLOAT32),
    "bfloat16": Precision({"dtype": "bfloat16", "transformer_impl": "local"}, BFLOAT16),
    "engine": Precision({"dtype": "bfloat16", "transformer_impl": "transformer_engine"}, BFLOAT16),
} | {name: Precision({"dtype": "bfloat16", "fp8": name}, FP8) for name in FP8_RECIPES}


def fp8(name: str, *values: Any) -> Any:
    """A parameter set on a GPU that has the recipe."""
    recipe = FP8_RECIPES[name]
    return cuda(name, *values, engine=recipe.transformer_engine, capability=recipe.compute_capability)


def config_of(device: str, precision: str = "float32", **learner: Any) -> Config:
    config = load(["experiment=smoke"])
    settings = {"device": device, "max_tokens_per_micro_batch": 150} | PRECISIONS[precision].learner | learner
    return replace(config, learner=replace(config.learner, **settings))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("qwen3", tmp_path_factory.mktemp("student"), **SIZES)


def built(student: Path, device: str, precision: str, **learner: Any) -> list[cases.Case]:
    """OPSD with adapters and with every parameter trained."""
    configs = [config_of(device, precision, trainable=trainable, **learner) for trainable in ("lora", "full")]
    return [(config.learner.trainable, config, random_samples(3), student, None) for config in configs]


def steps(device: str, built: list[cases.Case], changes: list[dict[str, Any]]) -> list[list[cases.Steps]]:
    """Per changed settings and case, on one rank."""
    return run_ranks(1, cases.traced_steps, built, [(ONE, change) for change in changes], RATES, device=device, timeout_s=250)[0]


@pytest.fixture(scope="module")
def reference(student: Path) -> list[cases.Steps]:
    return steps("cpu", built(student, "cpu", "float32"), [{}])[0]


def gaps(got: cases.Steps, want: cases.Steps) -> Bounds:
    """The largest over the steps."""
    changes = []
    for trace in (got, want):
        first, last = trace["adapters"][0], trace["adapters"][-1]
        changes.append(trace | {"adapters": [{name: last[name].float() - first[name].float() for name in first}]})
    return Bounds(*distance(*changes).values())


def assert_within(got: cases.Steps, want: cases.Steps, bounds: Bounds, *what: Any) -> None:
    for name, gap, bound in zip(Bounds._fields, gaps(got, want), bounds, strict=True):
        assert gap <= bound, (*what, name, gap)


@pytest.mark.parametrize(
    ("device", "precision"),
    [cpu("float32"), cuda("float32"), cpu("bfloat16"), cuda("bfloat16"), transformer_engine("engine"), *map(fp8, FP8_RECIPES)],
)
def test_steps_equal_float32_on_the_cpu(device: str, precision: str, student: Path, reference: list[cases.Steps]) -> None:
    for case, got, want in zip(built(student, device, precision), steps(device, built(student, device, precision), [{}])[0], reference, strict=True):
        if precision == "delayed":  # its first backward scales by 1, by which small gradients vanish
            got, want = ({**trace, "gradients": trace["gradients"][1:]} for trace in (got, want))
        print(device, precision, case[0], gaps(got, want))
        assert_within(got, want, PRECISIONS[precision].bounds, case[0])
