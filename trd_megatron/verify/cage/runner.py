"""What a program's process does: runs the program itself, answers calls of its functions, or runs a benchmark's asserts.

run() and talk() are called right after the fork and never return. Everything after confine() may be in a hostile program's hands, so
nothing that it sends or leaves behind is trusted by anyone.
"""

import _sitebuiltins
import atexit
import builtins
import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

START_ONLY = ("LD_LIBRARY_PATH", "PYTHONHOME")  # of the environment: Python may need them to start
RECURSION_LIMIT = 50_000  # as LiveCodeBench's grader sets it
MAX_DETAIL = 300  # characters
# Their names are at hand without an import, as in LiveCodeBench's grader; of two of one name the later module's counts.
STAR_MODULES = (
    *("typing", "string", "re", "datetime", "heapq", "bisect", "copy", "random", "statistics", "operator"),
    *("math", "itertools", "functools", "collections"),
)
PLAIN_MODULES = (*STAR_MODULES, "sys", "io", "json")
PRELOADED = ("decimal", "fractions", "array", "queue", "dataclasses", "enum", "abc", "time")  # saves time, changes nothing

_usual_names: dict[str, Any] = {}


def _load_plain_values() -> Any:
    """The package's plain_values.py, by its path: while it can be seen, so at the import of this module."""
    path = os.path.join(os.path.dirname(_HERE), "plain_values.py")
    spec = importlib.util.spec_from_file_location("plain_values", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HERE = os.path.dirname(os.path.abspath(__file__))
_plain_values = _load_plain_values()


def prepare(paths: list[str], executable: str) -> None:
    """In the launcher, once: everything that programs share. `paths` are where packages lie, beside the standard library."""
    for name in ("exit", "quit"):  # of the module site, which we do without
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    for name in START_ONLY:
        os.environ.pop(name, None)
    sys.executable = sys._base_executable = executable  # type: ignore[attr-defined]
    sys.path[:] = [path for path in sys.path if path != _HERE] + paths
    for name in STAR_MODULES:
        exec(f"from {name} import *", _usual_names)
    for name in (*PLAIN_MODULES, *PRELOADED):
        module = importlib.import_module(name)
        if name in PLAIN_MODULES:
            _usual_names[name] = module
    for name in [name for name in _usual_names if hasattr(builtins, name) or name.startswith("__")]:
        del _usual_names[name]  # pow is Python's, not math's


def describe(error: BaseException) -> str:
    """Type and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_DETAIL]


def _begin(confine: Callable[[], None], ready: int, keep: list[int]) -> None:
    """Puts the descriptors in their places (keep[0] becomes 0, keep[1] 1, ...), drops all others and all rights."""
    for place, descriptor in enumerate(keep):
        os.dup2(descriptor, 200 + place)  # out of each other's way
    os.dup2(ready, 200 + len(keep))
    for place in range(len(keep) + 1):
        os.dup2(200 + place, place)
    ready = len(keep)
    os.closerange(ready + 1, 1024)  # all that the launcher and the supervisor have; nothing was inherited
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        confine()
    except BaseException as error:
        os.write(ready, describe(error).encode("utf-8", "replace"))
        os._exit(70)
    os.write(ready, b"ready")
    os.close(ready)
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors, buffering = ("backslashreplace", 1) if name == "stderr" else ("strict", -1)
        stream = open(descriptor, mode, buffering, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["main.py"]
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(0)  # most solutions of the benchmarks are older than this limit
    for name in ("frames", "jail", "supervisor", "system_calls", "runner", "launcher"):
        sys.modules.pop(name, None)


def _new_module(name: str, setup: str | None) -> types.ModuleType:
    """The module that a program runs in, with the setup or in its place the usual names. Raises what the setup raises."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    if setup is None:
        module.__dict__.update(_usual_names)
    else:
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), module.__dict__)
    return module


