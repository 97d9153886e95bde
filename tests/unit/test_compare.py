"""Hand-made runs of two methods and two seeds whose every figure is known, put side by side."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_cli import trd
from tests.unit.test_report import SCRIPT, make_run, row
from trd_megatron.config import MethodConfig, TeacherConfig, load, to_dict
from trd_megatron.errors import UserError
from trd_megatron.evaluate.metrics import intervals
from trd_megatron.records import TRAJECTORY
from trd_megatron.report import compare
from trd_megatron.run_dir import Manifest, RunDir, read_parquet, shard_path, write_parquet

Make = Callable[..., Path]
# seed -> model -> how many of two samples pass, of each of three problems
PASSES = {
    0: {"base": [1, 0, 2], "trd": [2, 2, 2], "forward_kl": [1, 1, 2], "reverse_kl": [0, 0, 2]},
    1: {"base": [0, 1, 2], "trd": [2, 1, 2], "forward_kl": [2, 0, 2], "reverse_kl": [1, 1, 1]},
}
SECONDS = {"rollouts": 10.0, "refined": 6.0, "train": 8.0}


def write_scores(folder: Path, benchmark: str, passes: list[int], names: str = "abc", samples: int = 2) -> None:
    rows = [row(f"{name}", s, s < count, 5 + s, SCRIPT) for name, count in zip(names, passes, strict=True) for s in range(samples)]
    write_parquet(folder / f"{benchmark}.parquet", rows, TRAJECTORY)


def done(folder: Path, stage: str, **more: Any) -> None:
    Manifest(stage, "done", more.pop("fingerprint", f"of {folder}"), {}, more.pop("inputs", {}), {}, {"torch": "2.1"}, **more).write(folder)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(method: str, seed: int, at: str = "", benchmarks: tuple[str, ...] = ("test",), **changes: Any) -> Path:
        path = tmp_path / (at or f"{method}-{seed}")
        of = MethodConfig(name=method, trajectory="refined" if method == "trd" else "rollout")
        config, run_dir = make_run(path, method=of)
        data, learner = replace(config.data, path="x.jsonl"), replace(config.learner, max_tokens_per_micro_batch=60000)
        evaluate = replace(config.evaluate, benchmarks=[name if name == "test" else f"{name}.jsonl" for name in benchmarks])
        config = replace(config, seed=seed, **({"data": data, "learner": learner, "evaluate": evaluate} | changes))
        run_dir.write_config(to_dict(config))
        for name, seconds in SECONDS.items():
            if (path / name).exists():
                done(path / name, name, seconds=seconds + seed)
        lines = [{"step": n, "kl_passed": n + seed, "kl_failed": None, "perplexity_gap": 0.5, "epistemic_mass": 0.001} for n in (1, 2, 3)]
        (path / "train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: 3 - seed]))
        for model in ("base", "student"):
            for name in benchmarks:
                write_scores(path / "eval" / model, name, PASSES[seed]["base" if model == "base" else method])
            done(path / "eval" / model, "evaluate", seconds=1.0)
        return path

    return run


@pytest.fixture
def runs(make: Make) -> list[Path]:
    return [make(method, seed) for method in ("trd", "reverse_kl", "forward_kl") for seed in (1, 0)]


def compared(paths: list[Path], folder: Path) -> tuple[dict[str, Any], str, str]:
    compare.write(paths, folder)
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_scores_are_pooled_over_seeds_and_paired_with_the_base(runs: list[Path], tmp_path: Path) -> None:
    found, _, _ = compared(runs, tmp_path / "out")
    [section] = found["sections"]
    assert section["settings"] == {} and section["methods"] == {"forward_kl": [0, 1], "reverse_kl": [0, 1], "trd": [0, 1]}
    [table] = section["benchmarks"]
    assert (table["benchmark"], table["problems"], table["k"], table["problems_differ"]) == ("test", 3, 2, False)
    assert table["base"]["avg_at_k"] == pytest.approx(100 * (1 + 0 + 2 + 0 + 1 + 2) / 12)
    assert table["base"]["pass_at_k"] == pytest.approx(100 * (1 + 0 + 1 + 0 + 1 + 1) / 6)
    trd = table["methods"]["trd"]
    assert trd["avg_at_k"] == pytest.approx(100 * 11 / 12) and trd["pass_at_k"] == pytest.approx(100.0)
    assert trd["delta"]["avg_at_k"] == pytest.approx(100 * (11 - 6) / 12) and trd["delta"]["pass_at_k"] == pytest.approx(100 * (6 - 4) / 6)
    assert [(of["seed"], of["avg_at_k"], of["pass_at_k"]) for of in trd["seeds"]] == [(0, 100.0, 100.0), (1, pytest.approx(250 / 3), 100.0)]
    # The interval is that of the problems' means over seeds: a (1 + 2) / 4, b (2 + 0) / 4, c 0.
    assert trd["delta"]["avg_at_k_interval"] == intervals(np.array([[75.0], [50.0], [0.0]]))[0]
    assert trd["pass_curve"] == pytest.approx([100 * 11 / 12, 100.0])
    assert trd["lengths"]["correct"]["samples"] == 11 and trd["lengths"]["incorrect"]["samples"] == 1


def test_ours_is_set_against_the_best_baseline(runs: list[Path], tmp_path: Path) -> None:
    found, page, markdown = compared(runs, tmp_path / "out")
    [table] = found["sections"][0]["benchmarks"]
    best = table["against_best"]["avg_at_k"]  # forward_kl passes 8 of 12, reverse_kl 5
    assert best["method"] == "forward_kl" and best["delta"] == pytest.approx(100 * (11 - 8) / 12)
    assert best["interval"] == intervals(np.array([[25.0], [50.0], [0.0]]))[0]
    assert table["best_avg_at_k"] == ["trd"]
    assert "| trd | **91.7** (+41.7 [0.0, 75.0]) |" in markdown and "| forward\\_kl | 66.7 (+16.7" in markdown
    assert "- test, Avg@2: trd against the best baseline (forward\\_kl) +25.0 [0.0, 50.0]" in markdown
    assert "<b>91.7</b>" in page and "<b>66.7</b>" not in page
    assert markdown.index("forward\\_kl") < markdown.index("reverse\\_kl") < markdown.index("| trd")


def test_equals_as_shown_are_both_best() -> None:
    assert compare.best_of({"base": 10.0, "a": 20.04, "b": 19.96, "c": 19.9}) == ["a", "b"]


def test_buckets_count_a_problem_once_for_each_seed(runs: list[Path], tmp_path: Path) -> None:
    found, _, _ = compared(runs, tmp_path / "out")
    never, some, always = found["sections"][0]["benchmarks"][0]["methods"]["forward_kl"]["buckets"]
    assert (never["base_passes"], never["problems"]) == ("0", 2)  # b under seed 0, a under seed 1
    assert never["student"] == {"avg_at_k": pytest.approx(75.0), "pass_at_k": pytest.approx(100.0)}
    assert (some["problems"], some["student"]["avg_at_k"], some["base"]["avg_at_k"]) == (2, pytest.approx(25.0), pytest.approx(50.0))
    assert (always["base_passes"], always["student"]["pass_at_k"]) == ("2", 100.0)


def test_training_is_pooled_as_well(runs: list[Path], tmp_path: Path) -> None:
    shard = shard_path(tmp_path / "trd-1/rollouts", 0)
    rollouts = read_parquet(shard, TRAJECTORY)
    assert (rollouts[1]["problem_id"], rollouts[1]["passed"]) == ("p1", False)
    rollouts[1]["passed"] = True
    write_parquet(shard, rollouts, TRAJECTORY)
    section = compared(runs, tmp_path / "out")[0]["sections"][0]
    of = section["trajectories"]["trd"]
    assert (of["rollouts"]["samples"], of["refined"]["samples"]) == (14, 12)
    assert of["joint_outcomes"] == {"fail → pass": 3, "pass → fail": 2, "pass → pass": 3, "fail → fail": 2, "not graded": 2}
    assert "refined" not in section["trajectories"]["forward_kl"]
    assert section["costs"]["methods"]["trd"] == {"rollout": 10.5, "refine": 6.5, "train": 8.5, "total": 25.5, "evaluate": 1.0}
    assert section["costs"]["ratio"] == {"rollout": 1.0, "train": 1.0, "total": 25.5 / 19.0, "evaluate": 1.0}
    assert [line["kl_passed"] for line in section["curves"]["trd"]] == [1.5, 2.5]  # seed 1 has two steps, seed 0 three
    assert section["diagnostics"]["trd"] == {"kl_passed": 1.5, "kl_failed": None, "perplexity_gap": 0.5, "epistemic_mass": 0.001}


def test_several_benchmarks_have_a_mean_and_need_not_be_the_same(make: Make, tmp_path: Path) -> None:
    first = make("trd", 0, benchmarks=("test", "aime", "more"))
    second = make("forward_kl", 0, benchmarks=("test", "aime"))
    write_scores(first / "eval/student", "aime", [0, 0, 0])
    found, page, markdown = compared([first, second], tmp_path / "out")
    [section] = found["sections"]
    assert [table["benchmark"] for table in section["benchmarks"]] == ["test", "aime"] and section["left_out"] == ["more"]
    assert section["mean"]["methods"]["trd"]["avg_at_k"] == pytest.approx(50.0)
    assert section["mean"]["methods"]["trd"]["delta"]["avg_at_k"] == pytest.approx(0.0)
    assert section["mean"]["best_avg_at_k"] == ["forward_kl"]
    assert "| | test, Avg@2 | aime, Avg@2 | mean |" in markdown.replace("|  |", "| |")
    assert "not every run has it: more" in page


def test_settings_that_differ_make_sections(make: Make, tmp_path: Path) -> None:
    config = make_run(tmp_path / "x")[0]
    first, second = make("trd", 0), make("trd", 1)
    lora = replace(config.learner, max_tokens_per_micro_batch=60000, learning_rate=0.5)
    third = make("trd", 0, at="other", learner=lora)
    wide = make("trd", 1, at="wide", learner=replace(lora, learning_rate=config.learner.learning_rate, data_parallel_size=2))
    named = make("forward_kl", 0, at="named", name="another")
    found, page, markdown = compared([first, second, third, named], tmp_path / "out")
    key = "learner.learning_rate"
    assert [(of["settings"], of["methods"]) for of in found["sections"]] == [
        ({key: config.learner.learning_rate}, {"forward_kl": [0], "trd": [0, 1]}),
        ({key: 0.5}, {"trd": [0]}),
    ]
    assert [of["unusual"] for of in found["sections"]] == [{}, {key: 0.5}]
    assert f"## OPSD, builtin:tiny-qwen3, {key}=0.5" in markdown
    assert 'href="#s2"' in page and 'id="s2"' in page
    # A layout makes a section only where nothing else tells runs apart.
    assert len(compared([first, wide], tmp_path / "out")[0]["sections"]) == 1
    layouts = [of["settings"] for of in compared([second, wide], tmp_path / "out")[0]["sections"]]
    assert layouts == [{"learner.data_parallel_size": 1}, {"learner.data_parallel_size": 2}]


def test_filters_are_rows_against_the_row_without(make: Make, tmp_path: Path) -> None:
    paths = [make("forward_kl", 0), make("trd", 0)]
    for method, name, chosen in (("trd", "fail", "fail"), ("reverse_kl", "succ", "succ")):
        paths.append(make(method, 0, at=name))
        file = paths[-1] / "config.yaml"
        file.write_text(file.read_text().replace("filter: all", f"filter: {chosen}"))
    found, page, markdown = compared(paths, tmp_path / "out")
    [section] = found["sections"]
    assert list(section["methods"]) == ["forward_kl", "reverse_kl (succ)", "trd", "trd (fail)"]
    rows = section["benchmarks"][0]["methods"]
    assert [rows[name]["against"] for name in rows] == ["base", "base", "base", "trd"]
    gap = rows["trd (fail)"]["avg_at_k"] - rows["trd"]["avg_at_k"]
    assert rows["trd (fail)"]["delta"]["avg_at_k"] == pytest.approx(gap)
    # The row says what its difference is taken from; without that row it is the base, and nothing is said.
    for text in (page, markdown):
        assert "trd (fail), Δ against trd" in text and "reverse_kl (succ), Δ" not in text.replace("\\_", "_")
    assert "| trd (fail), Δ against trd | **100.0** (0.0) |" in markdown


def test_a_filter_is_no_baseline(make: Make, tmp_path: Path) -> None:
    paths = [make("trd", 0), make("reverse_kl", 0), make("forward_kl", 0, at="better")]  # reverse_kl passes 2 of 6, forward_kl 4
    file = paths[-1] / "config.yaml"
    file.write_text(file.read_text().replace("filter: all", "filter: succ"))
    [table] = compared(paths, tmp_path / "out")[0]["sections"][0]["benchmarks"]
    assert table["methods"]["forward_kl (succ)"]["avg_at_k"] > table["methods"]["reverse_kl"]["avg_at_k"]
    assert table["against_best"]["avg_at_k"]["method"] == "reverse_kl"


def test_held_out_problems_may_be_others_under_another_seed(make: Make, tmp_path: Path) -> None:
    paths = [make("trd", 0), make("trd", 1)]
    for model in ("base", "student"):
        write_scores(paths[1] / "eval" / model, "test", [0, 2, 2], "bcd")
    [table] = compared(paths, tmp_path / "out")[0]["sections"][0]["benchmarks"]
    assert (table["problems"], table["problems_differ"]) == (4, True)
    # base: a 1/2, b (0 + 0)/4, c (2 + 2)/4, d 2/2
    assert table["base"]["avg_at_k"] == pytest.approx(100 * (0.5 + 0 + 1 + 1) / 4)
    # Against the base of the same seed: a 1/2, b (2/2 + 0)/2, c 0, d 0.
    assert table["methods"]["trd"]["delta"]["avg_at_k"] == pytest.approx(100 * (0.5 + 0.5 + 0 + 0) / 4)
    write_scores(paths[1] / "eval/student", "test", [0, 2, 2], "bce")
    with pytest.raises(UserError, match=r"trd-1 .*trd-1 \(student\) were asked other problems of test"):
        compared(paths, tmp_path / "out")


def test_other_problems_or_another_k_are_refused(make: Make, tmp_path: Path) -> None:
    first, second = make("trd", 0, benchmarks=("aime",)), make("forward_kl", 1, benchmarks=("aime",))
    for model in ("base", "student"):
        write_scores(second / "eval" / model, "aime", [0, 0, 0], "abd")
    with pytest.raises(UserError, match=r"forward_kl-1 and .*trd-0 .*other problems of aime"):
        compared([first, second], tmp_path / "out")
    for model in ("base", "student"):
        write_scores(second / "eval" / model, "aime", [0, 0, 0], samples=3)
    with pytest.raises(UserError, match=r"forward_kl-1 and .*trd-0 .*3 and 2 samples"):
        compared([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_opd_opsd_and_the_teacher(make: Make, tmp_path: Path) -> None:
    teacher = TeacherConfig(path="builtin:smollm2-135m-instruct")
    opd = make("trd", 0, at="opd", mode="opd", teacher=teacher)
    opsd = make("trd", 0, at="opsd")
    write_scores(opd / "eval/teacher", "test", [2, 2, 1])
    done(opd / "eval/teacher", "evaluate")
    found, page, markdown = compared([opd, opsd], tmp_path / "out")
    [part] = found["teachers"]
    assert part["rows"] == [
        "Teacher builtin:smollm2-135m-instruct",
        "Base",
        "OPD teacher.path=builtin:smollm2-135m-instruct",
        "OPSD",
    ]
    scores = [part["benchmarks"][0]["rows"][label]["avg_at_k"] for label in part["rows"]]
    assert scores == pytest.approx([500 / 6, 50.0, 100.0, 100.0])
    assert found["sections"][0]["benchmarks"][0]["teacher"]["avg_at_k"] == pytest.approx(500 / 6)
    assert "OPD, OPSD and teacher" in page and "| Teacher | 83.3 |" in markdown


def test_the_papers_presets_of_both_modes_make_table_5(make: Make, tmp_path: Path) -> None:
    """They differ in more than the teacher: in the budget of what it is shown when it refines."""
    presets = {mode: load([f"experiment={mode}_qwen3_4b_instruct"]) for mode in ("opd", "opsd")}
    paths = []
    for mode, preset in presets.items():
        teacher = replace(preset.teacher, path="builtin:smollm2-135m-instruct") if mode == "opd" else preset.teacher
        paths.append(make("trd", 0, at=mode, mode=mode, teacher=teacher, refine=preset.refine))
    write_scores(paths[0] / "eval/teacher", "test", [2, 2, 1])
    done(paths[0] / "eval/teacher", "evaluate")
    [part] = compared(paths, tmp_path / "out")[0]["teachers"]
    assert [label.split()[0] for label in part["rows"]] == ["Teacher", "Base", "OPD", "OPSD"]


def test_a_model_evaluated_alone(make: Make, tmp_path: Path) -> None:
    student = make("trd", 0, benchmarks=("aime",))
    alone = make("forward_kl", 0, at="alone", benchmarks=("aime",), job="evaluate")
    found, page, markdown = compared([student, alone], tmp_path / "out")
    assert len(found["sections"]) == 1
    [line] = found["evaluated"][0]["benchmarks"]
    assert line["models"]["builtin:tiny-qwen3"]["avg_at_k"] == pytest.approx(50.0)
    assert "Evaluated alone" in page and "## Evaluated alone" in markdown
    assert compared([alone], tmp_path / "out")[0]["sections"] == []


def test_hostile_text_stays_text(make: Make, tmp_path: Path) -> None:
    paths = [make(method, 0, at=f"{SCRIPT.replace('/', '_')} | {method}", name=f"{SCRIPT} | *x*\n# y") for method in ("trd", "forward_kl")]
    method = MethodConfig(name=SCRIPT, trajectory="rollout")
    paths.append(make("reverse_kl", 1, at="named"))
    config = make_run(tmp_path / "y")[0]
    values = to_dict(replace(config, method=method, seed=1, data=replace(config.data, path="x.jsonl")))
    values["learner"]["max_tokens_per_micro_batch"] = 60000
    RunDir(paths[-1], config.name).write_config(values)
    _, page, markdown = compared(paths, tmp_path / "out")
    for text in (page, markdown):
        assert "<script" not in text.lower() and "&lt;script&gt;" in text
    assert markdown.splitlines()[0].endswith("\\| \\*x\\* \\# y, hand &lt;made&gt;")
    [style] = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in page
    assert " style=" not in page and not re.search(r"\ssrc=|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_a_run_counts_once(runs: list[Path], tmp_path: Path) -> None:
    found, page, _ = compared([*runs, runs[0] / ".." / runs[0].name], tmp_path / "out")
    assert len(found["runs"]) == 6
    assert "All 6 runs" in page and found["runs"][0]["fingerprints"]["train"]
    assert found["runs"][0]["versions"]["torch"] == ["2.1"]


def test_same_runs_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    assert compared(runs, tmp_path / "one") == compared(runs, tmp_path / "two")


def test_what_cannot_be_compared_is_one_line(make: Make, tmp_path: Path) -> None:
    def refused(match: str, *paths: Path, folder: str = "out") -> None:
        with pytest.raises(UserError, match=match) as error:
            compare.write(paths, tmp_path / folder)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    first, second = make("trd", 0), make("forward_kl", 0)
    refused("no run to compare")
    refused("is not a run directory", tmp_path)
    refused("trd-0 is a run, whose own report would be lost", first, folder="trd-0")
    (tmp_path / "file").write_text("")
    refused("file is a file", first, folder="file")
    refused(r"trd-0 and .*again have the same method, seed and settings", first, make("trd", 0, at="again"))
    refused(r"other was evaluated on aime and .*trd-0 on test", first, make("forward_kl", 1, at="other", benchmarks=("aime",)))

    (second / "train/metrics.jsonl").write_text('{"step": 1')
    refused("metrics.jsonl cannot be read", second)
    (second / "eval/student/test.parquet").write_bytes(b"PAR1")
    refused("test.parquet cannot be read as parquet", second)
    (second / "eval/student/manifest.json").unlink()
    refused("forward_kl-0: stage evaluate/student is missing; give its `trd run` command again", second)
    Manifest("train", "running", "f", {}, {}).write(second / "train")
    refused("stage train is not finished", second)
    (second / "config.yaml").write_text("nmae: x\n")
    refused(r"config.yaml: unknown key nmae", second)
    Manifest("train", "done", "f", {"learner.learning_rate": 7.0}, {}).write(first / "train")
    refused("stage train was made with another learner.learning_rate", first)
    done(first / "train", "train", inputs={"rollout": "another"})
    refused("stage train was made with another rollout", first)


def test_command(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths, out = [str(path) for path in runs], tmp_path / "out"
    code, _, err = trd("report", "--compare", *paths, "--output", str(out), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "report: " in err
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    code, _, err = trd("report", *paths, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and err.startswith("error: ") and "--compare" in err


def test_of_several_rounds_the_last_counts_and_all_cost(make: Make, tmp_path: Path) -> None:
    path = make("trd", 0, rounds=2)
    for name in ("rollouts", "refined", "train", "hf", "eval"):
        shutil.copytree(path / name, path / "rounds/1" / name)
        shutil.move(path / name, path / "rounds/0" / name)
    write_scores(path / "rounds/1/eval/student", "test", [0, 0, 1])
    write_scores(path / "rounds/1/eval/base", "test", [2, 2, 2])  # not the run's base: that is round 0's
    [section] = compared([path], tmp_path / "out")[0]["sections"]
    [table] = section["benchmarks"]
    assert table["base"]["avg_at_k"] == pytest.approx(50.0) and table["methods"]["trd"]["avg_at_k"] == pytest.approx(100 / 6)
    assert section["costs"]["methods"]["trd"] == {"rollout": 20.0, "refine": 12.0, "train": 16.0, "total": 48.0, "evaluate": 2.0}
