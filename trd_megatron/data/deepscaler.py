"""DeepScaleR-Preview (about 40k competition problems; columns problem, answer, solution), from the hub or a local copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_megatron.data.hub import HubFiles
from trd_megatron.data.parquet import read_rows
from trd_megatron.errors import UserError

FILES = HubFiles("agentica-org/DeepScaleR-Preview-Dataset", ("deepscaler.json",))


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """All problems, and that none was dropped. A solution that is empty or only repeats the answer counts as no reference solution.

    Raises UserError if a file cannot be read or a row has no problem or no answer.
    """
    problems: list[dict[str, Any]] = []
    for path in paths:
        for number, row in enumerate(read_rows(path)):
            for name in ("problem", "answer"):
                if not str(row.get(name) or "").strip():
                    raise UserError(f"{path}: row {number} has no {name}")
            answer, solution = str(row["answer"]).strip(), str(row.get("solution") or "").strip()
            problems.append(
                {
                    "problem_id": f"deepscaler-{len(problems)}",
                    "problem": str(row["problem"]),
                    "answer": answer,
                    "reference_solution": None if solution in ("", answer) else solution,
                    "source": "deepscaler",
                }
            )
    return problems, {}
