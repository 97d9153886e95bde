"""linear_kl against dense_kl in float64 with autograd, dense_kl against numbers worked out by hand."""

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trd_megatron.divergence import Divergence, KLOutput, dense_kl, linear_kl
from trd_megatron.divergence.dense import top_k_ids

VOCAB, PADDED, STUDENT_HIDDEN, TEACHER_HIDDEN = 41, 48, 6, 9
CLIP = {"forward": 0.5, "reverse": 0.5, "jsd": 0.15}  # holds for some tokens of the grid and not for others
KINDS_AND_TOP_K = [*itertools.product(("forward", "reverse"), (None, 1, 8, VOCAB)), ("jsd", None)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waking a second thread for tensors this small takes a hundred times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_problem(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Random models whose logits have a standard deviation of about 2."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": normal(tokens, STUDENT_HIDDEN).requires_grad_(),
        "student_weight": (normal(PADDED, STUDENT_HIDDEN) * 0.8).requires_grad_(),
        "teacher_hidden": normal(tokens, TEACHER_HIDDEN),
        "teacher_weight": normal(PADDED, TEACHER_HIDDEN) * 0.6,
        "token_weights": torch.rand(tokens, generator=rng),
        "targets": torch.randint(0, VOCAB, (tokens,), generator=rng),
        "token_set": [0, 3, 3, VOCAB - 1],
        "vocab_size": VOCAB,
    }


def reference(problem: dict[str, Any], divergence: Divergence) -> tuple[KLOutput, Tensor, Tensor]:
    """The same in float64 from whole logits; the output and the gradients of hidden states and weight."""
    leaves = [problem[name].detach().double().requires_grad_() for name in ("student_hidden", "student_weight")]
    student = leaves[0] @ leaves[1].t()
    teacher = problem["teacher_hidden"].double() @ problem["teacher_weight"].double().t()
    padding = torch.arange(student.shape[1]) >= problem["vocab_size"]
    student, teacher = student.masked_fill(padding, -math.inf), teacher.masked_fill(padding, -math.inf)
    per_token = dense_kl(student, teacher, divergence)
    unclipped = dense_kl(student, teacher, Divergence(**{**vars(divergence), "clip": None}))
    loss = (problem["token_weights"].double() * per_token).sum()
    grads = torch.autograd.grad(loss, leaves)
    logprobs = [x.detach().log_softmax(1).gather(1, problem["targets"][:, None])[:, 0] for x in (student, teacher)]
    mass = teacher.softmax(1)[:, sorted(set(problem["token_set"]))].sum(1)
    return KLOutput(loss.detach(), per_token.detach(), unclipped.detach(), *logprobs, mass), *grads


def assert_near(got: Tensor, want: Tensor, relative: float, absolute: float) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=relative, atol=absolute)


def assert_gradient(got: Tensor | None, want: Tensor, relative: float, absolute: float = 1e-9) -> None:
    assert got is not None
    assert got.isfinite().all()
    assert (got.double() - want).norm() <= relative * want.norm() + absolute


def check(problem: dict[str, Any], divergence: Divergence, chunk: int, relative: float = 2e-5, absolute: float = 1e-6) -> None:
    for name in ("student_hidden", "student_weight"):
        problem[name].grad = None
    got = linear_kl(**problem, divergence=divergence, chunk_tokens=chunk)
    got.loss.backward()
    want, hidden_grad, weight_grad = reference(problem, divergence)
    assert_near(got.loss.detach(), want.loss, relative, absolute * max(1, len(want.per_token)))
    for name in ("per_token", "unclipped", "student_logprob", "teacher_logprob", "teacher_set_mass"):
        assert not getattr(got, name).requires_grad
        assert_near(getattr(got, name), getattr(want, name), relative, max(absolute, 2e-6) if "logprob" in name else absolute)
    assert_gradient(problem["student_hidden"].grad, hidden_grad, relative, absolute)
    assert_gradient(problem["student_weight"].grad, weight_grad, relative, absolute)
    assert not problem["student_weight"].grad[problem["vocab_size"] :].any()


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_linear_kl_equals_the_float64_reference(kind: Any, top_k: int | None) -> None:
    for tokens, chunks in ((1, (5,)), (7, (1, 3, 256)), (513, (37, 512))):
        problem = make_problem(tokens, seed=tokens)
        for temperature, clip, chunk in itertools.product((0.7, 1.0, 2.0), (None, CLIP[kind]), chunks):
            check(problem, Divergence(kind, beta=0.3, top_k=top_k, clip=clip, temperature=temperature), chunk)


