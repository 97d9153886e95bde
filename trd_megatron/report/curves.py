"""The diagnostics of training (the paper's figure 3) over its steps, one method or several in one figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trd_megatron.report.plots import FIFTH, FIRST, FOURTH, HEIGHT, INK, MARKED, SECOND, THIRD, as_svg, step_axis

Metrics = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl, a step each
LOOKS = ((FIRST, "-", "o"), (SECOND, "--", "s"), (THIRD, "-.", "^"), (FOURTH, ":", "D"), (FIFTH, (0, (6, 2, 1, 2, 1, 2)), "v"))
WINDOWS = 20  # of a long curve's running mean in all of its steps
MARKERS = 8  # on a running mean


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean of up to `width` (odd) neighbours, fewer at the ends; NaN counts as no value, and stays where there is none around."""
    there = ~np.isnan(values)
    sums = np.convolve(np.where(there, values, 0.0), np.ones(width))[width // 2 :][: len(values)]
    counts = np.convolve(there.astype(float), np.ones(width))[width // 2 :][: len(values)]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def _curve(axes: Axes, metrics: Metrics, key: str, scale: float, look: tuple[str, Any, str], label: str) -> None:
    """Up to MARKED steps as they are; more as a thin line, and their running mean. Steps without a value are gaps."""
    colour, linestyle, marker = look
    steps = [line["step"] for line in metrics]
    values = np.array([np.nan if line[key] is None else scale * line[key] for line in metrics], dtype=float)
    more: dict[str, Any] = {"color": colour, "linestyle": linestyle, "marker": marker, "label": label}
    if len(steps) <= MARKED:
        axes.plot(steps, values, **more)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    width = 2 * (len(steps) // WINDOWS // 2) + 1
    axes.plot(steps, running_mean(values, width), markevery=max(1, len(steps) // MARKERS), **more)


def _panels(name: str, methods: Mapping[str, Metrics], panels: Mapping[str, str], ylabel: str, scale: float = 1.0) -> str:
    """panels: key of the metrics -> title, side by side on one scale. Raises ValueError where there are more methods than LOOKS."""
    if len(methods) > len(LOOKS):
        raise ValueError(f"{len(methods)} methods in one figure, which tells {len(LOOKS)} apart")

    def draw(figure: Figure) -> None:
        row = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (key, title) in zip(row, panels.items(), strict=True):
            for (label, metrics), look in zip(methods.items(), LOOKS, strict=False):
                _curve(axes, metrics, key, scale, look, label)
            if all(line[key] is None for metrics in methods.values() for line in metrics):
                axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")
            axes.set_title(title, fontsize=10)
            step_axis(axes)
        row[0].set_ylabel(ylabel)
        low, high = row[0].get_ylim()
        if low < 0 < high:
            for axes in row:
                axes.axhline(0, color=INK, linewidth=0.7)
        else:
            row[0].set_ylim(min(1.05 * low, 0), max(1.05 * high, 0))
        if len(methods) > 1:
            handles, labels = row[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=3, handlelength=3.5)

    return as_svg(name, draw, HEIGHT * (1.15 if len(methods) > 3 else 1))


def kl_by_outcome(methods: Mapping[str, Metrics]) -> str:
    """Mean KL per token, in nats, in samples whose rollout passed the verifier, and in those whose rollout failed.

    methods: label -> lines of metrics.jsonl; at most as many as LOOKS, else ValueError. So do the two below.
    """
    panels = {"kl_passed": "rollout passed", "kl_failed": "rollout failed"}
    return _panels("KL on passed and failed rollouts", methods, panels, "KL, nats per token")


def perplexity_gap(methods: Mapping[str, Metrics]) -> str:
    """Student's perplexity less the teacher's, on the same response tokens."""
    return _panels("Perplexity gap", methods, {"perplexity_gap": ""}, "student − teacher")


def epistemic_mass(methods: Mapping[str, Metrics]) -> str:
    """The teacher's mean probability of an epistemic token at a response position, per mille."""
    return _panels("Epistemic mass", methods, {"epistemic_mass": ""}, "teacher probability, ‰", 1000)
