"""The planner's formulas, against numbers computed by hand or by PyTorch."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trd_megatron import cli
from trd_megatron.capacity import plan, scaling, speed
from trd_megatron.capacity.fit import ROOM, smallest_change
from trd_megatron.capacity.gpus import GPUS
from trd_megatron.capacity.memory import Load, Memory, learner_memory, rank_adapters, rank_parameters
from trd_megatron.capacity.models import KNOWN, active_parameters
from trd_megatron.config import LearnerConfig, load, options
from trd_megatron.errors import UserError
from trd_megatron.learner.flops import PEAKS

MODEL_8B = KNOWN["Qwen/Qwen3-8B"]
GIB = 2**30


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        # What the models' pages say
        ("Qwen/Qwen3-1.7B", 1.72, 1.7), ("Qwen/Qwen3-4B-Instruct-2507", 4.02, 4.0), ("Qwen/Qwen3-8B", 8.19, 7.57),
        ("Qwen/Qwen3-32B", 32.8, 32.0), ("Qwen/Qwen3-235B-A22B", 235.1, 22),
    ],
)  # fmt: skip
def test_known_models_have_their_published_sizes(name: str, billions: float, active: float) -> None:
    assert KNOWN[name].parameter_count() / 1e9 == pytest.approx(billions, rel=0.003)
    assert active_parameters(KNOWN[name]) / 1e9 == pytest.approx(active, rel=0.03)


def test_ranks_hold_together_what_one_holds_but_for_what_is_replicated() -> None:
    whole = MODEL_8B.parameter_count()
    assert rank_parameters(MODEL_8B, 1) == whole
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert rank_parameters(MODEL_8B, 4) == (whole - norms) // 4 + norms
    targets = LearnerConfig().lora.targets
    assert rank_adapters(MODEL_8B, 64, targets, 1) == MODEL_8B.adapter_parameters(64, targets)
    # q alone: A [64, 4096] whole, B [4096 / 2, 64]
    assert rank_adapters(MODEL_8B, 64, ["q_proj"], 2) == 36 * 64 * (4096 + 2048)


def test_an_a100_has_no_fp8() -> None:
    config = load(["experiment=opsd_qwen3_8b", "learner.fp8=delayed"])
    assert len(plan.stages(config, MODEL_8B, None, GPUS["H100"])) == 4
    with pytest.raises(UserError, match=r"A100.* does not multiply in fp8: set learner\.fp8=none"):
        plan.stages(config, MODEL_8B, None, GPUS["A100-80GB"])


def _memory(**settings: object) -> Memory:
    learner = dataclasses.replace(
        load(["experiment=opsd_qwen3_8b"]).learner, tensor_model_parallel_size=1, sequence_parallel=False, **settings
    )
    return learner_memory(learner, MODEL_8B, None, Load(8192, 4096))


def test_memory_by_hand() -> None:
    held = _memory(data_parallel_size=4, recompute="full")
    trained = MODEL_8B.adapter_parameters(64, LearnerConfig().lora.targets)
    assert held.weights == 2 * MODEL_8B.parameter_count()
    assert (held.adapters, held.gradients, held.optimizer) == (4 * trained, 4 * trained, 8 * trained / 4)
    assert held.activations == 36 * 8192 * 4096 * 2  # the inputs of the layers
    assert held.chunk == 2 * 512 * 151_936 * 2  # triton: two buffers in bfloat16
    assert held.teacher == 0
    most = held.activations + held.hidden + max(held.chunk, held.layer)
    lasting = held.runtime + held.weights + held.adapters + held.gradients + held.optimizer
    assert held.total == pytest.approx(lasting + most + held.slack)


def test_every_parameter_has_a_frozen_teacher_and_sixteen_bytes() -> None:
    held = _memory(trainable="full", data_parallel_size=8)
    count = MODEL_8B.parameter_count()
    assert held.teacher == 2 * count and held.adapters == 0
    assert held.gradients == 4 * count and held.optimizer == 12 * count / 8
    assert _memory(trainable="full", data_parallel_size=8, teacher_offload=True).teacher == 2 * 2 * 151_936 * 4096  # its two ends stay


def test_what_saves_memory_does() -> None:
    full, selective, none = (_memory(recompute=name).total for name in ("full", "selective", "none"))
    assert full < selective < none
    assert _memory(lora=dataclasses.replace(LearnerConfig().lora, dropout=0.0)).total < _memory().total  # what dropout keeps
    one = dataclasses.replace(load(["experiment=opsd_qwen3_8b"]).learner, recompute="none")
    load_ = Load(8192, 4096)
    of = [learner_memory(dataclasses.replace(one, tensor_model_parallel_size=tp), MODEL_8B, None, load_).activations for tp in (2, 4)]
    assert of[1] == pytest.approx(of[0] / 2, rel=0.1)  # sequence parallel: all but the adapters' rank and the sines is cut
    cut = learner_memory(dataclasses.replace(one, context_parallel_size=2), MODEL_8B, None, load_)
    assert cut.activations < 0.6 * learner_memory(one, MODEL_8B, None, load_).activations


def test_the_smallest_change_comes_first_and_fits() -> None:
    config = load(["experiment=opsd_qwen3_8b", "learner.recompute=none", "cluster.gpu=A100-40GB"])
    memory = GPUS["A100-40GB"].memory

    def needs(learner: LearnerConfig) -> Memory:
        return plan.needs(config, learner, MODEL_8B, None)

    assert needs(config.learner).total > memory
    found = smallest_change(config.learner, MODEL_8B, None, plan.longest_sequence(config), memory, 8, needs)
    assert found is not None and found[0] == {"recompute": "full"} and found[1].total <= ROOM * memory
    big = KNOWN["Qwen/Qwen3-32B"]
    found = smallest_change(
        config.learner, big, None, plan.longest_sequence(config), memory, 8, lambda learner: plan.needs(config, learner, big, None)
    )
    assert found is not None and found[0]["tensor_model_parallel_size"] == 4 and found[0]["data_parallel_size"] == 2
    assert found[0] == {"recompute": "full", "tensor_model_parallel_size": 4, "sequence_parallel": True, "data_parallel_size": 2}

    def more(learner: LearnerConfig) -> Memory:
        return plan.needs(config, learner, big, None)

    assert smallest_change(config.learner, big, None, 38_912, 8 * GIB, 8, more) is None


def test_decoding_is_bound_by_reading_weights_then_by_the_cache() -> None:
    config = load(["experiment=opsd_qwen3_8b"])
    engine, servers, gpu = config.engine, config.engine.student, GPUS["H100"]
    one = dataclasses.replace(servers, data_parallel_size=1)
    lengths = speed.Lengths(100, 1000, 1000)
    alone = speed.generation(MODEL_8B, one, engine, gpu, lengths, 1)
    # 15.1 GB of weights (the embedding is not read) and 88 MB of cache a token at 0.6 of 3.35 TB/s, and 3 ms
    assert alone.seconds == pytest.approx(1000 * ((15.14e9 + 600 * 147_456) / (0.6 * 3.35e12) + 3e-3), rel=0.01)
    many = speed.generation(MODEL_8B, one, engine, gpu, lengths, 100)
    assert many.seconds < 2 * alone.seconds
    assert speed.kv_bytes(MODEL_8B, engine) == 147_456  # docs/serving.md
    assert (
        speed.generation(MODEL_8B, servers, engine, gpu, lengths, 8000).seconds
        < speed.generation(MODEL_8B, one, engine, gpu, lengths, 8000).seconds / 6
    )


def test_training_time_by_hand() -> None:
    config = load(["experiment=opsd_qwen3_8b", "learner.tensor_model_parallel_size=1", "learner.sequence_parallel=false"])
    timing = speed.training(config.learner, MODEL_8B, MODEL_8B, GPUS["H100"], (200, 1000), 4000, 1280, 8)
    layers = active_parameters(MODEL_8B) - 151_936 * 4096
    # forward of teacher and student, backward of the inputs, recomputation; attention and loss come on top
    least = 1280 * layers * (2 * 5000 + (2 + 2 + 2) * 4200) / 4 / (989.5e12 * 0.4)
    assert least < timing.seconds < 1.35 * least
    assert timing.gpu_hours == pytest.approx(timing.seconds * 4 / 3600)


@pytest.mark.parametrize("name", sorted(set(options("experiment"))))
def test_every_experiment_plans(name: str, tmp_path: Path) -> None:
    """Without a network, and without the models."""
    (tmp_path / "mine.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    settings = {
        "evaluate": ["model.path=builtin:tiny-qwen3", f"evaluate.benchmarks=[{tmp_path / 'mine.jsonl'}]"],
        "sft": ["model.path=builtin:tiny-qwen3", "data.path=builtin:smoke"],
    }
    if name in ("lab", "quickstart"):
        pytest.skip("its model is made, which takes minutes or a package: tests/e2e runs it")
    done = CliRunner().invoke(cli.app, ["plan", f"experiment={name}", "cluster=slurm", *settings.get(name, [])])
    assert done.exit_code == 0, done.output
    if name not in ("evaluate",):
        assert "Memory of a learner rank" in done.output


def test_the_plan_says_what_runs_out_and_what_would_fit() -> None:
    arguments = ["plan", "experiment=opsd_qwen3_8b", "cluster=slurm", "learner.recompute=none", "cluster.gpu=A100-40GB"]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "runs out" in done.output and "learner.recompute=full" in done.output
    assert "not downloaded yet" in done.output and "GPU-hours" in done.output


def test_every_gpu_of_the_planner_has_a_peak() -> None:
    assert all(gpu.name in PEAKS for gpu in GPUS.values())


def test_the_tables_in_the_documentation_are_the_planners() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.markdown().strip().split("\n\n"):
        assert table in page, "python tools/scaling_tables.py prints others: put them into docs/scaling.md"
