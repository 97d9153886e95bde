"""linear_cross_entropy against torch's own cross entropy on whole logits, value and gradients; over ranks in tests/dist."""

import pytest
import torch

from tests.dist.cross_entropy_cases import CASES, TOLERANCE, Case, ours, problem, reference
from trd_megatron.divergence import linear_cross_entropy, triton_kernels


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_torch(case: Case) -> None:
    for mine, theirs in zip(ours(case), reference(case), strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[case.dtype], check_dtype=False)


@pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="triton compiles for the GPU here")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_do_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "TILE", 16)  # the vocabulary is three tiles, the last one cut
    case = Case(tokens=5, vocab=41, chunk=3, dtype=dtype)
    for mine, theirs in zip(ours(case, backend="triton"), reference(case), strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[dtype], check_dtype=False)


def test_a_sure_student_costs_nothing_and_a_wrong_one_what_the_logits_say() -> None:
    hidden = torch.eye(3)
    weights = torch.full((3,), 1.0, dtype=torch.float64)
    output = linear_cross_entropy(hidden, 1e4 * torch.eye(3), torch.tensor([0, 1, 0]), token_weights=weights)
    assert output.per_token.tolist() == [0.0, 0.0, 1e4]
    assert output.loss.item() == 1e4
    assert output.teacher_logprob is not None
    assert output.teacher_logprob.tolist() == [0.0] * 3
    assert output.teacher_set_mass is None


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets, weights = problem(Case())
    for wrong, message in (
        ({"targets": targets + 40}, "targets has ids from"),
        ({"targets": targets[1:]}, "one id per token"),
        ({"targets": targets.int()}, "ids are int64"),
        ({"token_weights": weights[1:]}, "token_weights has shape"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"hidden": hidden.double(), "weight": weight.double(), "backend": "triton"}, "'triton' computes in float32"),
    ):
        given = {"hidden": hidden, "weight": weight, "targets": targets, "token_weights": weights, "vocab_size": 41} | wrong
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**given)
