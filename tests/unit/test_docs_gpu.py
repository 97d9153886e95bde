"""docs/gpu.md names every test of tests/gpu, and none that is not there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_table_names_the_tests_that_there_are() -> None:
    files = sorted((TESTS / "gpu").glob("test_*.py"))
    there = {f"{file.name}::{name}" for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    there -= {"test_learner_cuda.py::test_the_bounds_of_fp8_are_what_rounding_costs"}  # runs on the CPU
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert set(re.findall(r"\w+\.py::test_\w+", "\n".join(rows))) == there
    assert all(row.count(" | ") == 4 for row in rows)


def test_every_file_says_how_many_gpus_it_needs() -> None:
    for file in (TESTS / "gpu").glob("test_*.py"):
        assert re.match(r'"""NUM_GPUS = \d\. ', file.read_text(encoding="utf-8")), file
