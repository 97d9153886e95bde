"""What `trd bench learner` found: a row per side and model, and their tables."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from trd_megatron.bench.learner_profile import Profile, is_attention, is_product

MIB = 2**20
NAMES = {"ours": "ours", "peer": "transformers + PEFT"}
OPERATORS = 8  # of those that are neither a product nor attention, in the table of the profile


@dataclass
class Row:
    """One side with one model. tokens: of the student's sequences in one step, without padding. Lists: one entry per step, in order.

    memory_bytes: peak of the steps over what was there before the model was loaded; loaded_bytes: what was held
    before the first step (transformers maps the weights' file, whose pages come with the first step).
    seconds: without the first step, which warms up.
    """

    side: str
    model: str
    tokens: int
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loaded_bytes: int | None = None
    memory_bytes: int | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.median if self.median else None

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_median": self.median, "tokens_per_second": self.tokens_per_second}


def ratios(rows: Sequence[Row]) -> dict[str, float] | None:
    """ours / peer of one model: speed (tokens/s) and memory; None if a side was not measured."""
    by_side = {row.side: row for row in rows}
    ours, peer = by_side["ours"], by_side["peer"]
    if not (ours.tokens_per_second and peer.tokens_per_second and ours.memory_bytes and peer.memory_bytes):
        return None
    return {"speed": ours.tokens_per_second / peer.tokens_per_second, "memory": ours.memory_bytes / peer.memory_bytes}


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows of one model, and ours / peer."""
    grid = Table("side", title=f"{rows[0].model}: {title}")
    for column in ("tokens/s", "s/step", "peak MiB", "after loading", "loss", "gradient norm"):
        grid.add_column(column, justify="right")
    if any(row.error for row in rows):
        grid.add_column("")
    for row in rows:
        cells = [
            _number(row.tokens_per_second, ",.1f"),
            _number(row.median, ".2f"),
            _number(row.memory_bytes and row.memory_bytes / MIB, ",.0f"),
            _number(row.loaded_bytes and row.loaded_bytes / MIB, ",.0f"),
            _number(row.losses[0] if row.losses else None, ".6g"),
            _number(row.grad_norms[0] if row.grad_norms else None, ".6g"),
        ]
        grid.add_row(NAMES[row.side], *cells, *([Text(f"failed: {row.error}", style="yellow")] if row.error else []))
    if found := ratios(rows):
        grid.add_section()
        grid.add_row("ours / theirs", f"{found['speed']:.2f}", "", f"{found['memory']:.2f}")
    return grid


def profile_table(model: str, found: Profile) -> Table:
    """One step's time by part, then by kind of operator."""
    grid = Table("our step", title=f"{model}: one step under the profiler, {found.seconds:.2f} s")
    grid.add_column("seconds", justify="right")
    grid.add_column("share", justify="right")

    def add(name: str, seconds: float, style: str | None = None) -> None:
        grid.add_row(name, f"{seconds:.3f}", f"{100 * seconds / found.seconds:.1f} %", style=style)

    for name, seconds in found.parts.items():
        add("backward, with the recomputed forward" if name == "backward" else name, seconds)
    add("rest", found.seconds - sum(found.parts.values()))
    grid.add_section()
    add("matrix products", found.products)
    add("attention", found.attention)
    add("both", found.products + found.attention, "bold")
    others = [(name, seconds) for name, seconds in found.operators.items() if not (is_product(name) or is_attention(name))]
    for name, seconds in others[:OPERATORS]:
        add(name, seconds, "dim")
    return grid


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
