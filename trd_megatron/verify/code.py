"""Code verification: takes the last python block of a response and runs it against its problem's tests in a sandbox.

The tests of a problem (the column `tests`), as JSON, in one of three forms:

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}                        standard input and output; text, or lists of lines
    {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}            calls of a function, or of a method of `class Solution`
    {"asserts": "assert add(1, 2) == 3", "fn_name": "add"}            Python text that calls the program's functions (see below)

    "setup"      Python text that is run before the program, and before the asserts; it takes the place of the usual imports (the
                 names of typing, math, collections, itertools, ..., as LiveCodeBench's grader gives them). "" means nothing at all.
    "tolerance"  of numbers in function results: |result - expected| <= tolerance, default 0
    "compare"    how a function's result is compared; without it as TACO's and LiveCodeBench's graders do: tuples are lists, at any
                 depth; where [x] is expected, x will do. Else one of EvalPlus' ways, which know tuples from lists:
        "exact"            ==; numbers within tolerance + 1e-7 |expected| where the types agree, with a tolerance of 1e-6 where
                           floats are expected and none is given
        "set"              set(result) == set(expected)
        "not_none"         a bool must be the expected one; of anything else, whether it is not None
        "any"              every result passes (Mbpp/164)
        "or_zero"          as exact, or the result is 0 (Mbpp/295)
        "surface_area"     as exact, or within the tolerance of the pyramid's surface by its perpendicular height (Mbpp/581)
        "digit_distance"   as exact, or the sum of the differences of the digits (Mbpp/558)
        "polynomial_root"  the result is a root, within the tolerance, of the polynomial that is the argument (HumanEval/32)

Values that JSON cannot hold are written as in plain_values.py. In the assert form "fn_name" is a name or a list of names; without it
every name counts that the asserts use and neither they nor the setup nor Python define.
"""

import atexit
import builtins
import json
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from trd_megatron.verify import sandbox
from trd_megatron.verify.code_compare import output_difference, same_result, show
from trd_megatron.verify.plain_values import NotPlain, decode, encode
from trd_megatron.verify.sandbox import Ended, Sandbox
from trd_megatron.verify.verdict import Verdict, VerdictKind

MAX_PROGRAM_CHARS = 200_000  # a longer one fails unread
LEAST_MEMORY_MB = 64  # Python itself takes about 30 of address space
KEPT_PROGRAM_CHARS = 20_000  # of such a one, in the verdict
MAX_DETAIL = 300  # characters

_PYTHON = ("python", "py", "python3")
# Possessive, so that no line takes more than linear time.
_OPENING = re.compile(r"(?<!`)(`{3,}+)[ \t]*+([\w+.#-]*+)[^`\n]*+$")
_CLOSING = re.compile(r"[ \t]*+(`{3,}+)(?![ \t]*+\w)")


def extract_program(text: str) -> str | None:
    """Contents of the last closed block that is fenced as python (py, python3), None if there is none.

    Where no block is, the last closed one without a language counts. Only the text after the last `</think>` is searched, when there
    is one. Time is linear in the length of the text.
    """
    start = text.rfind("</think>") + 1
    found: dict[bool, str] = {}  # is it fenced as python -> contents
    fence, language, indent, lines = "", "", 0, list[str]()  # of the open block; no fence: none is open
    for line in text[start:].split("\n"):
        line = line.rstrip("\r")
        closing, opening = (_CLOSING.match(line), _OPENING.search(line)) if "```" in line else (None, None)
        if fence and closing is not None and len(closing[1]) >= len(fence):
            if language in _PYTHON or not language:
                found[language in _PYTHON] = "\n".join(lines)
            fence = ""
        # A block that is still open when the next begins was cut off.
        elif opening is not None and (opening[2].lower() in _PYTHON or (not fence and not line[: opening.start()].strip())):
            fence, language, lines = opening[1], opening[2].lower(), []
            indent = len(line) - len(line.lstrip())
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    return found.get(True, found.get(False))


class _MalformedTests(Exception):
    """The tests of a problem are not in a form that we know; the message says what is wrong."""


class _Outcome(Exception):
    """The verdict is known."""

    def __init__(self, kind: VerdictKind, detail: str = "") -> None:
        self.kind, self.detail = kind, detail


