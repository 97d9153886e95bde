"""The file that every finished sample goes to at once, so that neither a crash nor a kill loses one.

    magic, then records: key [32] | n: uint32 | finish: uint8 | crc32 of these 37 bytes | ids int32[n] | logprobs float32[n] | crc32 of both

Numbers are little-endian. Only key -> place is kept in memory.
"""

import contextlib
import errno
import os
import shutil
import struct
import sys
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

from trd_megatron.engine.base import FinishReason
from trd_megatron.errors import UserError

_MAGIC = b"trd journal 1\n"
_HEADER = struct.Struct("<32sIBI")
_CRC = struct.Struct("<I")
_FINISH: tuple[FinishReason, ...] = ("stop", "length")


class Journal:
    """Appends and reads samples. One process at a time; one thread appends, any thread reads.

    A record that a kill cut short at the end is cut off. Of a file that is damaged before its end the part before the damage is
    kept, and the whole of it beside it as <name>.damaged; say is told. Raises UserError if the file is no journal. OSError from
    `append` (a full disk) leaves what was written before as it was.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.path, self._say = path, say
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._places = self._scan()
        except BaseException:
            os.close(self._fd)
            raise
        self._unsynced = False

    def __len__(self) -> int:
        return len(self._places)

    def find(self, key: bytes) -> int | None:
        """The place of a sample's record, None if it is not there."""
        return self._places.get(key)

    def append(self, key: bytes, ids: "array[int]", logprobs: "array[float]", finish: FinishReason) -> int:
        """Writes a sample and returns its place. ids: array("i"), logprobs: array("f"), of one length."""
        head = key + struct.pack("<IB", len(ids), _FINISH.index(finish))
        body = _bytes(ids) + _bytes(logprobs)
        record = head + _CRC.pack(zlib.crc32(head)) + body + _CRC.pack(zlib.crc32(body))
        place = self._end
        try:
            written = os.pwrite(self._fd, record, place)
            if written < len(record):  # what a disk that fills up does first
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            with contextlib.suppress(OSError):  # the next opening cuts it off as well
                os.ftruncate(self._fd, place)
            raise
        self._end += len(record)
        self._places[key] = place
        self._unsynced = True
        return place

    def read(self, place: int) -> tuple["array[int]", "array[float]", FinishReason]:
        """(ids array("i"), logprobs array("f"), finish reason) of the record at `place`."""
        header = self._header(place)
        body = header and self._body(place, header[1])
        if not header or body is None:
            raise self._damaged(place)
        ids, logprobs = array("i"), array("f")
        ids.frombytes(body[: 4 * header[1]])
        logprobs.frombytes(body[4 * header[1] :])
        if sys.byteorder == "big":
            ids.byteswap()
            logprobs.byteswap()
        return ids, logprobs, _FINISH[header[2]]

    def sync(self) -> None:
        """Asks the disk to keep what was appended, through a power failure too."""
        if self._unsynced:
            self._unsynced = False
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Calling it twice is fine."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _scan(self) -> dict[bytes, int]:
        """Checks the whole file and sets _end, its good length."""
        size = os.fstat(self._fd).st_size
        start = os.pread(self._fd, len(_MAGIC), 0)
        if not _MAGIC.startswith(start):
            raise UserError(f"{self.path} is not a journal of samples: move it away and run again")
        if start != _MAGIC:
            os.pwrite(self._fd, _MAGIC, 0)
            size = len(_MAGIC)
        places: dict[bytes, int] = {}
        self._end = len(_MAGIC)
        while self._end < size:
            header = self._header(self._end)
            after = None if header is None else self._end + _HEADER.size + 8 * header[1] + _CRC.size
            if header is not None and after is not None and after <= size and self._body(self._end, header[1]) is not None:
                places[header[0]] = self._end
                self._end = after
                continue
            # Torn: the file ends in it. A power failure can also leave a last record of the right length, or zeros.
            torn = size - self._end < _HEADER.size or (after is not None and after >= size) or self._zeros(size)
            if not torn:
                whole = self.path.with_name(f"{self.path.name}.damaged")
                shutil.copyfile(self.path, whole)
                self._say(
                    f"{self.path} is damaged at byte {self._end}: the {len(places)} samples before it are kept, what follows is drawn "
                    f"anew (the damaged file: {whole})"
                )
            os.ftruncate(self._fd, self._end)
            break
        return places

    def _header(self, place: int) -> tuple[bytes, int, int] | None:
        """(key, n, finish) or None if it is not whole."""
        head = os.pread(self._fd, _HEADER.size, place)
        if len(head) < _HEADER.size:
            return None
        key, count, finish, crc = _HEADER.unpack(head)
        return (key, count, finish) if zlib.crc32(head[: -_CRC.size]) == crc and finish < len(_FINISH) else None

    def _body(self, place: int, count: int) -> bytes | None:
        body = os.pread(self._fd, 8 * count + _CRC.size, place + _HEADER.size)
        whole = len(body) == 8 * count + _CRC.size and zlib.crc32(body[: -_CRC.size]) == _CRC.unpack(body[-_CRC.size :])[0]
        return body[: -_CRC.size] if whole else None

    def _zeros(self, size: int) -> bool:
        """Whether nothing but zeros follows the good part."""
        return not any(os.pread(self._fd, 1 << 20, place).strip(b"\0") for place in range(self._end, size, 1 << 20))

    def _damaged(self, place: int) -> UserError:
        return UserError(f"{self.path} was damaged at byte {place} while it was in use: run again, what is good in it is kept")


def _bytes(values: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()
