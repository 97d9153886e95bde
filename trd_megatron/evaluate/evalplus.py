"""HumanEval+ and MBPP+ of EvalPlus (https://arxiv.org/abs/2305.01210): its data, in files that the package evalplus downloads and caches.

The data hold inputs and a canonical solution. What is expected is what that solution gives in our sandbox, kept beside the models under
$TRD_CACHE by the content of the data file.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from trd_megatron.cache import cache_dir
from trd_megatron.data.parquet import read_rows
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import file_sha256, write_json
from trd_megatron.verify import plain_values
from trd_megatron.verify.run_function import FunctionRunner

INSTALL = "pip install 'trd_megatron[code]'"
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
# Functions whose results EvalPlus does not compare by ==. The names on the right are those of verify/code.py.
COMPARE = {"find_zero": "polynomial_root"}
MBPP_COMPARE = {
    "are_equivalent": "any",
    "sum_div": "or_zero",
    "surface_Area": "surface_area",
    "digit_distance_nums": "digit_distance",
    **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), "not_none"),
    **dict.fromkeys(
        ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
         "find_dissimilar", "Diff"),
        "set",
    ),
}  # fmt: skip
# Where only the presence of a result counts: match objects and the like have no plain form.
NOT_NONE = "\n\n_result_of = {name}\n\n\ndef {name}(*arguments):\n    return _result_of(*arguments) is not None\n"


Kind = Literal["humaneval_plus", "mbpp_plus"]


def locate(kind: Kind) -> list[Path]:
    """EvalPlus' data file, which its package downloads at first use; HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH name another.

    Raises UserError if the package is not installed or the file cannot be had.
    """
    url, path = _place(kind)
    if url is not None:
        from evalplus.data.utils import make_cache

        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints
                make_cache(url, str(path))
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"EvalPlus' {url} cannot be downloaded ({type(error).__name__}): give a file, {kind}:FILE") from error
    return [path]


def is_cached(kind: Kind) -> bool:
    """Whether `locate` needs no download."""
    try:
        return _place(kind)[1].exists()
    except UserError:
        return False


def _place(kind: Kind) -> tuple[str | None, Path]:
    """(where the data file comes from, where it lies); no URL for a file of the user's. Raises UserError without the package."""
    try:
        from evalplus.data import humaneval, mbpp
        from evalplus.data.utils import get_dataset_metadata
    except ImportError as error:
        raise UserError(f"EvalPlus' problems need the package evalplus ({error}): {INSTALL}, or give a file, {kind}:FILE") from None
    name, version, override = {
        "humaneval_plus": ("HumanEvalPlus", humaneval.HUMANEVAL_PLUS_VERSION, humaneval.HUMANEVAL_OVERRIDE_PATH),
        "mbpp_plus": ("MbppPlus", mbpp.MBPP_PLUS_VERSION, mbpp.MBPP_OVERRIDE_PATH),
    }[kind]
    if override:
        return None, Path(override)
    url, path = get_dataset_metadata(name, version, False)
    return url, Path(path)


def read_human_eval(paths: Sequence[Path], with_tests: bool, allow_unsandboxed: bool) -> Iterator[dict[str, Any]]:
    """HumanEval+'s problems: the text is the signature and docstring. Raises UserError if a file is no such file."""
    for path in paths:
        rows = _rows(path)
        tests = _all_tests(path, rows, COMPARE, allow_unsandboxed) if with_tests else {}
        for row in rows:
            yield {"problem_id": row["task_id"], "problem": row["prompt"].strip("\n"), "tests": tests.get(row["task_id"])}


def read_mbpp(paths: Sequence[Path], with_tests: bool, allow_unsandboxed: bool) -> Iterator[dict[str, Any]]:
    """MBPP+'s problems: the text is a sentence and an assert that names the function. Raises UserError if a file is no such file."""
    for path in paths:
        rows = _rows(path)
        tests = {}
        if with_tests:
            try:
                from evalplus.data.mbpp import mbpp_deserialize_inputs
            except ImportError as error:
                raise UserError(f"MBPP+'s inputs are decoded by the package evalplus ({error}): {INSTALL}") from None
            for row in rows:
                for name in ("base_input", "plus_input"):
                    row[name] = mbpp_deserialize_inputs(row["task_id"], row[name])
            tests = _all_tests(path, rows, MBPP_COMPARE, allow_unsandboxed)
        for row in rows:
            text = row["prompt"].strip().removeprefix('"""').removesuffix('"""').strip()
            yield {"problem_id": row["task_id"], "problem": text, "tests": tests.get(row["task_id"])}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path)
    for number, row in enumerate(rows):
        for name in COLUMNS:
            if name not in row:
                raise UserError(f"{path}: row {number} has no column '{name}'; EvalPlus' are: {', '.join(COLUMNS)}, ...")
    return rows


def _all_tests(path: Path, rows: list[dict[str, Any]], compare: dict[str, str], allow_unsandboxed: bool) -> dict[str, str]:
    """Task id -> tests in the form of records.PROBLEM. The programs are run at first use of a data file only."""
    cache = cache_dir() / "evalplus" / f"{path.stem}-{file_sha256(path)[:16]}.json"
    if not cache.exists():
        found = {}
        with FunctionRunner(allow_unsandboxed=allow_unsandboxed) as runner, bar("evalplus", len(rows), "tasks") as shown:
            for row in rows:
                found[row["task_id"]] = json.dumps(_tests(runner, row, compare.get(row["entry_point"], "exact")))
                shown.advance()
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, found)
    return json.loads(cache.read_text(encoding="utf-8"))


def _tests(runner: FunctionRunner, row: dict[str, Any], compare: str) -> dict[str, Any]:
    entry = row["entry_point"]
    program = row["prompt"] + row["canonical_solution"] + (NOT_NONE.format(name=entry) if compare == "not_none" else "")
    inputs = [plain_values.encode(list(arguments)) for arguments in [*row["base_input"], *row["plus_input"]]]
    tests = {
        "inputs": inputs,
        "outputs": runner.run(program, entry, inputs),
        "fn_name": entry,
        "setup": "",  # nothing: in EvalPlus a program brings its own imports
        "compare": compare,
    }
    return tests | ({"tolerance": row["atol"]} if row["atol"] else {})
