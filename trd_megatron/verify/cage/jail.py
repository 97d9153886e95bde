"""The walls: namespaces, a file system of its own, another user, no privileges, limits. Linux through ctypes.

Two levels. `full`: new user (where we have no CAP_SYS_ADMIN), pid, network, mount, ipc and uts namespaces; a root file system that
holds Python and its libraries, read-only, and one small writable folder. `limits`: none of that, but the resource limits, the system call
filter and, where we may, another user.
"""

import contextlib
import ctypes
import errno
import os
import pwd
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
from typing import Any

import system_calls

FOLDER_BYTES = 64 << 20  # the writable folder
FOLDER_FILES = 4096
MAX_PROCESSES = 32  # and threads
MAX_FILE_BYTES = FOLDER_BYTES
MAX_OPEN_FILES = 64
STACK_BYTES = 120 << 20  # of the main thread; the kernel keeps 128 MiB free for it
FIRST_USER = 0x70000000  # users of programs: this + 27 random bits; containers of one machine may count processes alike
INSIDE_USER = 1000  # our own user's number in a user namespace
PACKAGES = "/packages"  # where the cage has the packages that programs may import

_CAP_SETGID, _CAP_SETUID, _CAP_SYS_ADMIN = 6, 7, 21
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_KEPT_OPTIONS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}  # may be locked
_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_MACHINE = os.uname().machine


class Refused(Exception):
    """This machine does not let us build the walls; the message says what it refuses."""


def _check(result: int, what: str) -> None:
    if result != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def _control(operation: int, value: int) -> None:
    arguments = [ctypes.c_ulong(number) for number in (value, 0, 0, 0)]
    _check(_libc.prctl(operation, *arguments), f"prctl {operation}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {kind or 'bind'} on {target}")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def die_with(parent: int | None) -> None:
    """Asks the kernel to kill this process with the one that started it; `parent` None where its id cannot be seen from here."""
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before we asked
        os._exit(1)


def protect() -> None:
    """No process of the same user may trace this one or open its memory and descriptors."""
    _control(_PR_SET_DUMPABLE, 0)


def _capabilities() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))


def _choose_user(capabilities: int) -> int | None:
    """A user number that no one has, None where we may not change users or there is only one."""
    if not (capabilities >> _CAP_SETUID & capabilities >> _CAP_SETGID & 1):
        return None
    maps = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as lines:
            maps.append([tuple(map(int, line.split())) for line in lines])
    wanted = FIRST_USER + (int.from_bytes(os.urandom(4)) >> 5)
    for user in (wanted, 100_000 + os.getpid() % 65_536, 30_000 + os.getpid() % 30_000):  # smaller ones: in containers with a map
        if all(any(first <= user < first + count for first, _, count in lines) for lines in maps) and not _is_known(user):
            return user
    return None


