"""Reading the tensors of a torch_dist checkpoint with their checksums, which PyTorch writes into every file and does not look at."""

import io
import os
import zipfile
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import _StorageInfo

from trd_megatron.convert.safe_metadata import SafeReader


class CheckedReader(SafeReader):
    """SafeReader that raises zipfile.BadZipFile where a tensor's bytes are not those that were written."""

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        view = _View(file, sinfo.offset, sinfo.length)
        if zipfile.is_zipfile(view):
            with zipfile.ZipFile(view) as archive:
                for record in archive.infolist():
                    if record.CRC:  # 0 where torch.serialization.set_crc32_options switched it off
                        with archive.open(record) as stored:
                            while stored.read(1 << 20):
                                pass
        view.seek(0)
        return cast(IO[bytes], view)


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
