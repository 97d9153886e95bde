"""Types of reference answers. number, set and variable are those that AMO-Bench grades with a parser (its fourth, description, is
graded by a language model, and is not supported)."""

import json
import re
from typing import Any

ANSWER_TYPES = ("integer", "latex", "number", "set", "variable")
MAX_CHARS = 4_000  # keeps a worker's request below the size of a pipe's buffer
_ASSIGNMENT = re.compile(r"\s*([A-Za-z])\s*=\s*([+-]?[0-9]{1,15}(?:\.[0-9]{1,15}|/[0-9]{0,14}[1-9][0-9]*)?)\s*")


def check_points(answer_type: str | None, check_values: str | None) -> list[dict[str, str]]:
    """The points at which a "variable" answer is compared: letter -> number, as text; empty for the other types.

    check_values is JSON: a list of points, each with a value for every letter, as in `["n=1", "n=2"]` or `["a=2,b=3", "a=1/2,b=-1"]`.
    Raises ValueError for an unknown type, for values where none belong, and for values that are missing or malformed.
    """
    if answer_type is not None and answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r} is not supported; known: {', '.join(ANSWER_TYPES)}")
    if answer_type != "variable":
        if check_values is not None:
            raise ValueError(f"check_values belong to answer_type 'variable', not to {answer_type!r}")
        return []
    if check_values is None:
        raise ValueError("answer_type 'variable' needs check_values")
    if len(check_values) > MAX_CHARS:
        raise ValueError(f"check_values have {len(check_values):,} characters, the limit is {MAX_CHARS:,}")
    try:
        texts: Any = json.loads(check_values)
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'check_values must be a JSON list such as ["n=1", "n=2"], not {str(check_values)[:100]!r}')
    points: list[dict[str, str]] = []
    for text in texts:
        parts = [_ASSIGNMENT.fullmatch(part) for part in text.split(",")]
        point = {part[1]: part[2] for part in parts if part}
        if len(point) != len(parts) or {"e", "i", "I"} & set(point) or (points and set(point) != set(points[0])):
            raise ValueError(f"check_values: {text[:100]!r} is not a value for each letter (the same letters everywhere, no e or i)")
        points.append(point)
    return points
