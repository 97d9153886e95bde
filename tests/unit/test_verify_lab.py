"""The lab's verifier on hand-made cases and hostile text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trd_megatron.lab_text import WORDS
from trd_megatron.verify.lab import first_error, verify_lab

PROBLEM, REFERENCE = "9 s1 # 10 s2 * 9 s3 - 3", "s1 3 s2 5 s3 2"
RIGHT = "s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 2 ANS 2"


@pytest.mark.parametrize(
    ("response", "verdict", "extracted"),
    [
        (RIGHT, "pass", "2"),
        ("ANS 2", "pass", "2"),
        (RIGHT[:-1] + "10", "fail", "10"),
        ("ANS 3 ANS 2", "pass", "2"),
        ("ANS 2 ANS 3", "fail", "3"),
        ("ANS 7 WAIT " + RIGHT, "pass", "2"),
        ("s1 9 # 10 4 WAIT s1 9 # 10 5 WAIT " + RIGHT, "pass", "2"),
        (RIGHT + " WAIT", "no_answer", None),  # taken back
        (RIGHT + " WAIT s1 9 # 10 3", "no_answer", None),
        ("", "no_answer", None),
        ("s1 9 # 10 3", "no_answer", None),
        ("ANS", "no_answer", None),
        ("ANS 2 ANS", "no_answer", None),
        ("ANS s1", "no_answer", None),
        ("ANS 11", "no_answer", None),
        ("ANS 02", "no_answer", None),
        ("ANS ٢", "no_answer", None),  # a digit that int() reads as 2
        ("ANS -2", "no_answer", None),
        ("ANS2", "no_answer", None),
        ("\\boxed{2}", "no_answer", None),
        ("<script>ANS 2</script> ANS 2", "pass", "2"),
    ],
)
def test_verdicts(response, verdict, extracted):
    found = verify_lab(response, "2")
    assert (found.verdict, found.extracted_answer) == (verdict, extracted)
    assert found.passed is (verdict == "pass")


def test_a_wrong_reference_answer_is_the_graders_error():
    found = verify_lab("ANS 2", "two")
    assert (found.verdict, found.passed) == ("error", None)
    assert "reference answer" in found.detail


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (RIGHT, None),
        ("", None),
        ("s1 9 # 10 3 s2", None),  # unfinished, nothing wrong so far
        ("s1 9 # 10 4 s2 4 * 9 3", (0, 4)),
        ("s1 9 # 10 3 s2 3 * 9 6 s3 6 - 3 3 ANS 3", (1, 9)),
        ("s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 1 ANS 1", (2, 14)),
        (RIGHT[:-1] + "3", (3, 16)),
        (RIGHT + " ANS", (3, 17)),
        ("s1 9 # 10 3 s2 4 * 9 3", (1, 6)),  # a step that starts from another value
        ("s1 9 # 10 3 s3 3 - 3 0", (1, 5)),  # a step left out
        ("s1 9 # 10 4 WAIT " + RIGHT, (0, 4)),  # the first one counts, mended or not
        ("s1 9 # 10 3 WAIT " + RIGHT, None),
        ("s1 9 # 10 3 WAIT s1 9 # 10 8", (0, 10)),
        ("s1 9 WAIT " + RIGHT, (0, 2)),  # not at a step's end
        (RIGHT + " WAIT", (3, 17)),  # nor after the answer
        ("hello", (0, 0)),
    ],
)
def test_the_first_error(response, expected):
    assert first_error(PROBLEM, REFERENCE, response) == expected


def test_the_first_error_of_a_problem_of_another_task():
    with pytest.raises(ValueError, match="no problem of the lab"):
        first_error("What is 2 + 2?", REFERENCE, RIGHT)
    with pytest.raises(ValueError, match="no reference solution"):
        first_error(PROBLEM, "2 + 2 = 4", RIGHT)


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_no_text_breaks_it(text):
    assert verify_lab(text, "2").verdict in ("pass", "fail", "no_answer")
    first_error(PROBLEM, REFERENCE, text)


def test_long_texts_take_linear_time():
    started = time.monotonic()
    for words in (["ANS"], ["WAIT"], ["ANS", "2"], ["WAIT", "ANS"], ["s1", "9", "#", "10", "3", "WAIT"]):
        text = " ".join(words * 200_000)
        verify_lab(text, "2")
        first_error(PROBLEM, REFERENCE, text)
    assert time.monotonic() - started < 60  # quadratic time would be hours
