"""Problems from files, and what is wrong with them in one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_megatron import pipeline
from trd_megatron.config import load
from trd_megatron.data import champ, deduplicate, deepscaler, human_eval, parquet
from trd_megatron.errors import UserError
from trd_megatron.evaluate import avg_at_k, pass_at_k
from trd_megatron.run_dir import RunDir
from trd_megatron.stages import prepare
from trd_megatron.verify import code_tests

ROWS = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(10)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def problems(path: Path, *overrides: str) -> list[dict[str, Any]]:
    return prepare.load(load(["experiment=smoke", f"data.path={path}", "data.test_problems=2", *overrides]))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_the_same_problems_from_every_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        jsonl(path, ROWS)
    rows = problems(path)
    assert {row["answer"] for row in rows} == {str(n + 1) for n in range(10)}
    assert sorted(row["split"] for row in rows) == ["test"] * 2 + ["train"] * 8
    assert rows[0]["problem_id"].startswith("mine-")
    assert rows[0]["source"] == path.name
    assert rows == problems(path)


def test_limits_and_seeds(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    few = problems(path, "data.train_problems=3")
    assert [row["split"] for row in few] == ["train"] * 3 + ["test"] * 2
    held_out = [{row["problem_id"] for row in problems(path, f"seed={seed}") if row["split"] == "test"} for seed in range(4)]
    assert len({frozenset(ids) for ids in held_out}) > 1


def test_the_files_own_split_is_kept(tmp_path: Path) -> None:
    rows = [row | {"split": "test" if n in (3, 4) else "train"} for n, row in enumerate(ROWS)]
    found = problems(jsonl(tmp_path / "mine.jsonl", rows))
    assert {row["answer"] for row in found if row["split"] == "test"} == {"4", "5"}
    with pytest.raises(UserError, match=r"split 'dev': must be train or test"):
        problems(jsonl(tmp_path / "mine.jsonl", [*rows, ROWS[0] | {"split": "dev"}]))


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([], r"holds no problems"),
        ([{"question": "?", "answer": 1}], r"no column 'problem'; it has: answer, question"),
        ([{"problem": "?"}], r"no column 'answer'"),
        ([ROWS[0], {"problem": "How many?", "answer": None}], r"row 1 has no answer \('How many\?'\)"),
        ([ROWS[0], {"problem": "How many?", "answer": "  "}], r"row 1 has no answer"),
        ([{"problem": " ", "answer": 1}], r"row 0 has no problem text"),
        ([ROWS[0] | {"problem_id": "a"}, ROWS[1] | {"problem_id": "a"}], r"problem_id 'a' occurs twice"),
        (ROWS[:2], r"0 training and 2 test problems are left"),
        ([1, 2], r"every entry must be an object"),
    ],
)
def test_wrong_files_are_named(rows: list[Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        problems(jsonl(tmp_path / "mine.jsonl", rows))
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        problems(tmp_path / "gone.jsonl")
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"mine\.parquet cannot be read"):
        problems(path)
    (tmp_path / "mine.jsonl").write_text('{"problem": "?", "ans')
    with pytest.raises(UserError, match=r"mine\.jsonl cannot be read"):
        problems(tmp_path / "mine.jsonl")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"must end in \.parquet, \.jsonl or \.json"):
        problems(tmp_path / "mine.txt")


def test_deepscaler_from_a_local_copy(tmp_path: Path) -> None:
    path = tmp_path / "deepscaler.json"
    path.write_text(json.dumps([{"problem": "a?", "answer": "1", "solution": "so 1"}, {"problem": "b?", "answer": 2, "solution": "2"}]))
    (first, second), dropped = deepscaler.load([path])
    assert (first["answer"], first["reference_solution"]) == ("1", "so 1")
    assert (second["answer"], second["reference_solution"]) == ("2", None)
    assert not dropped
    path.write_text(json.dumps([{"problem": "a?", "answer": None}]))
    with pytest.raises(UserError, match="row 0 has no answer"):
        deepscaler.load([path])


def test_human_eval_from_its_package() -> None:
    found = prepare.load(load(["experiment=quickstart", "task=code"]))
    assert sorted(row["split"] for row in found) == ["test"] * 16 + ["train"] * 32
    rows, dropped = human_eval.load([human_eval.locate()])
    assert len(rows) == 164 and not dropped
    row = rows[2]
    assert row["problem_id"] == "HumanEval/2"
    assert row["problem"].startswith("def truncate_number(number: float) -> float:\n")
    tests = code_tests.parse(row["tests"])
    assert tests["fn_name"] == "truncate_number"
    assert tests["asserts"].endswith("check(truncate_number)\n")
    for row in rows:  # the reference solution is a whole program
        compile(row["reference_solution"], row["problem_id"], "exec")


def test_champ_keeps_what_can_be_graded() -> None:
    rows, dropped = champ.load([champ.locate()])
    assert (len(rows), sum(dropped.values())) == (173, 97)
    by_id = {row["problem_id"]: row for row in rows}
    first = by_id["P_Combinatorics_1"]
    assert first["answer"] == "239"
    assert (
        first["reference_solution"].splitlines()[0]
        == "Let x_n, y_n, z_n be the number of length-n strings that end with digit 1, 2, 3 respectively."
    )
    assert first["reference_solution"].endswith(r"The final answer is \boxed{239}")
    assert prepare.load(load(["experiment=smoke", "data=champ", "data.path=null"]))


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("@@C(10, 5)@@, or equivalently @@252@@", r"\binom{10}{5}"),
        ("@@5/14@@, or approximately 35.7%", r"\frac{5}{14}"),
        ("@@(n+1)^(n-1)@@", "(n + 1)^{n - 1}"),
        ("@@1-1/2^(1/n)@@", r"1 - \frac{1}{2^{\frac{1}{n}}}"),
        ("@@-2x+2@@", r"-2 \cdot x + 2"),
        ("0 is the only possible value", "0"),
        ("The limit exists and is equal to @@(1+sqrt(4a+1))/2@@", r"\frac{(1 + \sqrt{4 \cdot a + 1})}{2}"),
        ("100 (i.e., all values)", "100"),
        ("98 values", "98"),
        ("@@(2n)!/(2^n*n!)@@", r"\frac{(2 \cdot n)!}{(2^{n} \cdot n!)}"),
        ("No", None),
        ("376 and 625", None),
        ("@@x=6, y=5@@", None),
        ("@@f(x)=0@@", None),
        ("At least 1 number", None),
        ("@@(x^2+x+1)(x^2-x+1)@@", None),
        ("@@[-1, 1]@@", None),
        ("@@2+@@", None),
        ("", None),
    ],
)
def test_champs_answers_become_latex_or_nothing(answer: str, latex: str | None) -> None:
    assert champ.latex(answer) == latex


CODE = {"problem": "Add.", "reference_solution": "def add(a, b): return a + b"}


def test_code_problems_of_a_file(tmp_path: Path) -> None:
    stdin = {"inputs": ["1 2"], "outputs": ["3"]}
    tests = [
        stdin,
        json.dumps(stdin),
        {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"},
        {"asserts": "assert add(1, 2) == 3", "fn_name": "add"},
    ]
    rows = problems(jsonl(tmp_path / "code.jsonl", [CODE | {"tests": each} for each in tests]), "task=code", "data.test_problems=1")
    assert len(rows) == 4
    assert all(isinstance(json.loads(row["tests"]), dict) for row in rows)
    with pytest.raises(UserError, match=r"'mine-0' has no tests: give some, or set task=math"):
        problems(jsonl(tmp_path / "mine.jsonl", ROWS), "task=code")
    with pytest.raises(UserError, match=r"'code-0' has no answer: give one, or set task=code"):
        problems(jsonl(tmp_path / "code.jsonl", [CODE | {"tests": stdin}]))


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("{", "is no JSON"),
        ([1], "must be an object"),
        ({}, "needs inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "two lists of the same length"),
        ({"inputs": [1], "outputs": ["1"]}, "every input and output is a text"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "every input is the list of the function's arguments"),
        ({"asserts": "assert f()"}, "asserts need fn_name"),
        ({"asserts": " ", "fn_name": "f"}, "asserts must be a text"),
        ({"input": ["1"], "outputs": ["1"]}, "unknown key 'input'"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_tests_are_named_by_row(tests: Any, message: str, tmp_path: Path) -> None:
    good = CODE | {"tests": {"inputs": ["1"], "outputs": ["1"]}}
    path = jsonl(tmp_path / "code.jsonl", [good, CODE | {"tests": tests}])
    with pytest.raises(UserError, match=rf"code\.jsonl: row 1: tests .*{message}"):
        parquet.load(path)


def test_texts_are_the_same_but_for_what_does_not_count() -> None:
    same = [
        r"Find $\frac{1}{2} + x$.",
        r"find \( \dfrac{1}{2}+x \)",
        "FIND   $$\\frac{1}{2}\\,+\\;x$$  ",
        r"Find $\left \frac{1}{2} \quad+ x\right$!",
        "Find $\\frac{１}{２} + x$.",  # full width digits
    ]
    assert len({deduplicate.normalise(text) for text in same}) == 1
    others = [
        r"Find $\frac{1}{2} - x$.",
        r"Find $\frac{1}{3} + x$.",
        r"Find $\frac{1}{2} + x$ twice.",
        r"Find $\leftarrow$.",
        r"Find $\rightarrow$.",
    ]
    assert len({deduplicate.normalise(text) for text in [*same, *others]}) == 1 + len(others)
    rows = [{"problem": text} for text in (same[0], "another")]
    assert deduplicate.overlap(rows, [{"problem": text} for text in (same[1], same[2], "new")]) == 2


def test_problems_of_benchmarks_are_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", ROWS)
    exams = jsonl(tmp_path / "exams.jsonl", [ROWS[0], {"problem": "what is  3 + 1", "answer": 4}])
    gsm8k = jsonl(tmp_path / "other.jsonl", [{"question": "What is 3 + 1?", "answer": "#### 4"}, {"question": "New?", "answer": "#### 0"}])
    option = f"data.exclude_benchmarks=['{exams}','gsm8k:{gsm8k}']"
    rows, figures = prepare.collect(load(["experiment=smoke", f"data.path={path}", "data.test_problems=2", option]))
    assert {row["answer"] for row in rows} == {str(n + 1) for n in range(10) if n not in (0, 3)}
    assert figures["in_benchmarks"] == {"exams": 2, "gsm8k": 1}
    held_out = [row | {"split": "test" if n == 0 else "train"} for n, row in enumerate(ROWS)]
    rows, figures = prepare.collect(load(["experiment=smoke", f"data.path={jsonl(path, held_out)}", "data.test_problems=1", option]))
    assert {row["answer"] for row in rows if row["split"] == "test"} == {"1"}  # never trained on: stays
    assert figures["in_benchmarks"] == {"exams": 1, "gsm8k": 1}


def test_the_built_in_file_is_there() -> None:
    assert len(parquet.load(parquet.locate("builtin:smoke"))) == 28


def test_metrics() -> None:
    assert avg_at_k([[True, False], [True, True]]) == 0.75
    assert pass_at_k(16, 0, 16) == 0
    assert pass_at_k(16, 1, 16) == 1
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(n, c, k)
    for outcomes in ([], [[True], []]):
        with pytest.raises(ValueError, match="avg_at_k"):
            avg_at_k(outcomes)


def test_prepare_is_stale_when_a_file_it_read_changes(tmp_path: Path) -> None:
    exams = jsonl(tmp_path / "exams.jsonl", ROWS[:2])
    config = load(["experiment=smoke", f"data.exclude_benchmarks=['aime24','{exams}']"])

    def fingerprint() -> str:
        return next(pipeline.works(config, RunDir(tmp_path / "run", "smoke"))).folder.fingerprint

    first = fingerprint()
    assert fingerprint() == first  # and a benchmark of the hub is not downloaded for it
    jsonl(exams, ROWS[:3])
    assert fingerprint() != first
