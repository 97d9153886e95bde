"""The verdict that every verifier gives on a response."""

from dataclasses import dataclass
from typing import Literal

VerdictKind = Literal["pass", "fail", "no_answer", "timeout", "error"]


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response; `passed`, `verdict` and `extracted_answer` are columns of records.TRAJECTORY.

    passed            True for pass; False for fail, no_answer and timeout; None for error, because a grader that crashes
                      does not make an answer wrong. Whoever averages must count the None apart.
    verdict           pass | fail | no_answer | timeout | error
    extracted_answer  what was graded; None where the response holds no answer
    detail            one line for people: why it failed, empty where there is nothing to add
    """

    passed: bool | None
    verdict: VerdictKind
    extracted_answer: str | None
    detail: str

    @classmethod
    def of(cls, verdict: VerdictKind, extracted_answer: str | None, detail: str = "") -> "Verdict":
        """The verdict with the `passed` that belongs to it."""
        passed = None if verdict == "error" else verdict == "pass"
        return cls(passed, verdict, extracted_answer, detail)
