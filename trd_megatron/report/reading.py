"""What the report reads of a run: rows of trajectories and texts. A damaged or missing output is one clear line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trd_megatron.errors import UserError

NGRAM = 4
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
        ids = table["response_ids"].combine_chunks()
        found = table.select(list(GRADED)).append_column("response_tokens", pc.list_value_length(ids))
        repeated = pa.array([repetition(one.values.to_numpy()) for one in ids], pa.float64())
        rows += found.append_column("repetition", repeated).to_pylist()
    return rows


def repetition(ids: NDArray[np.integer]) -> float | None:
    """Share of a response's 4-grams that stood in it before (seq-rep-4 of Welleck et al., 2020, section 5.2), between 0 and 1; None
    where it has none. ids: [tokens]."""
    if len(ids) < NGRAM:
        return None
    known, ranks = np.unique(ids, return_inverse=True)
    if len(known) <= 1 << 16:  # a 4-gram fits into 64 bits
        windows = np.lib.stride_tricks.sliding_window_view(ranks.astype(np.uint64), NGRAM)
        different = len(np.unique(windows @ (np.uint64(1) << (np.arange(NGRAM, dtype=np.uint64) * np.uint64(16)))))
    else:
        windows = np.lib.stride_tricks.sliding_window_view(ranks, NGRAM)
        different = len(np.unique(windows, axis=0))
    return 1 - different / len(windows)


def lengths(rows: Sequence[Row]) -> list[int]:
    return [row["response_tokens"] for row in rows]


def of_problems(paths: Sequence[Path], columns: Sequence[str], problem_ids: set[str]) -> list[dict[str, Any]]:
    """The rows of these problems."""
    wanted = pa.array(sorted(problem_ids), pa.string())
    tables_read = (read(path, columns) for path in paths)
    return [row for table in tables_read for row in table.filter(pc.is_in(table["problem_id"], wanted)).to_pylist()]
