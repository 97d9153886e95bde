"""Grades responses to problems of any kind: mathematics and the lab's chains by their answer, code by its tests."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any

from trd_megatron import __version__
from trd_megatron.config import VerifyConfig
from trd_megatron.verify import sandbox
from trd_megatron.verify.code import CodeVerifier
from trd_megatron.verify.lab import verify_lab
from trd_megatron.verify.math import MathVerifier
from trd_megatron.verify.verdict import Verdict

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
Item = tuple[Mapping[str, Any], str]  # (row of records.PROBLEM, response)


def kind(problem: Mapping[str, Any]) -> str | None:
    """What a problem is graded as: code where it has tests, math (or lab) where it has an answer, None where it has neither."""
    if problem["task"] == "code":
        return None if problem["tests"] is None else "code"
    if problem["answer"] is None:
        return None
    return "lab" if problem["task"] == "lab" else "math"


def _tests(problem: Mapping[str, Any]) -> Any:
    """The tests of a problem; what is no JSON stays text, which the verifier calls malformed."""
    try:
        return json.loads(problem["tests"])
    except (ValueError, RecursionError):
        return problem["tests"]


class Grader:
    """Grading processes for responses to problems of all kinds; a context manager that leaves none of them behind.

    They start with the first item of their kind; the lab's chains need none.
    """

    def __init__(self, settings: VerifyConfig) -> None:
        self._settings = settings
        self._math = MathVerifier(settings.workers, settings.timeout_s)
        self._code: CodeVerifier | None = None  # made when the first program comes: it looks at what this machine's sandbox can do

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._math.close()
        if self._code is not None:
            self._code.close()

    def facts(self, kinds: set[str]) -> dict[str, Any]:
        """How responses to problems of these kinds are graded: the settings and versions that can change a verdict. For the lab that is
        this package's alone."""
        found: dict[str, Any] = {"trd_megatron": __version__}
        if "math" in kinds:
            found["math"] = {"timeout_s": self._settings.timeout_s}
            for name in LIBRARIES:
                found["math"][name] = metadata.version(name)
        if "code" in kinds:
            code = self._settings.code
            limits = {"timeout_s": code.timeout_s, "total_timeout_s": code.total_timeout_s, "memory_mb": code.memory_mb}
            found["code"] = limits | {"sandbox": sandbox.level().name, "python": sys.version.split()[0]}
        return found

    def grade(self, items: Sequence[Item]) -> Iterator[Verdict | None]:
        """A verdict for each item, in order, as soon as it and those before it are known; None where there is nothing to grade by."""
        kinds = [kind(problem) for problem, _ in items]
        answers = (
            (response, problem["answer"], problem["answer_type"], problem["check_values"])
            for (problem, response), which in zip(items, kinds, strict=True)
            if which == "math"
        )
        programs = ((response, _tests(problem)) for (problem, response), which in zip(items, kinds, strict=True) if which == "code")
        chains = (
            verify_lab(response, problem["answer"]) for (problem, response), which in zip(items, kinds, strict=True) if which == "lab"
        )
        with contextlib.ExitStack() as stack:  # where the caller stops early, what is in the workers' hands is dropped
            verdicts: dict[str, Iterator[Verdict]] = {"math": self._math.verify_many(answers), "lab": chains}
            if "code" in kinds:
                verdicts["code"] = self._programs().verify_many(programs)
            for generator in verdicts.values():
                stack.callback(generator.close)  # type: ignore[attr-defined]
            for which in kinds:
                yield None if which is None else next(verdicts[which])

    def _programs(self) -> CodeVerifier:
        if self._code is None:
            settings = self._settings.code
            self._code = CodeVerifier(
                self._settings.workers, settings.timeout_s, settings.total_timeout_s, settings.memory_mb, settings.allow_unsandboxed
            )
        return self._code
