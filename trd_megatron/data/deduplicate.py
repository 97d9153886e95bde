"""Training problems that occur in a benchmark: found by their text, after what does not change its meaning is taken out."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

# Delimiters and spacing of LaTeX that show no symbol of their own. A backslash before a line's end or a space is one too.
_LATEX = re.compile(r"\\(?:left|right|quad|qquad|displaystyle|limits)(?![A-Za-z])|\\[,;:!> ()\[\]]|[$~]")
_ENDS = ".,;:!?\"'`*#-_"


def normalise(text: str) -> str:
    """The text in NFKC and without case, white space, LaTeX's delimiters and spacing, and punctuation at its ends."""
    text = _LATEX.sub(" ", unicodedata.normalize("NFKC", text)).casefold().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return "".join(text.split()).strip(_ENDS)


def texts(problems: Iterable[dict[str, Any]]) -> set[str]:
    """The normalised texts of problems."""
    return {normalise(problem["problem"]) for problem in problems}


def overlap(problems: Iterable[dict[str, Any]], benchmark_problems: Iterable[dict[str, Any]]) -> int:
    """How many of the benchmark's problems occur among `problems`, by their normalised texts."""
    known = texts(problems)
    return sum(normalise(problem["problem"]) in known for problem in benchmark_problems)
