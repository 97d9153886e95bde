"""Exit codes and one-line errors of the command line, and that wrong input loses nothing."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from trd_megatron import cli
from trd_megatron.builtin_models import resolve_model
from trd_megatron.learner import versions

ROWS = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(12)]


def trd(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    monkeypatch.setattr(sys, "argv", ["trd", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs smoke with changes, expects exit code 2, and returns the one line."""

    def run(*overrides: str) -> str:
        arguments = ("run", "experiment=smoke", f"run_dir={tmp_path / 'run'}", *overrides)
        code, _, err = trd(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), err
        assert err.rstrip().endswith(lines[0])  # nothing after it, no traceback
        assert "Traceback" not in err
        return lines[0]

    return run


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trd("--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert all(name in out for name in ("run", "plan", "status", "report", "doctor"))
    assert trd("--version", monkeypatch=monkeypatch, capsys=capsys)[:2] == (0, "0.1.0\n")
    code, out, _ = trd("run", "--keys", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "learner.learning_rate: float = 5e-06" in out
    assert trd("run", "--foo", monkeypatch=monkeypatch, capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--role", "teacher"), "--role teacher: in mode=opsd the student's servers refine too; there is only --role student"),
        (("--host", "0.0.0.0"), "--host 0.0.0.0 can be reached from other machines: set SGLANG_API_KEY in the environment"),
        (("engine.student.fp8=true",), "engine.student.fp8=true needs engine.device=cuda"),
        (("engine.python=/no/python",), "engine.python=/no/python cannot be run (No such file or directory): `make sglang-cpu`"),
    ],
)
def test_serve_refuses(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    command = ("serve", "experiment=smoke", f"run_dir={tmp_path / 'run'}", *arguments)
    code, _, err = trd(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {message}"), err
    assert not (tmp_path / "run").exists()


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trd("doctor", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "megatron-core" in out


def test_plan_of_a_new_run_and_status_of_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = trd("plan", "experiment=smoke", f"run_dir={tmp_path / 'r'}", "--show-sample", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert out.count("would run") == 9
    assert "58,816 parameters" in out
    assert "|W|h|a|t" in out
    assert not (tmp_path / "r").exists()  # a plan leaves nothing behind
    code, _, err = trd("status", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "is not a run directory" in err
    (tmp_path / "config.yaml").write_text("defaults: []")
    code, _, err = trd("status", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (2, f"error: {tmp_path / 'config.yaml'}: unknown key defaults: `trd run --keys` lists all keys\n")


def test_a_summary_says_how_much_could_not_be_graded() -> None:
    counts = {"samples": 4, "passed": 1, "mean_response_tokens": 9, "finish_reasons": {"stop": 4}, "skipped_over_budget": 0}
    rollout = counts | {"verdicts": {"pass": 1, "error": 3}}
    assert cli._result("rollout", rollout) == "4 samples, 25.0 % pass, 9 tokens each, 0 cut off, 3 whose grading failed"
    scores = {"k": 2, "avg_at_k": 25.0, "pass_at_k": 50.0, "verdicts": {"error": 3}, "skipped_over_budget": 2}
    left_out = "2 problems left out: over evaluate.max_prompt_tokens"
    assert cli._result("evaluate/base", {"x": scores}) == f"x: Avg@2 25.0, Pass@2 50.0, 3 samples whose grading failed, {left_out}"


def test_wrong_keys(refused) -> None:  # type: ignore[no-untyped-def]
    assert refused("learner.lr=1").startswith("error: unknown key learner.lr: did you mean")
    assert "method=forward_kl trains on y_o and has no stage refine" in refused("method=forward_kl", "--until", "refine")
    assert "no stage 'trian': stages are prepare, rollout" in refused("--until", "trian")
    assert "stage export/adapter reads train, which is not done" in refused("--only", "export")
    evaluates = ("job=evaluate", "evaluate.benchmarks=[builtin:smoke]", "--until", "train")
    assert "job=evaluate has no stage train" in refused(*evaluates)


def test_wrong_data(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "gone.jsonl does not exist" in refused(f"data.path={tmp_path}/gone.jsonl")
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:200])
    assert "p.parquet cannot be read" in refused(f"data.path={path}")
    for rows, message in (
        ([{"problem": "?"}], "has no column 'answer'"),
        ([], "holds no problems"),
        ([*ROWS, {"problem": "?", "answer": None}], "row 12 has no answer"),
    ):
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert message in refused(f"data.path={tmp_path}/p.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no problems" in refused(f"evaluate.benchmarks=[test,{tmp_path}/empty.jsonl]")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"problem": "?", "answer": "1", "answer_type": "proof"}))
    assert "row 0: answer_type 'proof' is not supported" in refused(f"evaluate.benchmarks=[{tmp_path}/odd.jsonl]")
    assert "gone.parquet does not exist" in refused("evaluate.benchmarks=[test,gone.parquet]")


def test_prompts_over_the_budget_are_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, refused  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    rows = [*ROWS, {"problem": "x" * 1200, "answer": "1"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows))
    run = tmp_path / "counted"
    arguments = (f"run_dir={run}", f"data.path={tmp_path}/p.jsonl", "data.test_problems=0", "evaluate.benchmarks=[]", "--until", "rollout")
    assert trd("run", "experiment=smoke", *arguments, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    counts = json.loads((run / "rollouts/manifest.json").read_text())["counts"]
    assert (counts["samples"], counts["skipped_over_budget"]) == (12, 1)
    assert "all 24 prompts are over rollout.max_prompt_tokens=3: raise it" in refused("rollout.max_prompt_tokens=3")


def test_wrong_models(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = Path(shutil.copytree(resolve_model("builtin:tiny-qwen3"), tmp_path / "model"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(f"model.path={folder}")
    assert "there is no model folder" in refused(f"model.path={tmp_path}/gone")
    odd = tiny.make("llama", tmp_path / "odd", hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    shutil.copy(resolve_model("builtin:tiny-qwen3") / "chat_template.jinja", odd)
    message = refused(f"model.path={odd}", "learner.tensor_model_parallel_size=2")
    assert "learner.tensor_model_parallel_size=2 does not divide" in message
    assert message.endswith("sizes that work: 1, 3")
    assert not (tmp_path / "run").exists()  # refused before anything was made
    experts = tiny.make("qwen3-moe", tmp_path / "experts")
    shutil.copy(resolve_model("builtin:tiny-qwen3") / "chat_template.jinja", experts)
    assert f"model.path={experts} has experts, which the learner does not train: choose a dense student" in refused(f"model.path={experts}")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "architecture 'gpt2' is not supported; supported: llama, qwen2, qwen3" in refused(f"model.path={odd}")


def test_a_teacher_with_another_vocabulary(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = Path(shutil.copytree(resolve_model("builtin:tiny-qwen3-teacher"), tmp_path / "model"))
    text = (folder / "tokenizer.json").read_text()
    assert "<|endoftext|>" in text
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|other|>"))
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config.replace("<|endoftext|>", "<|other|>"))
    message = refused("mode=opd", f"teacher.path={folder}")
    assert "has another vocabulary than model.path=builtin:tiny-qwen3 (2 tokens differ" in message


def test_a_folder_of_something_else(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("precious")
    assert "holds other files and no config.yaml" in refused()
    (run / "config.yaml").write_text("name: quickstart\n")
    assert "holds a run of experiment 'quickstart', not 'smoke'" in refused()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "thesis.txt"]


def test_a_gpu_that_is_not_there(refused) -> None:  # type: ignore[no-untyped-def]
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "learner.device=cuda with 1 ranks" in refused("learner.device=cuda")
    assert "engine.device=cuda, but this machine has no usable GPU" in refused("engine.device=cuda")
    assert "engine.device=cuda" in refused("engine.device=cuda", "--until", "rollout")
    # What comes after is for another machine: the first complaint is not about GPUs.
    assert "missing.jsonl" in refused("engine.device=cuda", "learner.device=cuda", "data.path=missing.jsonl", "--until", "prepare")


def test_an_untested_megatron_goes_on_only_when_asked(
    refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.99.0" if name == "megatron-core" else real(name))
    monkeypatch.setenv(versions.ALLOW, "")  # restored afterwards: --allow-untested sets it for child processes
    message = refused("--until", "train")
    assert "megatron-core 0.99.0 was not tested with this learner (tested: 0.16.1)" in message
    assert message.endswith("pip install megatron-core==0.16.1, or go on with --allow-untested")
    assert not (tmp_path / "run").exists()  # nothing was done
    arguments = ("run", "experiment=smoke", f"run_dir={tmp_path / 'run'}", "--until", "prepare")
    assert trd(*arguments, "--allow-untested", monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    allowed = json.loads((tmp_path / "run/problems/manifest.json").read_text())
    assert allowed["versions"]["megatron-core"] == "0.99.0"
    versions.check("0.99.0")  # as the ranks do, who inherit the variable
    monkeypatch.setenv(versions.ALLOW, "")
    assert trd(*arguments, monkeypatch=monkeypatch, capsys=capsys)[0] == 0  # nothing is trained: no Megatron is needed
    monkeypatch.setattr(metadata, "version", real)
    assert trd(*arguments, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    kept = json.loads((tmp_path / "run/problems/manifest.json").read_text())
    assert (kept["fingerprint"], kept["finished"]) == (allowed["fingerprint"], allowed["finished"])  # skipped: the flag is no setting
    assert "allow_untested" not in (tmp_path / "run/config.yaml").read_text()
