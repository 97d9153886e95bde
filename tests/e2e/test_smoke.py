"""The whole pipeline through the command line, on experiment=smoke: results, caching, interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDERS = ("problems", "rollouts", "refined", "train", "adapter", "hf", "eval/base", "eval/student", "report")
SMALL_SHARDS = ("rollout.shard_size=2", "refine.shard_size=2", "evaluate.shard_size=1")


def command(run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "trd_megatron.cli", "run", "experiment=smoke", f"run_dir={run_dir}", *overrides]


def trd(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command(run_dir, *overrides), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def manifest(run_dir: Path, folder: str) -> dict[str, Any]:
    return json.loads((run_dir / folder / "manifest.json").read_text())


def finished(run_dir: Path) -> dict[str, tuple[str, str]]:
    """folder -> (fingerprint, time it was finished)."""
    found = {folder: manifest(run_dir, folder) for folder in FOLDERS}
    assert all(m["status"] == "done" for m in found.values())
    return {folder: (m["fingerprint"], m["finished"]) for folder, m in found.items()}


def content(run_dir: Path) -> dict[str, Any]:
    """What two runs must agree on: every sampled id, verdict and score, metrics but for times, and the weights."""
    parts = sorted([*run_dir.glob("rollouts/part-*"), *run_dir.glob("refined/part-*"), *run_dir.glob("eval/*/*.parquet")])
    columns = ["problem_id", "sample_index", "prompt_ids", "response_ids", "verdict", "finish_reason", "seed"]
    rows = {str(path.relative_to(run_dir)): pq.read_table(path, columns=columns).to_pylist() for path in parts}
    metrics = [json.loads(line) for line in (run_dir / "train/metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        assert line["mfu"] is None  # nobody knows a CPU's peak
        assert line["memory_gib"] > 0
        for name in ("seconds", "tokens_per_second", "model_tflops", "memory_gib"):
            del line[name]
    return {"rows": rows, "metrics": metrics}


def shards(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run."""
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    trd(run_dir, *SMALL_SHARDS)
    return run_dir


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_run_leaves_everything_behind(whole: Path) -> None:
    finished(whole)
    summary = json.loads((whole / "train/summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["kl_fixed_batch_after"] < summary["kl_fixed_batch_before"]
    scores = json.loads((whole / "eval/summary.json").read_text())
    assert set(scores) == {"base", "student", "comparison"}
    assert scores["comparison"]["test"]["delta"]["avg_at_k"] == scores["student"]["test"]["avg_at_k"] - scores["base"]["test"]["avg_at_k"]
    assert scores["base"]["test"]["k"] == 2
    assert "<table" in (whole / "report.html").read_text()
    assert (whole / "train/checkpoints/step_5/state.json").exists()
    assert list((whole / "train/tensorboard").iterdir())
    assert not list(whole.rglob("*.tmp"))
    rollouts = shards(whole / "rollouts")
    refined = shards(whole / "refined")
    assert len(rollouts) == len(refined) == 24
    assert all(len(row["response_ids"]) == len(row["response_logprobs"]) > 0 for row in rollouts + refined)
    assert [row["initial_response"] for row in refined] == [row["response"] for row in rollouts]
    # The learner saw the student's prompt from rollouts/ and the teacher's from refined/.
    samples = pq.read_table(whole / "train/samples.parquet").to_pylist()
    assert [s["student_prompt_ids"] for s in samples] == [row["prompt_ids"] for row in rollouts]
    assert [s["teacher_prompt_ids"] for s in samples] == [row["prompt_ids"] for row in refined]
    assert [s["response_ids"] for s in samples] == [row["response_ids"] for row in refined]


def test_the_export_loads_and_differs_from_the_base(whole: Path) -> None:
    from peft import PeftModel

    from trd_megatron.builtin_models import resolve_model

    base_folder = resolve_model("builtin:tiny-qwen3")
    base, merged = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base_folder, whole / "hf"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(whole / "hf")("What is 2 + 2?")["input_ids"]])
    with torch.no_grad():
        plain, student = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, whole / "adapter")(ids).logits
    assert (plain - student).abs().max() > 1e-3
    torch.testing.assert_close(adapted, student, rtol=0, atol=1e-4)


def test_trd_convert_makes_what_the_export_stage_made(whole: Path, tmp_path: Path) -> None:
    """Through the command line and from a checkpoint of the run."""
    step = str(max((whole / "train/checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_"))))
    convert = [sys.executable, "-m", "trd_megatron.cli", "convert"]
    subprocess.run([*convert, "export-peft", "--megatron-path", step, "--output-path", tmp_path / "adapter"], check=True)
    base = ["--base-path", "builtin:tiny-qwen3", "--adapter-path"]
    subprocess.run([*convert, "merge-lora", *base, step, "--output-path", tmp_path / "merged"], check=True)
    assert (tmp_path / "adapter/adapter_config.json").read_text() == (whole / "adapter/adapter_config.json").read_text()
    for made, theirs in (("adapter/adapter_model.safetensors",) * 2, ("merged/model.safetensors", "hf/model.safetensors")):
        ours, exported = load_file(tmp_path / made), load_file(whole / theirs)
        assert ours.keys() == exported.keys() and all(torch.equal(ours[name], exported[name]) for name in ours)


