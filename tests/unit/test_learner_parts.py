"""The learner's parts that need no ranks: name table, packing, schedule, learning rate, checkpoint bookkeeping, adapters on disk."""

import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorProperties, TensorStorageMetadata

from tests import tiny
from tests.checkpoints import merge
from trd_megatron.config import LearnerConfig, LoraConfig, load
from trd_megatron.convert.architecture import Architecture, Rope
from trd_megatron.convert.mapping import entries, expected_shapes, fuse_qkv, shard
from trd_megatron.convert.peft import read_factors
from trd_megatron.convert.safe_metadata import check_checkpoint
from trd_megatron.errors import UserError
from trd_megatron.learner.checkpoint_files import best_step, prune, saved_steps, step_folder
from trd_megatron.learner.job import SAMPLES, TOKEN_COLUMNS, Job
from trd_megatron.learner.packing import Cut, Sample, deal, micro_batches, pack
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import write_parquet
from trd_megatron.stages.export import choose_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_name_table_covers_every_tensor_once(name: str, tmp_path: Path) -> None:
    architecture = Architecture.from_hf(tiny.make(name, tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    named = [hf for entry in entries(architecture) for hf in entry.hf]
    assert sorted(named) == sorted(tensors)
    for entry in entries(architecture):
        assert [tuple(tensors[hf].shape) for hf in entry.hf] == expected_shapes(entry, architecture)
    assert architecture.parameter_count() == sum(tensor.numel() for tensor in tensors.values())


def test_shards_put_together_are_the_whole(tmp_path: Path) -> None:
    architecture = Architecture.from_hf(tiny.make("qwen2", tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for entry in entries(architecture):
        full = [tensors[hf] for hf in entry.hf]
        one, two = shard(entry, full, architecture, 0, 1), [shard(entry, full, architecture, rank, 2) for rank in (0, 1)]
        if entry.kind == "replicated":
            assert all(torch.equal(part, one) for part in two)
        elif entry.kind == "gate_up":
            gate, up = one.chunk(2)
            assert torch.equal(torch.cat([part.chunk(2)[0] for part in two]), gate)
            assert torch.equal(torch.cat([part.chunk(2)[1] for part in two]), up)
        elif entry.kind == "vocab":  # 259 rows: padded with zeros on two ranks
            assert torch.equal(torch.cat(two)[:259], one)
            assert torch.cat(two)[259:].eq(0).all()
        else:
            assert torch.equal(torch.cat(two, dim=1 if entry.kind == "row" else 0), one)


def test_qkv_is_interleaved_by_group() -> None:
    q, k, v = torch.arange(8), torch.arange(10, 14), torch.arange(20, 24)  # 2 groups: 2 query heads of size 2, 1 key, 1 value
    expected = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert fuse_qkv((q, k, v), 2).tolist() == expected
    rows = [torch.stack([t, t + 100], dim=1) for t in (q, k, v)]
    assert fuse_qkv(rows, 2).tolist() == [[n, n + 100] for n in expected]


def test_architectures_that_are_not_carried_over_are_refused(tmp_path: Path) -> None:
    folder = tiny.make("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    for change, message in (
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": rope | {"rope_type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            Architecture.from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        Architecture.from_hf(folder)


def sample(student: int, teacher: int, response: int, name: str = "p") -> Sample:
    return Sample(name, 0, list(range(student)), list(range(50, 50 + teacher)), list(range(100, 100 + response)))


def test_rows_predict_their_targets() -> None:
    packing = pack([[1, 2, 3], [4]], [[5, 6], [7, 8]], Cut(4), CPU, [11, 12])
    assert packing.ids.tolist() == [1, 2, 3, 5, 6, 4, 7, 8]
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packing.cu_seqlens.tolist() == [0, 5, 8]
    assert packing.rows.tolist() == [2, 3, 5, 6]
    assert packing.targets.tolist() == [5, 6, 7, 8]
    assert packing.ids[packing.rows + 1].tolist() == packing.targets.tolist()
    padded = pack([[1, 2, 3]], [[5, 6]], Cut(4), CPU, [11])
    assert padded.cu_seqlens.tolist() == [0, 5, 8]  # padding is a segment of its own
    assert padded.rows.tolist() == [2, 3]


def test_samples_come_out_of_their_file_as_they_went_in(tmp_path: Path) -> None:
    rows = [asdict(sample(3, 5, 2, f"p{number}")) for number in range(300)]
    rows[1] |= {"teacher_prompt_ids": [], "rollout_passed": False, "source": "sums"}
    write_parquet(tmp_path / SAMPLES, rows, SAMPLE)
    read = Job({}, "student", None, []).samples(tmp_path)
    assert [one | {name: list(one[name]) for name in TOKEN_COLUMNS} for one in map(vars, read)] == rows
    packing, again = (micro_batches(some[2:6], 64, Cut(), CPU)[0].student for some in ([Sample(**row) for row in rows], read))
    assert torch.equal(packing.ids, again.ids) and torch.equal(packing.targets, again.targets)


def test_micro_batches_keep_the_order_and_the_limit() -> None:
    samples = [sample(5, 9, 3, "a"), sample(4, 2, 8, "b"), sample(9, 9, 3, "c")]
    batches = micro_batches(samples, 24, Cut(), CPU)
    assert [[s.problem_id for s in batch.samples] for batch in batches] == [["a", "b"], ["c"]]
    for batch in batches:
        assert max(len(batch.student.ids), len(batch.teacher.ids)) <= 24
        assert torch.equal(batch.student.targets, batch.teacher.targets)
    with pytest.raises(ValueError, match="a: 12 tokens do not fit into 11"):
        micro_batches(samples, 11, Cut(), CPU)


def test_dealing_is_disjoint_complete_and_balanced() -> None:
    draw = random.Random(0)
    samples = [sample(draw.randrange(1, 40), draw.randrange(1, 40), draw.randrange(1, 40), str(i)) for i in range(31)]
    dealt = deal(samples, 3)
    assert sorted(s.problem_id for part in dealt for s in part) == sorted(s.problem_id for s in samples)
    loads = [sum(s.longest for s in part) for part in dealt]
    assert max(loads) - min(loads) <= max(s.longest for s in samples)
    assert deal(samples[:1], 2)[1] == []


def test_the_learning_rate_warms_up_and_decays() -> None:
    from trd_megatron.learner.optimizer import learning_rate

    config = LearnerConfig(learning_rate=1.0, warmup_ratio=0.1, min_learning_rate_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[54] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert learning_rate(config, 1, 1) == 1.0


def test_the_learning_rate_stays_until_the_quality_is_reached() -> None:
    from trd_megatron.learner.optimizer import learning_rate

    config = LearnerConfig(learning_rate=1.0, warmup_ratio=0.1, min_learning_rate_ratio=0.1, decay_when={"solve": 0.5}, decay_steps=10)
    assert [learning_rate(config, step, 100) for step in (5, 10, 50, 100)] == [0.5, 1.0, 1.0, 1.0]
    rates = [learning_rate(config, step, 100, decay_from=40) for step in range(41, 51)]
    assert rates[4] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise([1.0, *rates]))
    assert learning_rate(config, 4, 100, decay_from=3) > 0.9  # reached in the warm-up: it ends there


def test_the_schedule_covers_every_sample_once_an_epoch() -> None:
    from trd_megatron.learner.train import schedule, split_held_out

    steps = schedule(10, load(["experiment=smoke", "learner.epochs=2"]))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:])) == list(range(10))
    assert steps[:3] != steps[3:]
    assert len(schedule(10, load(["experiment=smoke", "learner.max_steps=2"]))) == 2
    samples = [sample(1, 1, 1, str(i)) for i in range(10)]
    training, held = split_held_out(samples, 3, 0)
    assert len(held) == 3
    assert sorted(s.problem_id for s in training + held) == sorted(s.problem_id for s in samples)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Callable[..., Path]:
    def make(*steps: int, held_out: dict[str, float] | None = None) -> Path:
        for step in steps:
            folder = step_folder(tmp_path, step)
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps({"step": step, "held_out_kl": held_out or {}}))
        return tmp_path

    return make


def test_half_written_checkpoints_do_not_count(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints(2, 10)
    step_folder(folder, 12).mkdir()
    (folder / ".step_14.tmp").mkdir()
    assert saved_steps(folder) == [2, 10]


def test_old_checkpoints_go_but_the_best_and_the_last_stay(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints(1, 2, 3, 4, 5)
    prune(folder, 3, best=1)
    assert saved_steps(folder) == [1, 4, 5]
    prune(folder, 1, best=1)
    assert saved_steps(folder) == [1, 5]


def test_choosing_a_checkpoint(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        choose_step(tmp_path, "last")
    folder = checkpoints(2, 4, 6, held_out={"0": 0.1, "2": 0.5, "4": 0.3, "6": 0.4, "8": 0.0})
    assert choose_step(folder, "last") == 6
    assert choose_step(folder, "best") == 4
    assert choose_step(folder, "2") == 2
    with pytest.raises(UserError, match="saved steps are 2, 4, 6"):
        choose_step(folder, "3")
    assert best_step({"held_out_kl": {"0": 0.1}}, folder) is None


def test_merging_adds_scaled_products_and_checks_first(tmp_path: Path) -> None:
    base = tiny.make("qwen3", tmp_path / "base")
    name = "model.layers.1.mlp.down_proj"
    a, b = torch.randn(3, 72), torch.randn(40, 3)
    merge(base, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, 1.5, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 0.5 * b @ a)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{name}.weight"]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="does not fit"):
        merge(base, {f"{name}.lora_A.weight": b.T, f"{name}.lora_B.weight": a.T}, 1.5, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        read_factors(tmp_path)


class Unknown(Enum):
    ONE = 1


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": _Evil(tmp_path / "owned")}))
    with pytest.raises(UserError, match=r"names posix\.system, which no checkpoint needs"):
        read_factors(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({1: 2}))
    with pytest.raises(UserError, match="holds no checkpoint metadata"):
        read_factors(tmp_path)
    assert not (tmp_path / "owned").exists()


def megatron_checkpoint(folder: Path, entry: Any, common: Any) -> Path:
    """The two pickles of a torch_dist checkpoint."""
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"norm": entry})))
    torch.save(common, folder / "common.pt")
    return folder


def test_what_megatrons_loader_would_unpickle_is_checked_before(tmp_path: Path) -> None:
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size([3, 4]), [])
    sound = megatron_checkpoint(tmp_path / "sound", tensor, {"iteration": 7, "args": [1.5, "text"]})
    assert check_checkpoint(sound, ["norm"]) == {"norm": (3, 4)}
    with pytest.raises(UserError, match=r"sound has no tensor head: it is of another model"):
        check_checkpoint(sound, ["norm", "head"])
    evil = megatron_checkpoint(tmp_path / "evil", tensor, {"args": _Evil(tmp_path / "owned")})
    with pytest.raises(UserError, match=r"common\.pt cannot be read: it names posix\.system, which is not loaded from a checkpoint$"):
        check_checkpoint(evil, ["norm"])
    (evil / "common.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "owned")))  # not as torch.save writes it
    with pytest.raises(UserError, match=r"common\.pt cannot be read: "):
        check_checkpoint(evil, ["norm"])
    (evil / "common.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"common\.pt cannot be read: "):
        check_checkpoint(evil, ["norm"])
    unknown = megatron_checkpoint(tmp_path / "unknown", tensor, {"state": Unknown.ONE})  # harmless, but not PyTorch's or Megatron's
    with pytest.raises(UserError, match=r"it names tests\.unit\.test_learner_parts\.Unknown, which is not loaded"):
        check_checkpoint(unknown, ["norm"])
    # PyTorch would unpickle it though a tensor was asked for.
    hidden = megatron_checkpoint(tmp_path / "hidden", BytesStorageMetadata(), {})
    with pytest.raises(UserError, match=r"norm is no tensor but a pickled object"):
        check_checkpoint(hidden, ["norm"])
    assert not (tmp_path / "owned").exists()


def test_adapter_size_is_what_training_makes() -> None:
    architecture = Architecture("qwen3", 2, 48, 96, 4, 2, 16, 259, 4096, 1e-6, Rope(1e4), True, False, True)
    assert architecture.adapter_parameters(4, LoraConfig().targets) == 6528  # as the smoke experiment exports


def test_torn_metrics_lines_are_left_out(tmp_path: Path) -> None:
    from trd_megatron.learner.log import read_metrics

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
