"""`trd bench convert` on a model of a few MB: figures of all conversions, nothing left behind, and it notices a changed model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.test_cli import trd
from trd_megatron.bench import convert, convert_model, convert_report
from trd_megatron.bench.convert_report import Row
from trd_megatron.convert import operations, safetensors_file
from trd_megatron.convert.safetensors_file import Spec
from trd_megatron.convert.weight_files import Weights
from trd_megatron.errors import UserError


def test_the_command_writes_figures_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = trd(
        "bench", "convert", "--size", "3MB", "--repeats", "1", "--out", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0, err
    assert all(word in out for word in ("hf-to-megatron", "megatron-to-hf", "merge-lora", "cp + sync", "peak GB"))
    assert [path.name for path in tmp_path.iterdir()] == ["bench_convert.json"]
    report = json.loads((tmp_path / "bench_convert.json").read_text())
    assert set(report) == {"settings", "versions", "machine", "results"}
    assert [row["conversion"] for row in report["results"]] == ["hf-to-megatron", "megatron-to-hf", "merge-lora"]
    for row in report["results"]:
        assert 3_000_000 <= row["nbytes"] < 4_000_000
        for key in ("seconds", "start_seconds", "cp_seconds", "cp_synced_seconds", "memory_bytes"):
            assert len(row[key]) == 1 and row[key][0] > 0
        assert row["cp_seconds"][0] <= row["cp_synced_seconds"][0]
        assert 0 < row["import_bytes"] <= row["memory_peak"]
        assert row["speed_over_cp"] == pytest.approx(row["cp_synced_seconds"][0] / row["seconds"][0])


def test_a_model_that_comes_back_changed_is_an_error(tmp_path: Path) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    model = convert_model.shape(1_500_000)
    assert convert_model.write_model(model, hf) == model.nbytes >= 1_500_000
    assert len(list(hf.glob("*.safetensors"))) >= 4
    operations.hf_to_megatron(str(hf), megatron)
    operations.megatron_to_hf(megatron, back)
    convert._check_equal(hf, back)
    tensors = load_file(back / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] += 1
    save_file(tensors, back / "model.safetensors")
    with pytest.raises(convert.DisagreementError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight has other values"):
        convert._check_equal(hf, back)
    del tensors["model.norm.weight"]
    save_file(tensors, back / "model.safetensors")
    with pytest.raises(convert.DisagreementError, match="other tensors"):
        convert._check_equal(hf, back)


def test_the_models_tensors_all_differ(tmp_path: Path) -> None:
    convert_model.write_model(convert_model.shape(1_500_000), tmp_path / "hf")
    weights = Weights(tmp_path / "hf")
    starts = {tuple(weights.read(name).flatten()[:16].tolist()) for name in weights.shapes}
    assert len(starts) == len(weights.shapes)


def test_sizes_of_models() -> None:
    eight = convert_model.shape(8_000_000_000)
    assert (eight.hidden, eight.layers, eight.vocab) == (4096, 14, 128_256)  # a layer is 0.44 GB
    assert convert_model.shape(16_000_000_000).nbytes == 16_060_522_496  # of Llama-3.1-8B: 8,030,261,248 parameters
    with pytest.raises(UserError, match="--size: the smallest model has"):
        convert_model.shape(1000)
    with pytest.raises(UserError, match="--repeats 0"):
        convert.Settings(size=10**7, repeats=0)


def test_a_disk_with_too_little_room_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(30 * 10**9, 7 * 10**9, 23 * 10**9))  # type: ignore[attr-defined]
    code, _, err = trd("bench", "convert", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "24.9 GB are needed, 23.0 GB are free; --size makes a smaller model" in err
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupt_leaves_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Path] = []

    def interrupted(*arguments: Any) -> None:
        found.extend(tmp_path.rglob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_copy", interrupted)
    code, _, err = trd("bench", "convert", "--size", "3MB", "--out", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 130 and "the models are deleted" in err
    assert found and not list(tmp_path.iterdir())


def test_ratio_and_table() -> None:
    row = Row(
        "hf-to-megatron",
        8 * 10**9,
        [9.0, 8.0, 7.0],
        [4.0, 4.0, 5.0],
        [10**9, 2 * 10**9, 10**9],
        5 * 10**8,
        [3.0, 1.0, 2.0],
        [6.0, 4.0, 5.0],
    )
    assert row.ratio == 5 / 8
    cells = [list(column.cells) for column in convert_report.table([row], "").columns]
    assert cells == [
        ["hf-to-megatron"],
        ["8.0 (7.0-9.0)"],
        ["5.0 (4.0-6.0)"],
        ["2.0 (1.0-3.0)"],
        ["1,000"],
        ["0.62"],
        ["4.0"],
        ["2.00"],
        ["0.50"],
    ]


def test_safetensors_are_written_a_tensor_at_a_time(tmp_path: Path) -> None:
    wanted = {"a": torch.randn(3, 5), "b": torch.randn(7, 4).t(), "c": torch.randn(3).bfloat16(), "d": torch.empty(0, 2).half()}
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in wanted.items()}
    asked: list[str] = []

    def one_by_one() -> Any:
        for name, tensor in wanted.items():
            asked.append(name)
            yield tensor

    safetensors_file.write(tmp_path / "x.safetensors", specs, one_by_one())
    read = load_file(tmp_path / "x.safetensors")
    assert asked == list(wanted)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in wanted.items()
    }
    with pytest.raises(AssertionError, match=r"a is torch\.float32"):
        safetensors_file.write(tmp_path / "y.safetensors", specs, iter([wanted["b"]]))
    with pytest.raises(AssertionError, match="b would not be aligned"):
        safetensors_file.write(tmp_path / "z.safetensors", {"a": Spec(torch.bfloat16, (3,)), "b": Spec(torch.float32, (1,))}, iter([]))
