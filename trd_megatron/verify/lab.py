"""Verification of the lab's responses: pure Python, linear in the length of the text."""

from trd_megatron.lab_text import ANSWER, VALUES, WAIT, WORDS_OF_STEP, Program, own_style, parse_reference
from trd_megatron.verify.verdict import Verdict


def verify_lab(response: str, answer: str) -> Verdict:
    """Grades the value after the last ANS that no later WAIT takes back. answer: the reference answer, a value such as "7"."""
    words = response.split()
    if WAIT in words:
        words = words[len(words) - words[::-1].index(WAIT) :]
    if ANSWER not in words:
        return Verdict.of("no_answer", None, f"no {ANSWER} after the last start")
    found = words[len(words) - words[::-1].index(ANSWER) :][:1]
    if not found or found[0] not in VALUES:
        return Verdict.of("no_answer", None, f"no value after {ANSWER}")
    if answer not in VALUES:
        return Verdict.of("error", found[0], f"the reference answer is none of {', '.join(VALUES)}")
    return Verdict.of("pass" if found[0] == answer else "fail", found[0])


def first_error(problem: str, reference_solution: str, response: str) -> tuple[int, int] | None:
    """(step, word) at which a response first leaves the right solution, None if all that it says is right, finished or not.

    step counts from 0, and the number of steps stands for the answer; word is an index into response.split(). A WAIT before any error only
    starts again. Raises ValueError if the problem's columns are not the lab's.
    """
    program = Program.parse(problem)
    right = own_style(program, parse_reference(reference_solution)).split()
    start = 0
    for word, said in enumerate(response.split()):
        place = word - start
        if said == WAIT and place % WORDS_OF_STEP == 0 and place <= len(program.steps) * WORDS_OF_STEP:
            start = word + 1
        elif place >= len(right) or said != right[place]:
            return min(place // WORDS_OF_STEP, len(program.steps)), word
    return None
