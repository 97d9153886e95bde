import ast
import re
import sys
from itertools import pairwise

import pyarrow as pa
import pytest

from trd_megatron.data.reasoning_gym import DISTINCT, EXAMPLE, load_arithmetic
from trd_megatron.errors import UserError
from trd_megatron.prompts import MATH_INSTRUCTION
from trd_megatron.records import PROBLEM

pytest.importorskip("reasoning_gym")


def value(expression: str) -> int:
    """An evaluation of its own: the syntax tree of a sum of literals."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return walk(node.left) + walk(node.right)
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


def question(problem: dict) -> str:
    found = re.fullmatch(r"Calculate ([0-9+ ]+)\.", problem["problem"].rsplit("\n\n", 1)[1])
    assert found
    return found[1]


def test_same_arguments_give_the_same_problems_and_another_seed_gives_others():
    problems = list(load_arithmetic(20, 10, seed=3))
    assert problems == list(load_arithmetic(20, 10, seed=3))
    other = list(load_arithmetic(20, 10, seed=4))
    assert [question(p) for p in problems] != [question(p) for p in other]
    # The library draws item i from Random(seed + i), so neighbouring seeds could differ by a shift only.
    assert len({question(p) for p in problems} & {question(p) for p in other}) < 10
    assert not {p["problem_id"] for p in problems} & {p["problem_id"] for p in other}


def test_sizes_splits_and_no_question_twice():
    problems = list(load_arithmetic(400, 100, seed=0))
    train = [question(p) for p in problems if p["split"] == "train"]
    test = [question(p) for p in problems if p["split"] == "test"]
    assert (len(train), len(test)) == (400, 100)
    assert len({*train, *test}) == 500
    assert EXAMPLE not in {*train, *test}
    assert len({p["problem_id"] for p in problems}) == 500


def test_test_problems_do_not_depend_on_the_number_of_training_problems():
    few, many = ([p for p in load_arithmetic(size, 12, seed=1) if p["split"] == "test"] for size in (4, 64))
    assert few == many


def test_reference_solutions_are_right_step_by_step():
    for problem in load_arithmetic(150, 50, seed=2):
        *steps, last = problem["reference_solution"].split("\n")
        expected = value(question(problem))
        assert problem["answer"] == str(expected)
        assert last.endswith(f"\\boxed{{{expected}}}")
        assert len(steps) == 2
        sides = [re.fullmatch(rf"{n}\. (.+) = (\d+)", step).groups() for n, step in enumerate(steps, 1)]
        assert all(value(left) == int(right) for left, right in sides)
        assert all(following[0].startswith(f"{previous[1]} + ") for previous, following in pairwise(sides))
        assert int(sides[-1][1]) == expected


def test_every_problem_opens_with_the_same_right_example():
    openings = {p["problem"].rsplit("\n\n", 1)[0] for p in load_arithmetic(20, 5, seed=0)}
    assert len(openings) == 1
    opening = openings.pop()
    assert opening.startswith(f"Calculate {EXAMPLE}. {MATH_INSTRUCTION}\n")
    assert opening.endswith(f"\\boxed{{{value(EXAMPLE)}}}")


def test_rows_match_the_schema():
    problems = list(load_arithmetic(5, 3, seed=0))
    assert all(list(p) == PROBLEM.names for p in problems)
    table = pa.Table.from_pylist(problems, schema=PROBLEM)
    table.validate(full=True)
    assert table.to_pylist() == problems
    assert all(p[field.name] is not None for p in problems for field in PROBLEM if not field.nullable)
    assert {p["source"] for p in problems} == {"reasoning_gym/basic_arithmetic"}


def test_all_distinct_problems_can_be_had_and_no_more():
    assert len({question(p) for p in load_arithmetic(DISTINCT - 10, 10, seed=0)}) == DISTINCT
    with pytest.raises(UserError, match=f"there are {DISTINCT}"):
        load_arithmetic(DISTINCT, 1, seed=0)


@pytest.mark.parametrize("arguments", [(-1, 4, 0), (4, -1, 0), (4, 4, -1)])
def test_negative_arguments(arguments):
    with pytest.raises(UserError, match="negative"):
        load_arithmetic(*arguments)


def test_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym") as caught:
        load_arithmetic(4, 4, seed=0)
    assert "\n" not in str(caught.value)
