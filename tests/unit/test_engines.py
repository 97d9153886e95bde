"""Which servers run when: roles and the learner share GPUs in time, or servers keep their own."""

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_nodes import free_port
from trd_megatron import nodes, pipeline, preflight
from trd_megatron.config import load
from trd_megatron.engine import engines as engines_module
from trd_megatron.engine import server, sglang
from trd_megatron.engine.base import Weights
from trd_megatron.engine.engines import Engines, Role
from trd_megatron.errors import UserError

OPD = ("experiment=smoke", "engine=sglang_cpu", "mode=opd", "teacher.path=builtin:tiny-qwen3-teacher")
FIRST, SECOND = Weights(Path("/m/0"), 0, "a" * 64), Weights(Path("/m/1"), 1, "b" * 64)


class Servers:
    """Notes what is asked of LaunchedServers."""

    events: list[str]

    def __init__(self, role: str, weights: Weights, *_: object, **__: object) -> None:
        self.role, self.weights = role, weights
        self.urls = [f"http://{role}"]

    def start(self) -> None:
        self.events.append(f"start {self.role} {self.weights.version}")

    def use(self, weights: Weights) -> None:
        self.events.append(f"use {self.role} {weights.version}")

    def stop(self) -> None:
        self.events.append(f"stop {self.role}")

    def check(self) -> None:
        pass


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def client(urls: list[str], weights: Weights, *_: object, may_update: bool, api_key: str | None, **__: object) -> object:
        found.append(f"attach {' '.join(urls)} {weights.version} {'updates' if may_update else 'fixed'} {api_key}")
        return object()

    monkeypatch.setattr(Servers, "events", found, raising=False)
    monkeypatch.setattr(server, "LaunchedServers", Servers)
    monkeypatch.setattr(sglang, "SGLangEngine", client)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    return found


def opened(engines: Engines, events: list[str], role: Role, weights: Weights, folder: Path) -> list[str]:
    events.clear()
    engines.open(role, weights, folder / "journal")
    return list(events)


def test_roles_and_learner_share_gpus_in_time(events: list[str], tmp_path: Path) -> None:
    with Engines(load([*OPD, "engine.keep_servers=false"]), tmp_path, print) as engines:
        student = ["start student 0", "use student 0", "attach http://student 0 updates None"]
        assert opened(engines, events, "student", FIRST, tmp_path) == student
        assert opened(engines, events, "student", FIRST, tmp_path) == student[1:]  # they run
        teacher = ["start teacher 0", "use teacher 0", "attach http://teacher 0 fixed None"]
        assert opened(engines, events, "teacher", FIRST, tmp_path) == ["stop student", *teacher]
        events.clear()
        engines.release()
        assert events == ["stop teacher"]
        assert opened(engines, events, "student", SECOND, tmp_path)[0] == "start student 1"
        events.clear()
    assert events == ["stop student"]


def test_what_went_wrong_is_not_hidden_behind_another_node_that_is_still_starting(
    events: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other node hears nothing but that we are gone."""
    monkeypatch.setenv("SGLANG_API_KEY", "k")
    place = nodes.Place(0, 2, "127.0.0.1", free_port())
    let_go = threading.Event()

    def follow() -> None:
        with contextlib.suppress(nodes.NodeFailedError):
            nodes.follow(replace(place, rank=1), {"serve": lambda *_: let_go.wait(30)}, lambda: None)

    threading.Thread(target=follow, daemon=True).start()
    monkeypatch.setattr(nodes, "leader", nodes.Leader(place))
    monkeypatch.setattr(nodes, "members", 2)
    monkeypatch.setattr(engines_module, "STOP_S", 1.0)

    def fail(servers: Servers) -> None:
        raise UserError("this SGLang does not know a flag")

    monkeypatch.setattr(Servers, "start", fail)
    config = load([*OPD, "engine.student.data_parallel_size=2"])
    with pytest.raises(UserError, match="does not know a flag"), Engines(config, tmp_path, print) as engines:
        engines.open("student", FIRST, tmp_path / "journal")
    assert events == ["stop student"]
    let_go.set()


def test_kept_servers_stay_and_get_new_weights(events: list[str], tmp_path: Path) -> None:
    with Engines(load([*OPD]), tmp_path, print) as engines:
        opened(engines, events, "student", FIRST, tmp_path)
        assert opened(engines, events, "teacher", FIRST, tmp_path)[0] == "start teacher 0"
        events.clear()
        engines.release()
        assert not events
        assert opened(engines, events, "student", SECOND, tmp_path) == ["use student 1", "attach http://student 1 updates None"]
        events.clear()
    assert events == ["stop student", "stop teacher"]


def test_attached_servers_are_never_stopped(events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "k")
    config = load(["experiment=smoke", "engine.kind=sglang", "engine.student.urls=['http://a:1','http://b:2']"])
    with Engines(config, tmp_path, print) as engines:
        assert opened(engines, events, "student", FIRST, tmp_path) == ["attach http://a:1 http://b:2 0 updates k"]
        events.clear()
        engines.release()
    assert not events


def test_training_alone_makes_servers_give_gpus_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    def stage(name: str) -> Any:
        def run(config: object, run_dir: object, folder: Path, engines: object = None) -> dict[str, Any]:
            order.append(f"{name}{' with engines' if engines else ''}")
            return {}

        return run

    from dataclasses import replace

    from trd_megatron.run_dir import RunDir

    monkeypatch.setattr(pipeline, "STAGES", tuple(replace(each, run=stage(each.name)) for each in pipeline.STAGES))
    monkeypatch.setattr(Engines, "release", lambda self: order.append("release"))
    monkeypatch.setattr(pipeline.evaluate, "write_summary", lambda *_: None)
    pipeline.run(load(["experiment=smoke", f"run_dir={tmp_path / 'run'}"]), RunDir(tmp_path / "run", "smoke"))
    assert order == [
        "prepare", "rollout with engines", "refine with engines", "release", "train", "export/adapter", "export/hf",
        "evaluate/base with engines", "evaluate/student with engines", "report",
    ]  # fmt: skip


def test_context_without_room_for_a_prompt_is_found_before_any_work() -> None:
    preflight.check_inputs(load([*OPD]))
    with pytest.raises(UserError, match=r"^refine\.max_response_tokens=24 leaves no room.*teacher servers' context of 26.*engine\.teacher"):
        preflight.check_inputs(load([*OPD, "engine.teacher.context_length=26"]))
    with pytest.raises(UserError, match=r"^rollout\.max_response_tokens=24 .*engine\.student\.context_length"):
        preflight.check_inputs(load([*OPD, "engine.student.context_length=20"]))
