"""The child process that grades math answers with math-verify. Run as a script by trd_megatron.verify.math, never imported by it.

JSON lines: `{"ready": true}` once at the start (or `{"ready": false, "detail": ...}`), then one
`{"item": ..., "verdict": "pass"|"fail"|"error", "detail": ...}` for each request on stdin:
`{"item": ..., "gold": ..., "answer": ..., "answer_type": ..., "points": [{"n": "1"}, ...], "decimals": ..., "timeout_s": ...}`.
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
DIGITS = 50  # to which exact values are compared
TERM_DECIMALS = 9  # to which the values of terms that hold decimals are compared
RELATIVE_TOLERANCE = 1e-4  # of decimals, beside the rounding: math_text.py
VARIABLE_TOLERANCE = 1e-8  # relative, of the values of a "variable" answer
# Where letters are tried out: no value is special, and letters get different ones. Positive rows refute, all rows together confirm.
TRIALS = (
    ("17/13", "23/7", "31/19", "41/29", "53/11"),
    ("9/4", "5/7", "47/17", "3/8", "61/23"),
    ("7", "4", "11", "6", "9"),  # whole numbers tell the floor from the ceiling
    ("-19/12", "29/13", "-7/3", "37/5", "-2/9"),
)
# What a worker's sums, integrals and the like are evaluated by is simplify(), not digits: those can converge slowly.
SLOW = ("Integral", "Sum", "Product", "Limit", "Derivative", "ImageSet", "Piecewise")


_ATOM = re.compile(
    r"(?P<kind>Integer|Float) \('?(?P<digits>[0-9.eE+-]+)'? *\)(?: */ *Integer \((?P<below>[1-9][0-9]*) *\))?"
    r"|Symbol \('(?P<name>[A-Za-z_]\w*)' *\)|E"
)


def evaluate_atom(code: str, *_: object) -> Any:
    """Takes the place of sympy's eval_expr, which is Python's eval: one number, fraction or symbol is made, everything else is refused.

    Model output is hostile, and only the LaTeX grammar may read it. The library hands number tokens to sympy as text, simplify()
    imports units, which are symbols, and sympy's own tables hold fractions.
    """
    import sympy

    atom = _ATOM.fullmatch(code.strip())
    if atom is None:
        raise ValueError(f"text is not evaluated as Python: {code[:100]}")
    if atom["name"]:
        return sympy.Symbol(atom["name"])
    if atom["kind"]:
        return (sympy.Integer if atom["kind"] == "Integer" else sympy.Float)(atom["digits"]) / int(atom["below"] or 1)
    return sympy.E


_PERCENT = re.compile(r"\s*\\?%$")
_EQUALS = re.compile(r"(?<![\\<>!])=")
_COMPLEX = re.compile(r"(?<![a-zA-Z\\])I(?![a-zA-Z])|\\(?:Re|Im|arg|overline|bar)(?![a-zA-Z])|\\mathbb\{C\}|matrix|\\det")


def to_sympy(latex: str) -> Any:
    """latex2sympy()'s reading. Raises any Exception if the grammar has none.

    Its parser is first asked to predict with less context (ANTLR's SLL mode): that is eight times as fast and gives the same tree or a
    syntax error; only after an error the full prediction is worth its time.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy

    class Reader(_Latex2Sympy):
        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = mode
            return parser

    real, config = not _COMPLEX.search(latex), ConversionConfig(lowercase_symbols=False)  # n is not N
    try:
        mode = PredictionMode.SLL
        return Reader(is_real=real, config=config).parse(latex)
    except Exception:
        mode = PredictionMode.LL
        return Reader(is_real=real, config=config).parse(latex)


@lru_cache(maxsize=1024)
def parse(text: str) -> tuple[Any, str]:
    """(sympy object, text in math-verify's own spelling) of a normalised answer; None for the object if its grammar finds none."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct

    # Units are off: math-verify takes every letter m, g, s, h, t at the end for one, and 3t for 3.
    settings = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
    plain = normalize_latex(text, settings)
    if sum(map(plain.count, "([")) != sum(map(plain.count, ")]")):  # no rule of the grammar; long runs of brackets keep it busy
        return None, plain
    number, percents = _PERCENT.subn("", plain)
    last = _EQUALS.split(number)
    # math-verify too reads only the last part of a chain of equations that it does not understand as a whole.
    for latex in [number] + ([last[-1]] if len(last) > 2 and not set(",;") & set(number) else []):
        try:
            read = to_sympy(latex)
        except Exception:  # no LaTeX that the grammar knows: then only the text is compared
            continue
        return (convert_to_pct(read) if percents else read), plain
    return None, plain


_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-zA-Z])")


def read(text: str) -> tuple[Any, str]:
    """Like parse(), and reads two forms more: a single plus-minus inside of a term, and inequalities joined by "or"."""
    import sympy

    found, plain = parse(text)
    if found is None and len(_PLUS_MINUS.findall(text)) == 1:
        both = [parse(_PLUS_MINUS.sub(sign, text))[0] for sign in "+-"]
        if all(map(is_scalar, both)):
            found = sympy.FiniteSet(*both)
    parts = [parse(part.strip())[0] for part in _OR.split(text)]
    if len(parts) > 1 and all(isinstance(part, sympy.core.relational.Relational) and not isinstance(part, sympy.Eq) for part in parts):
        found = sympy.Union(*(part.as_set() for part in parts))
    return found, plain


def evaluated(value: Any) -> Any:
    """The value with sums and powers worked out; as it is where sympy cannot."""
    try:
        return value.doit()
    except Exception:
        return value


def is_scalar(value: Any) -> bool:
    """Whether this is a number or a term, no relation, set, tuple or matrix; percentages stay math-verify's."""
    import sympy

    return isinstance(value, sympy.Expr) and not value.has(sympy.UnevaluatedExpr) and not isinstance(value, sympy.MatrixExpr)


def same_number(gold: Any, answer: Any, decimals: int) -> bool | None:
    """Whether two numbers without letters are equal: to DIGITS digits, or as decimals if one is a decimal; None if sympy cannot say."""
    import sympy

    if not gold.has(sympy.I) and not answer.has(sympy.I):
        gold, answer = sympy.real_root(gold), sympy.real_root(answer)  # a cube root of -8 is -2, where nothing is complex
    if gold == answer:
        return True
    if any(value.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo) for value in (gold, answer)):
        return False
    if gold.is_Rational and answer.is_Rational:
        return False
    left, right = sympy.N(gold, DIGITS + 10), sympy.N(answer, DIGITS + 10)
    difference = sympy.N(gold - answer, DIGITS + 10)
    if not all(part.is_Float or part.is_Rational for value in (left, right, difference) for part in value.as_real_imag()):
        return None
    scale = max(abs(left), abs(right))
    if not gold.has(sympy.Float) and not answer.has(sympy.Float):
        return bool(abs(difference) <= scale * sympy.Float(10) ** -DIGITS)
    rounded = all(a.round(decimals) == b.round(decimals) for a, b in zip(left.as_real_imag(), right.as_real_imag(), strict=True))
    return bool(rounded and abs(difference) <= RELATIVE_TOLERANCE * scale)