@pytest.mark.parametrize("kind", CLIP)
def test_the_clip_of_the_grid_holds_for_some_tokens_and_not_for_others(kind: Any) -> None:
    divergence = Divergence(kind, beta=0.3, clip=CLIP[kind], temperature=2.0)
    got = linear_kl(**make_problem(513, seed=513), divergence=divergence)
    assert 50 < int((got.unclipped > CLIP[kind]).sum()) < 463
    assert torch.equal(got.per_token, got.unclipped.clamp(max=CLIP[kind]))


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_float64_stays_float64(kind: Any, top_k: int | None) -> None:
    check(make_problem(7, torch.float64), Divergence(kind, top_k=top_k, temperature=1.3), 3, relative=1e-12, absolute=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_several_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trd_megatron.divergence.products._COLUMNS", 7)
    monkeypatch.setattr(sys.modules["trd_megatron.divergence.linear_kl"], "_ROWS", 5)
    bars = (2e-5, 1e-6) if dtype == torch.float32 else (2e-2, 5e-2)
    check(make_problem(9, dtype), Divergence("reverse"), 4, *bars)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_bfloat16(kind: Any) -> None:
    problem = make_problem(65, torch.bfloat16)
    got = linear_kl(**problem, divergence=Divergence(kind), chunk_tokens=16)
    got.loss.backward()
    want, hidden_grad, weight_grad = reference(problem, Divergence(kind))
    assert got.per_token.dtype == torch.float32
    assert_near(got.loss.detach(), want.loss, 1e-2, 0)
    assert problem["student_hidden"].grad.dtype == problem["student_weight"].grad.dtype == torch.bfloat16
    assert_gradient(problem["student_hidden"].grad, hidden_grad, 2e-2)
    assert_gradient(problem["student_weight"].grad, weight_grad, 2e-2)


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_identical_models_have_zero_divergence(kind: Any, top_k: int | None, temperature: float) -> None:
    problem = make_problem(33)
    problem |= {"teacher_hidden": problem["student_hidden"].detach(), "teacher_weight": problem["student_weight"].detach()}
    got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k, temperature=temperature), chunk_tokens=7)
    got.loss.backward()
    assert got.unclipped.abs().max() <= 1e-6
    assert problem["student_hidden"].grad.abs().max() <= 1e-6


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_logits_of_ten_thousand(kind: Any, top_k: int | None) -> None:
    """Hidden size 1 and hidden state 1: the logits are the weights, exact in both precisions."""
    rng = torch.Generator().manual_seed(3)
    for scale in (100.0, 1e4):
        problem = make_problem(4) | {
            "student_hidden": torch.tensor([[1.0], [-1.0], [0.5], [0.0]], requires_grad=True),
            "student_weight": ((torch.rand(PADDED, 1, generator=rng) * 2 - 1) * scale).requires_grad_(),
            "teacher_hidden": torch.tensor([[1.0], [1.0], [0.0], [-1.0]]),
            "teacher_weight": (torch.rand(PADDED, 1, generator=rng) * 2 - 1) * scale,
        }
        check(problem, Divergence(kind, top_k=top_k), 3, relative=1e-3, absolute=1e-3)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_opposite_one_hot_models(kind: Any) -> None:
    problem = make_problem(1) | {
        "student_hidden": torch.ones(1, 1, requires_grad=True),
        "student_weight": torch.tensor([[1e4], [-1e4]], requires_grad=True),
        "teacher_hidden": torch.ones(1, 1),
        "teacher_weight": torch.tensor([[-1e4], [1e4]]),
        "targets": torch.tensor([1]),
        "token_set": [1],
        "vocab_size": 2,
        "token_weights": torch.ones(1),
    }
    got = linear_kl(**problem, divergence=Divergence(kind, beta=0.25))
    got.loss.backward()
    jsd = 0.25 * math.log(1 / 0.25) + 0.75 * math.log(1 / 0.75)
    assert got.per_token.item() == pytest.approx(jsd if kind == "jsd" else 2e4, rel=1e-6)
    assert got.student_logprob.item() == -2e4
    assert got.teacher_logprob.item() == 0
    assert got.teacher_set_mass.item() == 1
    want = torch.tensor([[1.0], [-1.0]]) if kind == "forward" else torch.zeros(2, 1)
    assert_near(problem["student_weight"].grad, want, 0, 1e-6)


