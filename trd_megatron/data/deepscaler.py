"""DeepScaleR-Preview (about 40k competition problems; columns problem, answer, solution), from the hub or a local copy."""

from pathlib import Path
from typing import Any

from trd_megatron.data.parquet import read_rows
from trd_megatron.errors import UserError

REPOSITORY, FILE = "agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json"


def load(path: Path | None) -> list[dict[str, Any]]:
    """All problems. A solution that is empty or only repeats the answer counts as no reference solution.

    Raises UserError if the file cannot be had or read.
    """
    rows = read_rows(path if path is not None else _download())
    problems = []
    for number, row in enumerate(rows):
        for name in ("problem", "answer"):
            if not str(row.get(name) or "").strip():
                raise UserError(f"{path or REPOSITORY}: row {number} has no {name}")
        answer, solution = str(row["answer"]).strip(), str(row.get("solution") or "").strip()
        problems.append(
            {
                "problem_id": f"deepscaler-{number}",
                "problem": row["problem"],
                "answer": answer,
                "reference_solution": None if solution in ("", answer) else solution,
                "source": "deepscaler",
            }
        )
    return problems


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; all mean that the file cannot be had
        raise UserError(f"cannot download {REPOSITORY} ({type(error).__name__}): set data.path to a local copy of {FILE}") from error
