"""NUM_GPUS = 1. The whole learner on a GPU against the float32 CPU path. The CPU runs the same bodies at the same small size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import tiny
from tests.checkpoints import read_tensors
from tests.dist import learner_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner_oracle import ONE, distance, random_samples
from tests.gpu import fp8_rounding
from tests.gpu.devices import cpu, cuda, transformer_engine
from trd_megatron.config import Config, load
from trd_megatron.learner.checkpoint_files import saved_steps, step_folder
from trd_megatron.learner.packing import Sample
from trd_megatron.learner.stack import FP8_RECIPES

# What fp8 by blocks of 128 needs; head_dim is not hidden / heads.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
RATES = [0.0, 2e-3, 2e-3]  # so that two steps' gradients are those of the same weights, before Adam adds to the differences


class Bounds(NamedTuple):
    """Relative differences from float32 on the CPU: of a step's loss; of its gradients and of the change of all weights, in norm."""

    loss: float
    gradients: float
    change: float


# Sums in another order: a GPU's products, softmax and reductions against the CPU's. The change of the weights is Adam's, which blows
# rounding up where a gradient is near 0.
FLOAT32 = Bounds(1e-4, 1e-4, 1e-2)
# Twice what local layers in bfloat16 on the CPU were measured at (the larger of adapters and every parameter, two models):
# 0.0019, 0.039, 0.128.
BFLOAT16 = Bounds(4e-3, 8e-2, 0.25)
# About 1.6 times what the operands' rounding alone costs (test_the_bounds_of_fp8_are_what_rounding_costs, the largest of all
# recipes): 0.026, 0.31, 0.52. Gradients of noise would be at 1.4, of zeros at 1.
FP8 = Bounds(4e-2, 0.48, 0.8)
# The same sums on one device, in an order that may differ from run to run on a GPU.
SAME = Bounds(1e-6, 1e-5, 1e-3)


class Precision(NamedTuple):
    learner: dict[str, Any]
    bounds: Bounds


PRECISIONS = {
    "float32": Precision({"dtype": "float32"}, FLOAT32),
    "bfloat16": Precision({"dtype": "bfloat16", "transformer_impl": "local"}, BFLOAT16),
    "engine": Precision({"dtype": "bfloat16", "transformer_impl": "transformer_engine"}, BFLOAT16),
} | {name: Precision({"dtype": "bfloat16", "fp8": name}, FP8) for name in FP8_RECIPES}


def fp8(name: str, *values: Any, gpus: int = 1) -> Any:
    """("cuda", name, *values) with what the recipe needs."""
    recipe = FP8_RECIPES[name]
    return cuda(name, *values, gpus=gpus, engine=recipe.transformer_engine, capability=recipe.compute_capability)


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
    [cuda("float32"), cpu("bfloat16"), cuda("bfloat16"), transformer_engine("engine"), *map(fp8, FP8_RECIPES)],
)
def test_steps_equal_float32_on_the_cpu(device: str, precision: str, student: Path, reference: list[cases.Steps]) -> None:
    for case, got, want in zip(
        built(student, device, precision), steps(device, built(student, device, precision), [{}])[0], reference, strict=True
    ):
        assert_within(got, want, PRECISIONS[precision].bounds, case[0])


def test_the_bounds_of_fp8_are_what_rounding_costs(student: Path, reference: list[cases.Steps]) -> None:
    """Without Transformer Engine: operands are rounded on the CPU."""
    rounded = run_ranks(1, fp8_rounding.traced_steps, built(student, "cpu", "float32"), RATES, timeout_s=250)[0]
    for name, traces in rounded.items():
        for case, got, want in zip(("lora", "full"), traces, reference, strict=True):
            assert_within(got, want, FP8, name, case)
            assert gaps(got, want).gradients > BFLOAT16.gradients  # there is rounding


@pytest.mark.parametrize(
    ("device", "precision"),
    [cpu("float32"), cuda("float32"), transformer_engine("engine"), fp8("delayed"), fp8("current")],
)
def test_recomputation_and_offload_change_nothing(device: str, precision: str, student: Path) -> None:
    """The first step's figures come from forwards alone: the same bits. Gradients may be added up in another order on a GPU."""
    changes: list[dict[str, Any]] = [{}, {"recompute": "selective"}, {"recompute": "full"}, {"teacher_offload": True}]
    plain, *others = steps(device, built(student, device, precision), changes)
    for change, traces in zip(changes[1:], others, strict=True):
        for got, want in zip(traces, plain, strict=True):
            if precision != "delayed":  # there a forward's scales depend on what ran before
                assert got["metrics"][0] == want["metrics"][0]
            assert_within(got, want, SAME if precision == "float32" else PRECISIONS[precision].bounds, change)


