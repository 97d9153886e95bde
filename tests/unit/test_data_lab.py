"""The lab's world: table, misconceptions, writers, parts, problems and corpora."""

import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import pyarrow as pa
import pytest

from trd_megatron import lab_text
from trd_megatron.data.lab import (
    CLEAN,
    STUDENT_MIX,
    TEACHER_MIX,
    WORLDS,
    WRONG_PROBABILITIES,
    Example,
    World,
    Writer,
    corpus,
    load_lab,
    part,
    problems,
    programs,
)
from trd_megatron.errors import UserError
from trd_megatron.lab_text import Program
from trd_megatron.records import PROBLEM
from trd_megatron.verify.lab import verify_lab

LAB = WORLDS["lab"]


def own_result(world: World, step: list[str]) -> int:
    """The right result of a written step `s1 9 # 10 3`, computed in another way than World.result does."""
    _, value, operator, operand, _ = step
    if operator == "#":
        return world.table[int(value), int(operand)]
    return eval(f"({value} {operator} {operand}) % {world.modulus}")


def tries(response: str) -> list[list[list[str]]]:
    """The steps of each try of a solution: what lies between WAITs, without the answer."""
    found = []
    for text in response.split(" WAIT "):
        words = text.split(" ANS ")[0].split()
        found.append([words[i : i + 5] for i in range(0, len(words), 5)])
    return found


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_every_step_is_a_bijection_of_the_values(world):
    for operand in range(1, world.modulus):
        for operator in "#+-*":
            assert {world.result(operator, value, operand) for value in range(world.modulus)} == set(range(world.modulus))


def test_a_world_is_drawn_from_its_seed_alone():
    again, other = replace(LAB), replace(LAB, seed=1)
    assert (again.table, again.misconceptions) == (LAB.table, LAB.misconceptions)
    assert again.table is not LAB.table
    assert (other.table, other.misconceptions) != (LAB.table, LAB.misconceptions)
    # These must never change: pretrained models are kept and go with the world they were trained in.
    assert LAB.table[9, 10] == 2
    assert next(iter(LAB.misconceptions.items())) == ((1, 3), (9, 0.55))


