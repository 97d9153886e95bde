"""Model folders in Hugging Face layout: read a tensor at a time, written in shards of safetensors with an index."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trd_megatron.convert import safetensors_file
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import Entry, entries, expected_shapes
from trd_megatron.convert.safetensors_file import Spec
from trd_megatron.convert.source import Source, ahead
from trd_megatron.convert.weight_files import INDEX, SINGLE, Weights, check_dtype
from trd_megatron.errors import UserError

SHARD_BYTES = 2_000_000_000
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
_NOT_COPIED = ("manifest.json", "conversion.json", "adapter_config.json")  # of the folder they come from; and indices of its weights


class HuggingFace:
    """A folder as save_pretrained writes it: a Source."""

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        """Checks names and shapes of all tensors. allow_pickle: also reads pytorch_model*.bin where there are no safetensors.

        Raises UserError if a file is missing or truncated, or if the tensors are not those of config.json's architecture.
        """
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give a model folder in Hugging Face layout")
        self.path = self.companions = folder
        self.architecture = Architecture.from_hf(folder)
        self._weights = Weights(folder, allow_pickle=allow_pickle)
        self._check()

    def dtype(self, entry: Entry) -> torch.dtype:
        found = {self._weights.dtypes[name] for name in entry.hf}
        if len(found) > 1:
            raise UserError(f"{self.path}: {', '.join(entry.hf)} have different dtypes and are converted with --dtype alone: choose one")
        return getattr(torch, found.pop())

    def read(self, entry: Entry) -> list[torch.Tensor]:
        return [self._weights.read(name) for name in entry.hf]

    def _check(self) -> None:
        expected: set[str] = set()
        shapes = self._weights.shapes
        for entry in entries(self.architecture):
            expected.update(entry.hf)
            for name, shape in zip(entry.hf, expected_shapes(entry, self.architecture), strict=True):
                if name not in shapes:
                    raise UserError(f"{self.path} has no tensor {name}: it does not fit its config.json, or was not copied whole")
                if shapes[name] != shape:
                    raise UserError(f"{self.path}: {name} has shape {shapes[name]}, its config.json says {shape}: one is another model's")
                check_dtype(self.path, name, self._weights.dtypes[name])
        for name in sorted(shapes.keys() - expected):
            if name == "lm_head.weight" and torch.equal(self._weights.read(name), self._weights.read("model.embed_tokens.weight")):
                continue  # the tied output layer, written out
            if not name.endswith("rotary_emb.inv_freq"):  # older versions of transformers saved what follows from config.json
                raise UserError(
                    f"{self.path}: {name} has no place in the architecture of its config.json ({self.architecture.model_type}), "
                    "which may be another model's"
                )


# Writing


def copy_companions(base: Path, folder: Path) -> None:
    """Makes `folder` and copies everything of a Hugging Face folder but its weights: config, tokenizer, chat templates."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)  # readable as new files are, whatever it was there
    if (base / "additional_chat_templates").is_dir():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        for path in (base / "additional_chat_templates").glob("*.jinja"):
            shutil.copyfile(path, folder / "additional_chat_templates" / path.name)


def nbytes(source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of the weights of a source, in its own or another dtype."""
    return sum(_entry_bytes(source, entry, dtype) for entry in entries(source.architecture))


def _entry_bytes(source: Source, entry: Entry, dtype: torch.dtype | None) -> int:
    numbers = sum(torch.Size(shape).numel() for shape in expected_shapes(entry, source.architecture))
    return numbers * (dtype or source.dtype(entry)).itemsize


def write(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
    written: Callable[[Path], None] = lambda path: None,
) -> None:
    """Writes a source as a Hugging Face folder, holding one parameter and the next. dtype None: the source's.

    advance is told the bytes written, `written` each file of weights that is complete.
    """
    copy_companions(source.companions, folder)
    record_dtypes(folder / "config.json", {dtype or source.dtype(entry) for entry in entries(source.architecture)})
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries(source.architecture):
        size = _entry_bytes(source, entry, dtype)
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += size
    for shard in shards:
        shard.sort(key=lambda entry: -(dtype or source.dtype(entry)).itemsize)
    weight_map: dict[str, str] = {}
    total = 0
    with contextlib.closing(ahead(partial(source.read, entry) for shard in shards for entry in shard)) as reads:
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            specs: dict[str, Spec] = {}
            for entry in shard:
                shapes = expected_shapes(entry, source.architecture)
                specs |= {key: Spec(dtype or source.dtype(entry), shape) for key, shape in zip(entry.hf, shapes, strict=True)}
            safetensors_file.write(folder / name, specs, _tensors(reads, len(shard), dtype, advance))
            written(folder / name)
            weight_map |= dict.fromkeys(specs, name)
            total += sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _tensors(
    reads: Iterator[list[torch.Tensor]], count: int, dtype: torch.dtype | None, advance: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """The tensors of the next `count` parameters."""
    for tensors in itertools.islice(reads, count):
        while tensors:  # taken out, so that nothing here holds what is written
            tensor = tensors.pop(0)
            tensor = tensor.to(dtype or tensor.dtype)
            advance(tensor.nbytes)
            yield tensor
            del tensor


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes one safetensors file that others may read: the library makes it private. Raises OSError if it cannot."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)


def record_dtypes(config: Path, dtypes: set[torch.dtype]) -> None:
    """Makes a config.json say the dtype of the weights beside it, where they have one and it says another or none."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    if len(names) == 1 and settings.get(key) != names[0]:
        settings[key] = names[0]
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
