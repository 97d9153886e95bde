"""The sandbox: hostile programs are contained, graded in time and leave nothing behind; what a machine without namespaces gives."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.unit.hostile_programs import ATTACKS, ENDLESS, PROBE_HELP, PROBES, RESULTS
from trd_megatron.doctor import sandbox_row
from trd_megatron.errors import UserError
from trd_megatron.verify import CodeVerifier, sandbox, verify_code
from trd_megatron.verify.sandbox import Sandbox

FIRST_USER = 0x70000000  # jail.FIRST_USER: jail.py is no module of the package's, it runs in the cage
REPOSITORY = Path(__file__).parents[2]
needs_full = pytest.mark.skipif(sandbox.level().name != "full", reason=f"no full sandbox here: {sandbox.level().reason}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def processes(of: int) -> dict[int, str]:
    """Process id -> command line of all that descend from a process, zombies left out."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != of:
            ancestor = parents[ancestor]
        if ancestor == of and process != of:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[process] = (Path(f"/proc/{process}") / "cmdline").read_text()
    return found


def programs_of(of: int) -> set[int]:
    """Processes below the launchers of a process: the trees of programs."""
    below: set[int] = set()
    for launcher, command in processes(of).items():
        if "launcher.py" in command:
            below |= processes(launcher).keys()
    return below


def users_of_programs() -> list[int]:
    """Processes that run as one of the users that launchers give to programs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if folder.stat().st_uid >= FIRST_USER:
                found.append(int(folder.name))
    return found


def shared_memory() -> int:
    """Bytes in files of the memory, on the whole machine."""
    return int(re.search(r"Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10


def traces() -> list[str]:
    """Files that a program has managed to leave."""
    places = [
        "/",
        "/tmp",
        "/var/tmp",
        "/dev",
        "/dev/shm",
        "/usr/lib",
        "/etc",
        "/root",
        str(Path.home()),
        os.getcwd(),
        os.path.dirname(os.__file__),
    ]
    found = []
    for place in places:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            found += [f"{place}/{name}" for name in os.listdir(place) if name.startswith(("trd-hostile", "trd-code-"))]
    return found


def wait_for(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(what)


@pytest.fixture(scope="module")
def nothing_left():
    """Around all hostile programs: nothing of them is there at the end."""
    before, mounts = shared_memory(), Path("/proc/self/mountinfo").read_text()
    yield
    assert not programs_of(os.getpid())
    assert not users_of_programs()
    assert traces() == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert shared_memory() - before < 256 << 20  # other tests run beside this one; the programs tried for gigabytes


@needs_full
def test_there_are_enough_hostile_programs():
    programs = [*PROBES.values(), *ATTACKS.values(), *ENDLESS.values(), *RESULTS.values()]
    assert len(set(programs)) == len(programs) >= 90


@needs_full
def test_what_is_forbidden_is_refused(nothing_left, monkeypatch):
    """A probe prints "contained" when everything it tried was refused."""
    monkeypatch.setenv("TRD_HOSTILE_SECRET", "secret")
    tests = {"inputs": [""], "outputs": ["contained"], "setup": ""}
    with CodeVerifier(workers=2, timeout_s=60) as verifier:
        verdicts = list(verifier.verify_many((block(PROBE_HELP + program), tests) for program in PROBES.values()))
        assert not programs_of(os.getpid())
    assert {name: v.detail for name, v in zip(PROBES, verdicts, strict=True) if v.verdict != "pass"} == {}


@needs_full
def test_attacks_do_not_pass(nothing_left):
    tests = {"inputs": [""], "outputs": ["THE ANSWER"]}
    with CodeVerifier(workers=2, timeout_s=2, memory_mb=512) as verifier:
        verdicts = list(verifier.verify_many((block(program), tests) for program in ATTACKS.values()))
        assert not programs_of(os.getpid())
    assert {name: v for name, v in zip(ATTACKS, verdicts, strict=True) if v.verdict not in ("fail", "timeout")} == {}
    assert all(v.detail and v.detail.isprintable() and len(v.detail) <= 300 for v in verdicts)


@needs_full
def test_a_program_takes_no_time_from_its_neighbours(nothing_left):
    hog = "import os\nfor _ in range(25):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\nwhile True: pass"
    honest = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 0.5: pass\nprint(1)"
    tests = {"inputs": [""], "outputs": ["1"]}
    with CodeVerifier(workers=2, timeout_s=3, memory_mb=512) as verifier:
        verdicts = [verdict.verdict for verdict in verifier.verify_many((block(program), tests) for program in (hog, honest))]
    assert verdicts == ["timeout", "pass" if len(os.sched_getaffinity(0)) > 1 else verdicts[1]]


@needs_full
def test_endless_programs_end(nothing_left):
    tests = {"inputs": [""], "outputs": ["THE ANSWER"]}
    with CodeVerifier(workers=4, timeout_s=1, memory_mb=512) as verifier:
        verdicts = list(verifier.verify_many((block(program), tests) for program in ENDLESS.values()))
        assert not programs_of(os.getpid())
    assert {name: v for name, v in zip(ENDLESS, verdicts, strict=True) if v.verdict != "timeout"} == {}


@needs_full
@pytest.mark.parametrize("form", ["function", "asserts"])
def test_results_cannot_be_forged(nothing_left, form):
    tests = {"inputs": [[]], "outputs": [42], "fn_name": "f"} if form == "function" else {"asserts": "assert f() == 42", "fn_name": "f"}
    with CodeVerifier(workers=2, timeout_s=5, memory_mb=512) as verifier:
        verdicts = list(verifier.verify_many((block(program), tests) for program in RESULTS.values()))
        assert not programs_of(os.getpid())
    assert {name: v for name, v in zip(RESULTS, verdicts, strict=True) if v.verdict not in ("fail", "timeout")} == {}
    assert all(v.detail and v.detail.isprintable() and len(v.detail) <= 300 for v in verdicts)


@needs_full
def test_memory_is_watched_between_calls():
    """A function that returns at once, and leaves processes that fill the memory while nobody asks for anything."""
    program = """
