"""Where y_r first leaves y_o, and where a response of the lab first goes wrong: what the report marks in samples side by side."""

import re
from itertools import zip_longest

from trd_megatron.lab_text import ANSWER, STEPS, WAIT, WORDS_OF_STEP, Program
from trd_megatron.report.html import HEAD, TAIL, left_out
from trd_megatron.verify.lab import first_error

Span = tuple[int, int]  # characters of a text: first, one after the last

LONGEST = 240  # characters that are marked
AROUND = 300  # characters shown on each side of a mark that stands in what is left out
_WORD = re.compile(r"\S+")
_LABELS = (*STEPS, ANSWER)


def first_difference(first: str, second: str) -> tuple[int, Span | None, Span | None] | None:
    """(word, place in `first`, place in `second`) from the first word in which they differ to the end of its line; a place is None where
    that text has ended. None if both have the same words. White space is no difference. Linear in the texts' common beginning."""
    for index, words in enumerate(zip_longest(_WORD.finditer(first), _WORD.finditer(second))):
        one, other = words
        if one is None or other is None or one[0] != other[0]:
            places = [found and _line_from(text, found.start()) for text, found in ((first, one), (second, other))]
            return index, places[0], places[1]
    return None


def _line_from(text: str, start: int) -> Span:
    stop = text.find("\n", start, start + LONGEST)
    line = text[start : start + LONGEST if stop < 0 else stop]
    return start, start + len(line.rstrip())


def wrong_step(problem: str, reference_solution: str, response: str) -> tuple[int, Span] | None:
    """(step, its place) at which a response of the lab first goes wrong; step is as in verify.lab.first_error, which see."""
    found = first_error(problem, reference_solution, response)
    if found is None:
        return None
    step, word = found
    words = list(_WORD.finditer(response))
    name = _name(problem, step)
    begun = [index for index in range(max(word - WORDS_OF_STEP + 1, 0), word + 1) if words[index][0] == name]
    first = begun[-1] if begun else word  # its very name may be what is wrong
    return step, _step_from(words, first, word)


def _name(problem: str, step: int) -> str:
    """What a step begins with: s1, s2, ..., and ANS for the answer, which is the step after the last."""
    return STEPS[step] if step < len(Program.parse(problem).steps) else ANSWER


def _step_from(words: list[re.Match[str]], first: int, past: int) -> Span:
    """From one word to the last before the next step, which begins after `past`."""
    last = first
    for index in range(first + 1, min(first + WORDS_OF_STEP, len(words))):
        if index > past and words[index][0] in (*_LABELS, WAIT):
            break
        last = index
    return words[first].start(), words[last].end()


def same_step(problem: str, response: str, step: int) -> Span | None:
    """Where a response of the lab has that step, after its last WAIT; None where it has it not."""
    words = list(_WORD.finditer(response))
    texts = [word[0] for word in words]
    start = len(texts) - texts[::-1].index(WAIT) if WAIT in texts else 0
    name = _name(problem, step)
    if name not in texts[start:]:
        return None
    first = texts.index(name, start)
    return _step_from(words, first, first)


def pieces(text: str, span: Span | None) -> list[tuple[str, bool]]:
    """(part of the text, whether it is marked), the parts in their order. Of a very long text the head, the tail and what is around the
    mark, with notes of what is left out."""
    start, stop = span or (0, 0)
    shown = [(0, len(text))]
    if len(text) > HEAD + TAIL:
        shown = [(0, HEAD), (max(start - AROUND, 0), min(stop + AROUND, len(text))), (len(text) - TAIL, len(text))]
    parts: list[tuple[str, bool]] = []
    done = 0
    for first, last in sorted(shown):
        if first > done:
            parts.append((f"\n\n{left_out(first - done)}\n\n", False))
            done = first
        for upto, marked in ((start, False), (stop, True), (last, False)):
            upto = min(upto, last)
            if upto > done:
                parts.append((text[done:upto], marked))
                done = upto
    return parts
