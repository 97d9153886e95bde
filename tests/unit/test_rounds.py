"""Rounds: views of a run directory, fingerprints, which stages run when. The stages themselves do nothing here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trd_megatron import pipeline
from trd_megatron.config import Config, load
from trd_megatron.engine.base import EngineFailedError, Generation, Request, Weights
from trd_megatron.errors import UserError
from trd_megatron.records import PROBLEM, TRAJECTORY
from trd_megatron.run_dir import IN_ROUND, RunDir, read_shards
from trd_megatron.stages import generate

ROUND = ("rollout", "refine", "train", "export/adapter", "export/hf", "evaluate/base", "evaluate/student")
FIRST = tuple(f"0/{name}" for name in ROUND)
SECOND = tuple(f"1/{name}" for name in ROUND if name != "evaluate/base")


def smoke(path: Path, *overrides: str) -> tuple[Config, RunDir]:
    return load(["experiment=smoke", f"run_dir={path}", *overrides]), RunDir(path, "smoke")


def fingerprints(config: Config, run_dir: RunDir) -> dict[str, str]:
    return {work.name: work.folder.fingerprint for work in pipeline.works(config, run_dir)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs smoke in tmp_path/run with stages that write one file; returns the names of those that were not skipped.
    fails: the name of one that ends with an error."""
    failing: set[str] = set()

    def stage_run(config: Config, run_dir: RunDir, folder: Path, engines: object = None) -> dict[str, Any]:
        (folder / "made").write_text(f"round {run_dir.round} from {config.model.path}")
        if folder.relative_to(run_dir.path).as_posix() in failing:
            raise RuntimeError("killed")
        return {}

    monkeypatch.setattr(pipeline, "STAGES", tuple(replace(stage, run=stage_run) for stage in pipeline.STAGES))

    def call(*overrides: str, fails: str | None = None, **named: Any) -> list[str]:
        ran: list[str] = []
        failing.clear()
        failing.update([fails] if fails else [])

        def on_stage(work: pipeline.Work, manifest: object, skipped: bool) -> None:
            if not skipped:
                ran.append(work.name)

        pipeline.run(*smoke(tmp_path / "run", *overrides), on_stage=on_stage, **named)
        return ran

    return call


def test_views(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path, "x")
    only, second = run_dir.in_round(0, 1), run_dir.in_round(1, 2)
    for name in IN_ROUND:
        assert run_dir.folder(name) == only.folder(name) == tmp_path / name
        assert second.folder(name) == tmp_path / "rounds/1" / name
    assert second.checkpoints == tmp_path / "rounds/1/train/checkpoints"
    assert (second.problems, second.report, second.stale) == (tmp_path / "problems", tmp_path / "report", tmp_path / "stale")
    assert (run_dir.round, only.round, second.round) == (0, 0, 1)


def test_one_round_has_the_fingerprints_of_the_first_of_two(tmp_path: Path) -> None:
    one, two = (fingerprints(*smoke(tmp_path / "run", f"rounds={rounds}")) for rounds in (1, 2))
    assert tuple(two) == ("prepare", *FIRST, *SECOND, "report")
    assert tuple(one) == ("prepare", *ROUND, "report")
    assert all(one[name] == two[f"0/{name}"] for name in ROUND)
    assert len({*two.values()}) == len(two)
    assert one["report"] != two["report"]


def test_samples_of_weights_made_again_are_refused(tmp_path: Path) -> None:
    first = Weights(tmp_path, 1, "a" * 64)
    generate.claim(tmp_path, first)
    generate.claim(tmp_path, first)
    with pytest.raises(UserError, match=rf"^{tmp_path} holds samples of weights 1-a+, not of 1-b+: move it away"):
        generate.claim(tmp_path, Weights(tmp_path, 1, "b" * 64))


