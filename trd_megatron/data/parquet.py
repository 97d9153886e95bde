"""The user's own problems: a .parquet or .jsonl file with the columns problem and answer (code: tests instead of answer)."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trd_megatron.errors import UserError
from trd_megatron.verify import check_points, code_tests

REQUIRED = ("problem", "answer")
OPTIONAL = ("problem_id", "answer_type", "check_values", "reference_solution", "starter_code", "tests", "source", "split")


BUILTIN = {"builtin:smoke": Path(__file__).with_name("smoke.jsonl")}  # 28 sums for experiment=smoke


def locate(path: str) -> Path:
    """The file that a data.path or a benchmark's path means. Raises UserError if there is none."""
    found = BUILTIN.get(path, Path(path))
    if not found.is_file():
        raise UserError(f"{path} does not exist: give a .parquet or .jsonl file")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .parquet, .jsonl(.gz) or .json (a list of objects) file. Raises UserError if it is damaged."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
                rows = [_object(number, line) for number, line in enumerate(file, 1) if line.strip()]
        else:
            raise UserError(f"{path}: must end in .parquet, .jsonl or .json")
    except (pa.ArrowInvalid, OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: every entry must be an object with the columns {', '.join(REQUIRED)}")
    return rows


def _object(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def load(path: Path) -> list[dict[str, Any]]:
    """Problems of a file. Raises UserError that names the missing column or the row that is wrong."""
    rows = read_rows(path)
    columns = {name for row in rows for name in row}
    for name in REQUIRED[:1] if "tests" in columns else REQUIRED:
        if rows and name not in columns:
            raise UserError(f"{path} has no column '{name}'; it has: {', '.join(sorted(columns))}")
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row.get("problem"), str) or not row["problem"].strip():
            raise UserError(f"{path}: row {number} has no problem text")
        answer = row.get("answer")
        if row.get("tests") is None and (answer is None or not str(answer).strip()):
            raise UserError(f"{path}: row {number} has no answer ({row['problem'][:40]!r})")
        if row.get("tests") is not None:
            try:
                row["tests"] = json.dumps(code_tests.parse(row["tests"]))
            except ValueError as error:
                raise UserError(f"{path}: row {number}: tests {error}") from None
        if isinstance(row.get("check_values"), list):
            row["check_values"] = json.dumps(row["check_values"])
        problem: dict[str, Any] = {name: None if row.get(name) is None else str(row[name]) for name in OPTIONAL}
        try:
            check_points(problem["answer_type"], problem["check_values"])
        except ValueError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
        problem |= {"problem": row["problem"], "answer": None if answer is None else str(answer)}
        problem["problem_id"] = problem["problem_id"] or f"{path.stem}-{number}"
        problem["source"] = problem["source"] or path.name
        if problem["problem_id"] in seen:
            raise UserError(f"{path}: problem_id '{problem['problem_id']}' occurs twice")
        seen.add(problem["problem_id"])
        problems.append(problem)
    return problems