def test_the_same_command_again_skips_everything(copy: Path) -> None:
    before = finished(copy)
    result = trd(copy, *SMALL_SHARDS)
    assert finished(copy) == before
    assert result.stderr.count("done before, skipped") == len(FOLDERS)


def test_a_changed_setting_runs_what_depends_on_it_and_nothing_else(copy: Path) -> None:
    before = finished(copy)
    ids = content(copy)
    trd(copy, *SMALL_SHARDS, "learner.learning_rate=2e-3")
    after = finished(copy)
    assert {folder for folder in FOLDERS if after[folder] != before[folder]} == {"train", "adapter", "hf", "eval/student", "report"}
    assert content(copy)["metrics"] != ids["metrics"]
    report = (copy / "report.html").read_text()
    trd(copy, *SMALL_SHARDS)  # the old setting: nothing but the report is made again, all else comes back from stale/
    again = finished(copy)
    assert {folder for folder in FOLDERS if again[folder] != before[folder]} <= {"report"}
    assert content(copy) == ids
    assert (copy / "report.html").read_text() != report
    assert json.loads((copy / "eval/summary.json").read_text())["student"] == manifest(copy, "eval/student")["counts"]


def test_grading_again_leaves_the_run_finished(copy: Path) -> None:
    """Labels that are put into the files by hand are corrected, everywhere where they are used."""
    before, forged = finished(copy), copy / "eval/student/test.parquet"
    table = pq.read_table(forged)
    for name, value in (("passed", True), ("verdict", "pass")):
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(position), pa.array([value] * len(table)))
    pq.write_table(table, forged)
    grade = [sys.executable, "-m", "trd_megatron.cli", "grade", str(copy), "verify.timeout_s=60"]
    result = subprocess.run(grade, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "evaluate/student test" in result.stdout
    assert "64 samples graded, 8 verdicts changed" in result.stderr
    assert "training is not repeated" in result.stderr
    assert json.loads((copy / "eval/summary.json").read_text())["student"]["test"]["passed"] == 0
    report = json.loads((copy / "report.json").read_text())
    assert report["benchmarks"][0]["method"]["avg_at_k"] == 0
    assert report["settings"]["verify.timeout_s"] == 60
    result = trd(copy, *SMALL_SHARDS)
    assert result.stderr.count("done before, skipped") == len(FOLDERS)
    assert {folder for folder in FOLDERS if finished(copy)[folder] != before[folder]} <= {"report"}


def test_the_layout_is_no_reason_to_run_again(copy: Path) -> None:
    before = finished(copy)
    trd(copy, *SMALL_SHARDS, "learner.tensor_model_parallel_size=2", "learner.sequence_parallel=true", "learner.kl_chunk_tokens=5")
    assert finished(copy) == before


def test_a_baseline_needs_no_refinement_and_is_compared(whole: Path, copy: Path, tmp_path: Path) -> None:
    before = finished(copy)
    result = trd(copy, *SMALL_SHARDS, "method=reverse_kl_topk", "learner.tensor_model_parallel_size=2")
    assert "refine" not in result.stderr
    after = finished(copy)
    assert {folder for folder in FOLDERS if after[folder] != before[folder]} == {"train", "adapter", "hf", "eval/student", "report"}

    arguments = ["report", "--compare", whole, copy, "--output", tmp_path / "both"]
    subprocess.run([sys.executable, "-m", "trd_megatron.cli", *map(str, arguments)], check=True, timeout=240)
    [section] = json.loads((tmp_path / "both/report.json").read_text())["sections"]
    assert section["methods"] == {"reverse_kl_topk": [0], "trd": [0]}
    [table] = section["benchmarks"]
    for name, run_dir in (("trd", whole), ("reverse_kl_topk", copy)):
        summary = json.loads((run_dir / "eval/summary.json").read_text())
        for key in ("avg_at_k", "pass_at_k", "pass_at_k_interval"):
            assert table["methods"][name][key] == summary["student"]["test"][key]
            assert table["methods"][name]["delta"][key] == summary["comparison"]["test"]["delta"][key]
            assert table["base"][key] == summary["base"]["test"][key]
        costs = json.loads((run_dir / "report.json").read_text())["costs"]
        assert section["costs"]["methods"][name]["total"] == costs["total"]["seconds"]
    assert set(section["trajectories"]["trd"]) > {"rollouts", "refined"}
    assert (tmp_path / "both/report.html").exists() and "| trd |" in (tmp_path / "both/report.md").read_text()


def test_opd_with_another_teacher(tmp_path: Path) -> None:
    trd(tmp_path / "run", "mode=opd", "teacher.path=builtin:tiny-qwen3-teacher", "--until", "train")
    summary = json.loads((tmp_path / "run/train/summary.json").read_text())
    assert summary["kl_fixed_batch_after"] < summary["kl_fixed_batch_before"]
    assert shards(tmp_path / "run/refined")[0]["model"] == "builtin:tiny-qwen3-teacher"


def test_best_and_intermediate_checkpoints_can_be_exported(copy: Path) -> None:
    trd(copy, *SMALL_SHARDS, "export.checkpoint=2")
    assert manifest(copy, "hf")["counts"]["step"] == 2
    second = load_file(copy / "hf/model.safetensors")
    trd(copy, *SMALL_SHARDS, "export.checkpoint=best", "--until", "export")
    state = json.loads((copy / "train/checkpoints/step_5/state.json").read_text())
    best = min(("2", "4", "5"), key=lambda step: state["held_out_kl"][step])
    assert manifest(copy, "hf")["counts"]["step"] == int(best)
    assert any(not torch.equal(second[name], tensor) for name, tensor in load_file(copy / "hf/model.safetensors").items())


def _begun(run_dir: Path, folder: str) -> bool:
    return (run_dir / folder / "manifest.json").exists()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "problems": lambda run: _begun(run, "problems"),
    "rollouts": lambda run: (run / "rollouts/part-00003.parquet").exists(),
    "refined": lambda run: (run / "refined/part-00003.parquet").exists(),
    "train, starting": lambda run: (run / "train/learner.log").exists(),
    "train": lambda run: (run / "train/checkpoints/step_2").exists(),
    "adapter": lambda run: _begun(run, "adapter"),
    "hf": lambda run: _begun(run, "hf"),
    "eval/base": lambda run: (run / "eval/base/.test.parts/part-00001.parquet").exists(),
    "eval/student": lambda run: (run / "eval/student/.test.parts/part-00001.parquet").exists(),
    "report": lambda run: _begun(run, "report"),
}


