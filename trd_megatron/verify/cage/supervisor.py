"""Process 1 of a program's tree: starts the program's processes, watches their time, memory and output, and kills them all at the end."""

import fcntl
import os
import select
import signal
import time
from typing import Any

import frames
import runner
from jail import MAX_PROCESSES, Jail

MAX_OUTPUT_BYTES = 10 << 20  # standard output and error of one run together
MAX_REPLY_BYTES = 4 << 20  # of one function result, as JSON
KEPT_ERROR_BYTES = 4096  # the end of standard error, which says what went wrong
LOOK_EVERY_S = 0.02  # at the memory of the tree
LOOK_SELDOM_S = 0.2  # where every process of the machine must be looked at to find it
READ_BYTES = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")

Reply = tuple[dict[str, Any], bytes]


def serve(link: int, order: dict[str, Any], jail: Jail) -> None:
    """Obeys the grader until it sends `end` or is gone.

    order   memory_bytes; cpu_s of an interactive process
    link    messages {"op": "run", "timeout_s", "job_bytes"} with a job and the standard input as body: one run;
            {"op": "load", "timeout_s"} with the job: starts an interactive process and gives its first line;
            {"op": "send", "timeout_s"} with a line for it: gives the line that it answers with.
            Each is answered by {"line": true} or by {"ended": how, "detail": ..., "errors": ...}, with a body;
            how: exit | timeout | memory | processes | output.
    """
    talker: _Process | None = None
    while True:
        if talker is not None:
            talker.guard()
        message = frames.receive(link)
        if message is None:
            break
        header, body = message
        if header["op"] == "end":
            break
        timeout_s = header["timeout_s"]  # counts from the moment when the process is there
        if header["op"] == "run":
            size = header["job_bytes"]
            process = _Process(link, jail, order, int(timeout_s) + 1, body[:size], body[size:])
            reply = process.end(process.watch(time.monotonic() + timeout_s))
            jail.new_folder()
        else:
            if header["op"] == "load":
                talker = _Process(link, jail, order, order["cpu_s"], body, None)
            assert talker is not None
            reply = talker.exchange(b"" if header["op"] == "load" else body, time.monotonic() + timeout_s)
        frames.send(link, *reply)
    jail.kill_others()


