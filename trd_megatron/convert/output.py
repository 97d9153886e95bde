"""A converted checkpoint appears whole or not at all, with checksums of its files."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trd_megatron import progress
from trd_megatron.errors import UserError
from trd_megatron.run_dir import file_sha256, versions

MANIFEST = "conversion.json"
SPARE = 64 << 20  # bytes for what is not weights: tokenizer, indices, metadata


class Output:
    """A folder being written."""

    def __init__(self, folder: Path, advance: Callable[[int], None]) -> None:
        self.folder, self.advance = folder, advance
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._sums: dict[Path, Future[str]] = {}

    def written(self, path: Path) -> None:
        """A file is complete: it goes to the disk and is summed up while the next one is written."""
        self._sums[path] = self._pool.submit(_synced_sha256, path)

    def files(self) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of every file, by its path in the folder."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in paths:
            if path not in self._sums:
                self.written(path)
        return {str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": self._sums[path].result()} for path in paths}

    def abandon(self) -> None:
        """Waits for what reads the files, so that they can be deleted."""
        self._pool.shutdown(cancel_futures=True)


def _synced_sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


@contextlib.contextmanager
def new_folder(target: Path, nbytes: int, made_by: dict[str, Any]) -> Iterator[Output]:
    """A temporary folder that becomes `target` when the block ends well; otherwise nothing is left of it.

    nbytes: of the weights to be written. made_by: what the manifest says of how it was made. Raises UserError if target exists, if it
    cannot be written, or if the disk has too little room.
    """
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    parents: list[Path] = []
    try:
        try:
            _check_free(target)
            parents = [folder for folder in target.parents if not folder.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(target, nbytes)
            temporary.mkdir()
        except OSError as error:
            where = error.filename if error.filename not in (None, str(temporary)) else target.parent
            raise UserError(f"{target} cannot be made ({where}: {error.strerror}): give another path") from None
        with progress.byte_bar("writing", nbytes) as advance:
            output = Output(temporary, advance)
            try:
                yield output
                files = output.files()
            finally:
                output.abandon()
        manifest = {"made_by": {k: v for k, v in made_by.items() if v is not None}, "versions": versions(), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="ascii")  # paths may be no valid UTF-8
        _publish(temporary, target)
    except OSError as error:  # a full disk, a quota, a source that cannot be copied
        named = str(error.filename or "")
        reason = error.strerror or str(error)
        reason = reason if not named or Path(named).is_relative_to(temporary) else f"{named}: {reason}"
        raise UserError(f"{target} could not be written ({reason}); nothing is left of it") from error
    finally:
        with _undisturbed():
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in parents:
                with contextlib.suppress(OSError):  # not empty: it holds the target
                    folder.rmdir()


def _check_free(target: Path) -> None:
    if target.name in ("", ".."):
        raise UserError(f"{target} names no folder to make: give its name")
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target} exists: give another path, or delete it")
    if target.is_mount():
        raise UserError(f"{target} is a mount point, which cannot be replaced: give a folder in it")


def _check_room(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + SPARE:
        raise UserError(
            f"{target} needs {(nbytes + SPARE) / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free: make room, or give another path"
        )


def _publish(temporary: Path, target: Path) -> None:
    try:
        os.replace(temporary, target)  # an empty folder gives way
    except OSError:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target} was made by another process meanwhile: look at what it is, or give another path") from None
        raise


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: a second one would stop the deletion that the first one started."""
    if threading.current_thread() is not threading.main_thread():  # never interrupted
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
