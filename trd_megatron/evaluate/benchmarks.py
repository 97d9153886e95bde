"""The benchmarks: a registry of public ones, and any file of the user's. docs/evaluation.md lists columns, splits and counts.

A benchmark is named by a spec: `aime24` (from the hub, cached), `aime24:PATH` (a local file or folder in the benchmark's official
columns), or the path of a .parquet, .jsonl or .json file with the columns of data/parquet.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trd_megatron.data import hub, human_eval, parquet
from trd_megatron.data.hub import HubFiles
from trd_megatron.errors import UserError
from trd_megatron.evaluate import evalplus, livecodebench, math_rows
from trd_megatron.records import PROBLEM

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """read: files, whether tests are wanted (without, only texts are), allow_unsandboxed -> problems. problems: how many there are.

    plain_prompt: the problem's text is the whole prompt, no instruction follows it. is_cached: whether the package has its file."""

    task: Literal["math", "code"]
    problems: int
    read: Callable[[Sequence[Path], bool, bool], Iterable[Row]]
    hub: HubFiles | None = None
    package: Callable[[], list[Path]] | None = None
    is_cached: Callable[[], bool] = lambda: True
    plain_prompt: bool = False


def _math(
    problems: int,
    repository: str,
    files: tuple[str, ...],
    columns: tuple[str, ...],
    read: Callable[[Row], Row | None],
    id_column: str | None = None,
    plain_prompt: bool = False,
) -> Benchmark:
    """A benchmark of mathematics, one row a problem. id_column: a column that tells rows apart; without one they are numbered."""

    def read_files(paths: Sequence[Path], _with_tests: bool, _allow_unsandboxed: bool) -> Iterable[Row]:
        number = 0
        for path in paths:
            for row in parquet.read_rows(path):
                for name in columns:
                    if row.get(name) is None:
                        raise UserError(f"{path}: row {number} has no column '{name}'; {repository} has: {', '.join(columns)}")
                problem = read(row)
                if problem is not None:
                    yield {"problem_id": str(row.get(id_column, number) if id_column else number)} | problem
                number += 1

    return Benchmark("math", problems, read_files, HubFiles(repository, files), plain_prompt=plain_prompt)


BENCHMARKS = {
    "aime24": _math(
        30, "AI-MO/aimo-validation-aime", ("data/train-*.parquet",), ("problem", "answer"), math_rows.aime24, "id"
    ),
    "aime25": _math(
        30, "opencompass/AIME2025", ("aime2025-I.jsonl", "aime2025-II.jsonl"), ("question", "answer"), math_rows.aime25
    ),
    "hmmt25": _math(
        30, "MathArena/hmmt_feb_2025", ("data/train-*.parquet",), ("problem", "answer"), math_rows.plain, "problem_idx"
    ),
    "beyondaime": _math(
        100, "ByteDance-Seed/BeyondAIME", ("data/test-*.parquet",), ("problem", "answer"), math_rows.plain
    ),
    "amobench": _math(
        39, "meituan-longcat/AMO-Bench", ("data/test-*.parquet",), ("question_id", "prompt", "answer", "answer_type"), math_rows.amobench,
        "question_id", plain_prompt=True,
    ),
    "math500": _math(
        500, "HuggingFaceH4/MATH-500", ("test.jsonl",), ("problem", "solution", "answer"), math_rows.plain, "unique_id"
    ),
    "gsm8k": _math(1319, "openai/gsm8k", ("main/test-*.parquet",), ("question", "answer"), math_rows.gsm8k),
    "human_eval": Benchmark("code", 164, lambda paths, *_: human_eval.load(paths)[0], package=lambda: [human_eval.locate()]),
    "humaneval_plus": Benchmark(
        "code", 164, evalplus.read_human_eval,
        package=lambda: evalplus.locate("humaneval_plus"), is_cached=lambda: evalplus.is_cached("humaneval_plus"),
    ),
    "mbpp_plus": Benchmark(
        "code", 378, evalplus.read_mbpp, package=lambda: evalplus.locate("mbpp_plus"), is_cached=lambda: evalplus.is_cached("mbpp_plus")
    ),
    "livecodebench_v6": Benchmark("code", 1055, livecodebench.read, livecodebench.FILES),
}  # fmt: skip


def get(spec: str) -> Benchmark | None:
    """The registry's entry for a spec; None for a file of the user's."""
    return BENCHMARKS.get(spec.partition(":")[0])


