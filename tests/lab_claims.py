"""What a comparison of lab runs has to show (docs/lab.md): bounds on one section of its report.json."""

from typing import Any

Section = dict[str, Any]


def check(section: Section, *, avg_gain: float = 25, pass_gain: float = 25, avg_lead: float = 20, pass_lead: float = 15) -> None:
    """TRD repairs: of the attempts nearly all; and it leads, by points of Avg@16 and Pass@16 over the base (gain) and over the best
    baseline (lead). The diagnostics show why: on y_o the teacher follows the errors and marks
    them (WAIT), on y_r it knows better."""
    attempts = section["trajectories"]["trd"]
    assert 35 <= attempts["rollouts"]["pass_rate"] <= 55
    assert attempts["refined"]["pass_rate"] >= 95
    joint = attempts["joint_outcomes"]
    assert joint["pass → fail"] <= 0.02 * joint["fail → pass"]

    [table] = section["benchmarks"]
    delta = {method: of["delta"] for method, of in table["methods"].items()}
    assert delta["trd"]["avg_at_k"] >= avg_gain
    assert delta["trd"]["pass_at_k"] >= pass_gain
    assert table["against_best"]["avg_at_k"]["delta"] >= avg_lead
    assert table["against_best"]["pass_at_k"]["delta"] >= pass_lead
    for method in set(delta) - {"trd"}:
        assert -10 <= delta[method]["avg_at_k"] <= 15, method

    on_refined = section["diagnostics"]["trd"]
    assert on_refined["perplexity_gap"] >= 0.05
    for method in set(delta) - {"trd"}:
        on_attempts = section["diagnostics"][method]
        assert on_attempts["perplexity_gap"] <= 0, method
        assert on_attempts["epistemic_mass"] >= 10 * on_refined["epistemic_mass"], method
    assert section["diagnostics"]["forward_kl"]["kl_failed"] < on_refined["kl_failed"]  # the same problems


def check_control(section: Section) -> None:
    """Where the teacher is right whatever prefix it is shown there is nothing to repair: a lead would be a bug."""
    assert abs(section["benchmarks"][0]["against_best"]["avg_at_k"]["delta"]) <= 3