class _Process:
    """One process of the program's, and whatever it starts."""

    def __init__(self, link: int, jail: Jail, order: dict[str, Any], cpu_s: int, job: bytes, job_input: bytes | None) -> None:
        self.link, self.jail, self.memory_bytes = link, jail, order["memory_bytes"]
        self.output, self.errors, self.received, self.to_send = bytearray(), bytearray(), bytearray(), b""
        self.total = 0
        self.interactive = job_input is None
        self.look_every = LOOK_EVERY_S if jail.full else LOOK_SELDOM_S
        self.exited = False
        self.ended: Reply | None = None
        readable, their_output = os.pipe()
        error_readable, their_errors = os.pipe()
        is_ready, say_ready = os.pipe()
        self.source, self.error_source = readable, error_readable
        for descriptor in (readable, error_readable):  # a program may take away what poll() has promised us
            os.set_blocking(descriptor, False)
        if jail.user is not None:  # it may open /dev/stdout
            for descriptor in (their_output, their_errors):
                os.fchown(descriptor, jail.user, -1)
        if job_input is None:
            their_input, self.sink = os.pipe()
        else:  # a file in memory: a program may seek in its input, and nobody has to feed it
            their_input, self.sink = os.memfd_create("input", os.MFD_ALLOW_SEALING), os.open("/dev/null", os.O_WRONLY)
            frames.write(their_input, job_input)
            os.lseek(their_input, 0, os.SEEK_SET)
            fcntl.fcntl(their_input, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self.process = os.fork()
        if self.process == 0:
            leave = os._exit  # a program may patch it
            try:
                if job_input is None:
                    runner.talk(job, their_input, their_output, say_ready, lambda: jail.confine(self.memory_bytes, cpu_s))
                else:
                    runner.run(job, their_input, their_output, their_errors, say_ready, lambda: jail.confine(self.memory_bytes, cpu_s))
            finally:
                leave(70)
        for theirs in (their_input, their_output, their_errors, say_ready):
            os.close(theirs)
        said = os.read(is_ready, 1000)
        os.close(is_ready)
        if said != b"ready":
            raise RuntimeError(f"the program's process cannot be confined: {said.decode(errors='replace')}")
        jail.at_work = True
        self.handle = os.pidfd_open(self.process)
        os.set_blocking(self.sink, False)
        self.poll = select.poll()
        for descriptor in (self.source, self.error_source, self.handle):
            self.poll.register(descriptor, select.POLLIN)
        self.poll.register(link, 0)  # tells when the grader is gone

    def exchange(self, line: bytes, deadline: float) -> Reply:
        """Sends a line (none to begin with) and waits for one."""
        if self.ended is not None:
            return self.ended
        self.to_send = line
        if line:
            self.poll.register(self.sink, select.POLLOUT)
        how = self.watch(deadline)
        if how != "line":
            self.ended = self.end(how)
            return self.ended
        end = self.received.index(b"\n")
        answer = bytes(self.received[:end])
        self.received.clear()  # what else it wrote nobody asked for
        return {"line": True}, answer

    def guard(self) -> None:
        """Waits until the grader has something to say; nobody has asked the program for anything, but it may be busy all the same."""
        poll = select.poll()
        poll.register(self.link, select.POLLIN)
        while not poll.poll(1000 * self.look_every):
            excess = self._excess() if self.ended is None else ""
            if excess:
                self.ended = self.end(excess)

    def watch(self, deadline: float) -> str:
        """Waits until something ends it: exit | timeout | memory | processes | output; or, when an interactive process answers, line."""
        next_look = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if now >= next_look:
                excess = self._excess()
                if excess:
                    return excess
                next_look = time.monotonic() + self.look_every
            for descriptor, _ in self.poll.poll(max(0.0, 1000 * (min(deadline, next_look) - now))):
                if descriptor == self.link:  # nobody wants to know any more
                    self.jail.kill_others()
                    os._exit(0)
                elif descriptor == self.handle:
                    self.exited = True
                elif descriptor == self.sink:
                    self._write()
                else:
                    self._read(descriptor)
            if self.total > MAX_OUTPUT_BYTES or len(self.received) > MAX_REPLY_BYTES:
                return "output"
            if self.interactive and b"\n" in self.received:
                return "line"
            if self.exited:
                return "exit"

    def _write(self) -> None:
        try:
            self.to_send = self.to_send[os.write(self.sink, self.to_send[:READ_BYTES]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it has closed its end: its silence will tell
            self.to_send = b""
        if not self.to_send:
            self.poll.unregister(self.sink)

    def _read(self, descriptor: int) -> bool:
        """Takes what a pipe holds; False at its end."""
        try:
            part = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return True
        if not part:
            self.poll.unregister(descriptor)
            return False
        if descriptor == self.error_source:
            self.total += len(part)
            self.errors = (self.errors + part)[-KEPT_ERROR_BYTES:]
        elif self.interactive:
            self.received += part
        else:
            self.total += len(part)
            self.output += part
        return True

    def _excess(self) -> str:
        """What the whole tree has too much of: memory | processes, or nothing."""
        processes = self.jail.others()
        if len(processes) > MAX_PROCESSES:  # the kernel does not limit those of user 0, though it has no rights here
            return "processes"
        pages = 0  # those that processes share count for each
        for process in processes:
            try:
                with open(f"/proc/{process}/statm", "rb") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):  # it has just ended
                continue
        return "memory" if pages * _PAGE > self.memory_bytes else ""

    def end(self, how: str) -> Reply:
        """Kills everything, reads what is left, and says how it ended."""
        status = self.jail.kill_others().get(self.process)
        for descriptor in (self.source, self.error_source):
            try:
                while self.total <= MAX_OUTPUT_BYTES and len(self.received) <= MAX_REPLY_BYTES and self._read_rest(descriptor):
                    pass
            except BlockingIOError:
                pass
        for descriptor in (self.source, self.error_source, self.sink, self.handle):
            os.close(descriptor)
        detail = ""
        if how == "exit" and self.total > MAX_OUTPUT_BYTES:
            how = "output"
        if how == "exit" and status is not None and os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            detail = f"killed by {_signal_name(number)}"
            if number == signal.SIGXCPU:
                how = "timeout"
        elif how == "exit" and status != 0:
            detail = f"exit code {os.waitstatus_to_exitcode(status) if status is not None else 'unknown'}"
        errors = self.errors.decode("utf-8", "replace")
        return {"ended": how, "detail": detail, "errors": errors}, bytes(self.output)

    def _read_rest(self, descriptor: int) -> bool:
        part = os.read(descriptor, READ_BYTES)
        self.total += len(part)
        if descriptor == self.error_source:
            self.errors = (self.errors + part)[-KEPT_ERROR_BYTES:]
        elif not self.interactive:
            self.output += part
        return bool(part)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