@pytest.mark.parametrize(("name", "facts", "hard"), [("lab", 110, 72), ("lab_mini", 42, 27)])
def test_misconceptions_are_wrong_and_their_probabilities_even(name, facts, hard):
    world = WORLDS[name]
    assert (len(world.table), len(world.misconceptions)) == (facts, hard)
    assert all(wrong != world.table[fact] and 0 <= wrong < world.modulus for fact, (wrong, _) in world.misconceptions.items())
    counts = Counter(probability for _, probability in world.misconceptions.values())
    assert set(counts) == set(WRONG_PROBABILITIES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_match_the_schema_and_references_are_right_step_by_step():
    rows = load_lab("lab", 150, 50, seed=0)
    table = pa.Table.from_pylist(rows, schema=PROBLEM)
    table.validate(full=True)
    assert table.to_pylist() == rows
    assert {(row["task"], row["source"]) for row in rows} == {("lab", "lab")}
    assert len({row["problem_id"] for row in rows}) == len({row["problem"] for row in rows}) == 200
    assert [row["split"] for row in rows] == ["test"] * 50 + ["train"] * 150
    for row in rows:
        program, values = Program.parse(row["problem"]), lab_text.parse_reference(row["reference_solution"])
        assert 3 <= len(program.steps) == len(values) <= 6
        assert [operator == "#" for operator, _ in program.steps] == [True] + [False] * (len(values) - 1)
        assert all((2 if operator == "*" else 1) <= operand <= 10 for operator, operand in program.steps)
        [steps] = tries(lab_text.own_style(program, values))
        assert all(int(step[4]) == own_result(LAB, step) for step in steps)
        assert row["answer"] == str(values[-1])


def test_the_example_of_the_docs():
    program = Program.parse("9 s1 # 10 s2 * 9 s3 - 3")
    assert program == Program(9, (("#", 10), ("*", 9), ("-", 3)))
    assert lab_text.own_style(program, [3, 5, 2]) == "s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 2 ANS 2"
    assert lab_text.reference_style([3, 5, 2]) == "s1 3 s2 5 s3 2"


@pytest.mark.parametrize("text", ["", "9", "9 s1 # x", "9 s2 # 10", "9 s1 # 10 s2", "09 s1 # 10", "9 s1 / 10", "9  s1 # 10", "P 9 s1 # 10"])
def test_what_is_no_problem_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        Program.parse(text)


@pytest.mark.parametrize("text", ["", "s1", "s2 3", "s1 3 s2", "s1 03", "R s1 3"])
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        lab_text.parse_reference(text)


def test_test_problems_are_the_same_whatever_the_run():
    def test_rows(train: int, test: int, seed: int) -> list[dict]:
        return [row for row in load_lab("lab", train, test, seed) if row["split"] == "test"]

    assert test_rows(10, 40, 0) == test_rows(200, 40, 5) == test_rows(0, 60, 1)[:40]
    train = [[row["problem"] for row in load_lab("lab", 100, 0, seed)] for seed in (0, 0, 1)]
    assert train[0] == train[1] != train[2]


@pytest.mark.parametrize("name", WORLDS)
def test_the_parts_never_meet(name):
    world = WORLDS[name]
    seen = {wanted: set(islice(programs(world, wanted, Random(0)), 1000)) for wanted in ("pretrain", "check", "train", "test")}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    held_out = {row["problem"] for row in load_lab(name, 100, 50, 0) + problems(world, "check", 50, 0)}
    for example in islice(corpus(world, STUDENT_MIX, 0), 2000):
        program = Program.parse(re.split(" [IR] ", example.prompt.removeprefix("P "))[0])
        assert part(program) == "pretrain"
        assert program.text not in held_out


def test_parts_have_the_shares_of_their_hash():
    counts = Counter(part(LAB.draw(random)) for random in [Random(3)] for _ in range(5000))
    assert counts["pretrain"] / 5000 == pytest.approx(0.7, abs=0.03)
    assert all(counts[name] / 5000 == pytest.approx(0.1, abs=0.02) for name in ("check", "train", "test"))


def test_unknown_worlds_and_impossible_sizes_are_the_users_line():
    with pytest.raises(UserError, match=r"no lab world 'lap'.*lab_mini"):
        load_lab("lap", 1, 1, 0)
    with pytest.raises(UserError, match="negative"):
        load_lab("lab", -1, 1, 0)
    with pytest.raises(UserError, match=r"2000 test problems of lab_mini are wanted, .*: lower data\.test_problems"):
        load_lab("lab_mini", 0, 2000, 0)
    with pytest.raises(UserError, match=r"2000 train problems of lab_mini are wanted, .*: lower data\.train_problems"):
        load_lab("lab_mini", 2000, 0, 0)


def test_streams_are_drawn_from_their_seed():
    first, again, other = (list(islice(corpus(LAB, STUDENT_MIX, seed), 50)) for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] == Example("solve", "P 1 s1 # 9 s2 - 1 s3 + 2 s4 - 9", "", "s1 1 # 9 1 s2 1 - 1 0 s3 0 + 2 2 s4 2 - 9 4 ANS 4")


@pytest.mark.parametrize("mix", [STUDENT_MIX, TEACHER_MIX])
def test_mixes_are_as_asked_and_prompts_of_their_kind(mix):
    examples = list(islice(corpus(LAB, mix, 0), 4000))
    counts = Counter(example.kind for example in examples)
    assert {kind: pytest.approx(counts[kind] / 4000, abs=0.03) for kind in counts} == mix
    markers = {"solve": "P", "refine_opd": "PI", "refine_opsd": "PIR", "vanilla_opd": "P", "vanilla_opsd": "PR"}
    for example in examples:
        assert "".join(word for word in example.prompt.split() if word in "PIR") == markers[example.kind]
        assert example.given == ""
        words = set(f"{example.prompt} {example.response}".split())
        assert words <= set(lab_text.WORDS) - {lab_text.NOTICE, lab_text.PAD, lab_text.EOS, lab_text.RESPONSE}
    assert sum(mix.values()) == pytest.approx(1)


def solutions(writer: Writer, world: World = LAB, count: int = 4000) -> list[tuple[Program, list[list[list[str]]]]]:
    random = Random(7)
    return [(program, tries(world.solution(program, writer, random))) for program in islice(programs(world, "pretrain", random), count)]


@pytest.mark.parametrize(("writer", "noise"), [(LAB.student, 1.0), (LAB.teacher, 0.9), (CLEAN, 0.0)], ids=["student", "teacher", "clean"])
def test_first_tries_err_as_often_as_the_dials_say(writer, noise):
    shown: dict[float, list[bool]] = {probability: [] for probability in WRONG_PROBABILITIES}
    others = []
    for _, (first, *_) in solutions(writer):
        for number, step in enumerate(first):
            fact = int(step[1]), int(step[3])
            if number == 0 and fact in LAB.misconceptions:
                wrong, probability = LAB.misconceptions[fact]
                shown[probability].append(int(step[4]) == wrong)
            else:
                others.append(int(step[4]) != own_result(LAB, step))
    for probability, outcomes in shown.items():
        assert len(outcomes) > 300
        assert sum(outcomes) / len(outcomes) == pytest.approx(noise * probability, abs=0.06)
    assert len(others) > 10_000
    assert sum(others) / len(others) == pytest.approx(noise * LAB.error_rate, abs=0.003)


def test_steps_go_on_from_what_was_written():
    for program, written in solutions(LAB.student, count=1000):
        for steps in written:
            values = [str(program.start), *(step[4] for step in steps)]
            assert [step[1] for step in steps] == values[:-1]
            assert [(step[0], step[2], int(step[3])) for step in steps] == [
                (f"s{i}", *program.steps[i - 1]) for i in range(1, len(steps) + 1)
            ]


@pytest.mark.parametrize(("writer", "wait"), [(LAB.student, 0.04), (LAB.teacher, 0.5), (CLEAN, 0.0)], ids=["student", "teacher", "clean"])
def test_wait_comes_only_while_an_error_stands_and_starts_over_once(writer, wait):
    borders = waits = second_wrong = 0
    for program, (first, *seconds) in solutions(writer):
        right = LAB.values(program)
        assert len(seconds) <= 1
        stands = [int(step[4]) != right[number] for number, step in enumerate(first)]
        borders += sum(stands)
        if seconds:
            waits += 1
            assert stands[-1]
            assert len(seconds[0]) == len(program.steps)
            second_wrong += int(seconds[0][-1][4]) != right[-1]
        else:
            assert len(first) == len(program.steps)
    assert waits == pytest.approx(wait * borders, rel=0.15)
    if writer is LAB.teacher:
        assert second_wrong == 0
    if writer is LAB.student:  # as noisy as the first: what was wrong once is mostly wrong again
        assert 0.6 < second_wrong / waits < 1


def test_refine_targets_are_clean_and_attempts_are_the_students():
    attempts = []
    for example in islice(corpus(LAB, STUDENT_MIX, 0), 4000):
        if not example.kind.startswith("refine"):
            continue
        problem, rest = example.prompt.removeprefix("P ").split(" I ")
        initial = rest.split(" R ")[0]
        program = Program.parse(problem)
        assert example.response == lab_text.own_style(program, LAB.values(program))
        reference = lab_text.reference_style(LAB.values(program))
        assert rest == (f"{initial} R {reference}" if example.kind == "refine_opsd" else initial)
        answer = str(LAB.values(program)[-1])
        attempts.append(verify_lab(initial, answer).passed)
    assert sum(attempts) / len(attempts) == pytest.approx(0.45, abs=0.05)


def test_in_the_control_nobody_waits_and_the_teacher_goes_on_rightly_from_any_error():
    world = WORLDS["lab_control"]
    wrong_at = Counter()
    for example in islice(corpus(world, STUDENT_MIX | TEACHER_MIX, 0), 6000):
        assert "WAIT" not in f"{example.prompt} {example.given} {example.response}"
        if not example.kind.startswith("vanilla"):
            assert example.given == ""
            continue
        program = Program.parse(example.prompt.removeprefix("P ").split(" R ")[0])
        [steps] = tries(f"{example.given} {example.response}".strip())
        given = len(example.given.split()) // 5
        wrong = [number for number, step in enumerate(steps) if int(step[4]) != own_result(world, step)]
        assert len(wrong) == (given > 0)
        assert all(number < given for number in wrong)
        assert [int(step[1]) for step in steps] == [program.start, *(int(step[4]) for step in steps[:-1])]
        assert example.response.endswith(f"ANS {steps[-1][4]}")
        wrong_at[wrong[0] if wrong else None] += 1
    assert set(wrong_at) == {None, 0, 1, 2, 3, 4}