import os, time
def f():
    for _ in range(4):
        if os.fork() == 0:
            x = b"x" * (200 << 20)
            time.sleep(600)
    return 1
"""
    box = Sandbox("full")
    try:
        box.begin(memory_mb=512, cpu_s=60)
        assert box.load({"kind": "functions", "program": program, "setup": "", "mutable": False}, 60) == b'{"loaded": true}'
        request = {"call": "f", "arguments": [], "keywords": {}}
        assert box.ask(request, 60) == b'{"value": 1}'
        wait_for(lambda: len(programs_of(os.getpid())) == 2, "the processes of the program live")  # stage and supervisor are left
        assert box.ask(request, 60) == sandbox.Ended("memory")
        box.end()
    finally:
        box.kill()


@needs_full
def test_a_program_finds_nothing_of_the_one_before():
    leave = "import os\nopen('/tmp/left', 'w').write('x')\nos.chmod('/tmp', 0o700) if os.stat('/tmp').st_uid == os.getuid() else None"
    look = "import os\nprint(os.listdir('/tmp'), oct(os.stat('/tmp').st_mode), [p for p in os.listdir('/proc') if p.isdigit()])"
    box = Sandbox("full")
    try:
        seen = []
        for programs in ([leave, look], [look]):  # tests of one program, then another program
            box.begin(memory_mb=512, cpu_s=60)
            seen += [box.run({"program": program, "setup": ""}, b"", timeout_s=60).output for program in programs]
            box.end()
        assert [text.decode().split("[")[1][:1] for text in seen[1:]] == ["]", "]"]
        assert len({text.decode().split("0o")[1][:5] for text in seen[1:]}) == 1
    finally:
        box.kill()


KILLED = """
import sys, time
from trd_megatron.verify import CodeVerifier
program = "```python\\nimport os, time\\nos.fork()\\nos.setsid() if os.fork() == 0 else None\\nwhile True: time.sleep(1)\\n```"
with CodeVerifier(workers=2, timeout_s=600, total_timeout_s=600, allow_unsandboxed=True) as verifier:
    list(verifier.verify_many([(program, {"inputs": [""], "outputs": [""]})] * 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_grader_leaves_nothing(number):
    grader = subprocess.Popen([sys.executable, "-c", KILLED], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(programs_of(grader.pid)) >= 10, "the programs do not start")  # 2 x (stage, supervisor, 4 processes)
        family = list(processes(grader.pid))
        grader.send_signal(number)
        errors = grader.communicate(timeout=60)[1]
        assert grader.returncode in (-number, 130, 1)
        assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
        wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in family), f"left behind: {family}")
    finally:
        grader.kill()
    assert traces() == []