def _is_known(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


class Jail:
    """The walls of one launcher. build() first; for each program enter_program() and furnish(), then confine() in its own process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        """plan: level; python (paths that Python needs), packages (folders and files to import), hidden (folders to be emptied)."""
        self.plan = plan
        self.full = plan["level"] == "full"
        self.folder = "/tmp"  # the writable folder; at the level `limits` a new one in self.above for each run
        self.above = ""
        self.user: int | None = None
        self.at_work = False  # a program has run since the last enter_program()
        self.filter = system_calls.build(_MACHINE) if system_calls.supported(_MACHINE) else None

    def build(self) -> None:
        """Moves this process behind the walls. Raises Refused."""
        capabilities = _capabilities()
        self.user = _choose_user(capabilities)
        if not self.full:
            _control(_PR_SET_CHILD_SUBREAPER, 1)  # what a program leaves behind becomes our child
            return
        if self.filter is None:
            raise Refused(f"no system call filter for processor {_MACHINE}")
        spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWNET
        own_user_space = not capabilities >> _CAP_SYS_ADMIN & 1
        if own_user_space:
            self._enter_user_space(spaces)
        else:
            _unshare(spaces)
        _mount("none", "/", None, _REC | _PRIVATE)
        self._build_root(with_proc=own_user_space)

    def _enter_user_space(self, other_spaces: int) -> None:
        """Unshares with a user namespace, for the rights that we lack. It has our user, and another where we may map one."""
        pairs = [(INSIDE_USER, os.getuid(), os.getgid())]
        if self.user is not None:
            pairs.append((INSIDE_USER + 1, self.user, self.user))
            self.user = INSIDE_USER + 1
        maps = {"setgroups": "deny"} if self.user is None else {}  # only who may change users may keep it
        maps["uid_map"] = "".join(f"{inside} {user} 1\n" for inside, user, _ in pairs)
        maps["gid_map"] = "".join(f"{inside} {group} 1\n" for inside, _, group in pairs)
        inside, ready = os.pipe()
        process = os.getpid()
        writer = os.fork()  # a second user can be mapped only from outside
        if writer == 0:
            try:
                os.close(ready)
                os.read(inside, 1)  # or nothing, where there is no new namespace to be written
                for name, text in maps.items():
                    with open(f"/proc/{process}/{name}", "w") as file:
                        file.write(text)
                os._exit(0)
            except OSError as error:
                os._exit(error.errno or 1)
            finally:
                os._exit(1)
        _unshare(other_spaces | _NEWUSER)
        os.write(ready, b"x")
        code = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
        os.close(inside)
        os.close(ready)
        if code != 0:
            raise Refused(f"users of a new user namespace: {os.strerror(code)}")

    def _build_root(self, with_proc: bool) -> None:
        root = "/tmp"  # what lies under it is hidden from here on, but can be bound by its open descriptor
        for path in self.plan["python"]:
            if path.startswith("/tmp/"):  # each program gets a /tmp of its own
                raise Refused(f"Python is installed under /tmp: {path}")
        binds: list[tuple[int, str]] = []  # descriptor of the source, path in the cage
        links: list[tuple[str, str]] = []
        covered: list[str] = []
        for path in sorted({"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", *self.plan["python"]}):
            if os.path.islink(path) and path.count("/") == 1:  # /lib -> usr/lib
                links.append((os.readlink(path), path))
            elif os.path.exists(path) and not any(path.startswith(folder + "/") for folder in covered):
                binds.append((os.open(path, os.O_PATH | os.O_CLOEXEC), path))
                covered.append(path)
        for path in self.plan["packages"]:
            binds.append((os.open(path, os.O_PATH | os.O_CLOEXEC), f"{PACKAGES}/{os.path.basename(path)}"))
        for name in ("null", "zero", "random", "urandom"):
            binds.append((os.open(f"/dev/{name}", os.O_PATH | os.O_CLOEXEC), f"/dev/{name}"))
        if with_proc:  # the kernel gives a user namespace a /proc of its own only where one can be seen; each program covers it by its own
            binds.append((os.open("/proc", os.O_PATH | os.O_CLOEXEC), "/proc"))
        _mount("tmpfs", root, "tmpfs", _NOSUID, "mode=755,size=1m")
        for name in ("proc", "tmp", "dev", PACKAGES.strip("/")):
            os.makedirs(f"{root}/{name}", exist_ok=True)
        for target, path in links:
            os.symlink(target, root + path)
        for name, target in (
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ):
            os.symlink(target, f"{root}/dev/{name}")
        os.symlink("/tmp", f"{root}/dev/shm")
        for source, path in binds:
            _make_place(root + path, is_folder=stat.S_ISDIR(os.fstat(source).st_mode))
            _mount(f"/proc/self/fd/{source}", root + path, None, _BIND | _REC)
            os.close(source)
        for folder in self.plan["hidden"]:
            if os.path.isdir(root + folder):
                _mount("tmpfs", root + folder, "tmpfs", _NOSUID | _NODEV, "mode=755,size=4k")
        self._close_mounts(root)
        os.chdir(root)
        _check(_libc.syscall(_PIVOT_ROOT[_MACHINE], b".", b"."), "pivot_root")
        _check(_libc.umount2(b".", _DETACH), "umount")
        os.chdir("/")
        _mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)

    def _close_mounts(self, root: str) -> None:
        """Makes every mount below the root's read-only, those that came along inside of a bind too."""
        below: set[str] = set()  # ids; a mount comes after the one that it stands on, and what the root has hidden is not below it
        with open("/proc/self/mountinfo") as lines:
            mounts = [line.split()[:6] for line in lines]
        top = [number for number, _, _, _, place, _ in mounts if place == root][-1]
        for number, parent, _, _, place, options in mounts:
            if parent != top and parent not in below:
                continue
            below.add(number)
            path = place.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")  # a space is \040
            if not path.startswith(root + "/proc"):
                kept = sum(flag for name, flag in _KEPT_OPTIONS.items() if name in options.split(","))
                devices = 0 if path.startswith(root + "/dev/") else _NODEV
                _mount("none", path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | kept | devices)

    def enter_program(self) -> None:
        """In a process that is to be a program's ancestor: namespaces of its own. The next fork is process 1 of the new ones."""
        if self.full:
            _unshare(_NEWPID | _NEWNS | _NEWIPC)

    def furnish(self) -> None:
        """In process 1 (or, at the level limits, the supervisor): /proc, a folder to write to."""
        if self.full:
            try:
                _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC, "subset=pid")
            except Refused:
                if ctypes.get_errno() != errno.EINVAL:  # before Linux 5.8
                    raise
                _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
            with open("/proc/self/oom_score_adj", "w") as file:  # before all others, where the machine runs out of memory
                file.write("1000")
            # Root's number without root's rights, in a container, would still own the files under /proc/sys.
            _mount("none", "/proc", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
        else:
            _control(_PR_SET_CHILD_SUBREAPER, 1)
        self.new_folder(first=True)

    def new_folder(self, first: bool = False) -> None:
        """An empty folder in place of the one that the last process wrote to."""
        if self.full:
            if not first:
                space, mode = os.statvfs("/tmp"), os.stat("/tmp").st_mode
                if space.f_files - space.f_ffree == 1 and space.f_bfree == space.f_blocks and mode == stat.S_IFDIR | 0o1777:
                    return  # as it was; unmounting costs more than a trivial program
                _check(_libc.umount2(b"/tmp", _DETACH), "umount /tmp")
            options = f"mode=1777,size={FOLDER_BYTES},nr_inodes={FOLDER_FILES}"
            _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, options)
        else:
            if not first:
                _remove(self.folder)
            self.folder = tempfile.mkdtemp(dir=self.above)
            if self.user is not None:
                os.chown(self.folder, self.user, self.user)

    def make_folder(self) -> None:
        """At the level limits: where a program's folders will lie, to be removed by remove_folder(). It is not the program's, which
        could put a link to another folder in the place of its own otherwise."""
        if not self.full:
            self.above = tempfile.mkdtemp(prefix="trd-code-")
            os.chmod(self.above, 0o711)

    def remove_folder(self) -> None:
        if not self.full:
            _remove(self.above)

    def confine(self, memory_bytes: int, cpu_seconds: int) -> None:
        """In the program's process, before it: gives up everything that has not been given up yet. Raises Refused or OSError."""
        os.setsid()
        os.umask(0o022)
        limits: dict[int, int | None] = {
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_AS: memory_bytes,
            resource.RLIMIT_NPROC: self._process_limit(),
            resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
            resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
            resource.RLIMIT_STACK: STACK_BYTES,
            resource.RLIMIT_CORE: 1,  # 0 would still start a core handler, where the machine has one
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        for limit, value in limits.items():
            hard = resource.getrlimit(limit)[1]
            if value is None:
                continue
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            room = limit == resource.RLIMIT_CPU and value != hard  # a second from SIGXCPU to SIGKILL
            resource.setrlimit(limit, (value, value + 1 if room else value))
        os.chdir(self.folder)
        if not self.full:
            os.environ["HOME"] = os.environ["TMPDIR"] = self.folder
        if self.full or self.user is not None:
            for capability in range(64):
                _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3)  # numbers that do not exist fail
        if self.user is not None:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        _give_up_capabilities()
        _control(_PR_SET_NO_NEW_PRIVS, 1)
        _control(_PR_SET_DUMPABLE, 1)  # its own /proc/self must open: /dev/stdin leads there
        _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if self.filter is not None:
            system_calls.install(_libc, self.filter)

    def _process_limit(self) -> int | None:
        """For the kernel, which counts all processes and threads of one user; None where only the supervisor can count."""
        if self.user is not None:
            return MAX_PROCESSES
        if self.full:  # the user is the grader's; since Linux 5.14 a user namespace has a count of its own
            version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
            return MAX_PROCESSES if version >= (5, 14) else None
        count = 0
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):  # it has just ended
                    if os.stat(f"/proc/{name}").st_uid == os.getuid():
                        count += len(os.listdir(f"/proc/{name}/task"))
        return count + MAX_PROCESSES

    def others(self) -> list[int]:
        """Processes of the program: all but process 1, or at the level limits all that descend from this one."""
        found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        if self.full:
            return [process for process in found if process != 1]
        children: dict[int, list[int]] = {}
        for process in found:
            try:
                with open(f"/proc/{process}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            children.setdefault(parent, []).append(process)
        descendants, queue = [], [os.getpid()]
        while queue:
            below = children.get(queue.pop(), [])
            descendants += below
            queue += below
        return descendants

    def kill_others(self) -> dict[int, int]:
        """Kills all of them and waits for them; process id -> wait status of those that were our children."""
        statuses: dict[int, int] = {}
        while True:
            if self.full:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                for process in self.others():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            try:
                while True:
                    process, status = os.waitpid(-1, 0 if self.full else os.WNOHANG)
                    if process == 0:  # alive still: it may have forked after we looked
                        time.sleep(0.001)
                        break
                    statuses[process] = status
            except ChildProcessError:  # none is left
                return statuses


def _make_place(path: str, is_folder: bool) -> None:
    os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
    if not is_folder:
        with open(path, "a"):
            pass


def _remove(path: str) -> None:
    """Removes a file or folder that a hostile program filled, if it has not done so itself: follows no link, and a folder may forbid its
    own listing. No process of the program may be left."""
    if not os.path.isdir(path) or os.path.islink(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    os.chmod(path, 0o700)
    for folder, below, _ in os.walk(path):
        for name in below:
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path)


def _give_up_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    number = _CAPSET.get(_MACHINE)
    if number is not None:
        _check(_libc.syscall(number, header, nothing), "capset")
