"""The report as one self-contained page: no script, no network, light and dark.

Model output is hostile: jinja2 escapes whatever the template prints, and before that every string has its control,
bidirectional and invisible characters replaced by a visible ⟨U+XXXX⟩. The Content-Security-Policy allows this page's own
stylesheet, by its hash, and nothing else.
"""

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: controls, formats (bidi, zero width, tags), separators
HEAD, TAIL = 3000, 1500  # characters shown of a longer text; the answer stands at its end
DASH = "—"


def visible(text: str) -> str:
    """`text` with every character that cannot be seen, or that changes how others are shown, as ⟨U+XXXX⟩; \\n and \\t stay."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) not in HIDDEN else f"⟨U+{ord(char):04X}⟩" for char in text)


def cut(text: str) -> str:
    """The head and the tail of a very long text, with a note in between."""
    if len(text) <= HEAD + TAIL:
        return text
    return f"{text[:HEAD]}\n\n{left_out(len(text) - HEAD - TAIL)}\n\n{text[-TAIL:]}"


def left_out(characters: int) -> str:
    """The note in the place of what is not shown."""
    return f"[… {characters:,} characters left out …]"


def number(value: float | None, digits: int = 0) -> str:
    """1234.5 -> 1,234.5; a dash for None."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """12.3 %; a dash alone for None."""
    return DASH if value is None else f"{number(value, 1)}\N{NO-BREAK SPACE}%"


def signed(value: float | None, digits: int = 1) -> str:
    """+1.2, −1.2, 0.0."""
    if value is None:
        return DASH
    text = f"{value:+,.{digits}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """[38.2, 40.1]; nothing for None."""
    return "" if bounds is None else f"[{number(bounds[0], 1)}, {number(bounds[1], 1)}]"


def significant(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """8.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def minute(timestamp: str) -> str:
    """2025-01-31T08:15:30Z -> 2025-01-31 08:15; a dash for none."""
    return timestamp[:16].replace("T", " ") or DASH


def setting(value: Any) -> str:
    """A setting as it is written in YAML: strings bare, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def row_label(row: str, against: str) -> str:
    """What a row of a comparison is called, with the row that its differences are taken from, where that is not the base."""
    return row if against == "base" else f"{row}, Δ against {against}"


def direction(value: float | None) -> str:
    """The CSS class of a delta as it is shown, with one decimal."""
    rounded = round(value or 0.0, 1)
    return "up" if rounded > 0 else "down" if rounded < 0 else ""


def _finalize(value: Any) -> Any:
    """Runs on every expression that the template prints, before escaping."""
    return visible(value) if type(value) is str else value


def _styles_to_classes(plots: Mapping[str, str]) -> tuple[dict[str, Markup], str]:
    """Replaces the style attributes of our own SVGs by classes: the page's policy forbids the former. Returns (plots, rules)."""
    classes: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        return f'class="{classes.setdefault(match[1], f"p{len(classes)}")}"'

    replaced = {name: Markup(re.sub(r'style="([^"]*)"', replace, svg)) for name, svg in plots.items()}
    return replaced, "".join(f".{name}{{{style}}}\n" for style, name in classes.items())


def render(figures: Mapping[str, Any], plots: Mapping[str, str], template: str = "template.html.j2") -> str:
    """The page. figures: as written to report.json, and more for the samples; plots: name -> SVG made by report.plots."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trd_megatron.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (cut, number, share, signed, interval, significant, duration, minute, setting, row_label, direction)
    environment.filters.update({function.__name__: function for function in filters})
    inline, rules = _styles_to_classes(plots)
    style = "\n" + resources.files("trd_megatron.report").joinpath("style.css").read_text(encoding="utf-8") + rules
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(figures, plots=inline, style=Markup(style), style_hash=f"sha256-{digest}")
