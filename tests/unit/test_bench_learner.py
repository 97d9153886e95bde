"""`trd bench learner` on a tiny model: both sides do the same work, and the benchmark notices when they do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import trd
from trd_megatron.bench import learner, learner_child, learner_peer, learner_report, learner_work
from trd_megatron.bench.learner_profile import PARTS, Profile
from trd_megatron.bench.learner_report import Row
from trd_megatron.errors import UserError
from trd_megatron.learner.packing import Sample

TINY = "builtin:tiny-qwen3"
SETTINGS: dict[str, Any] = {
    "models": [TINY], "batch": 3, "repeats": 1, "threads": 1, "device": "cpu", "dtype": "float32", "profile": False,
}  # fmt: skip


def test_the_command_writes_figures_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", TINY, "--batch", "3", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
    code, out, err = trd("bench", "learner", *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert all(word in out for word in ("ours / theirs", "transformers + PEFT", "backward, with the recomputed forward", "matrix products"))

    report = json.loads((tmp_path / "bench_learner.json").read_text())
    assert set(report) == {"settings", "versions", "machine", "results"}
    (result,) = report["results"]
    ours, peer = result["sides"]
    assert (ours["side"], peer["side"]) == ("ours", "peer")
    for row in (ours, peer):
        assert row["error"] is None
        assert row["tokens"] == sum(student + response for student, _, response in learner_work.lengths()[:3])
        assert len(row["seconds"]) == 2 and len(row["losses"]) == len(row["grad_norms"]) == 3
        assert 0 < row["loaded_bytes"] <= row["memory_bytes"]
    # Every step, not only the first, which the benchmark itself checks: the optimizers do the same as well.
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-3)
    assert ours["grad_norms"] == pytest.approx(peer["grad_norms"], rel=1e-3)
    assert len(set(ours["losses"])) == 3  # it does train
    assert result["ratios"]["memory"] == ours["memory_bytes"] / peer["memory_bytes"]
    profile = result["profile"]
    assert set(profile["parts"]) == set(PARTS) and min(profile["parts"].values()) > 0
    assert sum(profile["parts"].values()) < profile["seconds"]
    assert sum(profile["operators"].values()) < profile["seconds"]
    assert min(profile["products"], profile["attention"]) > 0
    assert profile["share"] == pytest.approx((profile["products"] + profile["attention"]) / profile["seconds"])


def test_sides_that_do_other_work_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = learner.Job

    def short(side: str, model: Path, samples: list[Sample], *rest: Any) -> learner_child.Job:
        return whole(side, model, samples[:-1] if side == "peer" else samples, *rest)

    monkeypatch.setattr(learner, "Job", short)
    flags = ["--model", TINY, "--batch", "2", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    code, _, err = trd("bench", "learner", *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "the losses of the first step differ by more than 0.001 of their value: ours 0." in err
    assert not (tmp_path / "bench_learner.json").exists()


def test_a_side_that_fails_says_so_and_the_other_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learner.Job

    def broken(side: str, model: Path, samples: list[Sample], *rest: Any) -> learner_child.Job:
        return whole(side, tmp_path / "nothing" if side == "peer" else model, samples, *rest)

    monkeypatch.setattr(learner, "Job", broken)
    (result,) = learner.benchmark(learner.Settings(**SETTINGS), tmp_path)
    ours, peer = result.rows
    assert ours.error is None and len(ours.seconds) == 1
    assert peer.error and (peer.seconds, peer.losses, peer.memory_bytes) == ([], [], None)
    assert json.loads((tmp_path / "bench_learner.json").read_text())["results"][0]["ratios"] is None


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (2.1, 0.5, "the losses .* ours 2, peer 2.1"),
        (float("nan"), 0.5, "the losses"),
        (2.0, 0.6, "the gradient norms .* ours 0.5, peer 0.6"),
    ],
)
def test_first_steps_that_differ_are_an_error(loss: float, norm: float, message: str) -> None:
    rows = [Row("ours", "m", 9, losses=[2.0], grad_norms=[0.5]), Row("peer", "m", 9, losses=[loss], grad_norms=[norm])]
    with pytest.raises(learner.DisagreementError, match=message):
        learner.check_agreement(rows, 1e-3)
    rows[1].losses, rows[1].grad_norms = [2.001], [0.5004]
    learner.check_agreement(rows, 1e-3)


def test_ratios_come_from_medians_and_peaks() -> None:
    ours = Row("ours", "m", 100, seconds=[9.0, 2.0, 1.0], memory_bytes=30 * 2**20, loaded_bytes=2**20, losses=[0.5], grad_norms=[0.25])
    peer = Row("peer", "m", 100, seconds=[4.0, 5.0, 99.0], memory_bytes=60 * 2**20, loaded_bytes=2**20, losses=[0.5], grad_norms=[0.25])
    assert learner_report.ratios([ours, peer]) == {"speed": 2.5, "memory": 0.5}
    cells = [list(column.cells) for column in learner_report.table([ours, peer], "").columns]
    assert cells[:4] == [
        ["ours", "transformers + PEFT", "ours / theirs"], ["50.0", "20.0", "2.50"], ["2.00", "5.00", ""], ["30", "60", "0.50"],
    ]  # fmt: skip
    assert learner_report.ratios([ours, Row("peer", "m", 100, error="killed")]) is None


def test_the_share_counts_products_and_attention_alone() -> None:
    operators = {"mkldnn::_linear_pointwise": 4.0, "aten::mul": 3.0, "aten::bmm": 1.0, "aten::_scaled_dot_product_x_backward": 2.0}
    found = Profile(20.0, {}, operators)
    assert (found.products, found.attention, found.share) == (5.0, 2.0, 0.35)


def test_the_peer_pads_up_to_the_longest_and_stays_within_the_batch_tokens() -> None:
    samples = [Sample(f"p{i}", 0, [1] * 2, [1] * teacher, [1] * 3) for i, teacher in enumerate((7, 5, 2, 17, 2))]
    groups = learner_peer.batches(samples, 20)
    assert [[sample.problem_id for sample in group] for group in groups] == [["p0", "p1"], ["p2"], ["p3"], ["p4"]]
    ids, attention, response = learner_peer.pad([[5, 6], [7]], [[8], [9, 9, 9]], "cpu")
    assert ids.tolist() == [[5, 6, 8, 0], [7, 9, 9, 9]]
    assert attention.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert response.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_the_padding_is_counted_over_both_forwards() -> None:
    samples = [Sample("a", 0, [1] * 2, [1] * 4, [1] * 4), Sample("b", 0, [1] * 2, [1] * 4, [1] * 2)]
    assert learner._padding(samples) == pytest.approx(1 - 24 / 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "--dtype float16: it must be one of float32, bfloat16"),
        ({"device": "tpu"}, "--device tpu: it must be cpu or cuda"),
        ({"batch": 0}, "--batch 0: it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner.Settings(**SETTINGS | change)
