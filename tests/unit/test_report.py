"""The report of a small hand-made run whose every figure is known and whose texts are hostile."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trd_megatron.config import Config, DataConfig, EvaluateConfig, MethodConfig, ModelConfig
from trd_megatron.errors import UserError
from trd_megatron.records import PROBLEM, REFINED, TRAJECTORY
from trd_megatron.report import html, plots, tables
from trd_megatron.run_dir import IN_ROUND, Manifest, RunDir, shard_path, write_json, write_parquet
from trd_megatron.stages import report

SCRIPT = "<script>alert(1)</script>"
CLOSING = "</pre></body><img src=https://example.org/x onerror=alert(2)>"
HIDDEN = "NUL \x00 RTL \u202eoverride\u202c zero\u200bwidth ESC \x1b[31m tag \U000e0041"
TEMPLATE = "{{7*7}} {% raw %} {{ settings }} <!-- ]]> &amp;"
LONG = "x" * 3000 + "M" * 1234 + "y" * 1500

# problem -> (y_o passed, y_o tokens, y_r passed, y_r tokens)
PAIRS: dict[str, tuple[bool | None, int, bool | None, int]] = {
    "p0": (True, 10, True, 12),
    "p1": (False, 20, True, 8),
    "p2": (False, 30, False, 16),
    "p3": (True, 40, False, 64),
    "p4": (None, 50, True, 2),
    "p5": (False, 60, True, 6),
}


def row(problem_id: str, sample: int, passed: bool | None, tokens: int, response: str, **more: Any) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "sample_index": sample,
        "prompt": "?",
        "prompt_ids": [1],
        "response": response,
        "response_ids": list(range(tokens)),
        "response_logprobs": [-0.5] * tokens,
        "finish_reason": "length" if tokens >= 60 else "stop",
        "passed": passed,
        "verdict": {True: "pass", False: "fail", None: "error"}[passed],
        "extracted_answer": SCRIPT if passed is False else None,
        "model": "m",
        "engine": "local",
        "weight_version": 0,
        "seed": 1,
        **more,
    }


def make_run(path: Path, *, method: MethodConfig | None = None, graded: bool = True, steps: int = 3) -> tuple[Config, RunDir]:
    """A finished run of everything but the report: two problem shards' worth of outcomes, one evaluated benchmark."""
    config = Config(
        name="hand <made>",
        run_dir=str(path),
        model=ModelConfig(path="builtin:tiny-qwen3"),
        data=DataConfig(test_problems=2),
        method=method or MethodConfig(name="trd"),
        evaluate=EvaluateConfig(samples=2),
    )
    path.mkdir()
    run_dir = RunDir(path, config.name)

    def manifest(folder: Path, stage: str, counts: dict[str, Any], seconds: float) -> None:
        versions = {"torch": "2.0" if stage == "prepare" else "2.1", "pyarrow": "9"}
        made = Manifest(stage, "done", "f" * 64, {}, {}, counts, versions, seconds, 0.0, "2025-01-01T00:00:00Z", "2025-01-01T00:01:00Z")
        made.write(folder)

    problems = [
        dict.fromkeys(PROBLEM.names)
        | {"problem_id": name, "task": "math", "problem": f"{SCRIPT} {name}", "answer": CLOSING, "source": "s", "split": "train"}
        | {"reference_solution": {"p0": "worked", "p1": "worked", "p2": ""}.get(name)}
        for name in PAIRS
    ]
    write_parquet(shard_path(run_dir.problems, 0), problems, PROBLEM)
    manifest(run_dir.problems, "prepare", {"train_problems": 6}, 0.5)

    texts = [SCRIPT, CLOSING, HIDDEN, TEMPLATE, LONG, "\u05d0\u05d1 natural"]
    first, second = [], []
    for text, (name, (before, tokens, after, refined_tokens)) in zip(texts, PAIRS.items(), strict=True):
        if not graded:
            before = after = None
        first.append(row(name, 0, before, tokens, text))
        second.append(row(name, 0, after, refined_tokens, text[::-1], initial_response=text, initial_passed=before))
    first.append(row("p5", 1, None if not graded else True, 70, "not refined"))
    write_parquet(shard_path(run_dir.rollouts, 0), first[:4], TRAJECTORY)
    write_parquet(shard_path(run_dir.rollouts, 1), first[4:], TRAJECTORY)
    manifest(run_dir.rollouts, "rollout", {"samples": 7, "response_tokens": 280, "skipped_over_budget": 0}, 14.0)
    if config.method.trajectory == "refined":
        write_parquet(shard_path(run_dir.refined, 0), second, REFINED)
        manifest(run_dir.refined, "refine", {"samples": 6, "response_tokens": 108, "skipped_over_budget": 1, "skipped_aborted": 0}, 3.0)

    summary = {"kl_fixed_batch_before": 0.5, "kl_fixed_batch_after": 0.375, "steps": steps, "tokens": 90, "seconds": 8.0}
    summary |= {"best_step": steps, "training_samples": 5, "held_out_samples": 1}
    lines = [{"step": n, "loss": 1.0 / n, "kl": 1.0 / n, "grad_norm": 0.25 * n, "lr": 1e-4 / n} for n in range(1, steps + 1)]
    for line in lines:
        line |= {"kl_passed": None if line["step"] == 2 else 0.1, "kl_failed": 0.2, "perplexity_gap": -0.5, "epistemic_mass": 0.02}
    lines[-1]["held_out_kl"] = 0.375
    run_dir.train.mkdir()
    (run_dir.train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run_dir.train / "summary.json", summary)
    manifest(run_dir.train, "train", summary | {"left_out_aborted": 2, "left_out_over_budget": 0}, 9.0)
    manifest(run_dir.hf, "export", {"step": steps}, 1.0)

    outcomes = {"base": [[True, False], [False, False]], "student": [[True, True], [True, False]]}
    for model, by_problem in outcomes.items():
        rows = [
            row(f"t{problem}", sample, passed if graded else None, 5 + sample, SCRIPT)
            for problem, results in enumerate(by_problem)
            for sample, passed in enumerate(results)
        ]
        write_parquet(run_dir.eval / model / "test.parquet", rows, TRAJECTORY)
        made = {"sampling": {"temperature": 0.6}, "engines": [{"name": "local", "torch": "2"}], "graders": [{"math": {"math-verify": "1"}}]}
        made |= {"source": {"name": "test"}, "in_training": 0}
        counts = {"test": {"samples": 4, "response_tokens": 22, "skipped_over_budget": 0, **made}}
        manifest(run_dir.eval / model, f"evaluate-{model}", counts, 2.0)
    return config, run_dir


