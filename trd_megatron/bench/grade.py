r"""How many answers a second the graders take. The math items are made, not drawn: half are plain integers as in AIME and GSM8K, the
other half fractions, roots, terms, sets, intervals, points, percentages and units with numbers of their own, half of them wrong. The
programs are of one or two lines, so that what is measured is the sandbox.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from trd_megatron.verify import CodeVerifier, MathVerifier, Verdict

Item = tuple[str, str]  # (response, reference answer)
SENTENCE = r"Let $x_{%d} = \frac{%d}{\sqrt{%d}}$; then \boxed{%d} is too small, since $\left\{ x : x^2 < %d \right\}$ is not empty. "


def _fraction(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randrange(1, 900), draw.randrange(2, 900)
    return rf"\dfrac{{{3 * a}}}{{{3 * b}}}", rf"\frac{{{a + 1}}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}"


def _root(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randrange(2, 60), draw.randrange(2, 99)
    return rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * b}}}", rf"{a}\sqrt{{{b}}}"


def _polynomial(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randrange(1, 99), draw.randrange(1, 99)
    return f"(x+{a})(x+{b})", f"(x+{a})(x-{b})", f"x^2+{a + b}x+{a * b}"


def _set(draw: random.Random) -> tuple[str, str, str]:
    a, b, c = draw.sample(range(1, 400), 3)
    return rf"\{{{c}, {a}, {b}\}}", rf"\{{{c}, {a}\}}", rf"\{{{a}, {b}, {c}\}}"


def _interval(draw: random.Random) -> tuple[str, str, str]:
    a, b = sorted(draw.sample(range(-400, 400), 2))
    return rf"\left[{a}, {b}\right)", f"[{a}, {b}]", f"[{a},{b})"


def _point(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.sample(range(1, 900), 2)
    return rf"\left({a}, \frac{{{b}}}{{2}}\right)", rf"\left(\frac{{{b}}}{{2}}, {a}\right)", rf"({a}, {b / 2})"


def _multiple_of_pi(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randrange(2, 400), draw.randrange(2, 40)
    return rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi"


def _unit(draw: random.Random) -> tuple[str, str, str]:
    a = draw.randrange(1, 9_000)
    return rf"{a / 4}\text{{ cm}}", rf"{a / 4}\text{{ m}}", rf"\frac{{{a}}}{{4}}\text{{ cm}}"


def _percentage(draw: random.Random) -> tuple[str, str, str]:
    a = draw.randrange(1, 9_000)
    return rf"{a / 8}\%", rf"{a / 4}\%", rf"\frac{{{a}}}{{800}}"


KINDS: tuple[Callable[[random.Random], tuple[str, str, str]], ...] = (
    _fraction, _root, _polynomial, _set, _interval, _point, _multiple_of_pi, _unit, _percentage,
)  # fmt: skip


def math_items(count: int, response_chars: int = 20_000, seed: int = 0) -> tuple[list[Item], list[bool]]:
    """`count` items and whether each is right. Responses have up to 2 x response_chars characters and hold other boxes before the last."""
    draw = random.Random(seed)
    items, right = [], []
    filler = "".join(SENTENCE % tuple(draw.randrange(999) for _ in range(5)) for _ in range(2 * response_chars // len(SENTENCE) + 1))
    for number in range(count):
        if number % 2:
            gold = draw.randrange(1000)
            correct, wrong, reference = str(gold), str(gold + draw.randrange(1, 99)), f"{gold:03d}"
        else:
            correct, wrong, reference = KINDS[number // 2 % len(KINDS)](draw)
        good = draw.random() < 0.5
        thoughts = filler[: draw.randrange(2 * response_chars)]
        end = "</think>" if number % 3 else ""  # without it the whole response is searched for boxes
        items.append((rf"{thoughts}{end}So the answer is $\boxed{{{correct if good else wrong}}}$.", reference))
        right.append(good)
    return items, right


def code_items(count: int, seed: int = 0) -> tuple[list[tuple[str, dict[str, Any]]], list[bool]]:
    """`count` (response, tests) with one test on standard input or one call of a function, in turn, and whether each is right."""
    draw = random.Random(seed)
    items, right = [], []
    for number in range(count):
        a, b, good = draw.randrange(1000), draw.randrange(1000), draw.random() < 0.5
        sign = "+" if good else "-"
        if number % 2:
            program = f"def combine(a, b):\n    return a {sign} b"
            tests = {"inputs": [[a, b + 1]], "outputs": [a + b + 1], "fn_name": "combine"}
        else:
            program = f"a, b = map(int, input().split())\nprint(a {sign} b)"
            tests = {"inputs": [f"{a} {b + 1}\n"], "outputs": [f"{a + b + 1}\n"]}
        items.append((f"So this will do:\n```python\n{program}\n```\n", tests))
        right.append(good)
    return items, right


def _measured(verify_many: Callable[[Any], Iterator[Verdict]], warm_up: list[Any], items: list[Any], right: list[bool]) -> dict[str, Any]:
    """Seconds and items per second without the start of the workers, which `warm_up` brings about."""
    list(verify_many(warm_up))
    start = time.perf_counter()
    verdicts = list(verify_many(items))
    seconds = time.perf_counter() - start
    return {
        "items": len(items),
        "seconds": seconds,
        "items_per_s": len(items) / seconds,
        "verdicts": dict(Counter(verdict.verdict for verdict in verdicts)),
        "misjudged": sum(verdict.passed is not good for verdict, good in zip(verdicts, right, strict=True)),
    }


def measure_code(count: int = 1_000, workers: int = 2, allow_unsandboxed: bool = False) -> dict[str, Any]:
    """Figures of CodeVerifier, on programs of one or two lines. Raises UserError where this machine has no sandbox."""
    items, right = code_items(count)
    with CodeVerifier(workers, allow_unsandboxed=allow_unsandboxed) as verifier:
        return {"workers": workers} | _measured(verifier.verify_many, items[: 2 * workers], items, right)


def measure_math(count: int = 10_000, workers: int = 2, timeout_s: float = 10) -> dict[str, Any]:
    """Figures of MathVerifier, and how many verdicts are not what they should be."""
    items, right = math_items(count)
    with MathVerifier(workers, timeout_s) as verifier:
        warm_up = [(r"\boxed{\frac{1}{2}}", r"\frac{2}{4}")] * 2 * workers
        return {"workers": workers} | _measured(verifier.verify_many, warm_up, items, right)