def _one_line(text: str) -> str:
    """Printable and short, whatever a hostile program put into it."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))[:MAX_DETAIL]


class _Limits:
    """The clock of one program."""

    def __init__(self, timeout_s: float, total_timeout_s: float, memory_mb: int) -> None:
        self.timeout_s, self.total_timeout_s, self.memory_mb = timeout_s, total_timeout_s, memory_mb
        self.end = time.monotonic() + total_timeout_s

    def of_a_test(self) -> float:
        """Seconds that the next test may take. Raises _Outcome when the program has had its time."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise self.passed("before its next test")
        return min(self.timeout_s, left)

    def passed(self, where: str) -> _Outcome:
        """The verdict when one of the two limits has passed."""
        if time.monotonic() >= self.end:
            return _Outcome("timeout", f"{where}: not done with all tests within {self.total_timeout_s:g} s")
        return _Outcome("timeout", f"{where}: not done within {self.timeout_s:g} s")


def _fail(ended: Ended, where: str, limits: _Limits) -> _Outcome:
    """The verdict of a program whose process ended too early."""
    match ended.how:
        case "timeout":
            return limits.passed(where)
        case "memory":
            return _Outcome("fail", f"{where}: more than {limits.memory_mb} MB of memory")
        case "processes":
            return _Outcome("fail", f"{where}: too many processes")
        case "output":
            return _Outcome("fail", f"{where}: too much output")
        case "collapse":
            return _Outcome("fail", f"{where}: the program brought its sandbox down: {ended.detail}")
    said = [line for line in ended.errors.splitlines() if line.strip()]
    return _Outcome("fail", f"{where}: {said[-1].strip() if said else ended.detail or 'ended early'}")


def _setup(tests: dict[str, Any]) -> str | None:
    setup = tests.get("setup")
    if setup is not None and not isinstance(setup, str):
        raise _MalformedTests("`setup` is no text")
    return setup