def test_settings_of_other_engines_change_nothing(tmp_path: Path) -> None:
    opd = ["engine=sglang_cpu", "mode=opd", "teacher.path=builtin:tiny-qwen3-teacher"]
    before = fingerprints(*smoke(tmp_path / "run", *opd))

    def changed(*overrides: str) -> list[str]:
        after = fingerprints(*smoke(tmp_path / "run", *opd, *overrides))
        return [name for name in ROUND[:3] if after[name] != before[name]]

    assert changed("engine.teacher.extra_args=[--schedule-policy,lpm]") == ["refine", "train"]
    assert changed("engine.student.extra_args=[--schedule-policy,lpm]") == ["rollout", "refine", "train"]
    assert changed("engine.batch_size=7") == []
    assert changed("engine.dtype=bfloat16") == ["rollout", "refine", "train"]
    local = fingerprints(*smoke(tmp_path / "run"))
    assert fingerprints(*smoke(tmp_path / "run", "engine.student.extra_args=[--x]")) == local
    assert fingerprints(*smoke(tmp_path / "run", "engine.batch_size=7"))["rollout"] != local["rollout"]


def test_what_reads_the_student_depends_on_the_round_before(tmp_path: Path) -> None:
    before = fingerprints(*smoke(tmp_path / "run", "rounds=3"))
    after = fingerprints(*smoke(tmp_path / "run", "rounds=3", "learner.learning_rate=2e-3"))
    changed = {name for name in before if before[name] != after[name]}
    kept = {"prepare", "0/rollout", "0/refine", "0/evaluate/base"}
    assert changed == set(before) - kept


def test_opd_s_teacher_is_the_same_in_every_round(tmp_path: Path) -> None:
    opd = ("mode=opd", "teacher.path=builtin:tiny-qwen3-teacher")
    for overrides, same in (((), False), (opd, True)):
        works = {work.name: work for work in pipeline.works(*smoke(tmp_path / "run", "rounds=2", *overrides))}
        teachers = [works[name].folder.inputs["teacher.path"] for name in ("0/refine", "1/refine", "1/train")]
        assert (teachers[0] == teachers[1]) is same
        assert teachers[1] == teachers[2]
        assert works["1/train"].folder.inputs["model.path"] == works["0/export/hf"].folder.fingerprint


