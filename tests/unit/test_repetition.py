"""Repetition of responses against a plain count over Python lists."""

import random

import numpy as np
import pyarrow as pa
import pytest

from trd_megatron.report import repetition

LARGE = 2**31 - 1  # the largest id that a file can hold


def plain_share(ids: list[int]) -> float:
    grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams)


def plain_loop(ids: list[int]) -> bool:
    return any(ids[-3 * period :] == 3 * ids[-period:] for period in range(2, len(ids) // 3 + 1))


def test_against_a_plain_count() -> None:
    draw = random.Random(0)
    loops = 0
    for _ in range(400):
        alphabet = draw.sample([0, 1, 2, 3, 151_935, LARGE], draw.randint(2, 6))
        ids = draw.choices(alphabet, k=draw.randint(4, 40))
        if draw.random() < 0.4:
            ids += draw.choices(alphabet, k=draw.randint(1, 6)) * draw.randint(2, 4)
        array = np.array(ids, dtype=np.int32)
        assert repetition.repeated_ngrams(array) == pytest.approx(plain_share(ids))
        assert repetition.ends_in_loop(array) == plain_loop(ids)
        loops += plain_loop(ids)
    assert 50 < loops < 350


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([], False),
        ([1, 1], False),
        ([1, 1, 1, 1, 1], False),  # a phrase has two tokens
        ([1, 1, 1, 1, 1, 1], True),
        ([7, 1, 2, 1, 2, 1, 2], True),
        ([7, 1, 2, 1, 2, 1], False),
        ([1, 2, 1, 2, 1, 2, 9], False),  # it found its end
    ],
)
def test_loops(ids: list[int], loop: bool) -> None:
    assert repetition.ends_in_loop(np.array(ids, dtype=np.int32)) is loop


def test_measure_leaves_out_what_is_empty() -> None:
    rows = [[9, 9, 9], [], [1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5], [5, 5]]
    whole = pa.array(rows, pa.list_(pa.int32()))
    expected = {"responses": 3, "repeated_4grams": pytest.approx(100 * (1 / 3 + 0) / 2), "loops": 1, "loop_rate": pytest.approx(100 / 3)}
    assert repetition.measure([whole[1:3], whole[3:]]) == expected  # slices of one array, whose offsets do not start at 0
    assert repetition.measure([whole[1:2]]) == {"responses": 0, "repeated_4grams": None, "loops": 0, "loop_rate": None}
