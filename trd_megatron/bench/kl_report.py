"""What `trd bench kl` found: a row per side and number of tokens, their table and their figure."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.table import Table
from rich.text import Text

from trd_megatron.run_dir import atomic_write

OURS, FLOOR = "linear_kl", "products"  # what the others are compared with
MIB = 2**20
COLOURS = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "black"]  # matplotlib's, but for the grey one
Status = Literal["measured", "failed", "not installed"]


@dataclass
class Row:
    """One side (of several ranks: one rank) at one number of tokens. memory_bytes: peak over what was there before the first call."""

    side: str
    tokens: int
    rank: int
    ranks: int
    threads: int
    status: Status = "measured"
    error: str | None = None
    loss: float | None = None
    seconds: list[float] = field(default_factory=list)  # of every call but the first
    memory_bytes: int | None = None

    @property
    def name(self) -> str:
        return self.side if self.ranks == 1 else f"{self.side}, rank {self.rank} of {self.ranks}"

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def json(self) -> dict[str, Any]:
        spread = {"seconds_min": min(self.seconds), "seconds_max": max(self.seconds)} if self.seconds else {}
        return {"name": self.name} | asdict(self) | {"seconds_median": self.median} | spread


def table(rows: Sequence[Row]) -> Table:
    """The rows of one number of tokens. "x slower" and "x memory" are against linear_kl."""
    nothing = Row("", 0, 0, 1, 0)
    by_name = {row.name: row for row in rows}
    floor, ours = by_name.get(FLOOR, nothing), by_name.get(OURS, nothing)
    grid = Table("side", title=f"{rows[0].tokens} tokens")
    for column in ("seconds", f"÷ {FLOOR}", "x slower than ours", "MiB", "x memory of ours", "loss"):
        grid.add_column(column, justify="right")
    if any(row.error for row in rows):
        grid.add_column("")
    for row in rows:
        cells = [
            _number(row.median, ".4g"),
            _ratio(row.median, floor.median),
            _ratio(row.median, ours.median),
            _number(None if row.memory_bytes is None else row.memory_bytes / MIB, ",.0f"),
            _ratio(row.memory_bytes, ours.memory_bytes),
            _number(row.loss, ".6g"),
        ]
        note = [Text(f"{'' if row.status == 'not installed' else 'failed: '}{row.error}", style="yellow")] if row.error else []
        grid.add_row(row.name, *cells, *note)
    return grid


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(value: float | None, other: float | None) -> str:
    return "–" if value is None or not other else f"{value / other:.2f}"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG: time and memory against the number of tokens, one line per side."""
    tokens = sorted({row.tokens for row in rows})
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "measured":
            lines.setdefault(row.name, []).append(row)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        time_panel, memory_panel = figure.subplots(1, 2)
        for number, (name, line) in enumerate(lines.items()):
            style = _style(name, number)
            counts = [row.tokens for row in line]
            time_panel.plot(counts, [row.median for row in line], **style)
            memory_panel.plot(counts, [(row.memory_bytes or 0) / MIB for row in line], **style)
        for panel, label in ((time_panel, "forward and backward, seconds"), (memory_panel, "peak extra memory, MiB")):
            panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            panel.set_xticks(tokens, [str(count) for count in tokens])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_minor_locator(NullLocator())
            panel.grid(axis="y", linewidth=0.4)
        figure.suptitle(title, fontsize=10)
        handles, labels = time_panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=130)


def _style(name: str, number: int) -> dict[str, Any]:
    """The floor grey and dotted, ours thick, the others dashed."""
    floor, ours = name.startswith(FLOOR), name.startswith(OURS)
    return {
        "label": name,
        "color": "grey" if floor else COLOURS[number % len(COLOURS)],
        "linestyle": ":" if floor else "-" if ours else "--",
        "linewidth": 2.5 if ours else 1.5,
        "marker": "osD^vPX*<>"[number % 10],
        "markersize": 5,
    }
