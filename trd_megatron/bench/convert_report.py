"""What `trd bench convert` found: a row per conversion, and their table."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table


@dataclass
class Row:
    """One conversion. nbytes: of the weights. Lists: one entry per run, in order.

    seconds: of the conversion, all files synced. start_seconds: before it, of Python and imports. memory_bytes: the process's highest
    moment; import_bytes: the highest before the conversion. cp_seconds: until cp ends; cp_synced_seconds: until its files are synced.
    """

    conversion: str
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    import_bytes: int = 0
    cp_seconds: list[float] = field(default_factory=list)
    cp_synced_seconds: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Speed of the conversion over that of cp with sync."""
        return statistics.median(self.cp_synced_seconds) / statistics.median(self.seconds)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"speed_over_cp": self.ratio, "memory_peak": max(self.memory_bytes)}


def table(rows: Sequence[Row], title: str) -> Table:
    """A line per conversion; seconds as median (least-most), speed against cp with sync."""
    grid = Table("conversion", title=title)
    for column in ("s", "cp + sync, s", "cp alone, s", "MB/s", "of cp's speed", "start, s", "peak GB", "after imports"):
        grid.add_column(column, justify="right")
    for row in rows:
        cells = [
            _spread(row.seconds),
            _spread(row.cp_synced_seconds),
            _spread(row.cp_seconds),
            f"{row.nbytes / 1e6 / statistics.median(row.seconds):,.0f}",
            f"{row.ratio:.2f}",
            f"{statistics.median(row.start_seconds):.1f}",
            f"{max(row.memory_bytes) / 1e9:.2f}",
            f"{row.import_bytes / 1e9:.2f}",
        ]
        grid.add_row(row.conversion, *cells)
    return grid


def _spread(seconds: Sequence[float]) -> str:
    digits = 1 if min(seconds) >= 1 else 2
    return f"{statistics.median(seconds):.{digits}f} ({min(seconds):.{digits}f}-{max(seconds):.{digits}f})"
