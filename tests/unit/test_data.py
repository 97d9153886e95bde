"""Problems from files, and what is wrong with them in one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_megatron.config import load
from trd_megatron.data import deepscaler, parquet
from trd_megatron.errors import UserError
from trd_megatron.evaluate import avg_at_k, pass_at_k
from trd_megatron.stages import prepare

ROWS = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(10)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def problems(path: Path, *overrides: str) -> list[dict[str, Any]]:
    return prepare.load(load(["experiment=smoke", f"data.path={path}", "data.test_problems=2", *overrides]))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_the_same_problems_from_every_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        jsonl(path, ROWS)
    rows = problems(path)
    assert {row["answer"] for row in rows} == {str(n + 1) for n in range(10)}
    assert sorted(row["split"] for row in rows) == ["test"] * 2 + ["train"] * 8
    assert rows[0]["problem_id"].startswith("mine-")
    assert rows[0]["source"] == path.name
    assert rows == problems(path)


def test_limits_and_seeds(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    few = problems(path, "data.train_problems=3")
    assert [row["split"] for row in few] == ["train"] * 3 + ["test"] * 2
    held_out = [{row["problem_id"] for row in problems(path, f"seed={seed}") if row["split"] == "test"} for seed in range(4)]
    assert len({frozenset(ids) for ids in held_out}) > 1


def test_the_files_own_split_is_kept(tmp_path: Path) -> None:
    rows = [row | {"split": "test" if n in (3, 4) else "train"} for n, row in enumerate(ROWS)]
    found = problems(jsonl(tmp_path / "mine.jsonl", rows))
    assert {row["answer"] for row in found if row["split"] == "test"} == {"4", "5"}
    with pytest.raises(UserError, match=r"split 'dev': must be train or test"):
        problems(jsonl(tmp_path / "mine.jsonl", [*rows, ROWS[0] | {"split": "dev"}]))


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([], r"holds no problems"),
        ([{"question": "?", "answer": 1}], r"no column 'problem'; it has: answer, question"),
        ([{"problem": "?"}], r"no column 'answer'"),
        ([ROWS[0], {"problem": "How many?", "answer": None}], r"row 1 has no answer \('How many\?'\)"),
        ([ROWS[0], {"problem": "How many?", "answer": "  "}], r"row 1 has no answer"),
        ([{"problem": " ", "answer": 1}], r"row 0 has no problem text"),
        ([ROWS[0] | {"problem_id": "a"}, ROWS[1] | {"problem_id": "a"}], r"problem_id 'a' occurs twice"),
        (ROWS[:2], r"0 training and 2 test problems are left"),
        ([1, 2], r"every entry must be an object"),
    ],
)
def test_wrong_files_are_named(rows: list[Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        problems(jsonl(tmp_path / "mine.jsonl", rows))
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        problems(tmp_path / "gone.jsonl")
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"mine\.parquet cannot be read"):
        problems(path)
    (tmp_path / "mine.jsonl").write_text('{"problem": "?", "ans')
    with pytest.raises(UserError, match=r"mine\.jsonl cannot be read"):
        problems(tmp_path / "mine.jsonl")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"must end in \.parquet, \.jsonl or \.json"):
        problems(tmp_path / "mine.txt")


def test_deepscaler_from_a_local_copy(tmp_path: Path) -> None:
    path = tmp_path / "deepscaler.json"
    path.write_text(json.dumps([{"problem": "a?", "answer": "1", "solution": "so 1"}, {"problem": "b?", "answer": 2, "solution": "2"}]))
    first, second = deepscaler.load(path)
    assert (first["answer"], first["reference_solution"]) == ("1", "so 1")
    assert (second["answer"], second["reference_solution"]) == ("2", None)
    path.write_text(json.dumps([{"problem": "a?", "answer": None}]))
    with pytest.raises(UserError, match="row 0 has no answer"):
        deepscaler.load(path)


def test_the_built_in_file_is_there() -> None:
    assert len(parquet.load(parquet.locate("builtin:smoke"))) == 28


def test_metrics() -> None:
    assert avg_at_k([[True, False], [True, True]]) == 0.75
    assert pass_at_k(16, 0, 16) == 0
    assert pass_at_k(16, 1, 16) == 1
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(n, c, k)
    for outcomes in ([], [[True], []]):
        with pytest.raises(ValueError, match="avg_at_k"):
            avg_at_k(outcomes)
