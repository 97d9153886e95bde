"""A model in a Megatron distributed checkpoint: read as a Source, and written."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from trd_megatron.convert import huggingface, run_config, torch_dist
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import LAYERS, Entry, entries, expected_shapes, fuse_local, megatron_shape, shard_dim, split_local
from trd_megatron.convert.source import Source
from trd_megatron.convert.torch_dist import Index, Part, TorchDist
from trd_megatron.convert.weight_files import check_dtype
from trd_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron-LM's name for a checkpoint of weights alone
_WEIGHTS = ("embedding.", "decoder.", "output_layer.", "mtp.", "model.", "lm_head.")  # a model's, Megatron's and the learner's
COMPANIONS = "tokenizer"  # Megatron-Bridge's name for the folder beside the weights; ours also has config.json


def checkpoint_folder(path: Path) -> Path:
    """The folder with the tensors: `path` itself, or the iteration that Megatron's tracker file in it names."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a Megatron distributed checkpoint")
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a folder in Hugging Face layout, not a Megatron checkpoint: hf-to-megatron makes one of it")
    if not tracker.is_file():
        raise UserError(f"{path} is no Megatron distributed checkpoint: it has neither .metadata nor {TRACKER}")
    latest = tracker.read_text(encoding="utf-8", errors="replace")[:40].strip()
    there = sorted(metadata.parent.name for metadata in path.glob("*/.metadata"))
    way = f"give one of the folders in it: {', '.join(there)}" if there else "no folder in it is one (torch_dist has .metadata)"
    if latest != RELEASE and not re.fullmatch("[0-9]+", latest):
        raise UserError(f"{tracker} holds {latest!r}, which is neither a number nor {RELEASE}: {way}")
    folder = path / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    if not (folder / ".metadata").is_file():
        raise UserError(f"{tracker} names {folder.name}, which is no distributed checkpoint: {way}")
    return folder


class Megatron:
    """A GPTModel's weights as Megatron-Core, Megatron-LM and Megatron-Bridge save them, or as the learner does: a Source."""

    def __init__(self, path: Path, base: Path | None = None) -> None:
        """base: the Hugging Face folder to take config and tokenizer from; without it, those that conversion laid beside the weights.

        Raises UserError if the checkpoint is damaged or its tensors are not those of the architecture.
        """
        self.path = path
        folder = checkpoint_folder(path)
        self._checkpoint = TorchDist(folder)
        if any(".lora_" in name for name in self._checkpoint.tensors):
            raise UserError(f"{self.path} holds an adapter and no model: trd convert merge-lora or export-peft converts it")
        self.companions = base or folder / COMPANIONS
        if not (self.companions / "config.json").is_file():
            raise UserError(f"{folder} has no {COMPANIONS}/config.json: give the model's Hugging Face folder with --base-path")
        self.architecture = Architecture.from_hf(self.companions)
        self._check()

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._checkpoint.dtype(self._places(entry)[0][0])  # the learner's have one dtype

    def read(self, entry: Entry) -> list[torch.Tensor]:
        places, a = self._places(entry), self.architecture
        if self._is_megatrons and entry.kind == "gate_up":  # stored apart
            [(key, index)] = places
            return [self._checkpoint.read(key, index, (start, start + a.mlp_columns)) for start in (0, a.mlp_columns)]
        tensors = [self._checkpoint.read(key, index) for key, index in places]
        if self._is_megatrons:
            tensors = split_local(entry, tensors[0], a.num_attention_heads, a.num_query_groups)
        if entry.kind == "vocab":
            tensors = [tensor[: self.architecture.vocab_size] for tensor in tensors]
        return tensors

    @property
    def _is_megatrons(self) -> bool:
        return "embedding.word_embeddings.weight" in self._checkpoint.tensors

    @property
    def megatron_loads(self) -> bool:
        """Whether a GPTModel finds the tensors where they lie: not those of the learner, nor layers under names of their own."""
        return all(entry.key in self._checkpoint.tensors for entry in entries(self.architecture))

    def _places(self, entry: Entry) -> list[tuple[str, Index]]:
        """(key, index) of the tensors that make up an entry; the learner saves whole ones under Hugging Face names."""
        if not self._is_megatrons:
            return [(name, ()) for name in entry.hf]
        for key, index in _spellings(entry):
            if key in self._checkpoint.tensors:
                return [(key, index)]
        raise self._without(entry.key)

    def _without(self, key: str) -> UserError:
        return UserError(f"{self.path} has no tensor {key}: it does not fit {self._config}")

    @property
    def _config(self) -> Path:
        return self.companions / "config.json"

    def _check(self) -> None:
        a, used = self.architecture, set()
        for entry in entries(a):
            places = self._places(entry)
            shapes = [megatron_shape(entry, a)] if self._is_megatrons else expected_shapes(entry, a)
            for (key, index), shape in zip(places, shapes, strict=True):
                if key not in self._checkpoint.tensors:
                    raise self._without(key)
                used.add(key)
                found = self._checkpoint.shape(key)
                stacked = _leading(entry, a)[len(entry.index) - len(index) :]
                if entry.kind == "vocab" and found and found[0] >= shape[0]:
                    shape = (found[0], *shape[1:])  # padding
                if found != (*stacked, *shape):
                    raise UserError(
                        f"{self.path}: {key} has shape {found}, {self._config} says {(*stacked, *shape)}: it is another model's, "
                        "give the right one with --base-path"
                    )
                check_dtype(self.path, key, str(self._checkpoint.dtype(key)).removeprefix("torch."))
        for key in sorted(self._checkpoint.tensors.keys() - used):
            if key.startswith(_WEIGHTS):  # not the optimizer's
                raise UserError(
                    f"{self.path}: {key} has no place in the architecture of {self._config} ({a.model_type}): it is another model's, "
                    "give the right one with --base-path"
                )


