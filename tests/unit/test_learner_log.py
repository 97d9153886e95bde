"""Where metrics go, and that a resumed run neither loses nor doubles a step in any of the sinks."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trd_megatron.config import Config, LoggingConfig, load
from trd_megatron.errors import UserError
from trd_megatron.learner.log import Log
from trd_megatron.preflight import check_training


def config(project: str | None = None, mode: str = "offline") -> Config:
    return replace(load(["experiment=smoke"]), logging=LoggingConfig(project, mode))


def write(folder: Path, settings: Config, done: int, steps: range) -> None:
    """What a start does that goes on from `done`. The loss tells the starts apart."""
    with Log(folder, done, settings, active=True) as log:
        for step in steps:
            log.write({"step": step, "loss": done + step / 10, "mfu": None})


def test_steps_after_the_checkpoint_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, config(), 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    write(tmp_path, config(), 2, range(3, 5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["mfu"]) for line in lines] == [(1, 0.1, None), (2, 0.2, None), (3, 2.3, None), (4, 2.4, None)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, round(e.value, 4)) for e in board.Scalars("train/loss")] == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]
    assert not (tmp_path / "wandb.json").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Log(tmp_path, 0, config("p"), active=False) as log:
        log.write({"step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


class FakeWandb(SimpleNamespace):
    """Online a run is known by its id and refuses to go back. Offline every start is a folder that knows nothing of the others."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(Settings=lambda **settings: settings)
        self.started: list[dict[str, Any]] = []
        self.history: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.exit_codes: list[int] = []

    def init(self, **arguments: Any) -> Any:
        if arguments["project"] == "forbidden":
            raise self.Error("permission\ndenied")
        self.started.append(arguments)
        place = arguments["id"]
        if arguments["mode"] == "offline":
            place = f"wandb/offline-run-{len(self.started)}-{place}"
            (Path(arguments["dir"]) / place).mkdir(parents=True)
        history = self.history.setdefault(place, [])
        start = history[-1][0] + 1 if history else 0

        def log(values: dict[str, float], step: int, commit: bool) -> None:
            assert commit
            history.append((step, values))

        return SimpleNamespace(step=start, log=log, finish=lambda exit_code: self.exit_codes.append(exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_goes_on_in_the_same_wandb_run(mode: str, wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    settings = config("my-project", mode)
    write(tmp_path, settings, 0, range(1, 7))
    if mode == "online":
        [history] = wandb.history.values()
        del history[2:]  # a kill before they were sent
    write(tmp_path, settings, 4, range(5, 7))
    write(tmp_path, settings, 4, range(5, 6))  # dies before it gets as far as the one before
    write(tmp_path, settings, 5, range(6, 9))
    assert [start["id"] for start in wandb.started] == [json.loads((tmp_path / "wandb.json").read_text())["id"]] * 4
    if mode == "online":
        [history] = wandb.history.values()
    else:
        [folder] = tmp_path.glob("wandb/*")
        history = wandb.history[str(folder.relative_to(tmp_path))]
    sixth = 4.6 if mode == "online" else 5.6  # sent is sent
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [values["train/loss"] for _, values in history] == pytest.approx([0.1, 0.2, 0.3, 0.4, 4.5, sixth, 5.7, 5.8])
    assert wandb.exit_codes == [0, 0, 0, 0]
    first = wandb.started[0]
    assert (first["project"], first["mode"], first["resume"], first["dir"]) == ("my-project", mode, "allow", str(tmp_path))
    assert first["config"]["learner"]["learning_rate"] == settings.learner.learning_rate
    assert "verysecret" not in str(wandb.started)
    assert not any(b"verysecret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_another_folder_is_another_run(wandb: FakeWandb, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name, config("p"), 0, range(1, 3))
    assert len(wandb.history) == 2


def test_a_failed_training_is_marked_and_a_refusal_is_one_line(wandb: FakeWandb, tmp_path: Path) -> None:
    log = Log(tmp_path, 0, config("p"), active=True)
    log.write({"step": 1, "loss": 1.0})
    log.__exit__(RuntimeError)
    assert wandb.exit_codes == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    with pytest.raises(UserError, match=r"^logging\.wandb_project: Weights & Biases refuses \(permission denied\)"):
        Log(tmp_path, 0, config("forbidden"), active=True)


def test_the_real_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for start in ("0, range(1, 4)", "2, range(3, 5)"):  # processes of their own, as in a run: W&B writes its last at the end of one
        code = f"from tests.unit.test_learner_log import *; write(Path({str(tmp_path)!r}), config('p'), {start})"
        subprocess.run([sys.executable, "-c", code], check=True)
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    [file] = tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb")
    assert history_of(file) == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]


def history_of(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of an offline run: LevelDB's log format (blocks of 32 KiB, records in parts) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, whole = path.read_bytes(), 7, [], b""  # 7: W&B's own header
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block that holds no header
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, last part
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                found.append((values["_step"], values["train/loss"]))
    return found


def test_what_wandb_needs_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    present = {"wandb": "0.31.0"}

    def version(name: str) -> str:
        if name == "wandb" and not present:
            raise metadata.PackageNotFoundError(name)
        return present.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    check_training(config(mode="online"))  # not asked for
    check_training(config("p"))
    with pytest.raises(UserError, match=r"^logging\.wandb_project=p needs the environment variable WANDB_API_KEY.*wandb_mode=offline"):
        check_training(config("p", "online"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    check_training(config("p", "online"))
    present.clear()
    with pytest.raises(UserError, match=r"^logging\.wandb_project=p needs the package wandb: pip install 'trd_megatron\[wandb\]'"):
        check_training(config("p"))
