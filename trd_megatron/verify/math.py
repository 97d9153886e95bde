r"""Math verification: finds the last \boxed{} of a response and compares it with the reference answer.

What takes no algebra is decided here (math_text.py), the rest by math-verify. Model output is hostile: an answer such as 9^{9^{9^9}}
can keep sympy busy for ever or eat the memory. So math-verify runs in child processes (math_worker.py) with an address-space limit,
which are killed when an item passes its wall-clock limit. docs/verification.md says what counts as correct.
"""

import atexit
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from trd_megatron.verify.math_text import AMO_DECIMALS, EXACT_DECIMALS, normalise, quick_verdict
from trd_megatron.verify.math_types import check_points
from trd_megatron.verify.verdict import Verdict

MAX_ANSWER_CHARS = 2_000  # a longer "answer" is a derivation; also keeps every request below the size of a pipe's buffer
MAX_REPLY_BYTES = 65_536
START_LIMIT_S = 120.0  # sympy is imported within a second on an idle machine
WORKER_SCRIPT = Path(__file__).with_name("math_worker.py")
# What a worker may see of the environment: enough to find Python's packages, no secrets.
WORKER_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")

# \boxed{ opens a box, also behind a doubled backslash; an escaped brace is a character; other braces open and close groups.
_TOKEN = re.compile(r"\\?\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Contents of the last \boxed{...} that is closed, None if there is none.

    Braces may nest; of nested boxes the inner one counts. Only the text after the last `</think>` is searched, when there is one.
    Time is linear in the length of the text.
    """
    start = text.rfind("</think>") + 1  # 0 without the tag; the tag itself holds no brace
    open_groups: list[int | None] = []  # where the contents of a box start; None for another group
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text, start):
        symbol = token.group()
        if symbol == "{":
            open_groups.append(None)
        elif symbol == "}":
            opened = open_groups.pop() if open_groups else None
            if opened is not None and (last is None or opened > last[0]):
                last = opened, token.start()
        elif len(symbol) > 2:  # a box; two characters are an escape
            open_groups.append(token.end())
    return None if last is None else text[last[0] : last[1]].strip()


def _prepare(response: str, answer: str, answer_type: str | None = None, check_values: str | None = None) -> Verdict | dict[str, Any]:
    """The verdict, where no algebra is needed to know it; otherwise the request for a worker."""
    points = check_points(answer_type, check_values)
    extracted = extract_boxed(response)
    if extracted is None:
        return Verdict.of("no_answer", None, r"no closed \boxed{}")
    if not extracted:
        return Verdict.of("no_answer", None, r"the last \boxed{} is empty")
    gold = extract_boxed(answer) or answer.strip()
    if len(gold) > MAX_ANSWER_CHARS:
        detail = f"the reference answer has {len(gold):,} characters, the limit is {MAX_ANSWER_CHARS:,}"
        return Verdict.of("error", extracted[:MAX_ANSWER_CHARS], detail)
    if not (gold := normalise(gold)):
        return Verdict.of("error", extracted[:MAX_ANSWER_CHARS], "the reference answer is empty")
    if len(extracted) > MAX_ANSWER_CHARS:
        detail = f"the answer has {len(extracted):,} characters and was cut and failed unread, the limit is {MAX_ANSWER_CHARS:,}"
        return Verdict.of("fail", extracted[:MAX_ANSWER_CHARS], detail)
    decimals = AMO_DECIMALS if answer_type in ("number", "set") else EXACT_DECIMALS
    decided = quick_verdict(gold, normalise(extracted), decimals)
    if decided is True and answer_type == "variable":  # a reference without a value at a point is no reference
        decided = gold, normalise(extracted)
    if isinstance(decided, bool):
        return Verdict.of("pass" if decided else "fail", extracted)
    gold, given = decided
    return {"gold": gold, "answer": given, "answer_type": answer_type, "points": points, "decimals": decimals, "extracted": extracted}


class _Worker:
    """One child process and the item it has in hand."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.item: int | None = None
        self.answer = ""
        self.timeout_s = 0.0
        self.ready = False
        self.deadline = 0.0  # on time.monotonic(); of the start while not ready, then of the item
        self.received = b""

    def send(self, item: int, request: dict[str, Any], timeout_s: float) -> None:
        """Hands over one item; starts the process first where there is none or it died while idle."""
        self.item, self.answer, self.timeout_s = item, request.pop("extracted"), timeout_s
        line = json.dumps(request | {"item": item, "timeout_s": timeout_s}).encode() + b"\n"
        if self.process is not None and self.process.poll() is None:
            self.deadline = time.monotonic() + timeout_s
        else:
            self.kill()
            self._start()
            self.item = item
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # died just now: receive() will see the end of its output and say so
            os.write(self.process.stdin.fileno(), line)  # under 64 KiB into an empty pipe: never blocks

    def _start(self) -> None:
        # By path, not -m: found wherever the current folder is by now. -P: this folder holds a math.py, which must not hide
        # the standard library's. Hashes are fixed because sympy's results can depend on the order of sets.
        environment = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ} | {"PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        self.deadline = time.monotonic() + START_LIMIT_S

    def receive(self) -> Verdict | None:
        """Reads what has come. The verdict of the item in hand, None if it is not there yet."""
        assert self.process is not None
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            return self._died()
        *lines, self.received = (self.received + chunk).split(b"\n")
        try:
            for line in lines:
                reply = json.loads(line)
                if self.ready:
                    if reply["item"] != self.item or reply["verdict"] not in ("pass", "fail", "error"):
                        raise ValueError
                    verdict = Verdict.of(reply["verdict"], self.answer, str(reply["detail"]))
                    self.item = None
                    return verdict
                if not reply["ready"]:
                    raise RuntimeError(f"the math verification worker cannot start: {reply['detail']}")
                self.ready, self.deadline = True, time.monotonic() + self.timeout_s
            if len(self.received) > MAX_REPLY_BYTES:
                raise ValueError
        except (ValueError, KeyError, TypeError):  # no JSON, or not what was asked for: nothing that it says later can be trusted
            self.kill()
            return Verdict.of("error", self.answer, "the grading process gave an answer that cannot be read")
        return None

    def _died(self) -> Verdict:
        assert self.process is not None
        code = self.process.wait()
        if not self.ready:
            raise RuntimeError(f"the math verification worker ended before it was ready (exit code {code}): {sys.executable}")
        if code == -signal.SIGALRM:  # its own alarm, because we were too busy or stopped to kill it in time
            return self.timed_out()
        self.kill()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Verdict.of("error", self.answer, f"the grading process ended {how}")

    def timed_out(self) -> Verdict:
        """Kills the process; the verdict of the item it was busy with."""
        if not self.ready:
            self.kill()
            raise RuntimeError(f"the math verification worker was not ready after {START_LIMIT_S:g} s")
        self.kill()
        return Verdict.of("timeout", self.answer, f"not graded within {self.timeout_s:g} s")

    def kill(self) -> None:
        """Ends the process, waits for it and closes the pipes; harmless if there is none."""
        if self.process is not None:
            self.process.kill()
            # With a limit: a Ctrl-C that came inside poll() can leave Popen's lock taken, and a plain wait() would wait for it for ever.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
        self.process, self.item, self.ready, self.received = None, None, False, b""


class MathVerifier:
    """Grades many responses with `workers` child processes; a context manager that leaves none of them behind.

    Workers start with the first item they get, and live until close(). For use from one thread, one verify_many at a time.

    workers    number of processes, at least 1
    timeout_s  wall-clock seconds for one item, over 0; the start of a worker does not count
    """

    def __init__(self, workers: int, timeout_s: float = 10) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be over 0, not {timeout_s}")
        self.timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(workers)]
        self._in_use = False

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers. The verifier can be used again; it starts new ones then."""
        for worker in self._workers:
            worker.kill()

    def verify_many(self, items: Iterable[tuple[Any, ...]]) -> Iterator[Verdict]:
        """One verdict for each (response, answer[, answer_type[, check_values]]), in order.

        A verdict comes as soon as it and all before it are known.
        `items` is read only as fast as workers take items, so it may be endless.

        Raises ValueError for an unsupported answer_type or check_values, RuntimeError if a worker cannot be started or another
        verify_many of this verifier has not ended.
        """
        if self._in_use:
            raise RuntimeError("another verify_many of this MathVerifier has not ended")
        self._in_use = True
        try:
            yield from self._verify(iter(items))
        finally:
            self._in_use = False
            for worker in self._workers:  # where the caller or an item stopped us: an answer still to come must not meet the next item
                if worker.item is not None:
                    worker.kill()

    def _verify(self, items: Iterator[tuple[Any, ...]]) -> Iterator[Verdict]:
        known: dict[int, Verdict] = {}
        taken = given = 0  # number of items read, of verdicts yielded
        exhausted = False
        while not exhausted or given < taken:
            idle = next((worker for worker in self._workers if worker.item is None), None)
            if idle is None or exhausted:
                known.update(self._wait())
            else:
                try:
                    prepared = _prepare(*next(items))
                except StopIteration:
                    exhausted = True
                    continue
                if isinstance(prepared, Verdict):
                    known[taken] = prepared
                else:
                    idle.send(taken, prepared, self.timeout_s)
                taken += 1
            while given in known:
                yield known.pop(given)
                given += 1

    def _wait(self) -> dict[int, Verdict]:
        """Waits until a worker answers, dies or passes its limit; item -> verdict."""
        busy = [worker for worker in self._workers if worker.item is not None]
        verdicts = {}
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process is not None
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = {key.data for key, _ in selector.select(max(0.0, left))}
        for worker in busy:
            item = worker.item
            assert item is not None
            verdict = None
            if worker in ready:
                verdict = worker.receive()
            elif time.monotonic() >= worker.deadline:
                verdict = worker.timed_out()
            if verdict is not None:
                verdicts[item] = verdict
        return verdicts


_shared: MathVerifier | None = None
_shared_lock = threading.Lock()


def _forget_shared() -> None:
    """In a forked child: the parent's worker is not ours to talk to or to end, and another thread may have held the lock."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


