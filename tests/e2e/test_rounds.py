"""Two rounds of experiment=smoke through the command line: the second works with the first one's student."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.test_smoke import kill_at, manifest, shards, trd
from trd_megatron.builtin_models import resolve_model

SMALL = (
    "data.train_problems=8", "learner.global_batch_size=2", "learner.checkpoint_interval=1", "learner.learning_rate=5e-3",
    "rollout.shard_size=2", "refine.shard_size=2", "evaluate.shard_size=1",
)  # fmt: skip
ROUND = ("rollout", "refine", "train", "export/adapter", "export/hf", "evaluate/student")
NAMES = {"prepare", "0/evaluate/base", "report"} | {f"{number}/{name}" for number in (0, 1) for name in ROUND}
COLUMNS = ("problem_id", "sample_index", "response_ids", "weight_version", "seed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of two rounds."""
    run_dir = tmp_path_factory.mktemp("rounds") / "run"
    trd(run_dir, *SMALL, "rounds=2")
    return run_dir


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM
    return model.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def distribution(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] at the response's tokens."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def farthest(model: Any, rows: list[dict[str, Any]]) -> float:
    """The largest difference between the stored logprobs of these samples and the model's."""
    worst = 0.0
    for row in rows:
        scores = distribution(model, row["prompt_ids"], row["response_ids"])
        own = scores.gather(-1, torch.tensor(row["response_ids"]).unsqueeze(-1)).squeeze(-1)
        worst = max(worst, (own - torch.tensor(row["response_logprobs"])).abs().max().item())
    return worst


def drawn(run_dir: Path) -> dict[str, list[tuple[Any, ...]]]:
    """folder -> its samples, of everything that was generated."""
    found = {}
    for part in sorted(run_dir.glob("rounds/*/*/**/*.parquet")):
        if part.parent.name != "train":
            found[str(part.relative_to(run_dir))] = [tuple(row[name] for name in COLUMNS) for row in pq.read_table(part).to_pylist()]
    return found


def test_every_sample_says_which_weights_drew_it(whole: Path) -> None:
    versions = {}
    for part, rows in drawn(whole).items():
        versions.setdefault(str(Path(part).parent), set()).update(row[COLUMNS.index("weight_version")] for row in rows)
    assert versions == {
        "rounds/0/rollouts": {0},
        "rounds/0/refined": {0},
        "rounds/0/eval/base": {0},
        "rounds/0/eval/student": {1},
        "rounds/1/rollouts": {1},
        "rounds/1/refined": {1},
        "rounds/1/eval/student": {2},
    }
    first, second = (shards(whole / f"rounds/{number}/rollouts") for number in (0, 1))
    assert [row["problem_id"] for row in first] == [row["problem_id"] for row in second]
    assert not {row["seed"] for row in first} & {row["seed"] for row in second}
    base, student = (pq.read_table(whole / f"rounds/{place}/test.parquet")["seed"] for place in ("0/eval/base", "1/eval/student"))
    assert base == student  # scores compare


def test_the_second_round_samples_from_the_first_student(whole: Path) -> None:
    base, student = load(resolve_model("builtin:tiny-qwen3")), load(whole / "rounds/0/hf")
    for folder in ("rollouts", "refined"):
        first, second = (shards(whole / f"rounds/{number}" / folder) for number in (0, 1))
        assert farthest(base, first) < 1e-4 < 1e-2 < farthest(student, first)
        assert farthest(student, second) < 1e-4 < 1e-2 < farthest(base, second)