def test_a_killed_launcher_is_replaced():
    tests = {"inputs": ["1"], "outputs": ["1"]}
    with CodeVerifier(workers=1, allow_unsandboxed=True) as verifier:
        assert [v.verdict for v in verifier.verify_many([(block("print(input())"), tests)])] == ["pass"]
        [launcher] = [
            process
            for process, command in processes(os.getpid()).items()
            if "launcher.py" in command and process not in _shared_launchers()
        ]
        os.kill(launcher, signal.SIGKILL)
        assert [v.verdict for v in verifier.verify_many([(block("print(input())"), tests)] * 2)] == ["pass"] * 2


def _shared_launchers() -> set[int]:
    """Launchers that verify_code keeps between calls."""
    from trd_megatron.verify import code

    boxes = [] if code._shared is None else [box for worker in code._shared._workers for box in (worker.candidate, worker.checker)]
    return {box._process.pid for box in boxes if box._process is not None}


@needs_full
def test_a_sandbox_that_breaks_is_no_wrong_answer():
    """The launcher is killed while a program runs: that is ours, so the verdict is an error, and the next program is graded."""
    with CodeVerifier(workers=1, timeout_s=60) as verifier:
        items = [
            (block("import time; time.sleep(600)"), {"inputs": [""], "outputs": [""]}),
            (block("print(1)"), {"inputs": [""], "outputs": ["1"]}),
        ]

        verdicts = verifier.verify_many(items)

        def kill_the_busy_one():
            wait_for(lambda: len(programs_of(os.getpid())) >= 3, "no program")
            os.kill(
                next(p for p, command in processes(os.getpid()).items() if "launcher.py" in command and len(processes(p)) >= 3),
                signal.SIGKILL,
            )

        killer = threading.Thread(target=kill_the_busy_one)
        killer.start()
        first, second = verdicts
        killer.join()
    assert (first.passed, first.verdict) == (None, "error")
    assert second.verdict == "pass"


