"""Figure 3's curves: gaps, running means, and several methods that can be told apart."""

from typing import Any

import numpy as np
import pytest

from trd_megatron.report import curves


def metrics(steps: int, **more: Any) -> list[dict[str, Any]]:
    line = {"kl_passed": 0.1, "kl_failed": 0.2, "perplexity_gap": -0.5, "epistemic_mass": 0.02} | more
    return [{"step": step, **line} for step in range(1, steps + 1)]


def test_running_mean_leaves_out_what_is_missing() -> None:
    nan = np.nan
    values = np.array([1.0, 2.0, 6.0, nan, 4.0, nan, nan, nan])
    assert np.array_equal(curves.running_mean(values, 3), [1.5, 3, 4, 5, 4, 4, nan, nan], equal_nan=True)
    assert np.array_equal(curves.running_mean(values, 1), values, equal_nan=True)


def test_a_step_without_value_is_a_gap() -> None:
    lines = metrics(9)
    whole = curves.perplexity_gap({"trd": lines})
    lines[4]["perplexity_gap"] = None
    gap = curves.perplexity_gap({"trd": lines})
    assert gap.count("<use ") == whole.count("<use ") - 1  # a marker less
    assert gap.count("M ") == whole.count("M ") + 1  # the line starts a second time


def test_without_any_value_it_says_so() -> None:
    drawn = curves.kl_by_outcome({"trd": metrics(3, kl_passed=None)})
    assert drawn.count("no values") == 1
    assert "no values" not in curves.kl_by_outcome({"trd": metrics(3)})


def test_methods_differ_in_colour_dash_and_marker() -> None:
    names = ["forward_kl", "reverse_kl", "trd", "forward_kl_clip", "reverse_kl_topk"]
    for steps in (10, 100):
        drawn = curves.kl_by_outcome({name: metrics(steps, kl_failed=0.1 * rank) for rank, name in enumerate(names)})
        for name in names:
            assert drawn.count(f">{name}<") == 1  # one legend for both panels
        for colour in ("first", "second", "third", "fourth", "fifth"):
            assert f"var(--{colour})" in drawn
        assert "#0" not in drawn.replace('href="#', "")  # no stand-in of a colour is left
    assert len({look[1] for look in curves.LOOKS}) == len({look[2] for look in curves.LOOKS}) == len(names)
    with pytest.raises(ValueError, match="6 methods"):
        curves.epistemic_mass({str(n): metrics(2) for n in range(6)})


def test_the_mass_is_per_mille() -> None:
    drawn = curves.epistemic_mass({"trd": metrics(5)})
    assert "‰" in drawn
    assert ">20<" in drawn
