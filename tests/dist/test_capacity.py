"""Two of the planner's cases against the real learner's peaks; tests/acceptance has all."""

import pytest

from trd_megatron.capacity import check


@pytest.mark.parametrize("name", ["adapters, full recomputation", "every parameter, 2 copies"])
def test_the_predicted_memory_is_within_the_bound_of_the_peak(name: str) -> None:
    [found] = check.check([case for case in check.CASES if case.name == name])
    assert abs(found.error) <= check.BOUND, f"measured {found.measured / 2**30:.2f} GiB, predicted {found.predicted.total / 2**30:.2f}"