def run(job: bytes, job_input: int, output: int, errors: int, ready: int, confine: Callable[[], None]) -> None:
    """One run of {"program", "setup"} with real standard input and output. Ends the process: 0, or 1 after an exception."""
    _begin(confine, ready, [job_input, output, errors])
    content = json.loads(job)
    leave, code = os._exit, 0  # not to be looked up later: the program may have put something else there
    try:
        module = _new_module("__main__", content["setup"])
        exec(compile(content["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:  # however it ends by itself: what it has written counts
        pass
    except BaseException:
        code = 1
        traceback.print_exc(limit=-3)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for its threads, as Python does
        atexit._run_exitfuncs()
    finally:
        for name in ("stdout", "stderr"):
            with contextlib.suppress(BaseException):  # it may have closed, replaced or deleted them
                getattr(sys, name).flush()
        leave(code)


def talk(job: bytes, requests: int, replies: int, ready: int, confine: Callable[[], None]) -> None:
    """Serves {"kind": "functions" | "asserts", ...} over lines of JSON; ends the process at the end of the requests."""
    null = os.open("/dev/null", os.O_RDWR)
    _begin(confine, ready, [null, null, null, requests, replies])
    content, leave = json.loads(job), os._exit
    with open(3, "rb") as lines:
        if content["kind"] == "functions":
            _serve_functions(content, lines)
        else:
            _run_asserts(content, lines)
    leave(0)


def _say(message: dict[str, Any]) -> None:
    """Writes one line to the supervisor."""
    line = memoryview(json.dumps(message, allow_nan=False).encode("ascii") + b"\n")
    while line:
        line = line[os.write(4, line) :]


def _raised(error: BaseException) -> dict[str, Any]:
    """What tells the other side of an exception: the built-in classes that it belongs to, nearest first."""
    bases = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins" and issubclass(kind, Exception)]
    try:
        detail = describe(error)
    except BaseException:  # its own __str__ fails
        detail = type(error).__name__
    return {"raised": bases, "detail": detail}


def _serve_functions(job: dict[str, Any], lines: Any) -> None:
    """Loads {"program", "setup", "mutable"} and answers {"call", "arguments", "keywords"} with {"value"} or {"raised", "detail"}.

    With `mutable` the arguments are sent back too, where the call has changed them.
    """
    encode, decode = _plain_values.encode, _plain_values.decode
    try:
        module = _new_module("solution", job["setup"])
        exec(compile(job["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
        solution, instance = module.__dict__.get("Solution"), None
    except BaseException as error:
        _say(_raised(error))
        return
    _say({"loaded": True})
    for line in lines:
        request = json.loads(line)
        arguments, keywords = decode(request["arguments"]), decode(request["keywords"])
        name = request["call"]
        try:
            if isinstance(solution, type) and hasattr(solution, name):  # LeetCode's form
                instance = instance or solution()
                function = getattr(instance, name)
            elif name in module.__dict__:
                function = module.__dict__[name]
            else:
                raise NameError(f"the program defines no {name}")
            answer = {"value": encode(function(*arguments, **keywords))}
        except BaseException as error:
            answer = _raised(error)
        if job["mutable"]:
            try:
                after = encode(arguments)
            except ValueError:  # no longer plain: the other side keeps what it has
                after = request["arguments"]
            if after != request["arguments"]:
                answer["arguments"] = after
        _say(answer)


class _Missing(TypeError):
    """A test that cannot be carried over to the program."""


def _run_asserts(job: dict[str, Any], lines: Any) -> None:
    """Runs {"asserts", "setup", "names"} with stand-ins for the program's functions.

    Says {"broken": why} where the tests themselves cannot run, otherwise {"ready": true}; after the first line to it, {"call", ...} for
    each call (answered by a line as _serve_functions writes it), and at last {"passed": true} or {"failed": why}.
    """
    try:
        setup = job["setup"] or ""
        code = compile(job["asserts"], "<asserts>", "exec", dont_inherit=True)
        module = _new_module("asserts", setup)
        names = job["names"] if job["names"] is not None else _free_names(job["asserts"], module.__dict__)
    except BaseException as error:
        _say({"broken": describe(error)})
        return
    _say({"ready": True})
    lines.readline()
    for name in names:
        module.__dict__[name] = _stand_in(name, lines)
    try:
        exec(code, module.__dict__)
    except AssertionError as error:
        failed_line = max(
            (frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<asserts>"), default=0
        )
        source = job["asserts"].splitlines()
        text = source[failed_line - 1].strip() if 0 < failed_line <= len(source) else str(error)
        _say({"failed": f"assertion failed: {text}"[:MAX_DETAIL]})
    except BaseException as error:
        _say({"failed": describe(error)})
    else:
        _say({"passed": True})


def _stand_in(name: str, lines: Any) -> Callable[..., Any]:
    """A function that has the program's function called, on the other side of two walls."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            sent = {"call": name, "arguments": _plain_values.encode(list(arguments)), "keywords": _plain_values.encode(keywords)}
        except ValueError as error:
            raise _Missing(f"an argument of {name} is {error}") from None
        _say(sent)
        answer = json.loads(lines.readline())
        for mine, theirs in zip(arguments, _plain_values.decode(answer.get("arguments", [])), strict=False):
            _take_over(mine, theirs)
        if "value" in answer:
            return _plain_values.decode(answer["value"])
        raise _exception(answer["raised"], answer["detail"])

    call.__name__ = name
    return call


def _exception(kinds: list[str], detail: str) -> Exception:
    """An exception of the first of these built-in classes that a text makes one of."""
    for kind in kinds:
        try:
            return getattr(builtins, kind)(detail)
        except TypeError:  # UnicodeDecodeError wants more
            continue
    return RuntimeError(detail)


def _take_over(mine: Any, theirs: Any) -> None:
    """Gives an argument the contents that the call has left it with."""
    if isinstance(mine, list | bytearray) and isinstance(theirs, list | bytes):
        mine[:] = theirs
    elif isinstance(mine, dict | set) and isinstance(theirs, dict | set):
        mine.clear()
        mine.update(theirs)


def _free_names(text: str, known: dict[str, Any]) -> list[str]:
    """Names that the text uses but nobody defines: neither the text, nor the setup, nor Python."""
    import symtable

    free: set[str] = set()
    bound: set[str] = set(known) | set(vars(builtins))
    tables = [symtable.symtable(text, "<asserts>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            if symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced()):
                free.add(symbol.get_name())
    return sorted(free - bound)