@pytest.mark.parametrize(("device", "precision"), [cuda("float32"), transformer_engine("engine"), fp8("current")])
def test_recomputation_and_offload_save_gpu_memory(device: str, precision: str, tmp_path: Path) -> None:
    student = tiny.make("qwen3", tmp_path, **SIZES | {"num_hidden_layers": 12, "max_position_embeddings": 4096})
    samples = [Sample(f"p{i}", 0, [5] * 40, [7] * 60, [11] * 1900) for i in range(4)]
    config = config_of(device, precision, trainable="full", max_tokens_per_micro_batch=4096)
    changes: list[dict[str, Any]] = [{}, {"recompute": "selective"}, {"recompute": "full"}, {"recompute": "full", "teacher_offload": True}]
    measured = run_ranks(1, cases.memory, ("memory", config, samples, student, None), changes, device=device, timeout_s=250)[0]
    (held, none), (_, selective), (_, full), (held_offloaded, _) = measured
    assert full < selective < none
    weights = 2 if precision != "float32" else 4
    layer = 128 * (512 + 256) + 3 * 128 * 256  # q, k, v, o, gate, up and down
    assert held - held_offloaded >= 0.9 * weights * 12 * layer


@pytest.mark.parametrize(("device", "direction"), [cpu("from"), cuda("from"), cuda("to")])
def test_a_checkpoint_goes_on_on_another_device(device: str, direction: str, student: Path, tmp_path: Path) -> None:
    """The device goes on from a checkpoint of the CPU, or the other way round; both against the run that made the checkpoint."""
    first, second = ("cpu", device) if direction == "from" else (device, "cpu")

    def train(folders: list[Path], on: str) -> list[dict[str, Any]]:
        both = built(student, on, "float32", learning_rate=1e-3, keep_checkpoints=9, async_checkpoint=True)
        runs = [
            ((name, config, samples[:20], *models), folder) for (name, config, samples, *models), folder in zip(both, folders, strict=True)
        ]
        return run_ranks(1, cases.train_each, runs, device=on)[0]

    whole, resumed = ([tmp_path / name / trainable for trainable in ("lora", "full")] for name in ("whole", "resumed"))
    for folder in whole:
        folder.mkdir(parents=True)
    expected = train(whole, first)
    for old, new in zip(whole, resumed, strict=True):
        assert saved_steps(old / "checkpoints") == [2, 4]
        shutil.copytree(old, new)
        shutil.rmtree(step_folder(new / "checkpoints", 4))
    for old, new, want, got in zip(whole, resumed, expected, train(resumed, second), strict=True):
        assert [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
        assert got["kl_fixed_batch_after"] == pytest.approx(want["kl_fixed_batch_after"], rel=1e-4)
        early, ours, theirs = (read_tensors(step_folder(at / "checkpoints", n)) for at, n in ((old, 2), (new, 4), (old, 4)))
        assert ours.keys() == theirs.keys()
        for kind in ("exp_avg_sq.", "exp_avg.", "model."):  # both moments and what is trained
            names = [name for name in theirs if name.startswith(kind)]
            gap, moved = (sum(float((one[n] - theirs[n]).double().square().sum()) for n in names) ** 0.5 for one in (ours, early))
            assert moved > 0
            assert gap <= 1e-2 * moved, (new, kind, gap, moved)


@pytest.mark.parametrize(("device", "precision"), [cpu("float32"), transformer_engine("engine"), *map(fp8, FP8_RECIPES)])
def test_the_layers_are_what_was_chosen(device: str, precision: str, tmp_path: Path) -> None:
    ends = 1 if precision in ("current", "blockwise", "mxfp8") else 0
    student = tiny.make("qwen3", tmp_path, **SIZES | {"num_hidden_layers": 3})
    config = config_of(device, precision, fp8_bf16_layers=ends)
    found = run_ranks(1, cases.modules, ("modules", config, random_samples(3), student, None), device=device)[0]
    on_engine = precision != "float32"
    classes = {
        "linear_qkv": "Linear", "linear_proj": "Linear", "linear_fc1": "Linear", "linear_fc2": "Linear",
        "core_attention": "DotProductAttention", "input_layernorm": "RMSNorm", "pre_mlp_layernorm": "RMSNorm",
        "q_layernorm": "RMSNorm", "k_layernorm": "RMSNorm", "final_layernorm": "RMSNorm",
    }  # fmt: skip
    recipes = {
        "delayed": "DelayedScaling", "current": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"
    }  # fmt: skip
    seen = set()
    for name, (bases, recipe) in found.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in classes:
            continue
        seen.add(leaf)
        assert any(one.startswith("transformer_engine.") and one.endswith(f".{classes[leaf]}") for one in bases) is on_engine, (name, bases)
        if leaf.startswith("linear"):
            wanted = recipes.get(precision) if not ends or ".layers.1." in name else None
            assert {one for one in recipes.values() if any(base.endswith(f".{one}") for base in recipe)} == {wanted} - {None}, name
    assert seen == classes.keys()