def same_term(gold: Any, answer: Any) -> bool | None:
    """Whether two terms with letters have the same values, by trying: False if they differ as real numbers where all letters are
    positive, True if they agree everywhere it was tried, None if that does not decide."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(symbols) > len(TRIALS[0]):
        return None
    found = []
    for trial in TRIALS:
        values = dict(zip(symbols, map(_rational, trial), strict=False))
        try:
            left, right = evaluated(gold.subs(values)), evaluated(answer.subs(values))
            found.append(None if left.free_symbols or right.free_symbols else same_number(left, right, TERM_DECIMALS))
        except Exception:
            found.append(None)
        if not trial[0].startswith("-") and found[-1] is False and all(value.is_real for value in (left, right)):
            return False
    return True if all(found) else None


def _rational(text: str) -> Any:
    import sympy

    return sympy.Rational(text)


def unwrapped(gold: Any, answer: Any) -> tuple[Any, Any]:
    """The right-hand sides where one side is a plain value: "x = 5" counts as 5, and 5 as x = 5, as in math-verify."""
    from math_verify.grader import is_assignment_relation, is_equation, take_last_relation

    if is_equation(answer) and is_scalar(gold):
        answer = take_last_relation(answer).rhs
    elif is_assignment_relation(gold) and is_scalar(answer):
        gold = take_last_relation(gold).rhs
    return gold, answer


def equal(gold: Any, answer: Any, decimals: int) -> bool:
    """Whether two objects of sympy are the same answer. What trying out cannot decide is math-verify's to decide."""
    import sympy
    from math_verify import verify

    gold, answer = unwrapped(gold, answer)
    if is_scalar(gold) and is_scalar(answer):
        if gold.has(sympy.zoo, sympy.nan):
            raise ValueError("the reference answer is no number")
        slow = {name for value in (gold, answer) for part in sympy.preorder_traversal(value) for name in [type(part).__name__]} & set(SLOW)
        left, right = evaluated(gold), evaluated(answer)
        letters = left.free_symbols | right.free_symbols
        decided = None if slow and letters else same_term(left, right) if letters else same_number(left, right, decimals)
        if decided is not None:
            return decided
    inequalities = sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, sympy.Ne
    if isinstance(gold, inequalities) and isinstance(answer, inequalities) and len(gold.free_symbols) == 1:
        return gold.free_symbols == answer.free_symbols and gold.as_set() == answer.as_set()
    return verify(gold, answer, float_rounding=decimals, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


def members(value: Any) -> list[Any] | None:
    """The distinct members of a list or finite set; of a single value that value. None for other sets."""
    import sympy
    from math_verify.grader import is_equation, take_last_relation

    if is_equation(value):
        value = take_last_relation(value).rhs
    if value == sympy.S.EmptySet:
        return []
    if isinstance(value, sympy.FiniteSet):
        return list(dict.fromkeys(value.args))
    return None if isinstance(value, sympy.Set) and not isinstance(value, sympy.Interval) else [value]


def grade_set(gold: Any, answer: Any, decimals: int) -> bool:
    """Order and repetition do not count: every member of one is a member of the other."""
    wanted, given = members(gold), members(answer)
    if wanted is None or given is None:
        return equal(gold, answer, decimals)
    pairs = [[equal(want, give, decimals) for give in given] for want in wanted]
    return all(map(any, pairs)) and all(any(row[column] for row in pairs) for column in range(len(given)))


def values_at(value: Any, points: list[dict[str, str]]) -> list[Any]:
    """Numbers (or None where there is none) that a term takes at the points. Letters are told apart by name."""
    import sympy
    from math_verify.grader import is_equation, take_last_relation

    if is_equation(value):
        value = take_last_relation(value).rhs
    if not is_scalar(value):
        return [None] * len(points)
    found = []
    for point in points:
        letters = {symbol: sympy.Rational(point[symbol.name]) for symbol in value.free_symbols if symbol.name in point}
        number = sympy.N(evaluated(value.subs(letters, simultaneous=True)), DIGITS)  # one by one, a/b would be 0 at a=0, b=0
        finite = not number.free_symbols and number.is_finite and all(part.is_number for part in number.as_real_imag())
        found.append(number if finite else None)
    return found


def grade_variable(gold: Any, answer: Any, points: list[dict[str, str]]) -> tuple[str, str]:
    """An expression is right if it has the reference's value at every point. answer None: it could not be read."""
    wanted = values_at(gold, points)
    if None in wanted:
        return "error", f"the reference answer has no value at {spelled(points[wanted.index(None)])}"
    given = [None] * len(points) if answer is None else values_at(answer, points)
    for point, want, give in zip(points, wanted, given, strict=True):
        if give is None or abs(give - want) > VARIABLE_TOLERANCE * abs(want):
            return "fail", f"{'no value' if give is None else 'another value'} at {spelled(point)}"
    return "pass", ""


def spelled(point: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def grade(gold: str, answer: str, answer_type: str | None, points: list[dict[str, str]], decimals: int) -> tuple[str, str]:
    """(verdict, detail) of a normalised answer against the normalised reference."""
    import sympy.core.random

    sympy.core.random.seed(0)  # sympy guesses: the same item must get the same verdict wherever it stands in the queue
    (wanted, wanted_text), (given, given_text) = read(gold), read(answer)
    if answer_type == "variable" and wanted is not None:
        return grade_variable(wanted, given, points)
    if wanted_text == given_text:
        return "pass", ""
    if wanted is None or given is None:
        return "fail", ""
    right = (grade_set if answer_type == "set" else equal)(wanted, given, decimals)
    return ("pass" if right else "fail"), ""


def describe(error: Exception) -> str:
    """Type and message in one line of bounded length."""
    try:
        message = " ".join(str(error).split())[:200]
    except Exception as second:  # printing a sympy object may itself fail
        message = f"(message not printable: {type(second).__name__})"
    return f"{type(error).__name__}: {message}"


def answer_request(line: str) -> dict[str, Any]:
    """Grades one request line."""
    request = json.loads(line)
    item = request.pop("item")
    signal.setitimer(signal.ITIMER_REAL, request.pop("timeout_s") + ORPHAN_GRACE_S)  # default action: the kernel ends this process
    try:
        verdict, detail = grade(**request)
    except Exception as error:
        verdict, detail = "error", f"math-verify raised {describe(error)}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"item": item, "verdict": verdict, "detail": detail}


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
