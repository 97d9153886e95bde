"""What is marked in samples side by side."""

import pytest

from trd_megatron.report import differences
from trd_megatron.report.html import HEAD, TAIL, cut

PROBLEM, REFERENCE = "9 s1 # 10 s2 * 9 s3 - 3", "s1 3 s2 5 s3 2"
RIGHT = "s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 2 ANS 2"


def at(text: str, span: differences.Span | None) -> str | None:
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(
    ("first", "second", "word", "marked"),
    [
        ("One.\nTwo is 3.\nEnd", "One.\nTwo is 2.\nEnd", 3, ("3.", "2.")),
        ("a  b\n c", "a b c d e \n f", 3, (None, "d e")),
        ("a b", "a", 1, ("b", None)),
        ("x " * 300, "y " * 300, 0, (("x " * 120).strip(), ("y " * 120).strip())),
        ("", "a", 0, (None, "a")),
    ],
)
def test_first_difference(first: str, second: str, word: int, marked: tuple[str | None, str | None]) -> None:
    found = differences.first_difference(first, second)
    assert found is not None
    assert (found[0], at(first, found[1]), at(second, found[2])) == (word, *marked)


def test_white_space_is_no_difference() -> None:
    assert differences.first_difference("a b\n", " a\t\nb") is None
    assert differences.first_difference("", " ") is None


@pytest.mark.parametrize(
    ("response", "step", "marked"),
    [
        ("s1 9 # 10 4 s2 4 * 9 3 s3 3 - 3 0 ANS 0", 0, "s1 9 # 10 4"),
        ("s1 9 # 10 3 s2 3 * 9 6 s3 6 - 3 3 ANS 3", 1, "s2 3 * 9 6"),
        ("s1 9 # 10 3 s2 3 + 9 1 WAIT " + RIGHT, 1, "s2 3 + 9 1"),
        ("s1 9 # 10 3 s3 3 * 9 5", 1, "s3 3 * 9 5"),  # the label itself is wrong
        ("s1 9 # 10 3 WAIT s1 9 # 10 3 s2 3 * 9 WAIT", 1, "s2 3 * 9 WAIT"),  # it may only take back whole steps
        (RIGHT[:-1] + "5", 3, "ANS 5"),
        (RIGHT + " 7 s1", 3, "ANS 2 7"),
        ("ANS 2", 0, "ANS 2"),
        ("7 7 7", 0, "7 7 7"),
    ],
)
def test_wrong_steps_of_the_lab(response: str, step: int, marked: str) -> None:
    found = differences.wrong_step(PROBLEM, REFERENCE, response)
    assert found is not None
    assert (found[0], at(response, found[1])) == (step, marked)


def test_what_is_right_has_no_wrong_step() -> None:
    assert differences.wrong_step(PROBLEM, REFERENCE, RIGHT) is None
    assert differences.wrong_step(PROBLEM, REFERENCE, RIGHT[:9]) is None


def test_the_same_step_elsewhere() -> None:
    again = f"s1 9 # 10 4 WAIT {RIGHT}"
    for response, before in ((RIGHT, 0), (again, len(again) - len(RIGHT))):
        for step, words in ((0, "s1 9 # 10 3"), (2, "s3 5 - 3 2"), (3, "ANS 2")):
            span = differences.same_step(PROBLEM, response, step)
            assert at(response, span) == words
            assert span is not None and span[0] >= before
    assert differences.same_step(PROBLEM, "s1 9 # 10 3", 1) is None
    assert differences.same_step(PROBLEM, RIGHT + " WAIT", 1) is None


def test_pieces_hold_the_whole_of_a_short_text() -> None:
    assert differences.pieces("abcdef", (2, 4)) == [("ab", False), ("cd", True), ("ef", False)]
    assert differences.pieces("abcdef", (0, 6)) == [("abcdef", True)]
    assert differences.pieces("abc", None) == [("abc", False)]
    assert differences.pieces("", None) == []


def test_a_mark_in_the_middle_of_a_long_text_is_shown() -> None:
    text = "".join(f"{number:9d} " for number in range(5000))
    assert "".join(part for part, _ in differences.pieces(text, None)) == cut(text)
    parts = differences.pieces(text, (20_000, 20_009))
    shown = "".join(part for part, _ in parts)
    assert [part for part, marked in parts if marked] == ["     2000"]
    assert (text[:HEAD] in shown, text[-TAIL:] in shown, shown.count("characters left out")) == (True, True, 2)
    for span in ((10, 20), (HEAD - 5, HEAD + 5), (len(text) - TAIL - 5, len(text) - TAIL + 5), (len(text) - 3, len(text))):
        parts = differences.pieces(text, span)
        assert "".join(part for part, marked in parts if marked) == text[slice(*span)]
        assert sum("characters left out" in part for part, _ in parts) == 1