def written(config: Config, run_dir: RunDir) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(report.json, report.html, counts)"""
    folder = run_dir.report
    folder.mkdir(exist_ok=True)
    counts = report.run(config, run_dir, folder)
    page = (run_dir.path / "report.html").read_bytes().decode()
    return json.loads((run_dir.path / "report.json").read_text(encoding="utf-8")), page, counts


class Page(HTMLParser):
    """Elements, references, and the texts of the <pre> elements; fails on anything that is not closed."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pre: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.pre[-1] += data


def test_figures(tmp_path: Path) -> None:
    figures, _, counts = written(*make_run(tmp_path / "run"))
    assert figures["kl_fixed_batch"] == {"before": 0.5, "after": 0.375, "change_percent": -25.0}
    assert figures["exported_step"] == 3

    (line,) = figures["benchmarks"]
    assert (line["benchmark"], line["problems"], line["k"]) == ("test", 2, 2)
    assert (line["base"]["avg_at_k"], line["method"]["avg_at_k"], line["delta"]["avg_at_k"]) == (25.0, 75.0, 50.0)
    assert (line["base"]["pass_at_k"], line["method"]["pass_at_k"], line["delta"]["pass_at_k"]) == (50.0, 100.0, 50.0)
    assert line["delta"]["avg_at_k_interval"] is None  # both problems gained 50 points
    assert line["delta"]["pass_at_k_interval"] == [0, 100]  # gains 0 and 100 points: a quarter of the resamples has twice the same
    assert line["base"]["pass_curve"] == [25.0, 50.0]
    assert [(b["base_passes"], b["problems"]) for b in line["buckets"]] == [("0", 1), ("1", 1), ("2", 0)]
    assert line["buckets"][0]["delta"]["avg_at_k"] == 50.0
    assert line["base"]["lengths"]["correct"]["mean"] == 5
    assert line["base"]["lengths"]["incorrect"]["mean"] == pytest.approx(17 / 3)
    assert line["made"]["student"]["graders"] == [{"math": {"math-verify": "1"}}]
    assert line["method"]["samples"]["mean_tokens"] == 5.5

    both = figures["trajectories"]
    assert both["rollouts"] == {
        "samples": 7,
        "graded": 6,
        "passed": 3,
        "pass_rate": 50.0,
        "mean_tokens": 40,
        "median_tokens": 40,
        "max_tokens": 70,
        "truncated_rate": pytest.approx(100 * 2 / 7),
        "aborted_rate": 0.0,
        "unparsable_rate": 0.0,
        "error_rate": pytest.approx(100 / 7),
        "finish_reasons": {"length": 2, "stop": 5},
        "verdicts": {"error": 1, "fail": 3, "pass": 3},
    }
    refined = both["refined"]
    assert (refined["mean_tokens"], refined["median_tokens"], refined["max_tokens"]) == (18, 10, 64)
    assert refined["pass_rate"] == pytest.approx(100 * 4 / 6)
    assert refined["finish_reasons"] == {"length": 1, "stop": 5}
    assert both["not_refined"] == 1
    assert both["rollout_pass_rate_of_the_refined"] == 40.0
    assert both["joint_outcomes"] == {"fail → pass": 2, "pass → fail": 1, "pass → pass": 1, "fail → fail": 1, "not graded": 1}
    assert counts["samples_shown"] == 6

    stages = {line["stage"]: line for line in figures["stages"]}
    assert list(stages) == ["prepare", "rollout", "refine", "train", "export", "evaluate/base", "evaluate/student"]
    assert (stages["rollout"]["samples_per_second"], stages["rollout"]["tokens_per_second"]) == (0.5, 20.0)
    assert (stages["train"]["samples"], stages["train"]["tokens_per_second"]) == (None, 10.0)
    assert (stages["evaluate/base"]["samples_per_second"], stages["evaluate/base"]["response_tokens"]) == (2.0, 22)
    assert stages["refine"]["skipped"] == {"skipped over budget": 1}
    assert stages["train"]["skipped"] == {"left out aborted": 2}
    costs = figures["costs"]
    assert list(costs) == ["rollout", "refine", "train", "total", "evaluate"]
    assert [costs[name]["seconds"] for name in costs] == [14, 3, 9, 26, 4]
    assert costs["refine"]["share"] == pytest.approx(100 * 3 / 26)
    assert (costs["total"]["share"], "share" in costs["evaluate"]) == (100, False)
    assert (costs["total"]["response_tokens"], costs["train"]["tokens_per_second"]) == (280 + 108 + 90, 10)
    assert costs["total"]["server_start_seconds"] == 0
    assert figures["versions"]["torch"] == {"2.0": ["prepare"], "2.1": list(stages)[1:]}
    assert figures["settings"]["learner.lora.rank"] == 64