def _close_shared() -> None:
    if _shared is not None:
        _shared.close()


os.register_at_fork(after_in_child=_forget_shared)
atexit.register(_close_shared)


def verify_math(
    response: str, answer: str, answer_type: str | None = None, check_values: str | None = None, timeout_s: float = 10
) -> Verdict:
    r"""Grades one response; keeps one worker alive between calls. Thread-safe, one item at a time: MathVerifier is for many.

    response      text of the model; the last closed \boxed{} (after the last `</think>`) is its answer
    answer        reference answer, with or without \boxed{} or dollar signs
    answer_type   None, "integer" and "latex" are graded alike: decimals must agree to 6 decimals. "number" and "set" (order and
                  repetition do not count) to 4, "variable" is an expression whose values are compared: as in AMO-Bench
    check_values  with "variable" only: JSON list of points with a value for every letter, such as '["a=2,b=3", "a=1/2,b=-1"]';
                  the values must agree to 8 significant digits
    timeout_s     wall-clock seconds, over 0

    What counts as the same answer is listed in docs/verification.md. Raises TypeError for a response or an answer that is no text,
    ValueError for another answer_type or check_values, RuntimeError if the worker cannot be started.
    """
    global _shared
    texts = {"response": response, "answer": answer, "answer_type": answer_type, "check_values": check_values}
    for name, value in texts.items():
        optional = name in ("answer_type", "check_values")
        if not isinstance(value, str) and not (optional and value is None):
            raise TypeError(f"{name} must be a string{' or None' if optional else ''}, not {type(value).__name__}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be over 0, not {timeout_s}")
    with _shared_lock:
        if _shared is None:
            _shared = MathVerifier(workers=1)
        _shared.timeout_s = timeout_s
        [verdict] = _shared.verify_many([(response, answer, answer_type, check_values)])
        return verdict