def test_the_second_round_trains_the_first_student(whole: Path) -> None:
    """Its held-out KL before training is the first student's, under both prompts; its result is that student with its adapter."""
    from peft import PeftModel

    from trd_megatron.learner.packing import Sample
    from trd_megatron.learner.train import split_held_out

    base, student, last = load(resolve_model("builtin:tiny-qwen3")), load(whole / "rounds/0/hf"), load(whole / "rounds/1/hf")
    samples = [Sample(**row) for row in pq.read_table(whole / "rounds/1/train/samples.parquet").to_pylist()]
    held_out = split_held_out(samples, 4, 0)[1]

    def kl(model: Any) -> float:
        each = []
        for sample in held_out:
            ours, theirs = (
                distribution(model, list(ids), list(sample.response_ids)) for ids in (sample.student_prompt_ids, sample.teacher_prompt_ids)
            )
            each.append((theirs.exp() * (theirs - ours)).sum(-1))
        return torch.cat(each).mean().item()

    before = json.loads((whole / "rounds/1/train/summary.json").read_text())["kl_fixed_batch_before"]
    assert kl(student) == pytest.approx(before, rel=1e-4)
    assert kl(base) != pytest.approx(before, rel=1e-2)
    ids = torch.tensor([list(held_out[0].student_prompt_ids)])
    with torch.no_grad():
        plain, made = student(ids).logits, last(ids).logits
        adapted = PeftModel.from_pretrained(student, whole / "rounds/1/adapter")(ids).logits
    assert (plain - made).abs().max() > 1e-3
    torch.testing.assert_close(adapted, made, rtol=0, atol=1e-4)


def test_report_and_second_call(whole: Path) -> None:
    assert [line["round"] for line in json.loads((whole / "report.json").read_text())["rounds"]] == [0, 1]
    assert "<h2>Rounds</h2>" in (whole / "report.html").read_text()
    again = trd(whole, *SMALL, "rounds=2")
    assert again.stderr.count("done before, skipped") == len(NAMES)
    assert "1/evaluate/student" in again.stdout
    assert "1/evaluate/base" not in again.stdout


def test_a_second_round_later_killed_while_it_trains_ends_with_the_same_result(whole: Path, tmp_path: Path) -> None:
    """A finished run of one round gets another; what is finished is kept."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole / "rounds/0", run_dir)
    shutil.copytree(whole / "problems", run_dir / "problems")
    shutil.copy(whole / "config.yaml", run_dir)
    second = run_dir / "rounds/1"
    assert kill_at(run_dir, lambda run: (second / "train/checkpoints/step_1").exists(), signal.SIGKILL, *SMALL, "rounds=2") == -9
    assert manifest(second, "train")["status"] == "running"
    result = trd(run_dir, *SMALL, "rounds=2").stderr
    skipped = {line.split(":")[0].strip() for line in result.splitlines() if "done before, skipped" in line}
    assert skipped == {name for name in NAMES if name.startswith("0/")} | {"prepare", "1/rollout", "1/refine"}
    assert drawn(run_dir) == drawn(whole)
    ours, theirs = load_file(second / "hf/model.safetensors"), load_file(whole / "rounds/1/hf/model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_fully_trained_student_and_another_teacher(tmp_path: Path) -> None:
    """OPD's teacher is the same in both rounds; the second round samples from the fully trained folder, in the dtype of the base."""
    opd = ("mode=opd", "teacher.path=builtin:tiny-qwen3-teacher", "learner.trainable=full", "learner.learning_rate=1e-3", "rounds=2")
    trd(tmp_path / "run", *SMALL, *opd, "evaluate.samples=1", "--until", "1/refine")
    rounds = [tmp_path / "run/rounds" / number for number in "01"]
    base, teacher = (load(resolve_model(f"builtin:{name}")) for name in ("tiny-qwen3", "tiny-qwen3-teacher"))
    for number, folder in enumerate(rounds):
        assert {row["weight_version"] for row in shards(folder / "rollouts")} == {number}
        assert {row["weight_version"] for row in shards(folder / "refined")} == {0}
        assert farthest(teacher, shards(folder / "refined")) < 1e-4
    assert farthest(load(rounds[0] / "hf"), shards(rounds[1] / "rollouts")) < 1e-4 < farthest(base, shards(rounds[1] / "rollouts"))
    assert {tensor.dtype for tensor in load_file(rounds[0] / "hf/model.safetensors").values()} == {torch.float32}
    assert not (rounds[1] / "train").exists()
