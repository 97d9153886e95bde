"""Our verdicts beside those of LiveCodeBench's own checker, where the package nvidia-livecodebench is installed (extra `code`)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trd_megatron.evaluate import benchmarks
from trd_megatron.verify import CodeVerifier

SPEC = importlib.util.find_spec("livecodebench")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the package nvidia-livecodebench is not installed")
# testing_util takes functions out of os for good, so it runs in a process of its own, one for each program.
PEER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("testing_util", sys.argv[1])
util = importlib.util.module_from_spec(spec)
spec.loader.exec_module(util)
sample, program = json.loads(sys.argv[2])
out = sys.stdout
results, _ = util.run_test({"input_output": json.dumps(sample)}, test=program, timeout=6)
print(json.dumps(bool(results) and all(result is True for result in results)), file=out)
"""
STDIN = [("1 2\n", "3\n"), ("10 -4\n", "6\n")]
CALLS = [('[1, 2]\n"x"', "[1, 2]"), ('[]\n""', "[]")]
ADD = "print(sum(map(int, input().split())))"
PROGRAMS = {  # stdin, then a function f(a, b) that gives a
    "right": (None, ADD),
    "reads all": (None, "import sys\nprint(sum(map(int, sys.stdin.read().split())))"),
    "other writing": (None, "print(f'{sum(map(int, input().split()))}.00')"),
    "white space": (None, "print(' ', sum(map(int, input().split())), ' \\n')"),
    "main": (None, f"def main():\n    {ADD}\n\nif __name__ == '__main__':\n    main()"),
    "wrong": (None, "print(0)"),
    "one line more": (None, f"{ADD}\nprint(1)"),
    "nothing": (None, "pass"),
    "raises": (None, "1 / 0"),
    "no Python": (None, "print("),
    "exits after": (None, f"{ADD}\nimport sys\nsys.exit(0)"),
    "function": ("f", "class Solution:\n    def f(self, a, b):\n        return a"),
    "tuple": ("f", "class Solution:\n    def f(self, a, b):\n        return tuple(a)"),
    "other name": ("f", "class Solution:\n    def g(self, a, b):\n        return a"),
    "wrong list": ("f", "class Solution:\n    def f(self, a, b):\n        return a + [1]"),
    "typing": ("f", "class Solution:\n    def f(self, a: List[int], b: str) -> List[int]:\n        return deepcopy(a)"),
    "changes its argument": ("f", "class Solution:\n    def f(self, a, b):\n        a.append(1)\n        return a[:-1]"),
}


def peer(cases: list[tuple[str, str]], fn_name: str | None, program: str) -> bool:
    assert SPEC is not None and SPEC.submodule_search_locations is not None
    util = Path(SPEC.submodule_search_locations[0]) / "evaluation" / "testing_util.py"
    sample = {"inputs": [given for given, _ in cases], "outputs": [output for _, output in cases], "fn_name": fn_name}
    child = subprocess.run(
        [sys.executable, "-c", PEER, str(util), json.dumps([sample, program])], capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_verdicts_are_those_of_its_own_checker(tmp_path: Path) -> None:
    items, theirs = [], []
    for number, (fn_name, program) in enumerate(PROGRAMS.values()):
        cases = STDIN if fn_name is None else CALLS
        row = {"question_id": f"q{number}", "question_content": "p", "starter_code": "", "private_test_cases": "[]"}
        row["public_test_cases"] = json.dumps([{"input": given, "output": output, "testtype": "x"} for given, output in cases])
        row["metadata"] = json.dumps({} if fn_name is None else {"func_name": fn_name})
        (tmp_path / "test.jsonl").write_text(json.dumps(row))
        [problem] = benchmarks.load(f"livecodebench_v6:{tmp_path / 'test.jsonl'}")
        items.append((f"```python\n{program}\n```", json.loads(problem["tests"])))
        theirs.append(peer(cases, fn_name, program))
    with CodeVerifier(2, allow_unsandboxed=True) as verifier:
        ours = [verdict.passed for verdict in verifier.verify_many(items)]
    assert dict(zip(PROGRAMS, ours, strict=True)) == dict(zip(PROGRAMS, theirs, strict=True))
    assert any(theirs) and not all(theirs)