def name(spec: str) -> str:
    """How results of a benchmark are called: the registry's name, the file's name without its ending, or test."""
    return spec.partition(":")[0] if get(spec) else Path(spec.removesuffix(".gz")).stem


def check(spec: str) -> None:
    """Raises UserError if a spec names neither a benchmark of the registry nor, by its form, a file. Touches no file."""
    first, colon, path = spec.partition(":")
    if first in BENCHMARKS:
        if colon and not path:
            raise UserError(f"'{spec}': a path must follow the colon, or leave the colon out")
    elif spec not in parquet.BUILTIN and not spec.endswith((".parquet", ".jsonl", ".jsonl.gz", ".json")):
        raise UserError(f"no benchmark '{spec}': {', '.join(BENCHMARKS)}, one of them with :PATH, or a .parquet, .jsonl or .json file")


def locate(spec: str) -> list[Path]:
    """The files of a benchmark, downloaded if they are not cached. Raises UserError if they cannot be had."""
    check(spec)
    entry, path = get(spec), spec.partition(":")[2]
    if entry is None:
        return [parquet.locate(spec)]
    if not path:
        if entry.package is not None:
            return entry.package()
        assert entry.hub is not None
        return hub.locate(entry.hub, way_out=_way_out(spec))
    local = Path(path)
    if local.is_file():
        return [local]
    if not local.is_dir() or entry.hub is None:
        raise UserError(f"{spec}: {path} does not exist{'' if entry.hub is None else ': give a file, or a folder with ' + str(entry.hub)}")
    try:
        return hub.matching(local, entry.hub)
    except FileNotFoundError as error:
        raise UserError(f"{spec}: {error} in that folder, a copy of {entry.hub}") from None


def local_files(spec: str) -> list[Path]:
    """The files of a spec with a path; none for a benchmark of the hub or of a package."""
    return locate(spec) if get(spec) is None or ":" in spec else []


def is_cached(spec: str) -> bool:
    """Whether `locate` needs no download."""
    entry = get(spec)
    if entry is None or ":" in spec:
        return True
    return entry.is_cached() if entry.hub is None else hub.is_cached(entry.hub)


def fetch(spec: str) -> list[Path]:
    """As `locate`, but the hub is asked for the newest files."""
    entry = get(spec)
    return hub.fetch(entry.hub, way_out=_way_out(spec)) if entry and entry.hub and ":" not in spec else locate(spec)


def load(spec: str, *, allow_unsandboxed: bool = False) -> list[Row]:
    """The problems, with all fields of records.PROBLEM; their task is math or code.

    allow_unsandboxed: as verify.code.allow_unsandboxed, for EvalPlus' own solutions, which are run when its tests are first asked for.

    Raises UserError if files cannot be had or read, a column is missing, or the hub's set has another number of problems than it had:
    figures of another set are not the benchmark's.
    """
    return _read(spec, True, allow_unsandboxed)


def texts(spec: str) -> list[Row]:
    """As `load`, but tests may be missing: what finding problems again needs. Runs no program."""
    return _read(spec, False, False)


def plain_prompt(spec: str) -> bool:
    """Whether a problem's text is the whole prompt of this benchmark."""
    entry = get(spec)
    return entry is not None and entry.plain_prompt


def _read(spec: str, with_tests: bool, allow_unsandboxed: bool) -> list[Row]:
    paths, entry, called = locate(spec), get(spec), name(spec)
    if entry is None:
        problems: Iterable[Row] = ({"task": "math" if row["tests"] is None else "code"} | row for row in parquet.load(paths[0]))
    else:
        problems = (
            {"task": entry.task} | row | {"problem_id": f"{called}/{row['problem_id']}"}
            for row in entry.read(paths, with_tests, allow_unsandboxed)
        )
    rows: list[Row] = [dict.fromkeys(PROBLEM.names) | problem | {"source": called, "split": "test"} for problem in problems]
    if not rows:
        raise UserError(f"{spec} holds no problems")
    if entry is not None and ":" not in spec and len(rows) != entry.problems:
        raise UserError(f"{spec}: {paths[0]} has {len(rows)} problems, the benchmark has {entry.problems}: give a file, {spec}:PATH")
    seen: set[str] = set()
    for row in rows:
        if row["problem_id"] in seen:
            raise UserError(f"{spec}: problem '{row['problem_id']}' occurs twice")
        seen.add(row["problem_id"])
    return rows


def _way_out(spec: str) -> str:
    return f"give a local copy, {spec}:PATH, or fetch it first {hub.DOWNLOAD}"
