"""Reading what torch.save wrote with its checksums, which PyTorch writes into every file and does not look at."""

import io
import os
import struct
import zipfile
import zlib
from typing import IO, Any, cast


def checked(file: IO[bytes], offset: int, length: int) -> IO[bytes]:
    """The part of a file that torch.save wrote at `offset`. Raises zipfile.BadZipFile if its bytes are not those that were written."""
    view = _View(file, offset, length)
    if zipfile.is_zipfile(view):
        with zipfile.ZipFile(view) as archive:
            for record in archive.infolist():
                if record.CRC not in (0, _crc32(view, record)):  # 0: torch.serialization.set_crc32_options switched it off
                    raise zipfile.BadZipFile(f"the CRC of {record.filename} in {file.name} is wrong")
    view.seek(0)
    return cast(IO[bytes], view)


def _crc32(view: "_View", record: zipfile.ZipInfo) -> int:
    """Of an uncompressed record, as PyTorch writes them; zipfile's own check takes three times as long."""
    view.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", view.read(4))
    view.seek(name + extra, os.SEEK_CUR)
    buffer = memoryview(bytearray(1 << 20))
    left, crc = record.file_size, 0
    while left > 0 and (count := view.readinto(buffer[:left])):
        crc = zlib.crc32(buffer[:count], crc)
        left -= count
    return crc


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        self._file.seek(self._offset + start + offset)
        return start + offset

    def readinto(self, buffer: Any, /) -> int:
        return self._file.readinto(memoryview(buffer)[: max(self._length - self.tell(), 0)])
