"""Megatron's distributed optimizer, bridged to the CPU, against ours; checkpoints of one under the other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import tiny
from tests.dist import learner_cases, optimizer_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner_oracle import config_of, random_samples
from tests.checkpoints import read_tensors
from trd_megatron.learner.checkpoint_files import saved_steps, step_folder

Place = learner_cases.Layout
ONE: Place = (1, False, 1)
LAYOUTS: dict[int, list[Place]] = {1: [ONE], 2: [(1, False, 2), (2, True, 1)], 3: [(1, False, 3)], 4: [(2, True, 2)]}


def full(folder: Path, architecture: str, dtype: str = "float32", **learner: Any) -> learner_cases.Case:
    """Every parameter is trained, several micro-batches a step, decay and clipping strong enough to show."""
    config = config_of("trd", trainable="full", max_tokens_per_micro_batch=150)
    config = replace(config, learner=replace(config.learner, **{"dtype": dtype, "weight_decay": 1.0, **learner}))
    return architecture, config, random_samples(3), tiny.make(architecture, folder / architecture), None


def same(one: cases.Trace, other: cases.Trace, tolerance: float) -> None:
    assert one["norms"][-len(other["norms"]) :] == pytest.approx(other["norms"], rel=tolerance)
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        # Adding to every key what does not depend on the position changes no softmax: the bias has a gradient of rounding errors
        # alone, which Adam blows up.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(tensor, other["weights"][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_megatrons_optimizer_makes_the_same_updates_as_ours(ranks: int, tmp_path: Path) -> None:
    """Norms of q and k, biases, tied and untied embeddings; sequence parallelism leaves gradients of norms in parts."""
    built = [full(tmp_path, name) for name in (("qwen3", "qwen2") if ranks == 2 else ("qwen3",))]
    runs = [(case, place, megatron) for case in built for place in LAYOUTS[ranks] for megatron in (False, True)]
    for rank in run_ranks(ranks, cases.updates, runs, timeout_s=280):
        for ours, theirs in zip(rank[::2], rank[1::2], strict=True):
            assert min(ours["norms"]) > 1e-3
            same(ours, theirs, 2e-5)
            # The first step only learns when buckets are full; in the third no rank may send early if one has no sample.
            assert theirs["early"] > 0


def test_half_precision_keeps_float32_copies_and_gradients(tmp_path: Path) -> None:
    case = full(tmp_path, "qwen3", "bfloat16")
    for ours, theirs in run_ranks(2, cases.updates, [(case, (1, False, 2), megatron) for megatron in (False, True)]):
        assert theirs["norms"][:1] == pytest.approx(ours["norms"][:1], rel=1e-2)  # ours adds micro-batches up in bfloat16
        assert all(tensor.dtype == torch.bfloat16 for tensor in theirs["weights"].values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_go_on_under_the_other_optimizer_and_any_layout(dtype: str, tmp_path: Path) -> None:
    case = full(tmp_path, "qwen3", dtype)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    two: Place = (1, False, 2)
    run_ranks(1, cases.save_after, [(case, ONE, False, 2, ours)])
    resumed = [(case, two, True, theirs), (case, (2, True, 1), True, theirs), (case, two, True, ours)]
    whole, again, *others = run_ranks(2, cases.save_and_go_on, [(case, two, True, 2, theirs)], [(case, two, True)], resumed)[0]
    first, second = (read_tensors(step_folder(folder, 2)) for folder in (ours, theirs))
    assert first.keys() == second.keys()
    assert any(name.startswith("exp_avg_sq.") for name in first)
    assert any(name.startswith("master.") for name in first) == (dtype == "bfloat16")
    assert all(tensor.shape == second[name].shape for name, tensor in first.items())

    same(whole, again, 0)
    if dtype == "float32":
        for other in others + run_ranks(1, cases.go_on, [(case, ONE, False, theirs)])[0]:
            same(whole, other, 2e-5)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> learner_cases.Case:
    learner: dict[str, Any] = {"trainable": "lora", "checkpoint_interval": 2, "max_steps": 5, "keep_checkpoints": 2, "learning_rate": 1e-2}
    return full(tmp_path_factory.mktemp("models"), "qwen3", **learner)


def test_training_goes_on_while_a_checkpoint_is_written(lora: learner_cases.Case, tmp_path: Path) -> None:
    for megatron in (False, True):
        case = lora if not megatron else ("full", replace(lora[1], learner=replace(lora[1].learner, trainable="full")), *lora[2:])
        folder = tmp_path / str(megatron)
        main, other = run_ranks(2, cases.save_while_training, case, (1, False, 2), megatron, folder)
        assert main["during"] == other["during"] == []
        assert main["after"] == other["after"] == [1]
        assert main["published"] == [{"step": 1, "held_out_kl": {"0": 1.0}}]  # as it was when it was saved
        assert other["published"] == []
        stored = read_tensors(step_folder(folder, 1))
        for name, tensor in main["saved"].items():
            assert torch.equal(stored[name], tensor), name


def test_checkpoints_written_in_the_background_are_the_same(lora: learner_cases.Case, tmp_path: Path) -> None:
    place: Place = (1, False, 2)
    runs = []
    for name, background in (("sync", False), ("async", True)):
        (tmp_path / name).mkdir()
        runs.append((tmp_path / name, place, False, {"async_checkpoint": background}))
    run_ranks(2, cases.train_with, lora, runs)
    folders = [tmp_path / name / "checkpoints" for name in ("sync", "async")]
    assert saved_steps(folders[0]) == saved_steps(folders[1])
    for step in saved_steps(folders[0]):
        one, other = (read_tensors(step_folder(folder, step)) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("sync", "async"))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_a_rank_killed_while_writing_leaves_the_older_checkpoint_and_no_process(lora: learner_cases.Case, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(1, cases.die_while_writing, lora, tmp_path)
    assert saved_steps(tmp_path) == [1]
    writers = [int(pid) for pid in (tmp_path / "writers").read_text().split()]
    processes = [psutil.Process(pid) for pid in writers if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert len(writers) >= 2
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