def _hear_ctrl_c() -> None:
    """A shell that runs the tests in the background ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_at(run_dir: Path, reached: Callable[[Path], bool], sent: signal.Signals, *overrides: str) -> int:
    """Starts the run and kills it at the given moment. Returns its exit code."""
    process = subprocess.Popen(
        command(run_dir, *SMALL_SHARDS, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_hear_ctrl_c
    )
    try:
        deadline = time.monotonic() + 120
        while not reached(run_dir):
            assert process.poll() is None, "the run ended before the moment came"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        code = process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        return code
    finally:
        process.kill()


def _left_over(run_dir: Path) -> Iterator[str]:
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(run_dir) in line and process.pid != os.getpid():
            yield line


def test_kill_9_in_every_stage_changes_nothing_in_the_end(whole: Path, tmp_path: Path) -> None:
    """One run, killed once in each stage, started again each time."""
    run_dir = tmp_path / "killed"
    caught = set()
    for folder, reached in MOMENTS.items():
        assert kill_at(run_dir, reached, signal.SIGKILL) == -signal.SIGKILL
        if manifest(run_dir, folder.split(",")[0])["status"] == "running":
            caught.add(folder)
        time.sleep(0.2)  # a process that was being started when its parent died
        assert not list(_left_over(run_dir))
    assert caught >= {
        "rollouts",
        "refined",
        "train, starting",
        "train",
        "eval/base",
        "eval/student",
    }  # the others may be over within a millisecond
    trd(run_dir, *SMALL_SHARDS)
    finished(run_dir)
    assert content(run_dir) == content(whole)
    ours, theirs = load_file(run_dir / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_only_takes_its_inputs_from_this_runs_settings(copy: Path) -> None:
    """Train with A, everything with B, then --only export with A: A's weights, brought back from stale/."""
    first = load_file(copy / "hf/model.safetensors")
    trd(copy, *SMALL_SHARDS, "learner.learning_rate=2e-3", "--until", "export")
    second = load_file(copy / "hf/model.safetensors")
    shutil.rmtree(next((copy / "stale").glob("export-hf-*")))
    trd(copy, *SMALL_SHARDS, "--only", "export")
    again = load_file(copy / "hf/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(second[name], again[name]) for name in first)


def test_modules_beside_the_user_do_not_reach_the_learner(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    line = [*command(copy, *SMALL_SHARDS, "learner.learning_rate=3e-3", "--until", "train")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    line.insert(1, "-P")
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]


def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "interrupted"
    assert kill_at(run_dir, MOMENTS["train"], signal.SIGINT) == 130
    assert not list(_left_over(run_dir))


def test_a_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    """conf/, templates and the smoke problems travel with the package."""
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*cache"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", source], check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = "import trd_megatron, trd_megatron.cli as c; print(trd_megatron.__file__); c.main()"
    result = subprocess.run(
        [sys.executable, "-c", script, "run", "experiment=smoke"],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert str(tmp_path / "site") in result.stdout
    assert (elsewhere / "runs/smoke/report.html").exists()
