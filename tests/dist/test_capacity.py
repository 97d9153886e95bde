"""One of the planner's cases, which is held out of its constants, against the real learner's peak; tests/acceptance has all."""

from trd_megatron.capacity import check


def test_the_predicted_memory_is_within_the_bound_of_the_peak() -> None:
    [found] = check.check([case for case in check.CASES if case.name == "every parameter, 2 copies"])
    assert abs(found.error) <= check.BOUND, f"measured {found.measured / 2**30:.2f} GiB, predicted {found.predicted.total / 2**30:.2f}"
