"""Manifests, stage folders, atomic writes, shards."""

import json
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest

from trd_megatron import run_dir
from trd_megatron.errors import UserError
from trd_megatron.run_dir import (
    Manifest,
    RunDir,
    StageFolder,
    atomic_write,
    packed_ids,
    read_groups,
    read_parquet,
    read_shards,
    shard_path,
    write_parquet,
)

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int32())])


def stage(run: RunDir, name: str = "rollout", inputs: dict[str, str] | None = None, **settings: object) -> StageFolder:
    return StageFolder(run, name, run.path / name, dict(settings), inputs or {})


def make(run: RunDir, content: str, **settings: object) -> StageFolder:
    folder = stage(run, **settings)
    manifest = folder.open()
    (folder.folder / "file").write_text(content)
    folder.close(manifest, {"n": 1}, 2.0)
    return folder


def test_a_stage_is_skipped_only_with_the_same_settings_and_inputs(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    assert stage(run, a=1).state() == "missing"
    make(run, "one", a=1)
    assert stage(run, a=1).state() == "done"
    assert stage(run, a=2).state() == "stale"
    assert stage(run, inputs={"prepare": "0"}, a=1).state() == "stale"


def test_settings_in_another_order_are_the_same_settings(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    assert stage(run, a=1, b=2).fingerprint == stage(run, b=2, a=1).fingerprint


def test_what_was_made_otherwise_is_parked_and_comes_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    one = make(run, "one", a=1)
    two = stage(run, a=2)
    assert two.open().status == "running"
    assert not (two.folder / "file").exists()
    assert stage(run, a=1).state() == "done"  # parked, but not lost
    again = stage(run, a=1)
    assert again.open().status == "done"
    assert (again.folder / "file").read_text() == "one"
    assert Manifest.read(again.folder) == Manifest.read(one.folder)
    assert stage(run, a=2).state() == "running"  # the unfinished one is parked in turn


def test_an_unfinished_stage_goes_on_with_its_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    first = stage(run, a=1)
    first.open()
    (first.folder / "part").write_text("kept")
    second = stage(run, a=1)
    assert second.state() == "running"
    assert second.open().status == "running"
    assert (second.folder / "part").read_text() == "kept"


def test_seconds_add_up_over_attempts(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    folder = stage(run, a=1)
    folder.pause(folder.open(), 3.0)
    manifest = folder.open()
    folder.close(manifest, {}, 2.0)
    read = Manifest.read(folder.folder)
    assert read is not None
    assert (read.seconds, read.status) == (5.0, "done")


def test_a_folder_without_a_manifest_is_not_overwritten(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    (tmp_path / "run/rollout").mkdir(parents=True)
    (tmp_path / "run/rollout/mine").write_text("precious")
    with pytest.raises(UserError, match=r"holds files but no manifest\.json"):
        stage(run, a=1).open()
    assert (tmp_path / "run/rollout/mine").read_text() == "precious"


def test_what_a_kill_leaves_while_writing_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run/rollout").mkdir(parents=True)
    (tmp_path / "run/rollout/.manifest.json.77.tmp").write_text("half")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.config.yaml.77.tmp").write_text("half")
    RunDir(tmp_path / "other", "x")
    RunDir(tmp_path / "other", "x").write_config({"name": "x"})
    (tmp_path / "run/config.yaml").write_text("name: x")
    run = RunDir(tmp_path / "run", "x")
    assert stage(run, a=1).open().status == "running"
    with run.lock():
        assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_stage_that_is_not_kept_is_made_anew(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    make(run, "one", a=1)
    other = StageFolder(run, "rollout", run.path / "rollout", {"a": 2}, {}, kept=False)
    assert other.open().status == "running"
    assert not (other.folder / "file").exists()
    assert not run.stale.exists()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": "ro')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Manifest.read(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunDir(tmp_path / "file", "x")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunDir(tmp_path, "x")
    run = RunDir(tmp_path / "run", "x")
    run.write_config({"name": "x"})
    RunDir(tmp_path / "run", "x")
    with pytest.raises(UserError, match="experiment 'x', not 'y'"):
        RunDir(tmp_path / "run", "y")


def test_two_processes_cannot_work_in_one_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    with run.lock(), pytest.raises(UserError, match="another process works in"), run.lock():
        pass
    with run.lock():  # free again
        pass
    RunDir(tmp_path / "run", "x")  # the lock file alone makes no foreign folder


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    target.write_text("old")

    def write() -> None:
        with atomic_write(target) as file:
            file.write("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_shards_round_trip_in_order(tmp_path: Path) -> None:
    for index in (1, 0):
        write_parquet(shard_path(tmp_path, index), [{"id": f"{index}", "n": None}], SCHEMA)
    assert [row["id"] for row in read_shards(tmp_path, SCHEMA)] == ["0", "1"]


@pytest.mark.parametrize("count", [0, 1, 3, 6, 7])
def test_rows_are_written_and_read_a_group_at_a_time(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "ROW_GROUP", 3)
    rows = [{"id": str(number), "n": number or None} for number in range(count)]
    assert write_parquet(tmp_path / "a.parquet", iter(rows), SCHEMA) == count
    assert read_parquet(tmp_path / "a.parquet", SCHEMA) == rows
    groups = [table.to_pylist() for table in read_groups(tmp_path / "a.parquet", SCHEMA)]
    assert [len(group) for group in groups] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    assert list(chain.from_iterable(groups)) == rows


def test_what_goes_wrong_while_rows_are_made_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "ROW_GROUP", 1)
    rows = ({"id": name, "n": None} for name in ("a", "b", None))
    with pytest.raises(ValueError, match="column id must not be null"):
        write_parquet(tmp_path / "a.parquet", rows, SCHEMA)
    assert not list(tmp_path.iterdir())


def test_packed_ids_are_those_of_their_rows() -> None:
    lists = [[1, 2, 3], [], [151_935], [4] * 5]
    column = pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))[1:], pa.array(lists[:1], pa.list_(pa.int32()))])
    packed = packed_ids(column)
    assert [list(ids) for ids in packed] == [*lists[1:], lists[0]]
    assert {ids.itemsize for ids in packed} == {4}


def test_rows_that_break_the_schema_are_not_written(tmp_path: Path) -> None:
    for row in ({"n": 1}, {"id": None, "n": 1}, {"id": "a", "n": "x"}):
        with pytest.raises((ValueError, pa.ArrowInvalid, pa.ArrowTypeError)):
            write_parquet(tmp_path / "part.parquet", [row], SCHEMA)
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    write_parquet(path, [{"id": "a", "n": 1}] * 100, SCHEMA)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"part-00000\.parquet cannot be read"):
        read_parquet(path, SCHEMA)


def test_a_shard_of_another_schema_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "a", "n": 1}], SCHEMA)
    with pytest.raises(UserError, match="has columns"):
        read_parquet(tmp_path / "a.parquet", pa.schema([pa.field("other", pa.string())]))


def test_the_manifest_is_json_for_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", "x")
    make(run, "one", a=1)
    values = json.loads((tmp_path / "run/rollout/manifest.json").read_text())
    assert {"stage", "status", "fingerprint", "settings", "inputs", "counts", "versions", "seconds"} <= set(values)
    assert values["versions"]["trd_megatron"]