def _text(value: Any) -> str:
    """Standard input or output of a test: text, or its lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise _MalformedTests(f"standard input and output are texts, not {show(value)}")
    return value


def _run_outputs(sandbox: Sandbox, program: str, tests: dict[str, Any], limits: _Limits) -> None:
    job = {"program": program, "setup": _setup(tests)}
    pairs = [(_text(given).encode("utf-8"), _text(expected)) for given, expected in zip(tests["inputs"], tests["outputs"], strict=True)]
    for number, (given, expected) in enumerate(pairs, 1):
        ended = sandbox.run(job, given, limits.of_a_test())
        if ended.how != "exit" or ended.detail:
            raise _fail(ended, f"test {number}", limits)
        difference = output_difference(ended.output.decode("utf-8", "replace"), expected)
        if difference is not None:
            raise _Outcome("fail", f"test {number}: {difference}")


def _answer(line: bytes | Ended, where: str, limits: _Limits) -> dict[str, Any]:
    """What a program's process said, as a dict of known shape and exact built-in types: it may have written anything.

    {"loaded": True}, {"value": ...} or {"raised": names of exceptions, "detail": text}, with "arguments" perhaps; values are decoded.
    """
    if isinstance(line, Ended):
        raise _fail(line, where, limits)
    try:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError
        answer: dict[str, Any] = {}
        if said.get("loaded") is True:
            answer["loaded"] = True
        elif "value" in said:
            answer["value"] = decode(said["value"])
        else:
            raised = said["raised"]
            if not (isinstance(raised, list) and all(isinstance(name, str) for name in raised)):
                raise ValueError
            answer |= {"raised": [name for name in raised[:20] if name in _EXCEPTIONS], "detail": _one_line(str(said["detail"]))}
        if "arguments" in said:
            answer["arguments"] = _list(decode(said["arguments"]))
    except NotPlain as error:
        raise _Outcome("fail", f"{where}: the program returned {error}") from None
    except (ValueError, KeyError, RecursionError):  # UnicodeDecodeError among them
        raise _Outcome("fail", f"{where}: the program wrote into its grader's channel") from None
    return answer


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


_EXCEPTIONS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def _load(sandbox: Sandbox, program: str, setup: str | None, limits: _Limits, mutable: bool) -> None:
    job = {"kind": "functions", "program": program, "setup": setup, "mutable": mutable}
    answer = _answer(sandbox.load(job, limits.of_a_test()), "loading", limits)
    if "loaded" not in answer:
        raise _Outcome("fail", f"loading: {answer.get('detail', 'no sign of life')}")


def _call_function(sandbox: Sandbox, program: str, tests: dict[str, Any], limits: _Limits) -> None:
    name, compare, tolerance = tests["fn_name"], tests.get("compare"), tests.get("tolerance", 0)
    if not isinstance(name, str):
        raise _MalformedTests("`fn_name` is no name")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise _MalformedTests("`tolerance` is no number")
    pairs = []
    for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
        arguments = decode(given)
        if not isinstance(arguments, list | tuple):
            raise _MalformedTests(f"the input of a function is a list of its arguments, not {show(given)}")
        pairs.append((list(arguments), encode(list(arguments)), decode(expected)))
    _load(sandbox, program, _setup(tests), limits, mutable=False)
    for number, (arguments, encoded, expected) in enumerate(pairs, 1):
        where = f"test {number}"
        line = sandbox.ask({"call": name, "arguments": encoded, "keywords": {}}, limits.of_a_test())
        answer = _answer(line, where, limits)
        if "value" not in answer:
            raise _Outcome("fail", f"{where}: {answer.get('detail', 'no result')}")
        if not same_result(answer["value"], expected, arguments, compare, tolerance):
            raise _Outcome("fail", f"{where}: {name} gives {show(answer['value'])}, expected {show(expected)}")


def _run_asserts(candidate: Sandbox, checker: Sandbox, program: str, tests: dict[str, Any], limits: _Limits) -> None:
    """The asserts run in a sandbox of their own; calls and plain values go to and fro.

    Until the program's first answer nothing that happens there is the program's doing, and a failure is ours.
    """
    names = tests.get("fn_name")
    names = [names] if isinstance(names, str) else names
    if not isinstance(tests["asserts"], str):
        raise _MalformedTests("`asserts` is no text")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _MalformedTests("`fn_name` is neither a name nor a list of names")
    job = {"kind": "asserts", "asserts": tests["asserts"], "setup": _setup(tests), "names": names}
    said = _checker_says(checker.load(job, limits.of_a_test()), answered=False, limits=limits)
    if "ready" not in said:
        raise _MalformedTests(f"the tests cannot run: {said.get('broken', 'no sign of life')}")
    _load(candidate, program, _setup(tests), limits, mutable=True)
    end, calls = time.monotonic() + limits.of_a_test(), 0
    reply: dict[str, Any] = {"go": True}
    while True:
        said = _checker_says(checker.ask(reply, end - time.monotonic()), answered=calls > 0, limits=limits)
        if "call" not in said:
            break
        left = end - time.monotonic()
        if left <= 0:
            raise limits.passed(f"call {calls + 1}")
        calls += 1
        answer = _answer(candidate.ask(said, left), f"call {calls}", limits)
        if not {"value", "raised"} & answer.keys():
            raise _Outcome("fail", f"call {calls}: the program wrote into its grader's channel")
        try:
            reply = answer | {key: encode(answer[key]) for key in ("value", "arguments") if key in answer}
        except NotPlain as error:
            raise _Outcome("fail", f"call {calls}: the program returned {error}") from None
    if calls == 0:
        raise _MalformedTests(f"the tests call no function of the program: {said.get('failed', 'they pass without it')}")
    if "passed" not in said:
        raise _Outcome("fail", said.get("failed", "the tests did not come to their end"))


def _checker_says(line: bytes | Ended, answered: bool, limits: _Limits) -> dict[str, Any]:
    """What the process of the asserts said. It is not ours either, but no program reaches it other than by plain values."""
    if isinstance(line, Ended):
        if answered:
            raise _fail(line, "the tests", limits)
        raise _MalformedTests(f"the tests end early: {line.how} {line.detail}")
    said = json.loads(line)
    assert isinstance(said, dict)
    return said


def _check_form(tests: Any) -> None:
    """Raises _MalformedTests where the tests have none of the three forms."""
    if not isinstance(tests, dict):
        raise _MalformedTests(f"the tests are no object (a dict; not its JSON text), but {show(tests)}")
    unknown = sorted(map(str, tests.keys() - {"inputs", "outputs", "fn_name", "asserts", "setup", "tolerance", "compare"}))
    if unknown:
        raise _MalformedTests(f"the tests have the unknown key {show(unknown[0])}")
    if "asserts" in tests:
        return
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and inputs):
        raise _MalformedTests("the tests have neither `asserts` nor lists of `inputs` and `outputs`")
    if len(inputs) != len(outputs):
        raise _MalformedTests(f"the tests have {len(inputs)} inputs and {len(outputs)} outputs")


class _Worker:
    """The sandboxes of one worker: one for programs, one for the asserts of benchmarks."""

    def __init__(self, level: sandbox.LevelName, processor: int) -> None:
        self.candidate, self.checker = Sandbox(level, processor), Sandbox(level, processor)

    def grade(self, program: str, tests: Any, limits: _Limits) -> tuple[VerdictKind, str]:
        """(verdict, detail); never raises for anything that a program or its tests do."""
        begun: list[Sandbox] = []
        try:
            verdict = self._grade(program, tests, limits, begun)
            for box in begun:
                box.end()
        except sandbox.SandboxError:  # the verdict is known
            self.kill()
        return verdict

    def _grade(self, program: str, tests: Any, limits: _Limits, begun: list[Sandbox]) -> tuple[VerdictKind, str]:
        """begun: takes the sandboxes that are open after it."""
        try:
            _check_form(tests)
            for box in (self.candidate, self.checker) if "asserts" in tests else (self.candidate,):
                box.begin(limits.memory_mb, limits.total_timeout_s)
                begun.append(box)
            if "asserts" in tests:
                _run_asserts(self.candidate, self.checker, program, tests, limits)
            elif tests.get("fn_name") is not None:
                _call_function(self.candidate, program, tests, limits)
            else:
                _run_outputs(self.candidate, program, tests, limits)
        except _Outcome as outcome:
            return outcome.kind, _one_line(outcome.detail)
        except (_MalformedTests, NotPlain) as error:
            return "error", _one_line(str(error))
        except Exception as error:  # ours, whatever it is: counted and shown, and no program pays for it
            self.kill()
            begun.clear()
            return "error", _one_line(f"{type(error).__name__}: {error}")
        return "pass", ""

    def abort(self) -> None:
        """Makes grade(), in its thread, come to an end."""
        self.candidate.abort()
        self.checker.abort()

    def kill(self) -> None:
        """Ends both sandboxes; not while grade() is at work."""
        self.candidate.kill()
        self.checker.kill()


class CodeVerifier:
    """Grades many responses, `workers` programs at a time; a context manager that leaves no process behind.

    workers             number of programs that run at once, at least 1
    timeout_s           wall-clock seconds for one test (one input, or the whole of the asserts), over 0
    total_timeout_s     wall-clock seconds for all tests of one program, over 0
    memory_mb           MiB for one program and all that it starts, at least 64; also the address space of each process of it
    allow_unsandboxed   whether resource limits will do where this machine gives no sandbox

    Raises UserError where this machine gives no sandbox and less is not allowed.
    """

    def __init__(
        self, workers: int, timeout_s: float = 10, total_timeout_s: float = 120, memory_mb: int = 1024, allow_unsandboxed: bool = False
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        for name, value in (("timeout_s", timeout_s), ("total_timeout_s", total_timeout_s)):
            if not value > 0:
                raise ValueError(f"{name} must be over 0, not {value}")
        if not memory_mb >= LEAST_MEMORY_MB:
            raise ValueError(f"memory_mb must be at least {LEAST_MEMORY_MB}, not {memory_mb}")
        self.timeout_s, self.total_timeout_s, self.memory_mb = timeout_s, total_timeout_s, memory_mb
        level = sandbox.require(allow_unsandboxed)
        # Each on a processor of its own: a program that starts many processes takes no time from its neighbours.
        processors = sorted(os.sched_getaffinity(0))
        start = random.randrange(len(processors))
        self._workers = [_Worker(level, processors[(start + number) % len(processors)]) for number in range(workers)]
        self._idle = list(self._workers)
        self._threads: ThreadPoolExecutor | None = None
        self._in_use = self._closing = False

    def __enter__(self) -> "CodeVerifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything that runs. The verifier can be used again; it starts anew then."""
        self._closing = True
        try:
            while len(self._idle) < len(self._workers):  # again and again: one may have been about to start
                for worker in self._workers:
                    worker.abort()
                time.sleep(0.01)
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)
                self._threads = None
            for worker in self._workers:
                worker.kill()
        finally:
            self._closing = False

    def verify_many(self, items: Iterable[tuple[str, Any]]) -> Iterator[Verdict]:
        """One verdict for each (response, tests), in order, each as soon as it and all before it are known.

        `items` is read only as fast as workers take items, so it may be endless. Raises RuntimeError if another verify_many of this
        verifier has not ended, or close() comes in between.
        """
        if self._in_use:
            raise RuntimeError("another verify_many of this CodeVerifier has not ended")
        self._in_use = True
        if self._threads is None:
            # A launcher dies with the thread that started it, so these live until close().
            self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="verify-code")
        threads = self._threads
        waiting: deque[Future[Verdict]] = deque()  # in the order of the items
        try:
            source = iter(items)
            exhausted = False
            while not exhausted or waiting:
                if not exhausted and sum(not future.done() for future in waiting) < len(self._workers):
                    try:
                        response, tests = next(source)
                    except StopIteration:
                        exhausted = True
                    else:
                        waiting.append(threads.submit(self._grade, response, tests))
                else:
                    wait([future for future in waiting if not future.done()], return_when=FIRST_COMPLETED)
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
                    if self._threads is not threads:
                        raise RuntimeError("this CodeVerifier was closed while verify_many was at work")
        finally:
            self._in_use = False
            if any(not future.done() for future in waiting):  # the caller or an item stopped us
                self.close()

    def _grade(self, response: str, tests: Any) -> Verdict:
        program = extract_program(response)
        if program is None:
            return Verdict.of("no_answer", None, "no closed block of python")
        if not program.strip():
            return Verdict.of("no_answer", None, "the last block of python is empty")
        if len(program) > MAX_PROGRAM_CHARS:
            detail = f"the program has {len(program):,} characters and failed unread, the limit is {MAX_PROGRAM_CHARS:,}"
            return Verdict.of("fail", program[:KEPT_PROGRAM_CHARS], detail)
        worker = self._idle.pop()
        try:
            if self._closing:
                return Verdict.of("error", program, "stopped")
            kind, detail = worker.grade(program, tests, _Limits(self.timeout_s, self.total_timeout_s, self.memory_mb))
        finally:
            self._idle.append(worker)
        return Verdict.of(kind, program, detail)