def test_a_vocabulary_of_one_word() -> None:
    problem = make_problem(5) | {"vocab_size": 1, "targets": torch.zeros(5, dtype=torch.long), "token_set": [0]}
    for kind in ("forward", "reverse", "jsd"):
        got = linear_kl(**problem, divergence=Divergence(kind))
        assert not got.per_token.any()
        assert not torch.autograd.grad(got.loss, problem["student_hidden"])[0].any()


def test_zero_weights_and_clipped_rows_have_no_gradient() -> None:
    for kind, top_k in KINDS_AND_TOP_K:
        problem = make_problem(9)
        got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k, clip=1e-9), chunk_tokens=4)
        got.loss.backward()
        if top_k != 1:
            assert (got.per_token == torch.tensor(1e-9)).all()
            assert (got.unclipped > 1e-3).all()
        assert not problem["student_hidden"].grad.any()
        assert not problem["student_weight"].grad.any()
        problem = make_problem(9) | {"token_weights": torch.tensor([0.0, 1.0, 0.0] * 3)}
        got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k), chunk_tokens=4)
        got.loss.backward()
        assert not problem["student_hidden"].grad[problem["token_weights"] == 0].any()
        assert got.per_token.isfinite().all()  # rows of weight 0 are computed all the same


def test_upstream_gradient_scales_and_backward_can_run_twice() -> None:
    problem = make_problem(7)
    loss = linear_kl(**problem, divergence=Divergence("reverse")).loss
    once = torch.autograd.grad(loss, [problem["student_hidden"], problem["student_weight"]], retain_graph=True)
    scaled = torch.autograd.grad(loss * -2.5, [problem["student_hidden"], problem["student_weight"]])
    for one, other in zip(once, scaled, strict=True):
        assert_near(other, one * -2.5, 1e-6, 0)


def test_no_tokens() -> None:
    problem = make_problem(0)
    got = linear_kl(**problem, divergence=Divergence("jsd"))
    got.loss.backward()
    assert got.loss.item() == 0
    assert got.per_token.shape == got.teacher_set_mass.shape == (0,)
    assert problem["student_hidden"].grad.shape == (0, STUDENT_HIDDEN)
    assert not problem["student_weight"].grad.any()


def test_extras_are_none_unless_asked_for() -> None:
    problem = make_problem(3) | {"targets": None, "token_set": None}
    got = linear_kl(**problem, divergence=Divergence("forward", temperature=2.0))
    assert got.student_logprob is got.teacher_logprob is got.teacher_set_mass is None
    assert not linear_kl(**problem | {"token_set": []}, divergence=Divergence("forward")).teacher_set_mass.any()


