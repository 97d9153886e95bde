"""NUM_GPUS = 1. linear_kl with the triton kernels at the size of a real vocabulary, about 10 GB of GPU memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trd_megatron.divergence as divergence_package
from trd_megatron.divergence import Divergence, KLOutput, dense_kl, linear_kl
from trd_megatron.divergence.linear_kl import _choose_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENS, CHUNK, HIDDEN, ROWS, VOCAB = 513, 100, 64, 151_936, 151_669  # an odd row length: no two rows are aligned alike
LEAVES = ("student_hidden", "student_weight")


def make_problem(dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Any]:
    """Random models whose logits have a standard deviation of about 1; of 2, their rounding to bfloat16 alone would cost 2e-2."""
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda")

    return {
        "student_hidden": normal(tokens, HIDDEN).to(dtype).requires_grad_(),
        "student_weight": (normal(ROWS, HIDDEN) / 8).to(dtype).requires_grad_(),
        "teacher_hidden": normal(tokens, HIDDEN).to(dtype),
        "teacher_weight": (normal(ROWS, HIDDEN) / 8).to(dtype),
        "token_weights": torch.rand(tokens, generator=rng, device="cuda"),
        "targets": torch.randint(0, VOCAB, (tokens,), generator=rng, device="cuda"),
        "token_set": [0, 3, VOCAB - 1],
        "vocab_size": VOCAB,
        "chunk_tokens": CHUNK,
    }


def run(problem: dict[str, Any], divergence: Divergence, backend: str) -> tuple[KLOutput, tuple[Tensor, ...]]:
    got = linear_kl(**problem, divergence=divergence, backend=backend)
    return got, torch.autograd.grad(got.loss, [problem[name] for name in LEAVES])


def reference(problem: dict[str, Any], divergence: Divergence) -> tuple[Tensor, list[Tensor]]:
    """per_token [T] and the gradients in float64, from whole logits of 32 tokens at a time."""
    student_hidden, student_weight = leaves = [problem[name].detach().double().requires_grad_() for name in LEAVES]
    teacher_weight = problem["teacher_weight"].double()[:VOCAB]
    values = []
    for block in torch.arange(TOKENS, device="cuda").split(32):
        teacher = problem["teacher_hidden"][block].double() @ teacher_weight.t()
        value = dense_kl(student_hidden[block] @ student_weight[:VOCAB].t(), teacher, divergence)
        (problem["token_weights"][block].double() * value).sum().backward()
        values.append(value.detach())
    return torch.cat(values), [leaf.grad for leaf in leaves]


def assert_gradients(got: tuple[Tensor, ...], want: Any, relative: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other.double()).norm() <= relative * other.double().norm()


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "triton_kernels"), (torch.float32, "triton_kernels"), (torch.float64, "torch_kernels")]
)
def test_auto_picks_triton_on_a_gpu_but_for_float64(dtype: torch.dtype, name: str) -> None:
    assert _choose_kernels("auto", torch.empty(1, dtype=dtype, device="cuda")) is getattr(divergence_package, name)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("dtype", "loss_error", "gradient_error"), [(torch.bfloat16, 1e-2, 2e-2), (torch.float32, 2e-5, 2e-5)])
def test_triton_equals_the_torch_backend_and_the_float64_reference(
    kind: Any, temperature: float, dtype: torch.dtype, loss_error: float, gradient_error: float
) -> None:
    problem, divergence = make_problem(dtype), Divergence(kind, beta=0.3, temperature=temperature)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    got, got_grads = run(problem, divergence, "triton")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == tf32
    want, want_grads = run(problem, divergence, "torch")
    for name, value in vars(got).items():
        torch.testing.assert_close(value.detach(), getattr(want, name).detach(), rtol=2e-5, atol=1e-5)
    assert_gradients(got_grads, want_grads, gradient_error)
    per_token, grads = reference(problem, divergence)
    loss = (problem["token_weights"].double() * per_token).sum()
    torch.testing.assert_close(got.loss.detach().double(), loss, rtol=loss_error, atol=0)
    assert_gradients(got_grads, grads, gradient_error)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_identical_models_have_zero_divergence(kind: Any, temperature: float) -> None:
    problem = make_problem(torch.float32)
    problem |= {"teacher_hidden": problem["student_hidden"].detach(), "teacher_weight": problem["student_weight"].detach()}
    got, (hidden_grad, _) = run(problem, Divergence(kind, temperature=temperature), "triton")
    assert got.unclipped.abs().max() <= 1e-6
    assert hidden_grad.abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_stays_at_two_chunks_of_logits(kind: Any, dtype: torch.dtype) -> None:
    """Less than three are allowed; [T, V] would be five."""
    problem = make_problem(dtype)
    problem["student_weight"].requires_grad_(False)
    for _ in range(2):  # the first run also takes the memory that cuBLAS keeps
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_kl(**problem, divergence=Divergence(kind), backend="triton").loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 3 * CHUNK * VOCAB * dtype.itemsize


def test_a_chunk_of_more_than_two_to_the_31_logits() -> None:
    """chunk_tokens does not change the result, even where the last rows begin beyond the range of int32."""
    tokens = 2**31 // VOCAB + 200
    problem = make_problem(torch.bfloat16, tokens)
    problem["student_weight"].requires_grad_(False)
    runs = []
    for chunk in (tokens, CHUNK):
        got = linear_kl(**problem | {"chunk_tokens": chunk}, divergence=Divergence("reverse"), backend="triton")
        runs.append((got.per_token, torch.autograd.grad(got.loss, problem["student_hidden"])))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)
    assert_gradients(runs[0][1], runs[1][1], 1e-2)