def _spellings(entry: Entry) -> Iterator[tuple[str, Index]]:
    """Where an entry may lie: layers stacked, as is usual, or each under its own name (Megatron's non_homogeneous_layers)."""
    for key in (entry.key, entry.key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")):  # as a local MoE layer saves it
        yield key, entry.index
        if entry.index:
            yield key.replace(LAYERS, f"{LAYERS}{entry.index[0]}."), entry.index[1:]


# Writing


def nbytes(source: Source, dtype: torch.dtype | None, tensor_model_parallel_size: int) -> int:
    """Bytes of the tensors of the checkpoint that `write` would write."""
    return sum(part.nbytes for part in _parts(source, dtype, tensor_model_parallel_size))


def write(
    source: Source,
    folder: Path,
    *,
    source_name: str,
    tokenizer: str,
    dtype: torch.dtype | None,
    tensor_model_parallel_size: int,
    file_bytes: int,
    advance: Callable[[int], None],
    written: Callable[[Path], None],
) -> None:
    """Writes a source as `folder`/release with Megatron's tracker file, holding one parameter and the next. dtype None: the source's.

    Tensors are stored in the chunks that ranks of tensor_model_parallel_size read; other sizes read them too. The vocabulary is padded
    to a multiple of that size. source_name and tokenizer (where the folder with it will lie) are recorded. advance is told the bytes
    written, `written` each file of the checkpoint that is complete.
    """
    architecture, tp = source.architecture, tensor_model_parallel_size
    checkpoint = folder / RELEASE
    huggingface.copy_companions(source.companions, checkpoint / COMPANIONS)
    dtypes = {dtype or source.dtype(entry) for entry in entries(architecture)}
    huggingface.record_dtypes(checkpoint / COMPANIONS / "config.json", dtypes)
    widest = max(dtypes, key=lambda one: one.itemsize)
    run_config.write(checkpoint, architecture, widest, tp, source=source_name, tokenizer=tokenizer)
    torch_dist.write(
        checkpoint,
        _parts(source, dtype, tp),
        list(_extra_states(architecture)),
        {"checkpoint_version": 3.0, "iteration": 0},
        file_bytes=file_bytes,
        advance=advance,
        written=written,
    )
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")


def _parts(source: Source, dtype: torch.dtype | None, tp: int) -> list[Part]:
    a = source.architecture
    dtypes: dict[str, torch.dtype] = {}
    parts = []
    for entry in entries(a):
        stored = dtype or source.dtype(entry)
        if dtypes.setdefault(entry.key, stored) != stored:
            raise UserError(f"{source.path}: {entry.hf[0]} is {stored}, in other layers {dtypes[entry.key]}: choose one with --dtype")
        shape = list(megatron_shape(entry, a))
        if entry.kind == "vocab":
            shape[0] = a.padded_vocab_size(tp)
        read = partial(_pieces, source, entry, stored, shape[0], tp)
        parts.append(Part(entry.key, entry.index, (*_leading(entry, a), *shape), stored, _chunks(entry, shape, tp), read))
    return parts


def _pieces(source: Source, entry: Entry, dtype: torch.dtype, rows: int, tp: int) -> list[torch.Tensor]:
    """The pieces of a Megatron tensor of so many rows, in the order of _chunks."""
    tensors = [tensor.to(dtype) for tensor in source.read(entry)]
    dim = shard_dim(entry)
    if entry.kind == "gate_up":  # not fused, as they would be cut apart again
        return [piece for tensor in tensors for piece in tensor.chunk(tp)]
    tensor = fuse_local(entry, tensors, source.architecture.num_query_groups)
    if rows > tensor.shape[0]:  # padding of the vocabulary
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
    return [tensor] if dim is None else list(tensor.chunk(tp, dim))


def _leading(entry: Entry, architecture: Architecture) -> tuple[int, ...]:
    """Sizes of the dimensions that entry.index points into."""
    experts = 0 if architecture.experts is None else architecture.experts.count
    return (architecture.num_layers, experts)[: len(entry.index)]


def _chunks(entry: Entry, shape: list[int], tp: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(offsets, sizes) of the pieces of a tensor: as ranks hold it, but gate and up apart, each cut over the ranks."""
    dim = shard_dim(entry)
    if dim is None:
        return (((0,) * len(shape), tuple(shape)),)
    count = 2 * tp if entry.kind == "gate_up" else tp
    size = shape[dim] // count
    sizes = tuple(size if d == dim else length for d, length in enumerate(shape))
    return tuple((tuple(number * size if d == dim else 0 for d in range(len(shape))), sizes) for number in range(count))


def _extra_states(architecture: Architecture) -> Iterator[str]:
    """Unique keys of the empty states that Megatron's layers, and Transformer Engine's, look for beside their weights."""
    for entry in entries(architecture):
        module, _, name = entry.key.rpartition(".")
        if name == "weight" and not module.endswith(("word_embeddings", "output_layer", "router")):
            index, sizes = entry.index or (0,), _leading(entry, architecture) or (1,)
            yield f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