class Recorder(TorchDispatchMode):
    """Notes the largest tensor that any operation gives back and counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
            torch.ops.mkldnn._linear_pointwise,
        )
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_matrix_products(kind: Any, top_k: int | None, dtype: torch.dtype) -> None:
    """Nothing of the size of [T, V]; three products per chunk, a fourth for a trained output layer, two without a gradient."""
    tokens, chunk = 60, 5
    divergence = Divergence(kind, top_k=top_k, temperature=1.5)
    for train_hidden, train_weight, products in ((True, False, 3), (True, True, 4), (False, True, 3), (False, False, 2)):
        problem = make_problem(tokens, dtype)
        problem["student_hidden"].requires_grad_(train_hidden)
        problem["student_weight"].requires_grad_(train_weight)
        with Recorder() as recorder:
            got = linear_kl(**problem, divergence=divergence, chunk_tokens=chunk)
            if train_hidden or train_weight:
                got.loss.backward()
        assert recorder.products == products * tokens // chunk
        assert recorder.largest <= max(chunk * PADDED, tokens * TEACHER_HIDDEN, PADDED * TEACHER_HIDDEN) < tokens * VOCAB / 4
        assert got.loss.requires_grad == (train_hidden or train_weight)
    with Recorder() as recorder, torch.no_grad():
        assert not linear_kl(**make_problem(tokens, dtype), divergence=divergence, chunk_tokens=chunk).loss.requires_grad
    assert recorder.products == 2 * tokens // chunk


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Small whole numbers as hidden states and weights: exact logits, many ties."""
    tokens, vocab = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    rows = vocab + data.draw(st.integers(0, 4))
    kind = data.draw(st.sampled_from(["forward", "reverse", "jsd"]))
    divergence = Divergence(
        kind,
        beta=data.draw(st.sampled_from([0.05, 0.5, 0.9])),
        top_k=None if kind == "jsd" else data.draw(st.none() | st.integers(1, 12)),
        clip=data.draw(st.sampled_from([None, 0.05, 1.0])),
        temperature=data.draw(st.sampled_from([0.5, 1.0, 3.0])),
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    student_size, teacher_size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=rng).double()

    problem = {
        "student_hidden": whole(tokens, student_size).requires_grad_(),
        "student_weight": whole(rows, student_size).requires_grad_(),
        "teacher_hidden": whole(tokens, teacher_size),
        "teacher_weight": whole(rows, teacher_size),
        "token_weights": torch.rand(tokens, generator=rng),
        "targets": torch.randint(0, vocab, (tokens,), generator=rng),
        "token_set": data.draw(st.lists(st.integers(0, vocab - 1))),
        "vocab_size": vocab,
    }
    check(problem, divergence, data.draw(st.integers(1, 7)), relative=1e-10, absolute=1e-12)
    assert linear_kl(**problem, divergence=divergence).unclipped.min() >= -1e-12


# dense_kl itself


P, Q = (0.7, 0.2, 0.1), (0.3, 0.3, 0.4)  # teacher, student


def by_hand(kind: str, p: tuple[float, ...], q: tuple[float, ...], beta: float) -> float:
    def kl(x: tuple[float, ...], y: tuple[float, ...]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))

    mixture = tuple((1 - beta) * b + beta * a for a, b in zip(p, q, strict=True))
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)}[kind]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_by_hand(kind: Any, dtype: torch.dtype) -> None:
    teacher, student = torch.tensor([P], dtype=dtype).log() + 3, torch.tensor([Q], dtype=dtype).log() - 1
    want = by_hand(kind, P, Q, 0.3)
    got = dense_kl(student, teacher, Divergence(kind, beta=0.3))
    assert got.dtype == dtype
    assert got.item() == pytest.approx(want, rel=1e-5)
    assert dense_kl(student * 2, teacher * 2, Divergence(kind, beta=0.3, temperature=2.0)).item() == pytest.approx(want, rel=1e-5)
    assert dense_kl(student, teacher, Divergence(kind, clip=want / 9)).item() == pytest.approx(want / 9)


def test_dense_top_k_by_hand() -> None:
    teacher, student = torch.tensor([P]).double().log(), torch.tensor([Q]).double().log()
    p, q = (0.7 / 0.9, 0.2 / 0.9), (0.5, 0.5)
    for kind in ("forward", "reverse"):
        assert dense_kl(student, teacher, Divergence(kind, top_k=2)).item() == pytest.approx(by_hand(kind, p, q, 0.5))
        assert dense_kl(student, teacher, Divergence(kind, top_k=1)).item() == 0
        assert dense_kl(student, teacher, Divergence(kind, top_k=99)).item() == pytest.approx(by_hand(kind, P, Q, 0.5))


