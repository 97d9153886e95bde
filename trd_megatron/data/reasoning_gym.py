"""The quickstart's problems: sums of three small numbers from the reasoning-gym library (task basic_arithmetic, Apache-2.0).

The size is chosen for SmolLM2-135M-Instruct, which solves about a fifth of them. Without an example it seldom writes
\\boxed{}, so every problem text opens with the same worked example; the reference solution has the example's form and is
composed here from the library's expression.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

from trd_megatron.errors import UserError
from trd_megatron.prompts import MATH_INSTRUCTION

DATASET = "basic_arithmetic"
EXAMPLE = "6 + 9 + 4"
TERMS, LARGEST = 3, 10  # with one digit the library draws every term from 0 to 10
DISTINCT = (LARGEST + 1) ** TERMS - 1  # all sums except the example
SEED_STRIDE = 1_000_000  # the library draws item i from Random(seed + i): without a stride neighbouring seeds share their items


def load_arithmetic(train_size: int, test_size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `test_size` test and then `train_size` training problems with the fields of records.PROBLEM, no question twice.

    The same arguments give the same problems, and the test problems depend on `test_size` and `seed` alone.
    Raises UserError if the library is missing, a size or the seed is negative, or more problems are wanted than there are.
    """
    if min(train_size, test_size, seed) < 0:
        raise UserError(f"train_problems={train_size}, test_problems={test_size}, seed={seed}: none of them may be negative")
    if train_size + test_size > DISTINCT:
        raise UserError(f"{train_size} training and {test_size} test problems are wanted, but there are {DISTINCT}: ask for fewer")
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("the arithmetic problems need the package reasoning-gym: pip install reasoning-gym") from None
    dataset = reasoning_gym.create_dataset(
        DATASET,
        seed=seed * SEED_STRIDE,
        size=SEED_STRIDE,
        min_terms=TERMS,
        max_terms=TERMS,
        min_digits=1,
        max_digits=1,
        operators=["+"],
        allow_parentheses=False,
        allow_negation=False,
    )
    return _problems(dataset, train_size, test_size, seed)


def _problems(dataset: Any, train_size: int, test_size: int, seed: int) -> Iterator[dict[str, Any]]:
    seen = {EXAMPLE}
    for index in count():
        taken = len(seen) - 1
        if taken == train_size + test_size:
            return
        item = dataset[index]
        expression = item["metadata"]["expression"]
        if expression in seen:
            continue
        seen.add(expression)
        yield {
            "problem_id": f"{DATASET}-{seed}-{index}",
            "task": "math",
            "problem": _with_example(item["question"]),
            "answer": item["answer"],
            "answer_type": None,
            "check_values": None,
            "reference_solution": worked_solution(expression),
            "starter_code": None,
            "tests": None,
            "source": f"reasoning_gym/{DATASET}",
            "split": "test" if taken < test_size else "train",
        }


def _with_example(question: str) -> str:
    return f"Calculate {EXAMPLE}. {MATH_INSTRUCTION}\n{worked_solution(EXAMPLE)}\n\n{question}"


def worked_solution(expression: str) -> str:
    """A sum such as "6 + 9 + 4", worked from left to right, one numbered step a line, ending in the boxed answer."""
    first, *others = (int(term) for term in expression.split(" + "))
    lines, total = [], first
    for term in others:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    lines.append(f"The final answer is \\boxed{{{total}}}")
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