def test_lengths_by_outcome_and_by_reference(tmp_path: Path) -> None:
    figures, page, _ = written(*make_run(tmp_path / "run"))
    both = figures["trajectories"]
    assert {name: of["samples"] for name, of in both["lengths"]["rollouts"].items()} == {"passed": 3, "failed": 3}
    assert both["lengths"]["rollouts"]["failed"]["mean"] == pytest.approx(110 / 3)
    assert both["lengths"]["refined"]["passed"]["max"] == 12
    repaired = both["joint_lengths"]["fail → pass"]  # p1 and p5
    assert (repaired["rollouts"]["mean"], repaired["refined"]["mean"]) == (40, 7)
    assert both["joint_lengths"]["pass → fail"]["refined"]["p50"] == 64

    worked, rest = figures["by_reference"]["worked"], figures["by_reference"]["answer_only"]
    assert (worked["problems"], rest["problems"]) == (2, 4)  # an empty reference solution is none
    assert (worked["rollouts"]["samples"], rest["rollouts"]["samples"]) == (2, 5)
    assert (worked["rollouts"]["pass_rate"], worked["refined"]["pass_rate"]) == (50, 100)
    assert worked["joint_outcomes"]["fail → pass"] == rest["joint_outcomes"]["fail → pass"] == 1
    assert "Worked reference" in page and "nothing to split by" not in page


