"""TACO's rows in the official columns, from parquet files made here."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_megatron.config import load
from trd_megatron.data import taco
from trd_megatron.errors import UserError
from trd_megatron.stages import prepare
from trd_megatron.verify import code_tests

STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}


def row(
    question: str = "Add.", tests: Any = STDIN, solutions: Any = ("a, b = map(int, input().split())\nprint(a + b)",), **more: Any
) -> dict:
    text = tests if isinstance(tests, str) else json.dumps(tests)
    columns = {"question": question, "solutions": json.dumps(list(solutions)), "starter_code": "", "input_output": text}
    return columns | {"difficulty": "EASY", "source": "codeforces", "url": None} | more


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def one(folder: Path, **columns: Any) -> dict[str, Any]:
    [problem] = taco.load([write(folder / "train-00000-of-00001.parquet", [row(**columns)])])[0]
    code_tests.parse(problem["tests"])  # a form that the verifier takes
    return problem


def test_a_program_that_reads_standard_input(tmp_path: Path) -> None:
    problem = one(tmp_path)
    assert (problem["problem_id"], problem["task"], problem["problem"], problem["starter_code"]) == (
        "taco-train-00000-0",
        "code",
        "Add.",
        None,
    )
    assert json.loads(problem["tests"]) == STDIN
    assert problem["reference_solution"].startswith("a, b = map")
    as_lines = {"inputs": [["1", "2"]], "outputs": [["3"]]}
    assert json.loads(one(tmp_path, tests=as_lines)["tests"]) == {"inputs": ["1\n2"], "outputs": ["3"]}


def test_a_function_with_starter_code(tmp_path: Path) -> None:
    tests = {"inputs": [[[1, 2], 10**30]], "outputs": [[10**30]], "fn_name": "solve"}
    problem = one(tmp_path, tests=tests, starter_code="class Solution:\n    def solve(self, a, b):\n        \n")
    assert problem["starter_code"] == "class Solution:\n    def solve(self, a, b):\n        "
    big = {"$int": hex(10**30)}  # beyond 64 bits: in plain form
    assert json.loads(problem["tests"]) == {"inputs": [[[1, 2], big]], "outputs": [[big]], "fn_name": "solve"}


def test_the_first_solution_that_python_3_parses_is_the_reference(tmp_path: Path) -> None:
    old, null, good, shorter = "print 'x'", "a = '\0'", "if 1:\n\tprint(1)", "1"
    assert one(tmp_path, solutions=[old, null, good, shorter])["reference_solution"] == good
    assert one(tmp_path, solutions=[old])["reference_solution"] is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": "  "}, "no question"),
        ({"tests": ""}, "no usable tests"),
        ({"tests": {"inputs": [], "outputs": []}}, "no usable tests"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "no usable tests"),
        ({"tests": {"inputs": [1], "outputs": ["1"]}}, "no usable tests"),
        ({"tests": {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}}, "no usable tests"),
        ({"tests": [1]}, "no usable tests"),
        ({"tests": '{"inputs": ['}, "unreadable tests"),
        ({"tests": '{"inputs": [[' + "9" * 5000 + ']], "outputs": [1], "fn_name": "f"}'}, "unreadable tests"),
        ({"tests": "[" * 100_000}, "unreadable tests"),
    ],
)
def test_rows_without_usable_tests_are_dropped_and_counted(columns: dict[str, Any], reason: str, tmp_path: Path) -> None:
    problems, dropped = taco.load([write(tmp_path / "x.parquet", [row(), row(**columns)])])
    assert len(problems) == 1
    assert dropped == {reason: 1}


def test_a_folder_is_prepared_and_a_damaged_file_named(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / "ALL" / f"train-0000{part}-of-00002.parquet", [row(f"Problem {part} {n}") for n in range(4)])
    write(tmp_path / "ALL" / "train-00002.parquet", [row("No solution", solutions=[]), row("No tests", tests="")])
    options = ["experiment=smoke", "task=code", "data=taco", f"data.path={tmp_path / 'ALL'}", "data.exclude_benchmarks=[]"]
    problems, figures = prepare.collect(load([*options, "data.test_problems=2"]))
    assert len({problem["problem_id"] for problem in problems}) == len(problems) == 8
    assert figures["dropped"] == {"no usable tests": 1, "no reference_solution": 1}  # which opsd shows the teacher

    wrong = tmp_path / "wrong.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "?"}]), wrong)
    with pytest.raises(UserError, match=r"wrong\.parquet has no column 'solutions'; TACO's are: question"):
        taco.load([wrong])
    wrong.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"wrong\.parquet cannot be read"):
        taco.load([wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without \.parquet files"):
        prepare.collect(load([*options, f"data.path={tmp_path / 'empty'}"]))