_shared: CodeVerifier | None = None
_shared_lock = threading.Lock()


def _forget_shared() -> None:
    """After a fork: the child must not talk through its parent's links, and another thread of the parent may have held the lock."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


def _close_shared() -> None:
    if _shared is not None:
        _shared.close()


os.register_at_fork(after_in_child=_forget_shared)
atexit.register(_close_shared)


def verify_code(
    response: str,
    tests: dict[str, Any],
    timeout_s: float = 10,
    memory_mb: int = 1024,
    allow_unsandboxed: bool = False,
    total_timeout_s: float = 120,
) -> Verdict:
    """Grades one response; keeps its launcher alive between calls. Thread-safe, one item at a time: CodeVerifier is for many.

    response  text of the model; the last closed block of python (after the last `</think>`) is its program
    tests     in a form of this module's docstring
    The rest as for CodeVerifier, whose exceptions it raises.
    """
    global _shared
    with _shared_lock:
        settings = CodeVerifier(1, timeout_s, total_timeout_s, memory_mb, allow_unsandboxed)  # starts nothing
        if _shared is None:
            _shared = settings
        _shared.timeout_s, _shared.total_timeout_s, _shared.memory_mb = timeout_s, total_timeout_s, memory_mb
        [verdict] = _shared.verify_many([(response, tests)])
        return verdict
