"""Megatron's distributed checkpoint format (torch_dist), read and written a tensor at a time, without Megatron and without ranks.

torch_dist is PyTorch's distributed checkpoint format under Megatron's conventions: the layers of a model are stacked in one tensor per
parameter, of which the files hold chunks, and metadata.json names the format. PyTorch reads and writes; here is only what makes it go
chunk by chunk instead of holding a whole state dict.
"""

import contextlib
import io
import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trd_megatron.convert.checked_reader import CheckedReader
from trd_megatron.convert.safe_metadata import METADATA
from trd_megatron.convert.source import ahead
from trd_megatron.errors import UserError

Index = tuple[int, ...]


class TorchDist:
    """The tensors of a torch_dist folder (the one that holds .metadata)."""

    def __init__(self, folder: Path) -> None:
        """Reads the metadata. Raises UserError if it is missing, damaged or unsafe, or if a file is missing or too short."""
        self.folder = folder
        self._reader = CheckedReader(folder)
        metadata = self._reader.read_metadata()
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
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
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
        items = create_read_items_for_chunk_list(key, TensorStorageMetadata(entry.properties, entry.size, stored), [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise UserError(f"checkpoint {self.folder}: parts of {key} are missing; copy the checkpoint again")
        if len(items) == 1 and wanted in stored:
            return self._load(key, wanted, items[0].storage_index).reshape(shape)  # as it lies there, without a copy
        target: torch.Tensor | None = None
        for item in items:
            assert item.storage_index.index is not None
            chunk = self._load(key, stored[item.storage_index.index], item.storage_index)
            if target is None:  # not before: the file has shown that the metadata tell no tales about sizes
                target = torch.empty(wanted.sizes, dtype=entry.properties.dtype)
            part = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
            narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(part)
        return torch.empty(shape, dtype=entry.properties.dtype) if target is None else target.view(shape)

    def _load(self, key: str, chunk: ChunkStorageMetadata, index: MetadataIndex) -> torch.Tensor:
        """A whole chunk, as torch.save wrote it somewhere in a file."""
        try:
            info = self._reader.storage_data[index]
            with (self.folder / info.relative_path).open("rb") as stream:
                found = torch.load(self._reader._slice_file(stream, info), map_location="cpu", weights_only=True)
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


class _Plan(SavePlanner):
    """Hands out the chunks of one file, in order. reads: the pieces of this file's parts and of those after it."""

    def __init__(self, parts: list[Part], reads: Iterator[list[torch.Tensor]], objects: list[str], advance: Callable[[int], None]) -> None:
        self.reads, self.advance = reads, advance
        self.items: list[WriteItem] = []
        self._at: dict[MetadataIndex, tuple[Part, int]] = {}
        self._pieces: list[torch.Tensor] = []  # still to write, of the part being written
        for part in parts:
            for number, (offsets, sizes) in enumerate(part.chunks):
                chunk = ChunkStorageMetadata(torch.Size([*part.index, *offsets]), torch.Size([*[1] * len(part.index), *sizes]))
                index = MetadataIndex(part.key, chunk.offsets)
                data = TensorWriteData(chunk, TensorProperties(part.dtype), torch.Size(part.size))
                self.items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._at[index] = (part, number)
        self.items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(EMPTY_OBJECT)
        part, number = self._at[write_item.index]
        if number == 0:
            self._pieces = next(self.reads)
        piece = self._pieces.pop(0).contiguous()  # let go of once it is written
        self.advance(piece.nbytes)
        return piece.view([*[1] * len(part.index), *part.chunks[number][1]])

    def _not_planned(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("the plan is made in its constructor")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = _not_planned


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # PyTorch's has the folder's path, which is a temporary one and nobody's business


def _empty_object() -> bytes:
    buffer = io.BytesIO()
    torch.save([None], buffer)  # as Megatron packs its ShardedObjects
    return buffer.getvalue()


EMPTY_OBJECT = _empty_object()


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
    writer = _Writer(folder, sync_files=False)  # `written` does, while the next file is being written
    writer.set_up_storage_writer(True)
    with contextlib.closing(ahead(part.read for part in parts)) as reads:
        plans = [_Plan(group, reads, objects if not number else [], advance) for number, group in enumerate(_groups(parts, file_bytes))]
        saved = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(plan.items)) for plan in plans])
        results = []
        for plan, items in zip(plans, saved, strict=True):
            try:
                results.append(writer.write_data(items, plan).wait())
            except RuntimeError as error:  # PyTorch hides a full disk behind its own complaint
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            written(folder / results[-1][0].storage_data.relative_path)
    writer.finish(_metadata(plans), results)
    packed = io.BytesIO()
    torch.save(common, packed)
    (folder / "common.pt").write_bytes(packed.getbuffer())
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(versions), encoding="utf-8")
    for name in (".metadata", "common.pt", "metadata.json"):
        written(folder / name)


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


def _metadata(plans: list[_Plan]) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for item in itertools.chain.from_iterable(plan.items for plan in plans):
        if item.tensor_data is None:
            entries[item.index.fqn] = BytesStorageMetadata()
            continue
        data = item.tensor_data
        entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(data.chunk)
    return Metadata(entries)
