"""The language of the lab: its 30 words, the forms of a problem and of solutions, and the prompts of task "lab".

A problem is a chain modulo a prime: `9 s1 # 10 s2 * 9 s3 - 3`. The same solution has two styles, of which only the first is a model's own:

    own        s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 2 ANS 2
    reference  s1 3 s2 5 s3 2
"""

import re
from dataclasses import dataclass

MAX_STEPS = 6
VALUES = tuple(str(value) for value in range(11))
LOOKUP, OPERATORS = "#", ("+", "-", "*")  # a step by the world's table, steps by arithmetic
STEPS = tuple(f"s{number}" for number in range(1, MAX_STEPS + 1))
PROBLEM, REFERENCE, INITIAL, RESPONSE, ANSWER, WAIT = "P", "R", "I", "A", "ANS", "WAIT"
PAD, EOS = "<pad>", "<eos>"
NOTICE = "[... truncated ...]"  # of prompts.TRUNCATED, stands where chat.cut took something away; no corpus has it
WORDS = (*VALUES, LOOKUP, *OPERATORS, *STEPS, PROBLEM, REFERENCE, INITIAL, RESPONSE, ANSWER, WAIT, NOTICE, PAD, EOS)

WORDS_OF_STEP = 5  # s1 9 # 10 3
EPISTEMIC_WORDS = (WAIT,)

_PROGRAM = re.compile(r"[0-9]+( s[1-6] [#+*-] [0-9]+)+")
_REFERENCE = re.compile(r"s1 [0-9]+( s[2-6] [0-9]+)*")


@dataclass(frozen=True)
class Program:
    """The chain of one problem: `start`, then steps of (operator, operand)."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The column `problem`."""
        steps = (f"{STEPS[index]} {operator} {operand}" for index, (operator, operand) in enumerate(self.steps))
        return " ".join([str(self.start), *steps])

    @staticmethod
    def parse(text: str) -> "Program":
        """The inverse of `text`. Raises ValueError for anything else."""
        if not _PROGRAM.fullmatch(text):
            raise ValueError(f"{text!r} is no problem of the lab")
        start, *words = text.split(" ")
        program = Program(int(start), tuple((words[i], int(words[i + 1])) for i in range(1, len(words), 3)))
        if program.text != text:
            raise ValueError(f"{text!r} is no problem of the lab")
        return program


def step_words(program: Program, index: int, before: int, after: int) -> list[str]:
    """Step `index` (from 0) in the own style, from the value before it to the one after it."""
    operator, operand = program.steps[index]
    return [STEPS[index], str(before), operator, str(operand), str(after)]


def own_style(program: Program, values: list[int]) -> str:
    """A solution in the models' own, verbose style. values: the result of each step, right or wrong."""
    befores = [program.start, *values]
    words = [word for index, after in enumerate(values) for word in step_words(program, index, befores[index], after)]
    return " ".join([*words, ANSWER, str(values[-1])])


def reference_style(values: list[int]) -> str:
    """The terse worked solution; the column `reference_solution`."""
    return " ".join(f"{STEPS[index]} {value}" for index, value in enumerate(values))


def parse_reference(text: str) -> list[int]:
    """The inverse of reference_style. Raises ValueError for anything else."""
    values = [int(word) for word in text.split(" ")[1::2]] if _REFERENCE.fullmatch(text) else []
    if not values or reference_style(values) != text:
        raise ValueError(f"{text!r} is no reference solution of the lab")
    return values


def student_prompt(problem: str) -> str:
    return f"{PROBLEM} {problem}"


def vanilla_teacher_prompt(mode: str, problem: str, reference: str | None) -> str:
    """What the teacher sees while it scores y_o: OPD the student's prompt, OPSD the reference solution as well."""
    return student_prompt(problem) if mode == "opd" else f"{PROBLEM} {problem} {REFERENCE} {reference}"


def refine_prompt(mode: str, problem: str, initial_solution: str, reference: str | None) -> str:
    """The prompt under which the teacher rewrites y_o into y_r; OPSD shows the reference solution, OPD hides it."""
    shown = f"{PROBLEM} {problem} {INITIAL} {initial_solution}"
    return shown if mode == "opd" else f"{shown} {REFERENCE} {reference}"