def test_each_round_starts_from_the_student_of_the_one_before(run: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run("rounds=2") == ["prepare", *FIRST, *SECOND, "report"]
    made = {folder: (tmp_path / "run" / folder / "made").read_text() for folder in ("rounds/0/train", "rounds/1/train", "report")}
    assert made["rounds/0/train"] == "round 0 from builtin:tiny-qwen3"
    assert made["rounds/1/train"] == f"round 1 from {tmp_path / 'run/rounds/0/hf'}"
    assert made["report"] == "round 1 from builtin:tiny-qwen3"
    assert run("rounds=2") == []
    assert run("rounds=2", "evaluate.samples=3") == ["0/evaluate/base", "0/evaluate/student", "1/evaluate/student", "report"]


def test_an_interrupted_round_goes_on(run: Callable[..., list[str]]) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run("rounds=2", fails="rounds/1/train")
    assert run("rounds=2") == [*SECOND[2:], "report"]


def test_more_rounds_keep_the_finished_one(run: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "run"
    run()
    assert (path / "hf/made").exists() and not (path / "rounds").exists()
    states = {work.name: work.folder.state() for work in pipeline.works(*smoke(path, "rounds=2"))}  # before anything was moved
    assert {name for name, state in states.items() if state == "done"} == {"prepare", *FIRST}
    assert run("rounds=2") == [*SECOND, "report"]
    assert not any((path / name).exists() for name in (*IN_ROUND, "stale"))
    # Fewer again: nothing is lost or made anew but the report.
    assert run("rounds=1") == ["report"]
    assert run("rounds=2") == ["report"]
    assert run("rounds=3") == [*(name.replace("1/", "2/") for name in SECOND), "report"]


def test_a_kill_while_folders_are_moved_leaves_nothing_behind(run: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "run"
    run()
    (path / "rounds/0").mkdir(parents=True)
    (path / "rollouts").rename(path / "rounds/0/rollouts")
    assert run("rounds=1") == []  # also where the user thinks better of it
    assert not any((path / name).exists() for name in IN_ROUND)
    (path / "hf").mkdir()
    with pytest.raises(UserError, match="are both there"):
        run("rounds=2")


def test_until_and_only(run: Callable[..., list[str]]) -> None:
    assert run("rounds=2", until="train") == ["prepare", *FIRST[:3]]
    with pytest.raises(UserError, match=r"stage 1/train reads 1/rollout, which is not done: run it first \(--until 1/rollout\)"):
        run("rounds=2", only="1/train")
    assert run("rounds=2", only="export") == ["0/export/adapter", "0/export/hf"]  # round 1 is not there yet
    assert run("rounds=2", only="rollout") == ["1/rollout"]
    assert run("rounds=2", until="1/train") == ["0/evaluate/base", "0/evaluate/student", "1/refine", "1/train"]
    with pytest.raises(UserError, match=r"stage 1/evaluate/student reads 1/export/hf, .*\(--until 1/export\)"):
        run("rounds=2", only="1/evaluate")
    assert run("rounds=2", until="report") == [*SECOND[3:], "report"]
    for name, message in (
        ("2/train", "with rounds=2, train is in round 0 to 1"),
        ("1/prepare", "prepare is in round 0"),
        ("1/trian", "no stage '1/trian': stages are prepare"),
    ):
        with pytest.raises(UserError, match=message):
            run("rounds=2", until=name)


def test_seeds_change_with_the_round() -> None:
    assert generate.seed_name("rollout", 0) == "rollout"
    names = {generate.seed_name(stage, number) for stage in ("rollout", "refine") for number in range(3)}
    assert len({generate.sample_seed(0, name, "p", 0) for name in names}) == 6


def test_a_sample_of_other_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine says, and what lies in a folder."""

    class Engine:
        name = "scripted"
        facts: dict[str, Any] = {}  # noqa: RUF012

        def generate(self, shards: list[list[Request]], *_: object) -> list[tuple[int, list[Generation]]]:
            return [(index, [Generation([65], [-1.0], "stop", 1) for _ in shard]) for index, shard in enumerate(shards)]

        def close(self) -> None:
            pass

    from trd_megatron.builtin_models import resolve_model
    from trd_megatron.chat import Chat
    from trd_megatron.engine.engines import Engines

    config, _ = smoke(tmp_path / "run")
    engines = Engines(config, tmp_path / "servers", print)
    monkeypatch.setattr(engines, "open", lambda role, weights, journal: Engine())
    model = resolve_model(config.model.path)
    problem = dict.fromkeys(PROBLEM.names) | {"problem_id": "p", "task": "math", "answer": "1"}
    tasks = [generate.Task(problem, 0, "?", [65])]
    sampling = config.rollout

    def draw(version: int) -> dict[str, Any]:
        weights = Weights(model, version, "f" * 64)
        author = generate.Author("student", weights, "m", Chat(model, "plain", {}))
        return generate.generate(config, "rollout", tmp_path, tasks, sampling, 8, TRAJECTORY, engines, author)

    with pytest.raises(EngineFailedError, match="drawn from weights 1, not 2"):
        draw(2)
    assert not list(tmp_path.glob("part-*"))
    draw(1)
    assert [row["weight_version"] for row in read_shards(tmp_path, TRAJECTORY)] == [1]
    with pytest.raises(UserError, match=r"part-00000\.parquet holds samples of weights 1, not of 0"):
        draw(0)
    with pytest.raises(UserError, match="holds samples of weights 1, not of 0"):
        generate.drawn(tmp_path, TRAJECTORY, 0, ["response"])
