"""What `trd bench engine` found: a row per side and concurrency, their table and their figure."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from trd_megatron.run_dir import atomic_write

RATIOS = (("sglang", "plain"), ("sglang", "local"), ("local", "plain"))


@dataclass
class Row:
    """One side at one concurrency. tokens: drawn in each of the rounds whose seconds these are."""

    side: str
    concurrency: int
    responses: int
    tokens: int
    status: Literal["measured", "failed"] = "measured"
    error: str | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Response tokens per second, median of the rounds."""
        return self.tokens / statistics.median(self.seconds) if self.status == "measured" and self.seconds else None

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.rate}


def _by_place(rows: Sequence[Row]) -> tuple[list[str], dict[int, dict[str, Row]]]:
    """The sides, and concurrency -> side -> row, both in the rows' order."""
    places: dict[int, dict[str, Row]] = {}
    for row in rows:
        places.setdefault(row.concurrency, {})[row.side] = row
    return list(dict.fromkeys(row.side for row in rows)), places


def table(rows: Sequence[Row], title: str) -> Table:
    """A line per concurrency: tokens per second of each side, as median (least-most), and how many times faster one is than another."""
    sides, places = _by_place(rows)
    ratios = [pair for pair in RATIOS if all(side in sides for side in pair)]
    grid = Table(title=title, caption="; ".join(failures(rows)) or None)
    speeds = [f"{side}, tok/s" for side in sides]
    for column in ("at once", "responses", *speeds, *(f"{one} ÷ {other}" for one, other in ratios)):
        grid.add_column(column, justify="right", no_wrap=column in speeds)
    for concurrency, found in places.items():
        cells = [_speed(found[side]) for side in sides]
        cells += [_ratio(found[one].rate, found[other].rate) for one, other in ratios]
        grid.add_row(str(concurrency), str(next(iter(found.values())).responses), *cells)
    return grid


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each side that was not measured."""
    return list(dict.fromkeys(f"{row.side} was not measured: {row.error}" for row in rows if row.status == "failed"))


def _speed(row: Row) -> str:
    if row.rate is None:
        return "–"
    return f"{row.rate:,.0f} ({row.tokens / max(row.seconds):,.0f}-{row.tokens / min(row.seconds):,.0f})"


def _ratio(one: float | None, other: float | None) -> str:
    return "–" if one is None or other is None else f"{one / other:.2f}"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG: tokens per second against the responses drawn at once, one line per side that was measured."""
    sides, places = _by_place(rows)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        panel = figure.subplots()
        for number, side in enumerate(sides):
            line = [row for row in rows if row.side == side and row.rate is not None]
            if line:
                points = [row.concurrency for row in line], [row.rate for row in line]
                panel.plot(*points, label=side, color=f"C{number}", marker="osD"[number % 3])  # type: ignore[arg-type]
        panel.set(xscale="log", xlabel="responses at once", ylabel="response tokens per second")
        panel.set_xticks(list(places), [str(concurrency) for concurrency in places])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", linewidth=0.4)
        figure.suptitle(title, fontsize=9)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