@pytest.mark.parametrize(("kind", "top_k"), [*KINDS_AND_TOP_K, ("forward", PADDED), ("reverse", PADDED)])
def test_dense_ignores_padding(kind: Any, top_k: int | None) -> None:
    rng = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, VOCAB, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tail = torch.full((3, PADDED - VOCAB), -math.inf, dtype=torch.float64)
    divergence = Divergence(kind, top_k=top_k)
    padded = dense_kl(torch.cat([student, tail], 1), torch.cat([teacher, tail], 1), divergence)
    plain = dense_kl(student, teacher, divergence)
    torch.testing.assert_close(padded, plain)
    for one, other in zip(
        torch.autograd.grad(padded.sum(), [student, teacher]), torch.autograd.grad(plain.sum(), [student, teacher]), strict=True
    ):
        torch.testing.assert_close(one, other)
    leaf = torch.cat([student.detach(), tail], 1).requires_grad_()
    dense_kl(leaf, torch.cat([teacher.detach(), tail], 1), divergence).sum().backward()
    assert not leaf.grad[:, VOCAB:].any()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_dense_gradient_is_the_derivative(kind: Any) -> None:
    rng = torch.Generator().manual_seed(2)
    logits = [torch.randn(2, 5, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda s, t: dense_kl(s, t, Divergence(kind, beta=0.2, temperature=0.7)), logits)


@pytest.mark.parametrize("values", [2, 3, 1000])
def test_top_k_ids_takes_the_lowest_id_of_equals(values: int) -> None:
    logits = torch.randint(0, values, (50, 40), generator=torch.Generator().manual_seed(values)).float()
    for k in (1, 2, 7, 39, 40):
        want = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(top_k_ids(logits, k), want)


# Errors


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "js"}, "kind"),
        ({"kind": "jsd", "top_k": 4}, "top_k"),
        ({"kind": "jsd", "beta": 0.0}, "beta"),
        ({"kind": "jsd", "beta": 1.0}, "beta"),
        ({"kind": "jsd", "beta": math.nan}, "beta"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_divergence_refuses(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Divergence(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"vocab_size": PADDED + 1}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"targets": torch.tensor([0, 1, VOCAB])}, "targets"),
        ({"targets": torch.tensor([0, 1])}, "targets"),
        ({"token_set": [VOCAB]}, "token_set"),
        ({"token_set": [-1]}, "token_set"),
        ({"token_weights": torch.ones(2)}, "token_weights"),
        ({"token_weights": torch.ones(3, dtype=torch.bfloat16)}, "token_weights is torch.bfloat16"),
        ({"targets": torch.ones(3)}, "targets is torch.float32"),
        ({"divergence": "forward"}, "pass a Divergence"),
        ({"student_weight": torch.ones(PADDED, STUDENT_HIDDEN, device="meta")}, "student_weight is on meta"),
        ({"token_set": [0.5, 1.7]}, "token_set is torch.float32"),
        ({"token_set": torch.ones(VOCAB).bool()}, "token_set is torch.bool"),
        (
            {name: make_problem(3)[name].detach().half() for name in ("student_hidden", "student_weight")},
            "student_hidden is torch.float16",
        ),
        ({"teacher_hidden": torch.ones(2, TEACHER_HIDDEN)}, "teacher_hidden"),
        ({"teacher_hidden": torch.ones(3, 5)}, "teacher_weight"),
        ({"teacher_weight": torch.ones(PADDED + 1, TEACHER_HIDDEN)}, "rows"),
        ({"student_hidden": torch.ones(3, STUDENT_HIDDEN, dtype=torch.bfloat16)}, "dtype"),
    ],
)
def test_linear_kl_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kl(**{"divergence": Divergence("forward")} | make_problem(3) | change)


def test_dense_kl_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="student_logits"):
        dense_kl(torch.ones(2, 3), torch.ones(2, 4), Divergence("forward"))
