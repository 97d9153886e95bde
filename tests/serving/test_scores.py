"""The learner gives the tokens of a real server the log-probabilities that the server gave them."""

import pytest

from tests.serving.conftest import StudentServer
from trd_megatron.config import load
from trd_megatron.scoring_check import Bound, check, wrong

pytestmark = pytest.mark.slow


def test_logprobs_of_a_real_server_are_the_learners(student_server: StudentServer) -> None:
    attached = [
        "engine=sglang",
        "engine.launch=false",
        "engine.device=cpu",
        "engine.dtype=float32",
        f"engine.student.urls=[{student_server.url}]",
    ]
    config = load(["experiment=smoke", *attached])
    said: list[str] = []
    sampled, greedy = check(config, said.append)
    assert said[0] == "sglang draws 16 responses of the student"
    assert (sampled.temperature, sampled.responses, greedy.temperature) == (0.6, 8, 0.0)
    assert sampled.tokens > 100
    assert wrong([sampled, greedy], Bound("maximum", 1e-3)) is None
    assert greedy.top_1 == 1.0
