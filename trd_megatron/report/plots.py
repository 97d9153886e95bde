"""The report's figures as inline SVG. Colours are CSS variables of the page, so that one figure serves light, dark and print.

The same figures always give the same bytes: a fixed hash salt, no date, and none of the user's matplotlib settings.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#010203", "#020304"  # stand-ins, see COLOURS
FIRST, SECOND, THIRD, FOURTH, FIFTH = "#030405", "#040506", "#050607", "#060708", "#070809"
COLOURS = {INK: "var(--ink)", GRID: "var(--rule)", FIRST: "var(--first)", SECOND: "var(--second)", THIRD: "var(--third)"}
COLOURS |= {FOURTH: "var(--fourth)", FIFTH: "var(--fifth)"}
SETTINGS = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}
MARKED = 40  # up to this many points, each gets a marker: a single step shows as well
BINS = 36
WIDTH, HEIGHT = 5.6, 2.9  # inches


@contextmanager
def _style(salt: str) -> Iterator[None]:
    with matplotlib.style.context(["default", SETTINGS | {"svg.hashsalt": salt}]):
        yield


def as_svg(name: str, draw: Callable[[Figure], None], height: float = HEIGHT) -> str:
    """The figure as an <svg> element for an HTML page: no prolog, no metadata, no ids but those it refers to."""
    buffer = io.StringIO()
    with _style(name):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{name}"', svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, **more: Any) -> None:
    axes.plot(x, y, color=colour, marker="o" if len(x) <= MARKED else None, **more)


def step_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)


def kl(metrics: Sequence[Mapping[str, Any]]) -> str:
    """KL and loss of every step's batch; one line where they are the same (nothing was clipped)."""
    steps = [line["step"] for line in metrics]
    values, losses = [line["kl"] for line in metrics], [line["loss"] for line in metrics]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, steps, values, FIRST, label="KL (= loss)" if values == losses else "KL")
        if values != losses:
            _line(axes, steps, losses, SECOND, label="loss (clipped)", linestyle="--")
        axes.set_ylabel("nats per token")
        _legend(axes)
        step_axis(axes)

    return as_svg("KL and loss per step", draw)


def loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Cross entropy of every step's batch."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, [line["step"] for line in metrics], [line["loss"] for line in metrics], FIRST)
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0)
        step_axis(axes)

    return as_svg("Loss per step", draw)


def held_out(before: float, metrics: Sequence[Mapping[str, Any]], name: str = "held_out_kl") -> str:
    """KL (held_out_nll: cross entropy) of the fixed held-out batch, step 0 being before training."""
    points = [(0, before)] + [(line["step"], line[name]) for line in metrics if name in line]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, [step for step, _ in points], [value for _, value in points], FIRST)
        for (step, value), side in ((points[0], "left"), (points[-1], "right")):
            axes.annotate(f"{value:.4g}", (step, value), xytext=(0, 7), textcoords="offset points", ha=side)
        axes.set_ylabel("nats per token")
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        step_axis(axes)

    return as_svg("The fixed held-out batch", draw)


def gradient_norm(metrics: Sequence[Mapping[str, Any]], clip_grad: float) -> str:
    """Global gradient norm of every step before clipping, and where it is clipped if the norms come near."""
    norms = [line["grad_norm"] for line in metrics]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, [line["step"] for line in metrics], norms, FIRST)
        if max(norms) > clip_grad / 2:
            axes.axhline(clip_grad, color=SECOND, linestyle="--", linewidth=1)
            where = axes.get_yaxis_transform()  # x: share of the axes' width, y: data
            axes.text(1, clip_grad, "clipped above", transform=where, ha="right", va="bottom", color=SECOND)
        axes.set_ylabel("gradient norm")
        axes.set_ylim(bottom=0)
        step_axis(axes)

    return as_svg("Gradient norm", draw)


def learning_rate(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Learning rate of every step."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _line(axes, [line["step"] for line in metrics], [line["lr"] for line in metrics], THIRD)
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        step_axis(axes)

    return as_svg("Learning rate", draw)


def lengths(initial: Sequence[int], refined: Sequence[int] | None) -> str:
    """Histogram of response lengths in tokens, of y_o and, where there is one, of y_r."""
    both = [*initial, *(refined or ())]
    low, high = min(both), max(both)
    span = (low - 0.5, high + 0.5)
    bins = min(BINS, high - low + 1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.hist(initial, bins=bins, range=span, histtype="stepfilled", color=FIRST, alpha=0.45, label="y_o, rollout")
        if refined is not None:
            axes.hist(refined, bins=bins, range=span, histtype="step", color=SECOND, linewidth=1.6, label="y_r, refined")
        axes.set_xlabel("response tokens")
        axes.set_ylabel("samples")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(axes)

    return as_svg("Response lengths", draw)


def pass_curve(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Pass@k over k with its intervals. models: what each is called -> its figures (evaluate.figures.of_model)."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, of), (colour, linestyle) in zip(models.items(), ((FIRST, "-"), (SECOND, "--")), strict=False):
            ks = list(range(1, of["k"] + 1))
            _line(axes, ks, of["pass_curve"], colour, label=name, linestyle=linestyle)
            low, high = zip(*(bounds or (math.nan, math.nan) for bounds in of["pass_curve_intervals"]), strict=True)
            axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
        axes.set_xlabel("k")
        axes.set_ylabel("Pass@k, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(axes)

    return as_svg("Pass@k", draw)


def success_lengths(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Histograms of response lengths of correct and of incorrect samples, one below the other. models: what each is called -> its rows."""
    tokens = [row["response_tokens"] for rows in models.values() for row in rows]
    low, high = min(tokens), max(tokens)
    span, bins = (low - 0.5, high + 0.5), min(BINS, high - low + 1)

    def draw(figure: Figure) -> None:
        for axes, (name, rows) in zip(figure.subplots(len(models), squeeze=False, sharex=True)[:, 0], models.items(), strict=True):
            wrong = [row["response_tokens"] for row in rows if row["passed"] is not True]
            right = [row["response_tokens"] for row in rows if row["passed"] is True]
            axes.hist(wrong, bins=bins, range=span, histtype="stepfilled", color=SECOND, alpha=0.45, label="incorrect")
            axes.hist(right, bins=bins, range=span, histtype="step", color=FIRST, linewidth=1.6, label="correct")
            axes.set_ylabel(f"samples, {name}")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            _legend(axes)
        axes.set_xlabel("response tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return as_svg("Lengths of correct and incorrect samples", draw, HEIGHT * (1 if len(models) == 1 else 1.6))


def joint_outcomes(counts: Mapping[str, int]) -> str:
    """Bars of y_o → y_r outcomes with counts and shares. counts: as in tables.trajectories."""
    total = sum(counts.values())
    colours = {"fail → pass": THIRD, "pass → fail": SECOND}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(counts)
        bars = axes.barh(names, list(counts.values()), color=[colours.get(name, FIRST) for name in names], height=0.62)
        axes.bar_label(bars, [f"{n:,}  ({100 * n / total:.1f} %)" for n in counts.values()], padding=5)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.margins(x=0.28)

    return as_svg("Joint outcomes of y_o and y_r", draw, HEIGHT * 0.8)
