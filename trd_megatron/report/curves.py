"""The diagnostics of the paper's figure 3 as curves over training, of one method or of several side by side."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trd_megatron.report import plots

Metrics = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
DIAGNOSTICS = ("kl_passed", "kl_failed", "perplexity_gap", "epistemic_mass")
FIRST_SHARE = 0.1  # of the steps: what `start` averages over


def seed_mean(runs: Sequence[Metrics]) -> list[dict[str, Any]]:
    """One line per step that all runs have: each diagnostic's mean over those that have a value there, None if none has."""
    found: list[dict[str, Any]] = []
    for lines in zip(*runs, strict=False):
        values = {name: [line[name] for line in lines if line.get(name) is not None] for name in DIAGNOSTICS}
        found.append({"step": lines[0]["step"]} | {name: mean(of) if of else None for name, of in values.items()})
    return found


def start(metrics: Metrics) -> dict[str, float | None]:
    """Each diagnostic's mean over the first tenth of the steps, before much is learned."""
    first = metrics[: max(round(FIRST_SHARE * len(metrics)), 1)]
    values = {name: [line[name] for line in first if line.get(name) is not None] for name in DIAGNOSTICS}
    return {name: mean(of) if of else None for name, of in values.items()}


def diagnostics(methods: Mapping[str, Metrics]) -> dict[str, str]:
    """Name -> SVG. methods: what each is called -> its metrics."""
    return {
        "kl_by_outcome": _kl(methods),
        "perplexity_gap": _one(methods, "perplexity_gap", "Perplexity gap", "student − teacher"),
        "epistemic_mass": _one(methods, "epistemic_mass", "Epistemic mass", "per mille", 1000.0),
    }


def _draw(axes: Axes, methods: Mapping[str, Metrics], name: str, scale: float = 1.0) -> None:
    for (label, metrics), look in zip(methods.items(), plots.looks(len(methods)), strict=True):
        points = [(line["step"], scale * line[name]) for line in metrics if line.get(name) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **look)
    plots.step_axis(axes)


def _kl(methods: Mapping[str, Metrics]) -> str:
    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, sharex=True)
        for axes, outcome in ((above, "passed"), (below, "failed")):
            _draw(axes, methods, f"kl_{outcome}")
            axes.set_ylabel(f"{outcome}, nats")
            axes.set_ylim(bottom=0)
        above.set_xlabel("")
        plots.legend(above)

    return plots.to_svg("KL per token where the rollout passed, and where it failed", draw, 1.5 * plots.HEIGHT)


def _one(methods: Mapping[str, Metrics], name: str, title: str, unit: str, scale: float = 1.0) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=plots.INK, linewidth=0.7)
        _draw(axes, methods, name, scale)
        axes.set_ylabel(unit)
        plots.legend(axes)

    return plots.to_svg(title, draw)
