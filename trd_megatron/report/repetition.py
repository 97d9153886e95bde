"""How much of responses repeats itself, from their token ids.

The paper names repetition loops among the prefixes on which a teacher is of no use, and measures none: these are two usual figures.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

N = 4  # tokens of an n-gram
SHORTEST, TIMES = 2, 3  # a phrase of at least so many tokens, so many times in a row

Ids = NDArray[np.integer[Any]]


def repeated_ngrams(ids: Ids) -> float | None:
    """Share of a response's 4-grams that stand in it before, 1 - different / all, between 0 and 1: seq-rep-4 of Welleck et al., 2020,
    "Neural text generation with unlikelihood training". None where it has no 4-gram."""
    if len(ids) < N:
        return None
    grams = ids.astype(np.int64)
    for width in (1, 2):  # from n-grams to 2n-grams, each numbered: exact, which hashes are not
        pairs = grams[:-width] * (grams.max() + 1) + grams[width:]
        different, grams = np.unique(pairs, return_inverse=True)
    return 1 - len(different) / len(grams)


def ends_in_loop(ids: Ids) -> bool:
    """Whether a response ends with a phrase of at least two tokens that stands there three times in a row or more, the repetition that
    Holtzman et al., 2020, "The curious case of neural text degeneration" count. One that an end-of-turn token ended is in no loop."""
    periods = np.arange(1, len(ids) // TIMES + 1)
    # Of a loop the last token stands a period and two periods earlier too.
    likely = (ids[len(ids) - 1 - periods] == ids[-1:]) & (ids[len(ids) - 1 - 2 * periods] == ids[-1:])
    return any(
        np.array_equal(ids[len(ids) - (TIMES - 1) * period :], ids[len(ids) - TIMES * period : len(ids) - period])
        for period in periods[likely].tolist()
        if period >= SHORTEST
    )


def measure(batches: Iterable[pa.ListArray]) -> dict[str, Any]:
    """Over all responses of these batches of token ids (but for those without any, which were aborted): how many they are, the mean of
    their repeated_ngrams and the share that ends in a loop, in percent; None where there is nothing to divide by."""
    responses = loops = 0
    shares: list[float] = []
    for batch in batches:
        ids, offsets = batch.values.to_numpy(), batch.offsets.to_numpy()
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            if start == stop:
                continue
            response = ids[start:stop]
            responses += 1
            loops += ends_in_loop(response)
            if (share := repeated_ngrams(response)) is not None:
                shares.append(share)
    return {
        "responses": responses,
        "repeated_4grams": 100 * sum(shares) / len(shares) if shares else None,
        "loops": loops,
        "loop_rate": 100 * loops / responses if responses else None,
    }
