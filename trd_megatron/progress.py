"""Progress bars for long work: what is done, how fast, how long it still takes."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 60.0
SPEED_OVER_S = 300.0  # results come in bursts of a shard
WIDE = 140  # where nothing is a terminal, lines are not folded at 80
console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)  # progress and errors
output = Console(width=None if sys.stdout.isatty() else WIDE)  # what was asked for


def printable(text: str) -> str:
    """Text from a file or a path, for a terminal: control characters, line breaks among them, as escapes such as \\x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with an exit code (README) and the message; that of Ctrl-C (130) is not called an error."""
    lines = message.splitlines() if code == 1 else [message]  # what the user did wrong is one line, whatever names are in it
    shown = "\n".join(map(printable, lines))
    text = Text("" if code == 130 else "error: ", style="red").append(shown, style="default")  # Text: no markup in messages
    console.print(text, highlight=False, soft_wrap=True)
    sys.exit(code)


class _Rate(ProgressColumn):
    """Items per second, and tokens per second where the task counts them."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        if not seconds or task.total is None:
            return Text("")
        parts = [f"{(task.completed - task.fields['before']) / seconds:.2f} {task.fields['unit']}/s"]
        if task.fields["tokens"]:
            parts.append(f"{task.fields['tokens'] / seconds:.0f} tok/s")
        return Text(" ".join(parts), style="cyan", no_wrap=True)


class Bar:
    """One bar. Items move it, tokens and notes are shown beside it. Where it is not drawn, a line a minute takes its place."""

    def __init__(self, progress: Progress, description: str, total: int, unit: str, start: int) -> None:
        self._progress, self._tokens, self._last_line = progress, 0, time.monotonic()
        self._task = progress.add_task(description, total=total, completed=start, unit=unit, tokens=0, note="", before=start)

    def advance(self, items: int = 1) -> None:
        self._progress.advance(self._task, items)
        self._line()

    def tokens(self, count: int) -> None:
        self._tokens += count
        self._progress.update(self._task, tokens=self._tokens)
        self._line()

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)
        self._line()

    def _line(self) -> None:
        now = time.monotonic()
        if console.is_terminal or now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        task = self._progress.tasks[self._task]
        left = "" if task.time_remaining is None else f", {task.time_remaining / 60:.0f} minutes left"
        note = f"  {task.fields['note']}" if task.fields["note"] else ""
        console.print(f"{task.description}: {task.completed:.0f}/{task.total:.0f}  {_Rate().render(task)}{left}{note}", highlight=False)


@contextlib.contextmanager
def bar(description: str, total: int, unit: str, start: int = 0) -> Iterator[Bar]:
    """A bar on standard error; where that is no terminal, a line a minute and at the end its last state."""
    columns = (
        TextColumn("{task.description:<8}"), BarColumn(bar_width=12), MofNCompleteColumn(), _Rate(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=SPEED_OVER_S) as progress:
        yield Bar(progress, description, total, unit, start)


@contextlib.contextmanager
def byte_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in MB (kB where there are few); what it yields is told the bytes that are done."""
    scale, unit = (1_000_000, "MB") if total >= 10_000_000 else (1000, "kB")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        shown = done // scale
        done += count
        shown_bar.advance(done // scale - shown)

    with bar(description, total // scale, unit) as shown_bar:
        yield advance
