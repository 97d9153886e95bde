"""The child process that grades math answers with math-verify. Run as a script by trd_megatron.verify.math, never imported by it.

JSON lines: `{"ready": true}` once at the start (or `{"ready": false, "detail": ...}`), then one
`{"verdict": "pass"|"fail"|"error", "detail": ...}` for each request `{"gold": ..., "answer": ..., "timeout_s": ...}` on stdin.
It imports nothing of this package, so that it starts fast and wherever the parent was started from. The parent enforces the
time limit by killing it; the alarm here is for a child whose parent was killed itself.
"""

import json
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY_LIMIT_BYTES = 1 << 30  # of address space; sympy with its caches needs about 70 MB
ORPHAN_GRACE_S = 1.0  # how long an item may outlive its limit, when no parent is left to kill us


_ATOM = re.compile(r"(Integer|Float) \('?([0-9.eE+-]+)'? *\)|(Symbol) \('([A-Za-z_]\w*)' *\)|E")


def evaluate_atom(code: str, *_: object) -> Any:
    """Takes the place of sympy's eval_expr, which is Python's eval: one number or symbol is made, everything else is refused.

    Model output is hostile, and only the LaTeX grammar may read it. The library hands number tokens to sympy as text, and
    simplify() imports units, which are symbols.
    """
    import sympy

    match _ATOM.fullmatch(code.strip()):
        case None:
            raise ValueError(f"text is not evaluated as Python: {code[:100]}")
        case atom if atom[3]:
            return sympy.Symbol(atom[4])
        case atom if atom[1]:
            return (sympy.Integer if atom[1] == "Integer" else sympy.Float)(atom[2])
        case _:
            return sympy.E


_TRAILING = re.compile(r"(?<!\\)[.,;\s]+$")
_DIGIT_GROUP_SPACE = re.compile(r"(?<=\d)(?:\\[,;:! ]|~| )(?=\d{3}(?!\d))")
_PERCENT = re.compile(r"\s*\\?%$")


def parse_answer(text: str) -> list[Any]:
    """The readings of one answer (a sympy object, then the normalised text), best first; empty if math-verify finds none.

    Three forms that its grammar does not take are put right first: a full stop or comma at the end, digit groups set apart by
    a space (1\\,234), and a percent sign, which must stand outside of the formula ($50$%).
    """
    from math_verify import LatexExtractionConfig, parse

    text = _DIGIT_GROUP_SPACE.sub("", _TRAILING.sub("", text))
    number, percents = _PERCENT.subn("", text.strip("$"))
    # A formula that is the whole text: the library takes all of it and looks nowhere else.
    formula = f"${number}$%" if percents else rf"\boxed{{{text}}}"
    return parse(formula, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None, raise_on_error=True)


parse_gold = lru_cache(maxsize=256)(parse_answer)  # the samples of one problem come one after the other


def grade(gold: str, answer: str) -> tuple[str, str]:
    """(verdict, detail) of an answer against the reference answer.

    math_verify.verify() tries every pair of readings and takes any that agrees. So do we, but a pair that crashes is remembered:
    if no other pair agrees the verdict is "error", not a wrong answer.
    """
    import sympy.core.random
    from math_verify import verify

    sympy.core.random.seed(0)  # sympy guesses: the same item must get the same verdict wherever it stands in the queue
    gold_readings = parse_gold(gold)
    if not gold_readings:
        return "error", "the reference answer cannot be parsed"
    crash = ""
    # Text against text first: it costs nothing, and spares the arithmetic where both are the same monster.
    for gold_reading in reversed(gold_readings):
        for reading in reversed(parse_answer(answer)):
            try:
                if verify(gold_reading, reading, timeout_seconds=None, raise_on_error=True):
                    return "pass", ""
            except Exception as error:
                crash = f"math-verify raised {describe(error)}"
    return ("error", crash) if crash else ("fail", "")


def describe(error: Exception) -> str:
    """Type and message in one line of bounded length."""
    try:
        message = " ".join(str(error).split())[:200]
    except Exception as second:  # printing a sympy object may itself fail
        message = f"(message not printable: {type(second).__name__})"
    return f"{type(error).__name__}: {message}"


def answer_request(line: str) -> dict[str, str]:
    """Grades one request line."""
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + ORPHAN_GRACE_S)  # default action: the kernel ends this process
    try:
        verdict, detail = grade(request["gold"], request["answer"])
    except Exception as error:
        verdict, detail = "error", f"math-verify raised {describe(error)}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"verdict": verdict, "detail": detail}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our stdin or kills us
    replies = os.fdopen(os.dup(1), "w", buffering=1)  # the pipe; fd 1 becomes the null device, so that no print can reach it
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        import math_verify
        import sympy.parsing.sympy_parser

        math_verify.verify(math_verify.parse(r"\boxed{1}", parsing_timeout=None), [], timeout_seconds=None)  # compiles the patterns
    except Exception as error:
        replies.write(json.dumps({"ready": False, "detail": describe(error)}) + "\n")
        sys.exit(1)
    sympy.parsing.sympy_parser.eval_expr = evaluate_atom
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer_request(line)) + "\n")


if __name__ == "__main__":
    main()
