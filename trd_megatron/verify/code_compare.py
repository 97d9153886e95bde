"""When a program's result is the expected one, as the benchmarks' graders have it. Everything here is a plain built-in value.

Sources: LiveCodeBench's testing_util (standard output, and function results), TACO's and APPS' testing_util ([x] for x, number keys),
EvalPlus 0.3.1's eval (exact and its special oracles). tests/unit/test_verify_code.py has a case for each rule.
"""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from trd_megatron.verify.plain_values import NotPlain, plain_set

EVALPLUS_FLOAT_TOLERANCE = 1e-6  # absolute, where floats are expected and the test gives no tolerance
EVALPLUS_RELATIVE = 1e-7


def output_difference(output: str, expected: str) -> str | None:
    """None where standard output is right, otherwise what differs: surrounding white space does not count, at its ends and each line's.

    A line may also hold the same numbers in other writing ("1.0" for "1"), compared exactly, as decimal fractions.
    """
    output, expected = output.strip(), expected.strip()
    count, expected_count = output.count("\n") + 1, expected.count("\n") + 1
    if count != expected_count:
        return f"{count:,} lines of output, expected {expected_count:,}"
    lines, expected_lines = ([line.strip() for line in text.split("\n")] for text in (output, expected))
    for number, (line, expected_line) in enumerate(zip(lines, expected_lines, strict=True), 1):
        if line != expected_line and not _same_decimals(line, expected_line):
            return f"line {number} of the output is {show(line)}, expected {show(expected_line)}"
    return None


def _same_decimals(line: str, expected: str) -> bool:
    words, expected_words = line.split(), expected.split()
    if len(words) != len(expected_words):
        return False
    try:
        return all(Decimal(word) == Decimal(other) for word, other in zip(words, expected_words, strict=True))
    except ArithmeticError:  # no number; or a signalling NaN, which refuses to be compared
        return False


def same_result(result: Any, expected: Any, arguments: list[Any], compare: str | None, tolerance: float) -> bool:
    """Whether a function's result is right, in one of the ways that code.py's docstring lists. `arguments` are those of the call.

    Raises ValueError for an unknown `compare`, TypeError or ValueError where the way does not fit `expected` or `arguments`.
    """
    if compare is not None and compare not in _WAYS:
        raise ValueError(f"compare {compare!r} is not known; known: {', '.join(_WAYS)}")
    try:
        if compare is not None:
            return bool(_WAYS[compare](result, expected, arguments, tolerance))
        unwrapped = [expected, *(expected if isinstance(expected, list) and len(expected) == 1 else [])]
        return any(_usual(result, value, tolerance) for value in unwrapped)
    except OverflowError:  # a number beyond the floats against one within
        return False


def _usual(result: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(result, list | tuple) and isinstance(expected, list | tuple):
        return len(result) == len(expected) and all(_usual(*pair, tolerance) for pair in zip(result, expected, strict=True))
    if isinstance(result, dict) and isinstance(expected, dict):
        if len(result) != len(expected):
            return False
        if any(isinstance(key, int) for key in result):  # JSON has text keys alone
            expected = {_number_key(key): value for key, value in expected.items()}
        return all(key in expected and _usual(value, expected[key], tolerance) for key, value in result.items())
    if tolerance > 0 and _is_real(result) and _is_real(expected):
        return bool(result == expected) or abs(_float(result) - _float(expected)) <= tolerance
    return bool(result == expected)


def _number_key(key: Any) -> Any:
    try:
        return int(key)
    except (TypeError, ValueError):
        return key


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float)


def _float(value: float) -> float:
    """As a float; an integer beyond the floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, 1 if value > 0 else -1)


def _exact(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    if result == expected:
        return True
    if tolerance == 0 and _is_floats(expected):
        tolerance = EVALPLUS_FLOAT_TOLERANCE
    return tolerance != 0 and type(result) is type(expected) and _all_close(result, expected, tolerance)


def _is_floats(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, list | tuple) and bool(value) and all(isinstance(part, float) for part in value))


def _all_close(result: Any, expected: Any, tolerance: float) -> bool:
    """numpy.allclose on nested lists of numbers of one shape."""
    if isinstance(result, list | tuple) and isinstance(expected, list | tuple):
        return len(result) == len(expected) and all(_all_close(*pair, tolerance) for pair in zip(result, expected, strict=True))
    if isinstance(result, complex) or isinstance(expected, complex):
        numbers = int | float | complex
        return isinstance(result, numbers) and isinstance(expected, numbers) and abs(result - expected) <= tolerance
    if not (_is_real(result) and _is_real(expected)):
        return False
    mine, theirs = _float(result), _float(expected)
    return mine == theirs or (math.isfinite(theirs) and abs(mine - theirs) <= tolerance + EVALPLUS_RELATIVE * abs(theirs))


def _as_sets(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    if not isinstance(result, list | tuple | set | frozenset | dict | str):  # a range may be longer than any memory
        return False
    wanted = plain_set(expected)
    try:
        return plain_set(result) == wanted
    except (TypeError, NotPlain):  # of lists
        return False


def _not_none(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    return bool(result == expected) if isinstance(result, bool) else bool(expected == (result is not None))


def _surface_area(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    if _exact(result, expected, arguments, tolerance):
        return True
    edge, height = arguments
    area = round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))
    return _is_real(result) and abs(_float(result) - area) <= tolerance


def _digit_distance(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    first, second = map(str, arguments)
    width = max(len(first), len(second))
    pairs = zip(first.zfill(width), second.zfill(width), strict=True)
    return _exact(result, expected, arguments, tolerance) or result == sum(abs(int(one) - int(other)) for one, other in pairs)


def _polynomial_root(result: Any, expected: Any, arguments: list[Any], tolerance: float) -> bool:
    if not _is_real(result):
        return False
    return abs(sum(factor * math.pow(result, power) for power, factor in enumerate(arguments[0]))) <= tolerance


_WAYS: dict[str, Callable[[Any, Any, list[Any], float], bool]] = {
    "exact": _exact,
    "set": _as_sets,
    "not_none": _not_none,
    "any": lambda result, expected, arguments, tolerance: True,
    "or_zero": lambda result, expected, arguments, tolerance: result == 0 or _exact(result, expected, arguments, tolerance),
    "surface_area": _surface_area,
    "digit_distance": _digit_distance,
    "polynomial_root": _polynomial_root,
}


def show(value: Any) -> str:
    """A value for people: printable, one line, at most 120 characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"