# Another user or a machine without namespaces, in a process of its own. The first argument says how it is to give up its rights.
ELSEWHERE = """
import ctypes, os, sys
sys.path.insert(0, {repository!r})
libc = ctypes.CDLL(None, use_errno=True)
def drop(*kept):
    for capability in range(41):
        if capability not in kept:
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; execve takes the rest
if os.environ.pop("STEP", "") != "2":
    how = sys.argv[1]
    if how == "user":
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    elif how == "container":  # root without CAP_SYS_ADMIN, and something mounted where the cage is built
        assert libc.unshare(0x20000) == 0
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
        assert libc.mount(b"tmpfs", sys.argv[2].encode(), b"tmpfs", 0, None) == 0
        drop(*[c for c in range(41) if c != 21])
    elif how == "nothing":  # ... and no user namespaces
        assert libc.unshare(0x10000000) == 0
        assert os.path.exists("/proc/self/uid_map")
        open("/proc/self/uid_map", "w").write("0 0 1")
        open("/proc/sys/user/max_user_namespaces", "w").write("0")
        drop()
    os.execve(sys.executable, [sys.executable, "-c", os.environ["SCRIPT"], *sys.argv[1:]], dict(os.environ, STEP="2"))
from trd_megatron.errors import UserError
from trd_megatron.verify import sandbox, verify_code
level = sandbox.level()
print(level.name, "|", level.reason)
block = "```python\\n{{}}\\n```".format
def grade(program, tests, **more):
    try:
        verdict = verify_code(block(program), tests, timeout_s=1 if "sleep" in program else 30, memory_mb=512, **more)
        print(verdict.verdict, "|", verdict.detail)
    except UserError as error:
        print("UserError", "|", error)
add = {{"asserts": "assert add(1, 2) == 3", "fn_name": "add"}}
grade("def add(a, b): return a + b", add)
for program, tests in (
    ("def add(a, b): return a + b", add),
    ("def add(a, b): return a - b", add),
    ("print(int(input()) + 1)", {{"inputs": ["1"], "outputs": ["2"]}}),
    ("import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(100)", {{"inputs": [""], "outputs": [""]}}),
    # Root's processes are not counted by the kernel, so no bomb where a program runs as root.
    ("import os\\n" + ("while True: os.fork()" if sys.argv[1] != "nothing" else "os.abort()"), {{"inputs": [""], "outputs": [""]}}),
    ("import socket; socket.socket(socket.AF_INET)", {{"inputs": [""], "outputs": [""]}}),
    ("import os\\nfor name in ('mem', 'environ', 'maps'):\\n"
     "    try: open(f'/proc/{{os.getppid()}}/{{name}}', 'rb').read(1)\\n    except OSError: print(name)",
     {{"inputs": [""], "outputs": ["mem\\nenviron\\nmaps"]}}),
):
    grade(program, tests, allow_unsandboxed=True)
"""


def elsewhere(how: str, folder: Path, python: str = sys.executable) -> list[list[str]]:
    script = ELSEWHERE.format(repository=str(REPOSITORY))
    environment = {"PATH": os.environ["PATH"], "SCRIPT": script}
    done = subprocess.run([python, "-c", script, how, str(folder)], cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split(" | ") for line in done.stdout.splitlines()]


def check_verdicts(lines: list[list[str]]) -> None:
    assert [verdict for verdict, _ in lines] == ["pass", "fail", "pass", "timeout", "fail", "fail", "pass"]
    assert "PermissionError" in lines[5][1]


@needs_root
@needs_full
@pytest.mark.parametrize("how", ["user", "container"])
def test_the_full_sandbox_needs_no_root(how, tmp_path):
    """An ordinary user, and root in a container without CAP_SYS_ADMIN: by a user namespace."""
    python = sys.executable
    if how == "user":
        found = [name for name in ("/usr/bin/python3.11", "/usr/local/bin/python3.11") if Path(name).exists()]
        if os.stat(os.path.realpath(python)).st_mode & 1 and all(
            folder.stat().st_mode & 1 for folder in Path(os.path.realpath(python)).parents
        ):
            found = [python]
        if not found or not all(folder.stat().st_mode & 1 for folder in REPOSITORY.parents):
            pytest.skip("other users can read neither a Python 3.11 nor this folder")
        python = found[0]
    level, graded, *rest = elsewhere(how, tmp_path, python)
    if level[0] != "full":
        pytest.skip(f"no user namespaces for such a user: {level[1]}")
    assert graded[0] == "pass"
    check_verdicts(rest)


@needs_root
def test_without_namespaces_it_says_so_and_needs_leave(tmp_path):
    if not Path("/proc/sys/user/max_user_namespaces").exists() or sandbox.level().name != "full":
        pytest.skip("user namespaces cannot be made here, to be forbidden in them")
    level, refused, *rest = elsewhere("nothing", tmp_path)
    assert level[0] == "limits"
    assert level[1].startswith("unshare: ")
    assert refused[0] == "UserError"
    assert "verify.code.allow_unsandboxed=true" in refused[1]
    assert level[1] in refused[1]
    check_verdicts(rest)
    assert traces() == []


