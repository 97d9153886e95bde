"""linear_kl over two, three and four gloo ranks, against dense_kl in float64 on whole logits. One spawn per world size."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.dist.ranks import run_ranks
from trd_megatron.divergence import Divergence, KLOutput, dense_kl, linear_kl

PADDED = 48  # 24 rows each on two ranks, 16 on three, 12 on four
VOCABS = {2: (27, 24), 3: (35, 15), 4: (39, 19)}  # a last rank with 3 rows, less than top-k 8; then ranks with nothing but padding
TOLERANCE = {torch.float32: (2e-5, 1e-6), torch.float64: (1e-11, 1e-12), torch.bfloat16: (1e-2, 5e-2)}  # relative, absolute
CLIP = {"forward": 0.5, "reverse": 0.5, "jsd": 0.15}


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    vocab: int
    tokens: int
    chunk: int
    extras: bool = True
    train_weight: bool = True
    dtype: torch.dtype = torch.float32
    whole: bool = False  # whole multiples of scale: exact logits, many ties
    identical: bool = False
    scale: float = 1.0


def make_cases(world_size: int) -> list[Case]:
    cases = []
    for vocab in VOCABS[world_size]:
        kinds = [*itertools.product(("forward", "reverse"), (None, 1, 8, vocab)), ("jsd", None)]
        for kind, top_k in kinds:
            for temperature, clip in itertools.product((0.7, 1.0, 2.0), (None, CLIP[kind])):
                divergence = Divergence(kind, beta=0.3, top_k=top_k, clip=clip, temperature=temperature)
                if vocab == VOCABS[world_size][0]:
                    cases += [Case(divergence, vocab, tokens, chunk) for tokens, chunk in ((1, 5), (7, 3), (513, 129))]
            plain = Case(Divergence(kind, top_k=top_k), vocab, 33, 13)
            cases += [
                plain,
                replace(plain, extras=False, train_weight=False),
                replace(plain, dtype=torch.float64),
                replace(plain, identical=True),
                replace(plain, scale=100.0),
                replace(plain, scale=1e4, whole=True),
                replace(plain, tokens=0),
            ]
        cases += [replace(Case(Divergence(kind), vocab, 33, 13), dtype=torch.bfloat16) for kind in CLIP]
        for kind, top_k in itertools.product(("forward", "reverse"), (1, 3, 8, 20)):
            cases.append(Case(Divergence(kind, top_k=top_k, temperature=0.9), vocab, 33, 13, whole=True))
    return cases


def make_problem(case: Case) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(case.tokens + case.vocab)

    def draw(size: float, *shape: int) -> Tensor:
        if case.whole:
            return (torch.randint(-1, 2, shape, generator=rng) * size).to(case.dtype)
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * size).to(case.dtype)

    student = {"student_hidden": draw(1, case.tokens, 4), "student_weight": draw(case.scale, PADDED, 4)}
    teacher = {
        "teacher_hidden": draw(1, case.tokens, 6),
        "teacher_weight": draw((1 if case.whole else 0.7) * case.scale, PADDED, 6),
    }
    if case.identical:
        teacher = {"teacher_hidden": student["student_hidden"], "teacher_weight": student["student_weight"]}
    return (
        student
        | teacher
        | {
            "token_weights": torch.rand(case.tokens, generator=rng),
            "targets": torch.randint(0, case.vocab, (case.tokens,), generator=rng),
            "token_set": [0, case.vocab // 2, case.vocab - 1],
        }
    )


class Recorder(TorchDispatchMode):
    """Counts the collectives by name and notes the largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__.strip("_")] += 1
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def run_case(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    problem = make_problem(case)
    rows = PADDED // world_size
    for name in ("student_weight", "teacher_weight"):
        problem[name] = problem[name][rank * rows : (rank + 1) * rows].clone()
    if not case.extras:
        problem |= {"targets": None, "token_set": None}
    problem["student_hidden"].requires_grad_()
    problem["student_weight"].requires_grad_(case.train_weight)
    with Recorder() as recorder:
        got = linear_kl(**problem, divergence=case.divergence, vocab_size=case.vocab, tp_group=dist.group.WORLD, chunk_tokens=case.chunk)
        (got.loss * 3).backward()
    return {
        "output": {name: None if value is None else value.detach() for name, value in vars(got).items()},
        "hidden_grad": problem["student_hidden"].grad,
        "weight_grad": problem["student_weight"].grad,
        "collectives": recorder.collectives,
        "largest": recorder.largest,
    }


def run_all(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [run_case(rank, world_size, case) for case in make_cases(world_size)]


def reference(case: Case) -> tuple[KLOutput, Tensor, Tensor]:
    problem = make_problem(case)
    leaves = [problem[name].double().requires_grad_() for name in ("student_hidden", "student_weight")]
    padding = torch.arange(PADDED) >= case.vocab
    student = (leaves[0] @ leaves[1].t()).masked_fill(padding, -math.inf)
    teacher = (problem["teacher_hidden"].double() @ problem["teacher_weight"].double().t()).masked_fill(padding, -math.inf)
    per_token = dense_kl(student, teacher, case.divergence)
    loss = (problem["token_weights"].double() * per_token).sum()
    hidden_grad, weight_grad = torch.autograd.grad(loss * 3, leaves)
    logprobs = [x.detach().log_softmax(1).gather(1, problem["targets"][:, None])[:, 0] for x in (student, teacher)]
    mass = teacher.softmax(1)[:, problem["token_set"]].sum(1)
    unclipped = dense_kl(student, teacher, replace(case.divergence, clip=None))
    return KLOutput(loss.detach(), per_token.detach(), unclipped.detach(), *logprobs, mass), hidden_grad, weight_grad


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waking a second thread for tensors this small takes a hundred times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, 3, 4])
def runs(one_thread: None, request: pytest.FixtureRequest) -> list[tuple[Case, list[dict[str, Any]]]]:
    """Each case with its results by rank."""
    by_rank = run_ranks(request.param, run_all, request.param)
    return list(zip(make_cases(request.param), zip(*by_rank, strict=True), strict=True))


