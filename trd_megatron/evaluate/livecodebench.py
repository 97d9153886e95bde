"""LiveCodeBench's code generation problems (https://arxiv.org/abs/2403.07974), from the files test*.jsonl of code_generation_lite.

They are read here and not by the package's loader, which needs trust_remote_code and unpickles: private tests are base64 of zlib of a
pickle of one JSON text. Such a pickle needs no class at all, and one that names any is refused.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trd_megatron.data.hub import HubFiles
from trd_megatron.errors import UserError
from trd_megatron.verify import plain_values

# release_v6 is the problems of all six files.
FILES = HubFiles("livecodebench/code_generation_lite", ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7))))
COLUMNS = ("question_id", "question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata")
MAX_TESTS_BYTES = 1 << 30  # of one problem's private tests, unpacked


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a text does not need")


def read(paths: Sequence[Path], with_tests: bool, _: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the problems. Without tests, those columns are not decoded. Raises UserError that names the file and the problem."""
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _problem(f"{path}, line {number}", json.loads(line), with_tests)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _problem(place: str, row: dict[str, Any], with_tests: bool) -> dict[str, Any]:
    for name in COLUMNS:
        if name not in row:
            raise UserError(f"{place} has no column '{name}'; LiveCodeBench's are: {', '.join(COLUMNS)}, ...")
    try:
        tests = json.dumps(_tests(row)) if with_tests else None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        EOFError,
        IndexError,
        zlib.error,
        RecursionError,
    ) as error:
        raise UserError(f"{place}: the tests of {row['question_id']} cannot be read: {str(error).splitlines()[0]}") from None
    return {
        "problem_id": row["question_id"],
        "problem": row["question_content"],
        "starter_code": row["starter_code"] or None,
        "tests": tests,
    }


def _tests(row: dict[str, Any]) -> dict[str, Any]:
    """Public and private tests in the form of records.PROBLEM: texts, or calls of the function that the metadata name."""
    cases = json.loads(row["public_test_cases"]) + _private(row["private_test_cases"])
    fn_name = json.loads(row["metadata"]).get("func_name")
    inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
    if fn_name is None:
        return {"inputs": inputs, "outputs": outputs}
    return {
        "inputs": [[plain_values.encode(json.loads(line)) for line in text.split("\n")] for text in inputs],  # an argument a line
        "outputs": [plain_values.encode(json.loads(text)) for text in outputs],
        "fn_name": fn_name,
    }


def _private(packed: str) -> Any:
    """The private tests: JSON as it is, or packed."""
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(base64.b64decode(packed), MAX_TESTS_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {MAX_TESTS_BYTES >> 20} MiB")
    text = _TextOnly(io.BytesIO(unpacked)).load()
    if not isinstance(text, str):
        raise ValueError(f"a pickled {type(text).__name__}, not a text")
    return json.loads(text)
