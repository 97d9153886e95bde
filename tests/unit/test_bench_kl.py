"""`trd bench kl` at tiny sizes: what it writes, that its sides agree, and that a side that fails or is missing says so."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.test_cli import trd
from trd_megatron.bench import kl, kl_report, record
from trd_megatron.bench.kl_report import Row
from trd_megatron.bench.kl_sides import SIDES, load_inputs, write_inputs
from trd_megatron.divergence import Divergence, dense_kl
from trd_megatron.errors import UserError

SETTINGS = kl.Settings(
    sides=["linear_kl"], tokens=[5], hidden=8, vocab=700, chunk=4, threads=1, repeats=2, dtype="float32", device="cpu", ranks=1
)
ROW_KEYS = {
    "name", "side", "tokens", "rank", "ranks", "threads", "status", "error", "loss", "seconds", "seconds_median", "seconds_min",
    "seconds_max", "memory_bytes",
}  # fmt: skip


def test_the_command_writes_figures_and_a_table_for_each_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--tokens", "5", "9", "--vocab", "700", "--hidden", "8", "--threads", "1", "--repeats", "2"]
    sides = ["--sides", "products", "linear_kl", "plain"]
    code, out, err = trd("bench", "kl", *sizes, *sides, "--out", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "5 tokens" in out and "9 tokens" in out
    assert (tmp_path / "bench_kl.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "bench_kl.json").read_text())
    assert set(report) == {"settings", "versions", "machine", "results"}
    assert set(report["versions"]) == {"trd_megatron", "torch", "triton", "liger-kernel", "trl"}
    settings = {key: report["settings"][key] for key in ("tokens", "vocab", "hidden", "threads", "repeats", "dtype", "device", "seed")}
    expected = {"tokens": [5, 9], "vocab": 700, "hidden": 8, "threads": 1, "repeats": 2, "dtype": "float32", "device": "cpu", "seed": 0}
    assert settings == expected
    rows = {(row["name"], row["tokens"]): row for row in report["results"]}
    assert set(rows) == {(side, tokens) for side in ("products", "linear_kl", "plain") for tokens in (5, 9)}
    for row in rows.values():
        assert set(row) == ROW_KEYS
        assert (row["status"], row["error"], len(row["seconds"])) == ("measured", None, 2)
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["memory_bytes"] > 0
    for tokens in (5, 9):
        assert rows["linear_kl", tokens]["loss"] == pytest.approx(rows["plain", tokens]["loss"], rel=1e-5)
        assert rows["products", tokens]["loss"] is None


def test_missing_and_failing_sides_are_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIDES, "trl", replace(SIDES["trl"], module="no_such_library.trainer"))
    # 40 ids are too few for a top 64, but not for linear_kl: there it is the full vocabulary.
    settings = replace(SETTINGS, sides=["trl", "top64", "linear_kl_top64"], vocab=40, ranks=2)
    tables: list[list[Row]] = []
    rows = {row.name: row for row in kl.benchmark(settings, tmp_path, tables.append)}
    assert [[row.name for row in table] for table in tables] == [list(rows)]
    assert (rows["trl"].status, rows["trl"].error) == ("not installed", "not installed (pip install -e '.[bench]')")
    assert rows["top64"].status == "failed"
    assert "RuntimeError: selected index k out of range" in str(rows["top64"].error)
    first, second = rows["linear_kl, rank 0 of 2"], rows["linear_kl, rank 1 of 2"]
    for row in (rows["linear_kl_top64"], first, second):
        assert (row.status, len(row.seconds)) == ("measured", 2)
    assert first.loss == second.loss == pytest.approx(rows["linear_kl_top64"].loss, rel=1e-5)
    saved = json.loads((tmp_path / "bench_kl.json").read_text())["results"]
    assert [(row["name"], row["status"]) for row in saved] == [(row.name, row.status) for row in rows.values()]


def test_a_side_whose_process_is_killed_has_failed(tmp_path: Path) -> None:
    write_inputs(tmp_path, 5, 8, 700, "float32", seed=0)
    team = kl._Team(SETTINGS, "linear_kl", 5, 1, tmp_path)
    team.start()
    os.kill(team._children[0].process.pid, signal.SIGKILL)
    team.wait_ready()
    assert (team.rows[0].status, team.rows[0].error, team.alive) == ("failed", "the process was killed: out of memory?", False)


def test_every_side_without_a_peer_gives_the_loss_and_gradient_of_its_definition(tmp_path: Path) -> None:
    write_inputs(tmp_path, 9, 8, 700, "float32", seed=0)
    checked = set()
    for name, side in SIDES.items():
        if side.module or side.agrees is None:
            continue
        inputs = load_inputs(tmp_path, 9, 8, 700, "float32", "cpu", 4, None)
        loss = side.make(inputs)()
        hidden = inputs.student_hidden.detach().double().requires_grad_()
        teacher = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().t()
        divergence = Divergence("forward", top_k=64 if side.agrees == "top64" else None)
        expected = dense_kl(hidden @ inputs.student_weight.double().t(), teacher, divergence).sum()
        expected.backward()
        assert loss is not None and inputs.student_hidden.grad is not None and hidden.grad is not None
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(inputs.student_hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-6)
        checked.add(name)
    assert checked == {"linear_kl", "plain", "top64", "linear_kl_top64"}


@pytest.mark.parametrize("other", [101.0, math.nan])
def test_losses_that_differ_are_an_error(other: float) -> None:
    rows = [Row("linear_kl", 5, 0, 1, 1, loss=100.0), Row("plain", 5, 0, 1, 1, loss=other), Row("products", 5, 0, 1, 1)]
    with pytest.raises(kl.DisagreementError, match=f"linear_kl 100, plain {other:g}"):
        kl._check_losses(rows, 1e-3)
    rows[1].loss = 100.09
    kl._check_losses([*rows, Row("top64", 5, 0, 1, 1, loss=1.0)], 1e-3)


def test_the_high_water_mark_sees_what_was_freed_again() -> None:
    """In a process of its own: this one may hand out pages that it holds already."""
    code = "import torch; from trd_megatron.bench.memory import HostMemory; m = HostMemory(); torch.ones(2**24); print(m.peak())"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 2**26 - 2**20 < peak < 2**26 + 2**24  # 64 MiB


def test_the_table_compares_with_the_floor_and_with_ours() -> None:
    rows = [Row(side, 5, 0, 1, 1, seconds=[seconds], memory_bytes=mib * 2**20) for side, seconds, mib in (
        ("products", 1.0, 10), ("linear_kl", 2.0, 20), ("plain", 6.0, 90))]  # fmt: skip
    cells = [list(column.cells) for column in kl_report.table(rows).columns]
    assert cells == [
        ["products", "linear_kl", "plain"], ["1", "2", "6"], ["1.00", "2.00", "6.00"], ["0.50", "1.00", "3.00"],
        ["10", "20", "90"], ["0.50", "1.00", "4.50"], ["–", "–", "–"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sides": ["linear"]}, "--sides linear: no such side; there are products, "),
        ({"dtype": "int8"}, "--dtype int8: it must be one of float32, bfloat16"),
        ({"device": "tpu"}, "--device tpu"),
        ({"repeats": 0}, "--repeats 0: it must be at least 1"),
        ({"ranks": 3}, "--ranks 3: --vocab 700 must be a multiple of it"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(SETTINGS, **change)
    assert message in str(caught.value)


def test_a_system_that_cannot_measure_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("/proc/self/clear_refs: not permitted")

    monkeypatch.setattr(record, "HostMemory", refuse)
    with pytest.raises(UserError, match="memory cannot be measured on this system: /proc/self/clear_refs: not permitted"):
        kl.benchmark(SETTINGS, tmp_path)


def test_inputs_that_do_not_fit_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(UserError, match="set TMPDIR to another folder"):
        kl.benchmark(SETTINGS, tmp_path)


def test_the_help_names_every_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trd("bench", "kl", "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert [side for side in SIDES if f"{side}:" not in out and f"{side}," not in out] == []
    assert "[bench]" in out
    assert trd("bench", monkeypatch=monkeypatch, capsys=capsys)[2] == ""


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: not a folder"):
        kl.benchmark(kl.Settings(["products"], [5], 8, 70, 5, 1, 1, "float32", "cpu", 1), tmp_path / "file")
    assert not (tmp_path / "file").read_text()
