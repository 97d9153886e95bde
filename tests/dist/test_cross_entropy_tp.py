"""linear_cross_entropy over two and three gloo ranks against torch's own cross entropy on whole logits."""

import pytest
import torch

from tests.dist.cross_entropy_cases import CASES, TOLERANCE, on_rank, reference
from tests.dist.ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 3])  # small vocabularies leave the last ones with nothing but padding
def test_value_and_gradients_are_those_of_torch(ranks: int) -> None:
    results = run_ranks(ranks, on_rank, CASES)
    for case, *by_rank in zip(CASES, *results, strict=True):
        want = reference(case)
        weight = torch.cat([got[3] for got in by_rank])
        for got in by_rank:
            assert all(torch.equal(mine, first) for mine, first in zip(got[:3], by_rank[0][:3], strict=True))
            for mine, theirs in zip([*got[:3], weight], want, strict=True):
                torch.testing.assert_close(mine, theirs, **TOLERANCE[case.dtype], check_dtype=False)
