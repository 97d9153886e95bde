"""NUM_GPUS = 2. The learner on two GPUs (nccl) against one. The CPU runs the same bodies over gloo."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist import learner_cases as cases
from tests.dist import optimizer_cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner_oracle import ONE
from tests.gpu.devices import cpu, cuda, transformer_engine
from tests.gpu.test_learner_cuda import BFLOAT16, FP8, RATES, SIZES, Bounds, assert_within, built, fp8

Layouts = dict[str, tuple[cases.Layout, dict[str, Any]]]
LAYOUTS: Layouts = {
    "tensor and sequence": ((2, True, 1), {"recompute": "full"}),
    "tensor": ((2, False, 1), {}),
    "data": ((1, False, 2), {}),
    "context": (ONE, {"context_parallel_size": 2}),
}
FLOAT32 = Bounds(1e-5, 1e-5, 1e-3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("qwen3", tmp_path_factory.mktemp("student"), **SIZES)


@pytest.mark.parametrize(
    ("device", "precision", "bounds"),
    [
        cpu("float32", FLOAT32),
        cuda("float32", FLOAT32, gpus=2),
        cuda("bfloat16", BFLOAT16, gpus=2),
        transformer_engine("engine", BFLOAT16, gpus=2),
        fp8("current", FP8, gpus=2),
    ],
)
def test_two_ranks_take_the_steps_of_one(device: str, precision: str, bounds: Bounds, student: Path) -> None:
    """Adapters and every parameter, with a GPU's optimizers on the CPU too; one process group for all layouts."""
    case = built(student, device, precision)
    # On a GPU context parallelism needs Transformer Engine's attention.
    layouts = {name: place for name, place in LAYOUTS.items() if name != "context" or device == "cpu" or precision in ("engine", "current")}
    single = run_ranks(1, cases.traced_steps, case, [(ONE, {})], RATES, device=device)[0][0]
    for rank in run_ranks(2, optimizer_cases.traced_steps, case, list(layouts.values()), RATES, device=device, timeout_s=250):
        for name, traces in zip(layouts, rank, strict=True):
            for one, got, want in zip(case, traces, single, strict=True):
                assert_within(got, want, bounds, name, one[0])
