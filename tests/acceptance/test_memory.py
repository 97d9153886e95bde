"""The planner's memory within its bound of the real learner's peaks, all cases (`trd bench memory`)."""

import pytest

from trd_megatron.capacity import check


@pytest.mark.acceptance
@pytest.mark.parametrize("case", check.CASES, ids=lambda case: case.name)
def test_the_prediction_is_within_the_bound(case: check.Case) -> None:
    [found] = check.check([case])
    if case.outside:  # known: on the safe side
        assert 0 < found.error <= 0.25, f"{found.error:+.1%}"
        return
    assert abs(found.error) <= check.BOUND, f"measured {found.measured / 2**30:.2f} GiB, predicted {found.predicted.total / 2**30:.2f}"