@needs_root
def test_limits_of_root_are_those_of_another_user():
    """The level `limits` itself, here for root: another user, no network, and nothing of the tree or its folder stays."""
    look = """
import os, socket
above = os.path.basename(os.path.dirname(os.getcwd()))
print(os.getuid() >= 0x70000000, os.getcwd() == os.environ["HOME"] != "/tmp", above.startswith("trd-code-"))
actions = [lambda: socket.socket(socket.AF_INET), lambda: open("/trd-hostile", "w"), lambda: os.kill(os.getppid(), 9), lambda: os.setuid(0)]
for action in actions:
    try:
        print(action())
    except OSError:
        print("refused")
folder = os.getcwd()
for action in (lambda: os.rmdir(folder), lambda: os.rename(folder, folder + "x"), lambda: open(os.path.dirname(folder) + "/x", "w")):
    try:  # a link in the folder's place would lead root's cleaning somewhere else
        print(action())
    except OSError:
        print("refused")
os.makedirs("a/b/c")
os.symlink("/", "a/root")
os.chmod("a/b", 0)
"""
    daemon = "import os, time\nfor _ in range(3):\n    if os.fork() == 0: os.setsid()\nopen('left', 'w')\ntime.sleep(600)"
    box = Sandbox("limits")
    try:
        box.begin(memory_mb=512, cpu_s=60)
        ended = box.run({"program": look, "setup": ""}, b"", timeout_s=60)
        assert (ended.how, ended.detail, ended.output.decode()) == ("exit", "", "True True True\n" + "refused\n" * 7)
        assert box.run({"program": "import os; print(os.listdir())", "setup": ""}, b"", timeout_s=60).output == b"[]\n"
        assert box.run({"program": daemon, "setup": ""}, b"", timeout_s=1).how == "timeout"
        box.end()
        assert not programs_of(os.getpid())
        assert not users_of_programs()
        assert traces() == []
    finally:
        box.kill()


def test_what_require_takes(monkeypatch):
    for name, allowed, outcome in (("full", False, "full"), ("full", True, "full"), ("limits", True, "limits")):
        monkeypatch.setattr(sandbox, "level", lambda name=name: sandbox.Level(name, "why"))
        assert sandbox.require(allowed) == outcome
    with pytest.raises(UserError, match=r"no sandbox .*\(why\).*verify.code.allow_unsandboxed=true"):
        sandbox.require(False)
    monkeypatch.setattr(sandbox, "level", lambda: sandbox.Level("none", "why"))
    for allowed in (True, False):
        with pytest.raises(UserError, match="programs cannot be run on this machine: why"):
            sandbox.require(allowed)


def test_doctor_tells_the_level():
    assert sandbox_row(sandbox.Level("full", "")) == ("full: own namespaces, no network, read-only files", "task=code")
    for name in ("limits", "none"):
        found, purpose = sandbox_row(sandbox.Level(name, "unshare: [odd] text"))
        assert "yellow" in found and "unshare: \\[odd] text" in found
        assert ("allow_unsandboxed=true" in purpose) == (name == "limits")


def test_packages_and_threads_of_honest_programs():
    """What the walls must let through."""
    program = """
    import asyncio, multiprocessing, subprocess, sys, tempfile, threading
    import numpy, sympy
    async def double(x):
        await asyncio.sleep(0)
        return 2 * x
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    results = []
    thread = threading.Thread(target=lambda: results.append(numpy.arange(4).sum()))
    thread.start()
    thread.join()
    with multiprocessing.Pool(2) as pool:
        results += pool.map(abs, [-1, 2])
    results.append(asyncio.run(double(21)))
    print(*results, sympy.Integer(2) ** 10, open("/dev/stdin").read().strip(), file=open("/dev/stdout", "w"))
    del sys.stdout
    """
    tests = {"inputs": ["hello\n"], "outputs": ["6 1 2 42 1024 hello"]}
    verdict = verify_code(block(textwrap.dedent(program)), tests, timeout_s=60, allow_unsandboxed=True)
    assert (verdict.verdict, verdict.detail) == ("pass", "")