def test_values_and_gradients_equal_the_dense_reference(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    for case, ranks in runs:
        relative, absolute = TOLERANCE[case.dtype]
        if case.scale > 1:
            relative, absolute = 1e-3, max(absolute, 1e-6 * case.scale)
        want, hidden_grad, weight_grad = reference(case)
        for name, value in ranks[0]["output"].items():
            if name in ("student_logprob", "teacher_logprob", "teacher_set_mass") and not case.extras:
                assert value is None
                continue
            # A log-probability near 0 is the small difference of two numbers of the size of a logit.
            slack = {"loss": max(1, case.tokens), "student_logprob": 2, "teacher_logprob": 2}.get(name, 1) * absolute
            if name == "loss" and case.dtype == torch.bfloat16:
                slack = 0
            near = torch.isclose(value.double(), getattr(want, name), rtol=relative, atol=slack)
            assert near.all(), (case, name, value, getattr(want, name))
        grads = [(rank["hidden_grad"], hidden_grad) for rank in ranks]
        if case.train_weight:
            grads.append((torch.cat([rank["weight_grad"] for rank in ranks]), weight_grad))
        for got, expected in grads:
            assert got.dtype == case.dtype
            assert got.isfinite().all()
            bar = 2e-2 if case.dtype == torch.bfloat16 else relative
            assert (got.double() - expected).norm() <= bar * expected.norm() + 1e-6 * case.scale, case


def test_every_rank_has_the_same_bits(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    for case, ranks in runs:
        for other in ranks[1:]:
            for name, value in ranks[0]["output"].items():
                assert value is None or torch.equal(value, other["output"][name]), (case, name)
            assert torch.equal(ranks[0]["hidden_grad"], other["hidden_grad"]), case


def test_one_collective_per_chunk_two_for_jsd_and_one_at_the_end(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    for case, ranks in runs:
        chunks = math.ceil(case.tokens / case.chunk)
        gathers = chunks * (2 if case.divergence.kind == "jsd" else 1)
        want = {"allgather": gathers, "allreduce": 1} if chunks else {}
        assert all(rank["collectives"] == want for rank in ranks), (case, ranks[0]["collectives"])


def test_no_rank_holds_more_than_a_chunk_of_logits(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    seen = 0
    for case, ranks in runs:
        if case.tokens == 513 and (case.divergence.top_k or 0) <= 8:
            seen += 1
            limit = max(case.chunk * PADDED // len(ranks), case.chunk * len(ranks) * (2 * (case.divergence.top_k or 0) + 10))
            assert all(rank["largest"] <= limit < 513 * case.vocab for rank in ranks), (case, limit, ranks[0]["largest"])
    assert seen


def test_identical_models_have_zero_divergence(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    for case, ranks in runs:
        if case.identical:
            assert ranks[0]["output"]["unclipped"].abs().sum() <= 1e-6 * case.tokens, asdict(case)


def test_the_tie_cases_have_ties_at_the_border(runs: list[tuple[Case, list[dict[str, Any]]]]) -> None:
    """Otherwise the tests above would say nothing about which of equal logits is taken."""
    for case, ranks in runs:
        k = case.divergence.top_k
        if case.whole and k is not None and k < case.vocab:
            problem = make_problem(case)
            logits = (problem["teacher_hidden"] @ problem["teacher_weight"].t())[:, : case.vocab]
            at_border = logits.topk(k + 1).values[:, -2:]
            holders = (logits == at_border[:, :1]).reshape(case.tokens, -1).float()
            rows = PADDED // len(ranks)
            across = (holders[:, :rows].any(1) & holders[:, rows:].any(1)) if case.vocab > rows else torch.ones(case.tokens).bool()
            assert ((at_border[:, 0] == at_border[:, 1]) & across).any(), case


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("what went wrong")
    dist.barrier()


def test_an_exception_in_a_rank_reaches_the_test() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*fail_on_rank_one.*what went wrong"):
        run_ranks(2, fail_on_rank_one)
