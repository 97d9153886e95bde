"""CHAMP (https://arxiv.org/abs/2401.06961): 270 competition problems with solutions in steps, from the package champ-dataset.

The package's data file is read, the package is not imported. It writes mathematics as @@2^(n-1)@@. Answers that are a number, or an
expression of numbers, variables, + - * / ^ !, sqrt and C(n, k), become LaTeX; the others (yes or no, sentences, several values) cannot be
graded by the math verifier and are dropped.
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_megatron.errors import UserError

PACKAGE, INSTALL = "champ_dataset", "pip install --no-deps champ-dataset==1.0.0"
_TOKEN = re.compile(r"\s*(\d+|sqrt(?=\()|C(?=\()|[a-z](?![a-z(])|[-+*/^!(),])")
_NOUNS = "inequalities|values|pairs|roots|times|zeros"


def locate() -> Path:
    """The package's data file. Raises UserError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"CHAMP comes with the package champ-dataset: {INSTALL}")
    return Path(spec.origin).parent / "dataset_files" / "v0.json"


def load(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The problems that can be graded, and how many were dropped. Raises UserError if a file is damaged."""
    problems: list[dict[str, Any]] = []
    dropped = 0
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["problems"]
            for name, row in rows.items():
                answer = latex(row["_raw_answer"])
                if answer is None:
                    dropped += 1
                    continue
                steps = [step["_text"] for step in row["solution"]["steps"]]
                problems.append(
                    {
                        "problem_id": name,
                        "problem": row["_text"],
                        "answer": answer,
                        "reference_solution": "\n".join([*steps, f"The final answer is \\boxed{{{answer}}}"]),
                        "source": "champ",
                    }
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read as CHAMP's data file ({type(error).__name__}): set data.path=null to take the package's ({INSTALL})"
            ) from None
    return problems, {"answer is no number or expression": dropped} if dropped else {}


def latex(answer: str) -> str | None:
    """An answer as LaTeX, None where it is no single number or expression."""
    text = re.sub(r" \(.*\)$", "", re.sub(r",? or (?:equivalently|approximately|an equivalent).*$", "", answer.strip()))
    text = re.sub(r"^(?:The limit exists and is equal to|The only possible value for the limit is|At most) ", "", text)
    text = re.sub(rf" (?:is the only possible value|(?:integer-valued |real-valued )?(?:{_NOUNS}))$", "", text).replace("@@", "")
    if ")(" in text:  # asked to factorise, the expression as it was given would pass
        return None
    try:
        return _Expression(text).read()
    except ValueError:
        return None


class _Expression:
    """Reads an expression by precedence: sum, product, power, factorial, atom. Every method returns LaTeX, or raises ValueError."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        while position < len(text.rstrip()):
            token = _TOKEN.match(text, position)
            if token is None:
                raise ValueError(text)
            self.tokens.append(token[1])
            position = token.end()

    def read(self) -> str:
        found = self.sum()
        if self.tokens:
            raise ValueError(self.tokens)
        return found

    def take(self, *wanted: str) -> str | None:
        return self.tokens.pop(0) if self.tokens and self.tokens[0] in wanted else None

    def need(self, token: str) -> None:
        if self.take(token) is None:
            raise ValueError(token)

    def sum(self) -> str:
        found = (self.take("-") or "") + self.product()
        while sign := self.take("+", "-"):
            found += f" {sign} {self.product()}"
        return found

    def product(self) -> str:
        found = self.power()
        while self.tokens and self.tokens[0] not in ("+", "-", ")", ","):
            if self.take("/"):
                found = rf"\frac{{{found}}}{{{self.power()}}}"
            else:
                self.take("*")
                found += rf" \cdot {self.power()}"
        return found

    def power(self) -> str:
        found = self.factorial()
        return f"{found}^{{{self.exponent()}}}" if self.take("^") else found

    def exponent(self) -> str:
        if self.tokens and self.tokens[0] == "(":
            self.need("(")
            found = self.sum()
            self.need(")")
            return found
        return self.factorial()

    def factorial(self) -> str:
        found = self.atom()
        return f"{found}!" if self.take("!") else found

    def atom(self) -> str:
        if not self.tokens:
            raise ValueError("nothing")
        token = self.tokens.pop(0)
        if token.isdigit() or (token.isalpha() and len(token) == 1 and token.islower()):
            return token
        if token == "(":
            found = rf"({self.sum()})"
        elif token == "sqrt":
            self.need("(")
            found = rf"\sqrt{{{self.sum()}}}"
        elif token == "C":
            self.need("(")
            found = rf"\binom{{{self.sum()}}}"
            self.need(",")
            found += f"{{{self.sum()}}}"
        else:
            raise ValueError(token)
        self.need(")")
        return found
