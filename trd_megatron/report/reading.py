"""What the report reads of a run: rows of trajectories and texts. A damaged or missing output is one clear line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trd_megatron.errors import UserError

GRADED = ("problem_id", "sample_index", "finish_reason", "passed", "verdict")
Row = Mapping[str, Any]  # as report.tables takes it


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: move {path.parent} away and run again") from None


def shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("part-*.parquet"))
    if not shards:
        raise UserError(f"{folder} holds no part-*.parquet: move it away and run again")
    return shards


def read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns)).select(list(columns))
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}): move {path.parent} away and run again") from None


def graded(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Trajectories as report.tables takes them. Ids and texts, nearly all of the bytes, do not become Python objects."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = read(path, (*GRADED, "response_ids"))
        lengths = pc.list_value_length(table["response_ids"])
        rows += table.select(list(GRADED)).append_column("response_tokens", lengths).to_pylist()
    return rows


def lengths(rows: Sequence[Row]) -> list[int]:
    return [row["response_tokens"] for row in rows]


def of_problems(paths: Sequence[Path], columns: Sequence[str], problem_ids: set[str]) -> list[dict[str, Any]]:
    """The rows of these problems."""
    wanted = pa.array(sorted(problem_ids), pa.string())
    tables_read = (read(path, columns) for path in paths)
    return [row for table in tables_read for row in table.filter(pc.is_in(table["problem_id"], wanted)).to_pylist()]
