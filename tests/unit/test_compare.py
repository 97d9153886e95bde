"""Many runs side by side: hand-made runs of two methods and two seeds whose every figure is known."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_report import SCRIPT, make_run, row
from trd_megatron.config import TeacherConfig, to_dict
from trd_megatron.config_checks import check
from trd_megatron.errors import UserError
from trd_megatron.records import TRAJECTORY
from trd_megatron.report import compare
from trd_megatron.run_dir import Manifest, RunDir, write_parquet

Make = Callable[..., Path]
PASSED = {0: {"base": [1, 0], "trd": [2, 2], "forward_kl": [1, 1]}, 1: {"base": [0, 1], "trd": [2, 1], "forward_kl": [2, 0]}}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(method: str, seed: int, **changes: Any) -> Path:
        """A run whose models pass PASSED of two samples on each of two problems."""
        path = tmp_path / f"{method}-{seed}{'-other' if changes else ''}"
        config, run_dir = make_run(path)
        of = replace(config.method, name=method, trajectory="refined" if method == "trd" else "rollout", teacher_prompt="vanilla")
        config = replace(config, method=of, seed=seed, data=replace(config.data, path="x.jsonl"), **changes)
        config = replace(config, learner=replace(config.learner, max_tokens_per_micro_batch=60000))
        check(config)
        run_dir.write_config(to_dict(config))
        for model in ("base", "student"):
            passes = PASSED[seed]["base" if model == "base" else method]
            rows = [row(f"t{p}", s, s < count, 5 + s, SCRIPT) for p, count in enumerate(passes) for s in range(2)]
            write_parquet(run_dir.eval / model / "test.parquet", rows, TRAJECTORY)
        return path

    return run


def compared(paths: list[Path], folder: Path) -> tuple[dict[str, Any], str, str]:
    compare.write(paths, folder)
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_methods_are_pooled_over_seeds(make: Make, tmp_path: Path) -> None:
    paths = [make(method, seed) for method in ("trd", "forward_kl") for seed in (0, 1)]
    found, page, markdown = compared(paths, tmp_path / "out")
    [section] = found["sections"]
    assert section["settings"] == {}
    assert section["methods"] == {"forward_kl": [0, 1], "trd": [0, 1]}
    [table] = section["benchmarks"]
    assert (table["base"]["avg_at_k"], table["base"]["pass_at_k"]) == (25.0, 50.0)
    trd, forward = table["methods"]["trd"], table["methods"]["forward_kl"]
    assert (trd["avg_at_k"], trd["pass_at_k"]) == (87.5, 100.0)
    assert (forward["avg_at_k"], forward["pass_at_k"]) == (50.0, 75.0)
    assert (trd["delta"]["avg_at_k"], forward["delta"]["pass_at_k"]) == (62.5, 25.0)
    assert [seed["avg_at_k"] for seed in trd["seeds"]] == [100.0, 75.0]
    assert table["against_best"]["avg_at_k"]["delta"] == 37.5
    assert table["best_avg_at_k"] == table["best_pass_at_k"] == ["trd"]
    # p0: trd passes 2 of 2 with both seeds, p1: 2 and 1; the base 1 and 0, 0 and 1.
    assert trd["delta"]["avg_at_k_interval"] == [50.0, 75.0]
    assert table["base"]["avg_at_k_interval"] is None  # both problems came out alike
    buckets = {line["base_passes"]: line for line in trd["buckets"]}
    assert {name: line["problems"] for name, line in buckets.items()} == {"0": 2, "1": 2, "2": 0}
    assert (buckets["0"]["base"], buckets["0"]["student"]) == (0.0, 100.0)
    assert section["trajectories"]["trd"]["joint_outcomes"]["fail → pass"] == 4
    assert section["costs"]["methods"]["trd"] == {"rollout": 14.0, "refine": 3.0, "train": 9.0, "total": 26.0}
    assert section["costs"]["ratio"] == pytest.approx(26 / 23)
    assert "| trd | **87.5** | +62.5 [50.0, 75.0] | **100.0** |" in markdown
    assert "| Base | 25.0 |  | 50.0 |" in markdown
    assert len(found["runs"]) == 4
    assert "<script" not in page
    assert page.count("<svg") == 4


def test_other_settings_make_sections(make: Make, tmp_path: Path) -> None:
    first, second = make("trd", 0), make("trd", 1, mode="opd", teacher=TeacherConfig(path="builtin:tiny-qwen3"))
    found, *_ = compared([first, second], tmp_path / "out")
    assert [section["settings"] for section in found["sections"]] == [
        {"mode": "opsd", "teacher.path": "null"},
        {"mode": "opd", "teacher.path": "builtin:tiny-qwen3"},
    ]


def test_hostile_names_stay_text(make: Make, tmp_path: Path) -> None:
    first, second = make("trd", 0), make("forward_kl", 0)
    for path, name in ((first, "a|b`*_" + SCRIPT), (second, SCRIPT)):
        config = path / "config.yaml"
        config.write_text(re.sub(r"^name: .*$", f"name: '{name}'", config.read_text(), flags=re.M))
    _, page, markdown = compared([first, second], tmp_path / "out")
    assert "<script" not in page
    assert "<script" not in markdown
    assert "a\\|b\\`\\*\\_" in markdown


def test_what_cannot_be_compared_is_one_clear_line(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^name at least one run"):
        compare.write([], tmp_path)
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml$"):
        compare.write([tmp_path / "nothing"], tmp_path)
    first, second = make("trd", 0), make("trd", 1)
    run = RunDir(second, "hand <made>")
    table = [row("t9", s, True, 5, "") for s in range(2)]
    write_parquet(run.eval / "student" / "test.parquet", table, TRAJECTORY)
    with pytest.raises(UserError, match=r"were evaluated on other problems or samples of test: compare them apart$"):
        compare.write([first, second], tmp_path / "out")
    manifest = Manifest.read(run.eval / "student")
    assert manifest is not None
    manifest.status = "running"
    manifest.write(run.eval / "student")
    with pytest.raises(UserError, match=r"has not been evaluated yet \(student\): finish it first"):
        compare.write([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_runs_give_the_same_files(make: Make, tmp_path: Path) -> None:
    paths = [make("trd", 0), make("forward_kl", 0)]
    assert compared(paths, tmp_path / "a") == compared(paths, tmp_path / "b")


def test_a_run_counts_once(make: Make, tmp_path: Path) -> None:
    first, second = make("trd", 0), make("trd", 1)
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1", "seed: 0"))
    with pytest.raises(UserError, match=r"trd-0 and .*trd-1 have the same method, seed and settings: leave one out$"):
        compare.write([first, second], tmp_path / "out")
