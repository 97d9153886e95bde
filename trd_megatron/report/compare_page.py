"""The comparison of runs for people: one page, and Markdown tables. What is in it comes from report.compare."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trd_megatron.report import curves, html, plots

METRICS = {"avg_at_k": "Avg", "pass_at_k": "Pass"}
DRAWN_FIRST = ("trd", "forward_kl", "reverse_kl")  # figure 3's; the first has the plain line
DRAWN = len(curves.LOOKS)  # methods that a figure tells apart


def page(found: Mapping[str, Any]) -> str:
    """The HTML page of report.compare.compare's figures."""
    drawn: dict[str, str] = {}
    not_drawn: list[list[str]] = []
    for number, section in enumerate(found["sections"]):
        methods = sorted(section["methods"], key=lambda name: DRAWN_FIRST.index(name) if name in DRAWN_FIRST else len(DRAWN_FIRST))
        not_drawn.append(methods[DRAWN:])
        methods = methods[:DRAWN]
        for table in section["benchmarks"]:
            models = {name: table["methods"][name] for name in methods}
            drawn[f"{number}/pass_curve/{table['benchmark']}"] = _pass_curve(table["base"], models)
            drawn[f"{number}/lengths/{table['benchmark']}"] = _lengths({"base": table["base"]} | table["methods"])
        trained = {name: section["curves"][name] for name in methods if name in section.get("curves", {})}
        if trained:
            for draw in (curves.kl_by_outcome, curves.perplexity_gap, curves.epistemic_mass):
                drawn[f"{number}/{draw.__name__}"] = draw(trained)
    return html.render({**found, "not_drawn": not_drawn, "metrics": METRICS}, drawn, "compare.html.j2")


def _pass_curve(base: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Pass@k over k of the base and of up to DRAWN methods, with the intervals of base and first method."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        looks = [*curves.LOOKS[: len(methods)], (plots.INK, (0, (1, 1)), "")]
        rows = [*methods.items(), ("base", base)]
        for index, ((name, of), (colour, linestyle, marker)) in enumerate(zip(rows, looks, strict=True)):
            ks = list(range(1, len(of["pass_curve"]) + 1))
            axes.plot(ks, of["pass_curve"], color=colour, linestyle=linestyle, marker=marker, markevery=max(1, len(ks) // 8), label=name)
            if index in (0, len(rows) - 1) and all(of["pass_curve_intervals"]):
                low, high = zip(*of["pass_curve_intervals"], strict=True)
                axes.fill_between(ks, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("k")
        axes.set_ylabel("Pass@k, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=3.5)

    return plots.as_svg("Pass@k", draw, plots.HEIGHT * (1.25 if len(methods) > 2 else 1.1))


def _lengths(models: Mapping[str, Mapping[str, Any]]) -> str:
    """For each model a line from the 10th to the 90th percentile of the lengths of its correct and of its incorrect samples, a bar over the
    middle half and a tick at the median."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        labelled: set[str] = set()
        for row, of in enumerate(models.values()):
            for side, colour, shift in (("correct", plots.FIRST, -0.17), ("incorrect", plots.SECOND, 0.17)):
                spread = of["lengths"][side]
                if not spread["samples"]:
                    continue
                y = row + shift
                axes.plot([spread["p10"], spread["p90"]], [y, y], color=colour, linewidth=1.2)
                label = None if side in labelled else side
                labelled.add(side)
                axes.plot([spread["p25"], spread["p75"]], [y, y], color=colour, linewidth=6, alpha=0.55, label=label, solid_capstyle="butt")
                axes.plot([spread["p50"]], [y], color=plots.INK, marker="|", markersize=9, linestyle="none")
        axes.set_yticks(range(len(models)), list(models))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("response tokens")
        if labelled:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    return plots.as_svg("Lengths of correct and incorrect samples", draw, 1.1 + 0.38 * len(models))


# Markdown


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of scores, for a note or a README: rows and columns as in the paper."""
    lines = [f"# {_cell(found['title'])}", ""]
    for section in found["sections"]:
        lines += _heading(section["title"], section["unusual"])
        tables = section["benchmarks"]
        methods = list(tables[0]["methods"])
        for metric, title in METRICS.items():
            columns = [f"{_cell(table['benchmark'])}, {title}@{table['k']}" for table in tables] + (["mean"] if "mean" in section else [])
            lines += _head(columns)
            sources = tables + ([section["mean"]] if "mean" in section else [])
            lines.append(_row("Base", [_score(of["base"][metric], "base" in of[f"best_{metric}"]) for of in sources]))
            for method in methods:
                cells = []
                for of in sources:
                    one = of["methods"][method]
                    bounds = html.interval(one["delta"].get(f"{metric}_interval"))
                    delta = f"{html.signed(one['delta'][metric])} {bounds}".strip()
                    cells.append(f"{_score(one[metric], method in of[f'best_{metric}'])} ({delta})")
                lines.append(_row(_cell(html.row_label(method, tables[0]["methods"][method]["against"])), cells))
            if all("teacher" in table for table in tables):
                lines.append(_row("Teacher", [_score(table["teacher"][metric]) for table in tables] + [""] * (len(columns) - len(tables))))
            lines.append("")
        for table in tables:
            for metric, best in table.get("against_best", {}).items():
                gap = f"{html.signed(best['delta'])} {html.interval(best['interval'])}".strip()
                of = f"{_cell(table['benchmark'])}, {METRICS[metric]}@{table['k']}"
                lines.append(f"- {of}: trd against the best baseline ({_cell(best['method'])}) {gap}")
        seeds = "; ".join(f"{_cell(name)} {', '.join(map(str, of))}" for name, of in section["methods"].items())
        lines += [f"- seeds: {seeds}", ""]
    for part in found["evaluated"]:
        lines += _heading("Evaluated alone", part["settings"])
        columns = [f"{_cell(line['benchmark'])}, {title}@{line['k']}" for line in part["benchmarks"] for title in METRICS.values()]
        lines += _head(columns)
        for model in part["benchmarks"][0]["models"]:
            cells = [_score(line["models"][model][metric]) for line in part["benchmarks"] for metric in METRICS]
            lines.append(_row(_cell(model), cells))
        lines.append("")
    for part in found["teachers"]:
        lines += _heading("OPD, OPSD and teacher", part["settings"])
        columns = [f"{_cell(line['benchmark'])}, {title}@{line['k']}" for line in part["benchmarks"] for title in METRICS.values()]
        lines += _head(columns)
        for label in part["rows"]:
            cells = [_score(line["rows"][label][metric]) for line in part["benchmarks"] for metric in METRICS]
            lines.append(_row(_cell(label), cells))
        lines.append("")
    lines.append(
        "In brackets: points against the base, or against the row that is named, and their 95 % confidence interval over problems. "
        "Bold: best as shown."
    )
    return "\n".join(lines) + "\n"


def _heading(title: str, settings: Mapping[str, Any]) -> list[str]:
    return ["## " + ", ".join([_cell(title), *(f"{key}={_cell(html.setting(value))}" for key, value in settings.items())]), ""]


def _head(columns: Sequence[str]) -> list[str]:
    return [_row("", columns), _row("---", ["---:"] * len(columns))]


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _score(value: float, best: bool = False) -> str:
    text = html.number(value, 1)
    return f"**{text}**" if best else text


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table, nor become anything but text in it."""
    escaped = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.visible(text)).replace("\n", " ")
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
