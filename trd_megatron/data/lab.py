"""The lab's world: chains modulo 11 that start with a fact to be known, writers who get some facts wrong, and what models learn from them.

Step 1 looks up a fixed random table (#), later steps are + - *. Modulo a prime each of them is bijective, so that a wrong first step dooms
the answer unless a second error cancels it. Some facts are hard: for them a writer shows one fixed wrong value with a fixed probability
(a misconception), and goes on consistently. While an error stands a writer may notice it at a step's end: WAIT, and a second try from the
start. Pretraining on such texts gives models with these errors, whatever the number of steps.

Every program belongs to one part by its hash: what models are pretrained on, checked, distilled and tested on never meets. The facts are
the same in all parts.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any, Literal, NamedTuple

from trd_megatron import lab_text
from trd_megatron.errors import UserError
from trd_megatron.lab_text import LOOKUP, OPERATORS, WAIT, Program
from trd_megatron.records import PROBLEM

Part = Literal["pretrain", "check", "train", "test"]
_PARTS: tuple[Part, ...] = ("pretrain",) * 7 + ("check", "train", "test")  # by the hash's last digit
REPEATS = 200  # in a row, after which a part of a world counts as exhausted
WRONG_PROBABILITIES = (0.55, 0.75, 0.9, 0.97, 1.0)  # of the hard facts, in equal numbers


@dataclass(frozen=True)
class Writer:
    """Who writes a solution: `noise` scales the errors of the first try, `second_noise` those of the second, which comes with
    probability `wait` at the end of each step while an error stands."""

    noise: float
    wait: float
    second_noise: float


CLEAN = Writer(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class World:
    """The dials. A world is drawn from its seed; problems and corpora have seeds of their own."""

    name: str
    modulus: int = 11  # a prime, at most 11
    min_steps: int = 3
    max_steps: int = lab_text.MAX_STEPS
    hard_share: float = 0.65  # of the facts
    error_rate: float = 0.005  # per step, besides the misconceptions: a random wrong value
    student: Writer = Writer(1.0, 0.04, 1.0)
    teacher: Writer | None = Writer(0.9, 0.5, 0.0)  # None: it goes on, rightly, from prefixes with an error at any step
    seed: int = 0

    @property
    def facts(self) -> list[tuple[int, int]]:
        """All (value, operand) of #."""
        return [(value, operand) for value in range(self.modulus) for operand in range(1, self.modulus)]

    @cached_property
    def table(self) -> dict[tuple[int, int], int]:
        """(value, operand) -> value # operand: a random permutation of the values for each operand."""
        random = Random(f"{self.seed}/table")
        found: dict[tuple[int, int], int] = {}
        for operand in range(1, self.modulus):
            column = list(range(self.modulus))
            random.shuffle(column)
            found |= {(value, operand): result for value, result in enumerate(column)}
        return found

    @cached_property
    def misconceptions(self) -> dict[tuple[int, int], tuple[int, float]]:
        """Hard fact -> (its wrong value, how often a writer with noise 1 has it)."""
        random = Random(f"{self.seed}/misconceptions")
        hard = random.sample(self.facts, round(self.hard_share * len(self.facts)))
        return {
            fact: (self._other(self.table[fact], random), WRONG_PROBABILITIES[index % len(WRONG_PROBABILITIES)])
            for index, fact in enumerate(hard)
        }

    def _other(self, value: int, random: Random) -> int:
        return (value + random.randrange(1, self.modulus)) % self.modulus

    def result(self, operator: str, value: int, operand: int) -> int:
        """The right result of one step."""
        if operator == LOOKUP:
            return self.table[value, operand]
        return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % self.modulus

    def values(self, program: Program) -> list[int]:
        """The right result of every step."""
        found, value = [], program.start
        for operator, operand in program.steps:
            value = self.result(operator, value, operand)
            found.append(value)
        return found

    def draw(self, random: Random) -> Program:
        """Any program of this world."""
        steps = [(LOOKUP, random.randrange(1, self.modulus))]
        for _ in range(random.randint(self.min_steps, self.max_steps) - 1):
            operator = random.choice(OPERATORS)
            steps.append((operator, random.randrange(2 if operator == "*" else 1, self.modulus)))
        return Program(random.randrange(self.modulus), tuple(steps))

    def written(self, operator: str, value: int, operand: int, noise: float, random: Random) -> int:
        """What a writer with this noise gives as the result of one step."""
        right = self.result(operator, value, operand)
        if operator == LOOKUP and (value, operand) in self.misconceptions:
            wrong, probability = self.misconceptions[value, operand]
            if random.random() < noise * probability:
                return wrong
        return self._other(right, random) if random.random() < noise * self.error_rate else right

    def solution(self, program: Program, writer: Writer, random: Random) -> str:
        """A solution as this writer gives it, in the own style, without the end of turn."""
        right, first, value = self.values(program), [], program.start
        for index, (operator, operand) in enumerate(program.steps):
            before, value = value, self.written(operator, value, operand, writer.noise, random)
            first += lab_text.step_words(program, index, before, value)
            if value != right[index] and random.random() < writer.wait:
                second = Writer(writer.second_noise, 0.0, 0.0)
                return " ".join([*first, WAIT, self.solution(program, second, random)])
        return " ".join([*first, lab_text.ANSWER, str(value)])

    def continuation(self, program: Program, random: Random) -> tuple[str, str]:
        """(beginning of a solution with an error at one of its steps, its continuation without further ones); both are cut between steps,
        the beginning may be empty."""
        cut = random.randrange(len(program.steps))
        wrong = random.randrange(cut) if cut else None
        values, value = [], program.start
        for index, (operator, operand) in enumerate(program.steps):
            right = self.result(operator, value, operand)
            value = self._other(right, random) if index == wrong else right
            values.append(value)
        words = lab_text.own_style(program, values).split(" ")
        given = cut * lab_text.WORDS_OF_STEP
        return " ".join(words[:given]), " ".join(words[given:])