def test_repetition_is_measured_of_both(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    rows = [row(name, 0, True, 12, "again", initial_response="", initial_passed=True) for name in PAIRS]
    rows[0]["response_ids"] = [5, 6, 7, 8] * 3
    write_parquet(shard_path(run_dir.refined, 0), rows, REFINED)
    figures, page, _ = written(config, run_dir)
    assert figures["repetition"]["rollouts"] == {"responses": 7, "repeated_4grams": 0, "loops": 0, "loop_rate": 0}
    assert figures["repetition"]["refined"] == {
        "responses": 6, "repeated_4grams": pytest.approx(100 * 5 / 9 / 6), "loops": 1, "loop_rate": pytest.approx(100 / 6)
    }  # fmt: skip
    assert "seq-rep-4" in page


def test_what_is_behind_the_figures(tmp_path: Path) -> None:
    figures, _, _ = written(*make_run(tmp_path / "run"))
    assert figures["made"]["rollouts"]["sampling"]["seed"] == figures["made"]["training"]["seed"] == 0
    assert figures["made"]["refined"]["sampling"]["max_prompt_tokens"] == 22528
    assert figures["made"]["training"]["data.filter"] == "all"
    assert figures["curves"]["step"] == [1, 2, 3]
    assert figures["curves"]["kl_passed"] == [0.1, None, 0.1]
    assert figures["curves"]["epistemic_mass"] == [0.02] * 3


def test_samples_side_by_side_mark_where_they_part(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    texts = {"p0": ("Right so far.\nNow <b>5</b>.\nEnd", "Right  so far.\nNow <i>6</i>.\nEnd"), "p1": ("same words", "same\nwords")}
    for folder, schema, side in ((run_dir.rollouts, TRAJECTORY, 0), (run_dir.refined, REFINED, 1)):
        for path in folder.glob("part-*"):
            path.unlink()
        rows = [row(name, 0, True, 9, both[side], initial_response="", initial_passed=True) for name, both in texts.items()]
        write_parquet(shard_path(folder, 0), [{name: one[name] for name in schema.names if name in one} for one in rows], schema)
    figures, page, _ = written(config, run_dir)
    assert [(one["problem_id"], one["first_different_word"], one["first_wrong_step"]) for one in figures["samples"]] == [
        ("p0", 5, None), ("p1", None, None)
    ]  # fmt: skip
    assert '<mark class="first">&lt;b&gt;5&lt;/b&gt;.</mark>' in page
    assert '<mark class="second">&lt;i&gt;6&lt;/i&gt;.</mark>' in page
    assert page.count("<mark ") == 2
    assert texts["p0"][0] in Page(page).pre


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    _, page, _ = written(*make_run(tmp_path / "run"))
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "base", "form"}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert any(name == "mark" for name in names)  # around hostile text as well
    shown = parsed.pre
    assert f"{SCRIPT} p0" in shown
    assert SCRIPT in shown
    assert CLOSING in shown
    assert TEMPLATE in shown
    assert "NUL ⟨U+0000⟩ RTL ⟨U+202E⟩override⟨U+202C⟩ zero⟨U+200B⟩width ESC ⟨U+001B⟩[31m tag ⟨U+E0041⟩" in shown
    assert "\u05d0\u05d1 natural" in shown
    assert "x" * 3000 + "\n\n[… 1,234 characters left out …]\n\n" + "y" * 1500 in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", page)
    assert "hand &lt;made&gt;" in page


def test_page_is_self_contained(tmp_path: Path) -> None:
    _, page, _ = written(*make_run(tmp_path / "run"))
    ids = re.findall(r' id="([^"]*)"', page)
    for _, attributes in Page(page).tags:
        assert "src" not in attributes
        assert "style" not in attributes  # forbidden by the policy
        assert "http-equiv" not in attributes or attributes["http-equiv"] == "Content-Security-Policy"
        if "href" in attributes:
            assert attributes["href"] in {f"#{name}" for name in ids}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    allowed = policy[1].replace("&#39;", "'")
    assert allowed == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert len(page) < 300_000


def test_same_run_same_bytes(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    written(config, run_dir)
    before = {name: (run_dir.path / name).read_bytes() for name in ("report.html", "report.json")}
    written(config, run_dir)
    assert before == {name: (run_dir.path / name).read_bytes() for name in before}


def test_baseline_has_no_refined(tmp_path: Path) -> None:
    method = MethodConfig(name="forward_kl", trajectory="rollout", teacher_prompt="vanilla")
    config, run_dir = make_run(tmp_path / "run", method=method)
    # What an earlier run of trd left in the same folder is not this run's.
    write_parquet(shard_path(run_dir.refined, 0), [row("gone", 0, True, 1, "", initial_response="")], REFINED)
    figures, page, _ = written(config, run_dir)
    assert set(figures["trajectories"]) == {"rollouts", "lengths"}
    assert "refine" not in [line["stage"] for line in figures["stages"]]
    assert "<i>y</i><sub>r</sub>" not in page
    assert "y_r, refined" not in page
    assert "Joint outcomes" not in page
    assert SCRIPT in Page(page).pre


def test_nothing_graded(tmp_path: Path) -> None:
    figures, page, _ = written(*make_run(tmp_path / "run", graded=False))
    assert figures["trajectories"]["rollouts"]["pass_rate"] is None
    assert figures["trajectories"]["joint_outcomes"]["not graded"] == 6
    assert figures["benchmarks"][0]["method"]["avg_at_k"] == 0.0
    assert figures["benchmarks"][0]["method"]["samples"]["graded"] == 0
    assert "— → —<" in page


def test_single_step_shows_its_points(tmp_path: Path) -> None:
    figures, page, _ = written(*make_run(tmp_path / "run", steps=1))
    assert figures["training"]["steps"] == 1
    drawn = plots.kl([{"step": 1, "kl": 1.0, "loss": 0.5}])
    assert drawn.count("<use ") >= 2  # a marker for KL and one for the loss
    assert "loss (clipped)" in drawn
    assert "KL (= loss)" in page


@pytest.mark.parametrize(
    "missing", ["train/summary.json", "train/metrics.jsonl", "eval/student/test.parquet", "rollouts/part-00000.parquet"]
)
def test_missing_or_damaged_output_is_one_clear_line(tmp_path: Path, missing: str) -> None:
    config, run_dir = make_run(tmp_path / "run")
    path = run_dir.path / missing
    if missing.startswith("rollouts"):
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        report.run(config, run_dir, run_dir.report)
    assert "\n" not in str(caught.value)
    assert not (run_dir.path / "report.html").exists()


def test_missing_column_is_named(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    table = pa.schema([field for field in TRAJECTORY if field.name != "verdict"])
    rows = [{k: v for k, v in row("p0", 0, True, 3, "").items() if k != "verdict"}]
    write_parquet(shard_path(run_dir.rollouts, 0), rows, table)
    with pytest.raises(UserError, match="verdict"):
        report.run(config, run_dir, run_dir.report)


def test_benchmark_needs_the_same_samples() -> None:
    one, other = ([{**row(name, 0, True, 1, ""), "response_tokens": 1}] for name in ("a", "b"))
    with pytest.raises(ValueError, match="same samples"):
        tables.benchmark("test", one, other)
    with pytest.raises(ValueError, match="at least one"):
        tables.benchmark("test", [], [])
    uneven = [*one, {**one[0], "sample_index": 1}, *other]
    with pytest.raises(ValueError, match="same number"):
        tables.benchmark("test", uneven, uneven)


def test_samples_are_taken_in_turn_and_from_different_problems() -> None:
    rollouts = [{**row(f"p{n // 2}", n % 2, n >= 10, 1, ""), "response_tokens": 1} for n in range(20)]
    refined = [{**r, "passed": True} for r in rollouts]
    picked = tables.pick_samples(rollouts, refined, 6)
    assert picked == [((f"p{n}", 0), "fail → pass") for n in range(3)] + [((f"p{n}", 0), "pass → pass") for n in range(5, 8)]
    assert tables.pick_samples(rollouts, None, 3) == [(("p5", 0), "pass"), (("p6", 0), "pass"), (("p0", 0), "fail")]


def test_kl_change_without_a_start() -> None:
    assert tables.kl_change({"kl_fixed_batch_before": 0.0, "kl_fixed_batch_after": 0.1})["change_percent"] is None


def test_costs_add_up_the_rounds_and_say_where_they_know_nothing() -> None:
    made = {"status": "done", "started": "", "finished": "", "counts": {"samples": 2, "response_tokens": 30}}
    rollout, train = (made | {"seconds": seconds, "server_start_seconds": start} for seconds, start in ((4.0, 5.0), (1.0, 0.0)))
    train["counts"] = {"tokens": 60}
    stages = [("prepare", None), ("rollout", rollout), ("train", train), ("rollout", rollout), ("train", train)]
    costs = tables.costs(stages)
    assert list(costs) == ["rollout", "train", "total"]
    assert costs["rollout"] == {
        "seconds": 8, "server_start_seconds": 10, "response_tokens": 60, "tokens_per_second": 7.5, "share": 80
    }  # fmt: skip
    assert costs["total"] == {
        "seconds": 10, "server_start_seconds": 10, "response_tokens": 180, "tokens_per_second": 18, "share": 100
    }  # fmt: skip
    lacking = tables.costs([*stages[:-1], ("train", None)])
    assert set(lacking["total"].values()) == {None}
    assert lacking["rollout"]["seconds"] == 8


def test_the_band_of_pass_at_k_is_left_out_only_where_there_is_no_interval() -> None:
    of = {"k": 3, "pass_curve": [40.0, 60.0, 100.0], "pass_curve_intervals": [[30.0, 50.0], [50.0, 70.0], None]}
    none = of | {"pass_curve_intervals": [None] * 3}
    assert plots.pass_curve({"base": of}).count("opacity: 0.15") > plots.pass_curve({"base": none}).count("opacity: 0.15")


def test_a_filter_is_named(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    assert "data.filter=fail" not in written(config, run_dir)[1]
    config.data.filter = "fail"
    assert "data.filter=fail" in written(config, run_dir)[1]


def test_number_formats() -> None:
    assert [html.signed(x) for x in (1.25, -1234.56, -0.04, None)] == ["+1.2", "−1,234.6", "0.0", "—"]
    assert [html.direction(x) for x in (0.06, -0.06, 0.04, None)] == ["up", "down", "", ""]
    assert [html.duration(x) for x in (8.25, 185, 7620, None)] == ["8.2 s", "3 min 05 s", "2 h 07 min", "—"]
    assert [html.minute(x) for x in ("2025-01-31T08:15:30Z", "")] == ["2025-01-31 08:15", "—"]
    assert [html.setting(x) for x in ("a", None, True, [1], 5e-6)] == ["a", "null", "true", "[1]", "5e-06"]


def test_rounds_are_compared_and_the_last_is_shown(tmp_path: Path) -> None:
    config, run_dir = make_run(tmp_path / "run")
    assert "rounds" not in written(config, run_dir)[0]
    config.rounds = 2
    for name in ("rounds/0", "rounds/1"):
        for folder in set(IN_ROUND) - {"adapter"}:
            shutil.copytree(run_dir.path / folder, run_dir.path / name / folder)
    for folder in set(IN_ROUND) - {"adapter"}:
        shutil.rmtree(run_dir.path / folder)
    second = run_dir.in_round(1, 2)
    shutil.rmtree(second.eval / "base")
    rows = [row("p0", 0, True, 10, "better"), row("p1", 0, True, 10, "better")]
    for path in second.rollouts.glob("part-*"):
        path.unlink()
    write_parquet(shard_path(second.rollouts, 0), rows, TRAJECTORY)
    refined = [one | {"initial_response": "better", "initial_passed": True, "passed": one["problem_id"] == "p0"} for one in rows]
    write_parquet(shard_path(second.refined, 0), refined, REFINED)
    better = [row(f"t{problem}", sample, True, 5 + sample, SCRIPT) for problem in range(2) for sample in range(2)]
    write_parquet(second.eval / "student/test.parquet", better, TRAJECTORY)
    summary = json.loads((second.train / "summary.json").read_text())
    write_json(second.train / "summary.json", summary | {"kl_fixed_batch_after": 0.25})

    figures, page, _ = written(config, second)
    first, last = figures["rounds"]
    assert (first["rollout_pass_rate"], last["rollout_pass_rate"]) == (50, 100)
    assert (first["refined_pass_rate"], last["refined_pass_rate"]) == (pytest.approx(100 * 4 / 6), 50)
    assert (first["kl_fixed_batch"]["after"], last["kl_fixed_batch"]["after"]) == (0.375, 0.25)
    assert first["benchmarks"] == {"test": {"avg_at_k": 75, "pass_at_k": 100}}
    assert last["benchmarks"] == {"test": {"avg_at_k": 100, "pass_at_k": 100}}
    assert figures["kl_fixed_batch"]["after"] == 0.25
    [line] = figures["benchmarks"]
    assert (line["base"]["avg_at_k"], line["method"]["avg_at_k"]) == (25, 100)
    names = [line["stage"] for line in figures["stages"]]
    assert names[:2] == ["prepare", "0/rollout"] and "1/train" in names and "1/evaluate/base" not in names
    assert all(line["status"] == "done" for line in figures["stages"])
    Page(page)
    assert "<h2>Rounds</h2>" in page
    assert "in the last of 2 rounds" in page
