"""Megatron's distributed checkpoint format (torch_dist), read and written a tensor at a time, without Megatron and without ranks.

torch_dist is PyTorch's distributed checkpoint format under Megatron's conventions: the layers of a model are stacked in one tensor per
parameter, of which the files hold chunks, each as torch.save writes it, one after the other. .metadata says what lies where, metadata.json
names the format. PyTorch's own reader and writer want a whole state dict in memory.
"""

import contextlib
import io
import itertools
import json
import pickle
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of the format: .metadata is a pickle that names it
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from trd_megatron.convert.checked_reader import checked
from trd_megatron.convert.safe_metadata import COMMON, METADATA, read_metadata
from trd_megatron.convert.source import ahead
from trd_megatron.errors import UserError

Index = tuple[int, ...]


class TorchDist:
    """The tensors of a torch_dist folder (the one that holds .metadata)."""

    def __init__(self, folder: Path) -> None:
        """Reads the metadata. Raises UserError if it is missing, damaged or unsafe, or if a file is missing or too short."""
        self.folder = folder
        metadata = read_metadata(folder)
        try:
            sound = all(_is_sound(entry) for entry in metadata.state_dict_metadata.values())
            stored = [(info.relative_path, info.offset + info.length) for info in metadata.storage_data.values()]
        except (AttributeError, TypeError, ValueError):
            sound = False
        if not sound:
            raise UserError(f"{folder / METADATA} is damaged: copy the checkpoint again")
        _check_files(folder, stored)
        if any(info.transform_descriptors for info in metadata.storage_data.values()):
            raise UserError(f"{folder} was saved with extensions of PyTorch's writer, which are not read: save it without them")
        self._stored: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors = {key: one for key, one in metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
        self._chunks: dict[tuple[str, int], dict[Index, list[ChunkStorageMetadata]]] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, key: str, index: Index = (), rows: tuple[int, int] | None = None) -> torch.Tensor:
        """What lies at `index` of a tensor's leading dimensions, put together from its chunks; rows: only (from, to) of the next one.

        Raises UserError if it is damaged.
        """
        entry, depth = self.tensors[key], len(index)
        shape, offsets = list(entry.size[depth:]), [*index, *[0] * (len(entry.size) - depth)]
        if rows is not None:
            offsets[depth], shape[0] = rows[0], rows[1] - rows[0]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size([*[1] * depth, *shape]))
        stored = self._chunks_at(key, index)
        if wanted in stored:
            return self._load(key, wanted).reshape(shape)  # as it lies there, without a copy
        overlaps = [(chunk, common) for chunk in stored if (common := _common(wanted, chunk)) is not None]
        covered = sum(torch.Size(common.sizes).numel() for _, common in overlaps)
        apart = all(_common(one, other) is None for (_, one), (_, other) in itertools.combinations(overlaps, 2))
        if covered != wanted.sizes.numel() or not apart:
            raise UserError(f"checkpoint {self.folder}: parts of {key} are missing, or there twice; copy the checkpoint again")
        target: torch.Tensor | None = None
        for chunk, common in overlaps:
            part = self._load(key, chunk)[_place(common, chunk)]
            if target is None:  # not before: the file has shown that the metadata tell no tales about sizes
                target = torch.empty(wanted.sizes, dtype=entry.properties.dtype)
            target[_place(common, wanted)] = part
        return torch.empty(shape, dtype=entry.properties.dtype) if target is None else target.view(shape)

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """A whole chunk, as torch.save wrote it somewhere in a file."""
        try:
            info = self._stored[MetadataIndex(key, chunk.offsets)]
            with (self.folder / info.relative_path).open("rb") as file:
                found = torch.load(checked(file, info.offset, info.length), map_location="cpu", weights_only=True)
            if (found.shape, found.dtype) != (chunk.sizes, self.dtype(key)):
                raise ValueError(f"{tuple(found.shape)} of {found.dtype}, which is not what {METADATA} says")
        except Exception as error:  # a damaged file may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, pickle.UnpicklingError):  # PyTorch's message advises to load it all the same
                reason = "it holds something other than a tensor"
            raise UserError(f"checkpoint {self.folder}: {key} cannot be read ({reason}): copy the checkpoint again") from error
        return found

    def _chunks_at(self, key: str, index: Index) -> list[ChunkStorageMetadata]:
        """The chunks that cover `index`, without looking through those of every other layer and expert each time."""
        depth = len(index)
        if (key, depth) not in self._chunks:
            by_index: dict[Index, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                covered = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for place in itertools.product(*(range(start, start + size) for start, size in covered)):
                    by_index[place].append(chunk)
            self._chunks[key, depth] = by_index
        return self._chunks[key, depth].get(index, [])


def _common(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> ChunkStorageMetadata | None:
    """Where two chunks of a tensor overlap."""
    starts = [max(pair) for pair in zip(one.offsets, other.offsets, strict=True)]
    ends = [min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    return ChunkStorageMetadata(torch.Size(starts), torch.Size([end - start for start, end in zip(starts, ends, strict=True)]))


def _place(part: ChunkStorageMetadata, whole: ChunkStorageMetadata) -> tuple[slice, ...]:
    """A part of a chunk as slices of it."""
    return tuple(slice(p - w, p - w + size) for p, w, size in zip(part.offsets, whole.offsets, part.sizes, strict=True))


def _is_sound(entry: TensorStorageMetadata | BytesStorageMetadata) -> bool:
    """Whether a tensor's chunks lie within it. Raises AttributeError, TypeError or ValueError where metadata are something else."""
    if isinstance(entry, BytesStorageMetadata):
        return True
    within = all(
        0 <= start <= start + size <= whole
        for chunk in entry.chunks
        for start, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    return within and isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)


def _check_files(folder: Path, stored: list[tuple[str, int]]) -> None:
    """stored: (file, end of what is stored in it)."""
    ends: dict[str, int] = defaultdict(int)
    for name, end in stored:
        if Path(name).name != name:
            raise UserError(f"{folder}: its metadata names a file outside of it, {name!r}: get the checkpoint from elsewhere")
        ends[name] = max(ends[name], end)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the checkpoint again")
        if path.stat().st_size < end:
            raise UserError(f"{path} is truncated, it has {path.stat().st_size} of at least {end} bytes: copy the checkpoint again")


# Writing


@dataclass(frozen=True)
class Part:
    """A tensor to write: what lies at `index` of the leading dimensions of tensor `key`, whose full size is size."""

    key: str
    index: Index
    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (offsets, sizes) of its pieces, without leading dimensions
    read: Callable[[], list[torch.Tensor]]  # its pieces, in the order of chunks

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(sizes).numel() for _, sizes in self.chunks) * self.dtype.itemsize


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write(
    folder: Path,
    parts: Iterable[Part],
    objects: list[str],
    common: dict[str, Any],
    *,
    file_bytes: int,
    advance: Callable[[int], None],
    written: Callable[[Path], None],
) -> None:
    """Writes a torch_dist folder: the parts, in order, in files of about file_bytes each; `objects`, Megatron's empty ShardedObjects, by
    their unique keys; `common`, what is not sharded. advance is told the bytes written, `written` each file that is complete."""
    parts = list(parts)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    with contextlib.closing(ahead(part.read for part in parts)) as reads:
        for number, group in enumerate(_groups(parts, file_bytes)):
            name = f"__{number}_0.distcp"
            with (folder / name).open("wb") as file:
                for part in group:
                    pieces = next(reads)
                    entry = entries.setdefault(part.key, TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(part.size), []))
                    assert isinstance(entry, TensorStorageMetadata)
                    for offsets, sizes in part.chunks:
                        piece = pieces.pop(0)  # let go of once it is written
                        assert (piece.dtype, tuple(piece.shape)) == (part.dtype, sizes), f"{part.key} at {offsets} is {tuple(piece.shape)}"
                        chunk = ChunkStorageMetadata(torch.Size([*part.index, *offsets]), torch.Size([*[1] * len(part.index), *sizes]))
                        entry.chunks.append(chunk)
                        start = file.tell()
                        _save(_alone(piece).view(chunk.sizes), file)
                        stored[MetadataIndex(part.key, chunk.offsets)] = _StorageInfo(name, start, file.tell() - start)
                        advance(piece.nbytes)
                        del piece
                if not number:
                    empty = _saved([None])  # as Megatron packs its ShardedObjects
                    for key in objects:
                        entries[key] = BytesStorageMetadata()
                        stored[MetadataIndex(key)] = _StorageInfo(name, file.tell(), len(empty))
                        file.write(empty)
            written(folder / name)
    metadata = Metadata(entries, storage_data=stored, storage_meta=StorageMeta(save_id=str(uuid.uuid4())), version="1.0.0")
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / COMMON).write_bytes(_saved(common))
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(versions), encoding="utf-8")


def _save(tensor: torch.Tensor, file: IO[bytes]) -> None:
    try:
        torch.save(tensor, file)
    except RuntimeError as error:  # PyTorch hides a full disk behind its own complaint
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _alone(piece: torch.Tensor) -> torch.Tensor:
    """Contiguous, and with no other numbers in its storage, which torch.save would write too."""
    piece = piece.contiguous()
    return piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone()


def _groups(parts: list[Part], file_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    held = 0
    for part in parts:
        if group and held + part.nbytes > file_bytes:
            yield group
            group, held = [], 0
        group.append(part)
        held += part.nbytes
    yield group