# The negative control: nobody writes WAIT, and the teacher is right whatever it is shown, so that there is nothing to refine.
WORLDS = {
    world.name: world
    for world in (
        World("lab"),
        World("lab_mini", modulus=7, min_steps=2, max_steps=3),
        World("lab_control", error_rate=0.05, student=Writer(1.0, 0.0, 1.0), teacher=None),
    )
}


def part(program: Program) -> Part:
    """Which part a program belongs to, in every world and under every seed."""
    digest = hashlib.blake2b(program.text.encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest, "big") % len(_PARTS)]


def programs(world: World, wanted: Part, random: Random) -> Iterator[Program]:
    """Endless, with repetitions."""
    while True:
        program = world.draw(random)
        if part(program) == wanted:
            yield program


def problems(world: World, wanted: Part, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` distinct problems with the fields of records.PROBLEM; a smaller count gives the first of them.

    Raises UserError if the world does not have so many.
    """
    found: dict[Program, None] = {}
    repeated = 0
    for program in programs(world, wanted, Random(f"{world.seed}/{wanted}/{seed}")):
        if len(found) == count or repeated == REPEATS:
            break
        repeated = repeated + 1 if program in found else 0
        found[program] = None
    split = "test" if wanted == "test" else "train"
    if len(found) < count:
        raise UserError(
            f"{count} {split} problems of {world.name} are wanted, but only {len(found)} were found: lower data.{split}_problems"
        )
    return [_row(world, program, split) for program in found]


def _row(world: World, program: Program, split: str) -> dict[str, Any]:
    values = world.values(program)
    return dict.fromkeys(PROBLEM.names) | {
        "problem_id": f"{world.name}-{program.start}" + "".join(f"{operator}{operand}" for operator, operand in program.steps),
        "task": "lab",
        "problem": program.text,
        "answer": str(values[-1]),
        "reference_solution": lab_text.reference_style(values),
        "source": world.name,
        "split": split,
    }


def load_lab(name: str, train_size: int, test_size: int, seed: int) -> list[dict[str, Any]]:
    """`test_size` test and then `train_size` training problems of a world. The test problems depend on the world and `test_size` alone, so
    that runs with other seeds are tested on the same ones.

    Raises UserError if there is no such world, a size is negative, or more problems are wanted than there are.
    """
    if name not in WORLDS:
        raise UserError(f"there is no lab world '{name}': there are {', '.join(WORLDS)}")
    if min(train_size, test_size) < 0:
        raise UserError(f"train_problems={train_size}, test_problems={test_size}: none of them may be negative")
    return problems(WORLDS[name], "test", test_size, 0) + problems(WORLDS[name], "train", train_size, seed)


class Example(NamedTuple):
    """One text of a pretraining corpus. given: the response's beginning, which is shown and not learned (mostly empty)."""

    kind: str
    prompt: str
    given: str
    response: str


def _solve(world: World, program: Program, random: Random) -> tuple[str, str, str]:
    return lab_text.student_prompt(program.text), "", world.solution(program, world.student, random)


def _as_teacher(mode: str) -> Callable[[World, Program, Random], tuple[str, str, str]]:
    """Under the vanilla prompt of `mode`, as a teacher writes."""

    def make(world: World, program: Program, random: Random) -> tuple[str, str, str]:
        prompt = lab_text.vanilla_teacher_prompt(mode, program.text, lab_text.reference_style(world.values(program)))
        if world.teacher is None:
            return prompt, *world.continuation(program, random)
        return prompt, "", world.solution(program, world.teacher, random)

    return make


def _refine(mode: str) -> Callable[[World, Program, Random], tuple[str, str, str]]:
    """The student's attempt, rewritten without errors."""

    def make(world: World, program: Program, random: Random) -> tuple[str, str, str]:
        reference = lab_text.reference_style(world.values(program))
        prompt = lab_text.refine_prompt(mode, program.text, world.solution(program, world.student, random), reference)
        return prompt, "", world.solution(program, CLEAN, random)

    return make


def _checked(kind: str, world: World, program: Program, random: Random) -> Example:
    """An example of a kind whose response is right."""
    prompt, given, response = _KINDS[kind](world, program, random)
    return Example(kind, prompt, given, response if given else world.solution(program, CLEAN, random))


_KINDS: dict[str, Callable[[World, Program, Random], tuple[str, str, str]]] = {
    "solve": _solve,
    "refine_opd": _refine("opd"),
    "refine_opsd": _refine("opsd"),
    "vanilla_opd": _as_teacher("opd"),
    "vanilla_opsd": _as_teacher("opsd"),
}
STUDENT_MIX = {"solve": 0.4, "refine_opd": 0.05, "refine_opsd": 0.25, "vanilla_opsd": 0.3}
TEACHER_MIX = {"vanilla_opd": 0.5, "refine_opd": 0.5}  # OPD's teacher


def corpus(world: World, mix: dict[str, float], seed: int, wanted: Part = "pretrain") -> Iterator[Example]:
    """An endless stream of examples. mix: kind -> its share; programs of the part `wanted`."""
    random = Random(f"{world.seed}/corpus/{seed}/{','.join(mix)}")
    for program in programs(world, wanted, random):
        [kind] = random.choices(list(mix), list(mix.values()))
        yield Example(kind, *_KINDS[kind](world, program, random))


def checks(world: World, kinds: Sequence[str], count: int) -> Iterator[Example]:
    """`count` held-out examples of each kind with the right response, to see how likely a model finds it."""
    for kind in kinds:
        random = Random(f"{world.seed}/checks/{kind}")
        for program in islice(programs(world, "check", random), count):
            yield _checked(kind, world, program, random)
