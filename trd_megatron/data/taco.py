"""TACO (https://arxiv.org/abs/2312.14852): about 25k competitive programming problems, ALL/train-*.parquet of BAAI/TACO, or local parquet.

Columns used: question, solutions (JSON list of programs), starter_code, input_output (JSON object: inputs, outputs, and fn_name where a
function is asked for).
"""

import ast
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trd_megatron.data.hub import HubFiles
from trd_megatron.errors import UserError
from trd_megatron.verify import plain_values

FILES = HubFiles("BAAI/TACO", ("ALL/train-*.parquet",))
COLUMNS = ["question", "solutions", "starter_code", "input_output"]
BATCH = 200  # rows in memory at once: a row's tests and solutions may be several MB


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Problems with usable tests, and how many were dropped for which reason. Raises UserError if a file cannot be read."""
    problems: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}
    for path in paths:
        part = path.stem.split("-of-")[0]  # train-00003: ids stay the same when parts are left out
        try:
            file = pq.ParquetFile(path)
            for name in COLUMNS:
                if name not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column '{name}'; TACO's are: {', '.join(COLUMNS)}, ...")
            number = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=COLUMNS):
                for row in batch.to_pylist():
                    problem = _problem(row)
                    if isinstance(problem, str):
                        dropped[problem] = dropped.get(problem, 0) + 1
                    else:
                        problems.append({"problem_id": f"taco-{part}-{number}"} | problem)
                    number += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return problems, dropped


def _problem(row: dict[str, Any]) -> dict[str, Any] | str:
    """The problem of a row, or the reason why it is none."""
    if not (row["question"] or "").strip():
        return "no question"
    try:
        tests = _tests(json.loads(row["input_output"] or "{}"))
    except (ValueError, RecursionError):  # no JSON, an integer of more digits than Python reads, or nested too deeply
        return "unreadable tests"
    if not tests:
        return "no usable tests"
    starter = (row["starter_code"] or "").strip("\n")
    return {
        "task": "code",
        "problem": row["question"].strip(),
        "starter_code": starter or None,
        "reference_solution": _solution(row["solutions"]),
        "tests": json.dumps(tests),
        "source": "taco",
    }


def _tests(found: Any) -> dict[str, Any] | None:
    """The tests in the form of records.PROBLEM, None where there are none that can be run."""
    if not isinstance(found, dict):
        return None
    inputs, outputs, fn_name = found.get("inputs"), found.get("outputs"), found.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list)) or not inputs or len(inputs) != len(outputs):
        return None
    if fn_name is None:
        texts = [[_text(value) for value in values] for values in (inputs, outputs)]
        return None if any(None in values for values in texts) else {"inputs": texts[0], "outputs": texts[1]}
    if not isinstance(fn_name, str) or not all(isinstance(arguments, list) for arguments in inputs):
        return None
    # Many problems wrap every result in a list of one, and nothing says which: the verifier takes [x] and x, as TACO's checker does.
    return {"inputs": [plain_values.encode(arguments) for arguments in inputs], "outputs": plain_values.encode(outputs), "fn_name": fn_name}


def _text(value: Any) -> str | None:
    """What a program reads or writes: a text, or a list of its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def _solution(solutions: str | None) -> str | None:
    """The first solution that Python 3 can parse (some are in Python 2), None if there is none."""
    try:
        programs = json.loads(solutions or "[]")
    except (ValueError, RecursionError):
        return None
    for program in programs if isinstance(programs, list) else []:
        if isinstance(program, str) and program.strip() and _parses(program):
            return program.strip("\n")
    return None


def _parses(program: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            ast.parse(program)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
