"""A row of each mathematical benchmark, in its official columns, as a problem."""

import json
import re
from typing import Any

from trd_megatron.errors import UserError

Row = dict[str, Any]

# AMOBench's answers in variables are checked at these values, those of its own grader (question_id -> values).
AMO_CHECK_VALUES = {
    5: [f"n={n}" for n in range(1, 21)],
    37: [f"a={n},b={n + 1},c={n + 2}" for n in range(2, 19)],
}


def plain(row: Row) -> Row:
    """Columns problem and answer, and solution where there is one."""
    return {"problem": row["problem"], "answer": _number(row["answer"]), "reference_solution": row.get("solution")}


def aime24(row: Row) -> Row | None:
    """As `plain`; AI-MO/aimo-validation-aime has the years 2022 to 2024, told apart by url."""
    return plain(row) if "url" not in row or "2024" in str(row["url"]) else None


def aime25(row: Row) -> Row:
    """Columns question and answer. Every AIME answer is an integer; one is written with a degree sign behind it."""
    return {"problem": row["question"], "answer": re.sub(r"\^\{?\\circ\}?$", "", _number(row["answer"]))}


def gsm8k(row: Row) -> Row:
    """Columns question and answer, the worked solution with the result after ####. Raises UserError where there is no such mark."""
    solution, mark, result = str(row["answer"]).rpartition("####")
    if not mark:
        raise UserError(
            f"the answer {str(row['answer'])[:40]!r} has no ####, which stands before GSM8K's results: is this another data set?"
        )
    return {"problem": row["question"], "answer": result.strip().replace(",", ""), "reference_solution": solution.strip()}


def amobench(row: Row) -> Row | None:
    """Columns prompt, answer, answer_type. Answers of type description need a judge, they are left out."""
    if row["answer_type"] == "description":
        return None
    values = AMO_CHECK_VALUES.get(row["question_id"]) if row["answer_type"] == "variable" else None
    return {
        "problem": row["prompt"],
        "answer": row["answer"],
        "answer_type": row["answer_type"],
        "check_values": None if values is None else json.dumps(values),
        "reference_solution": row.get("solution"),
    }


def _number(answer: Any) -> str:
    """An answer as text; JSON and parquet writers make 27.0 of an integer."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
