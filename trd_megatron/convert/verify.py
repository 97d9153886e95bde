"""Comparing two checkpoints, of either format: what a conversion has to keep."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from trd_megatron import progress
from trd_megatron.builtin_models import local
from trd_megatron.convert import huggingface, logits, output, peft
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.mapping import Entry, entries, expected_shapes
from trd_megatron.convert.megatron import Megatron, checkpoint_folder
from trd_megatron.convert.source import Source
from trd_megatron.errors import UserError
from trd_megatron.progress import printable
from trd_megatron.run_dir import file_sha256

TOLERANCE = 1e-5  # of the largest logit: what float32 leaves where sums are taken in another order
SHOWN = 10
PROMPTS = (
    "The sum of 17 and 25 is",
    "def is_prime(n):\n    if n < 2:\n        return False\n    for d in range(2, int(n**0.5) + 1):\n",
    "Problem: a train leaves at 9:40 and arrives at 13:05. How long does it travel?\nSolution: from 9:40 to 13:05 it is",
)
_COMPARED = ("tokenizer*.json", "vocab.json", "merges.txt", "*.model", "*.jinja", "generation_config.json")


@dataclass(frozen=True)
class Check:
    name: str
    differences: list[str]
    detail: str  # where there are none
    compared: bool = True


@dataclass(frozen=True)
class Report:
    a: str
    b: str
    checks: list[Check]

    @property
    def same(self) -> bool:
        return not any(check.differences for check in self.checks)

    @property
    def verdict(self) -> str:
        differ = [check.name for check in self.checks if check.differences]
        return f"they differ in {len(differ)} of {len(self.checks)} checks" if differ else "they are the same"

    @property
    def table(self) -> Table:
        table = Table("", "", "", title=Text(printable(f"{self.a} and {self.b}")), show_header=False, title_justify="left")
        for check in self.checks:
            shown = check.differences[:SHOWN]
            if len(check.differences) > SHOWN:
                shown.append(f"and {len(check.differences) - SHOWN} more")
            verdict = Text("differ", style="red") if shown else Text("same", style="green") if check.compared else Text("not compared")
            table.add_row(Text(printable(check.name)), verdict, Text("\n".join(map(printable, shown)) or check.detail))
        return table


def compare(a: str, b: str, *, base_path: str | None = None, logits: bool = True) -> Report:
    """Compares checksums, architecture, names, shapes, dtypes, bits, tokenizers and, unless told otherwise, logits.

    Memory: one parameter of each, or, for the logits, one whole model in float32. Raises UserError if one cannot be read or is not whole.
    """
    paths = [local(a), local(b)]
    checks = [check for path in paths if (check := _checksums(path)) is not None]
    base = None if base_path is None else local(base_path)
    one, other = (_open(path, base) for path in paths)
    checks.append(_architectures(one.architecture, other.architecture))
    names, dtypes, bits = _tensors(one, other)
    checks += [names, dtypes, bits, _companions(one.companions, other.companions)]
    if logits and not names.differences:
        checks.append(_logits(one, other))
    return Report(a, b, checks)


def _open(path: Path, base: Path | None) -> Source:
    if (path / peft.CONFIG).is_file():
        raise UserError(f"{path} is an adapter: verify compares models; merge it into its base first (merge-lora)")
    return HuggingFace(path) if (path / "config.json").is_file() else Megatron(path, base)


def _checksums(path: Path) -> Check | None:
    """Against those that conversion wrote down, if it made the folder."""
    manifest = path / output.MANIFEST
    if not manifest.is_file():
        return None
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        files = {name: (int(one["bytes"]), one["sha256"]) for name, one in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} cannot be read ({error}): delete it to compare without checksums") from None
    differences = []
    with progress.byte_bar("checksums", sum(size for size, _ in files.values())) as advance:
        for name, (size, digest) in files.items():
            file = path / name
            if not file.is_file():
                differences.append(f"{name} is missing")
            elif file.stat().st_size != size or file_sha256(file) != digest:
                differences.append(f"{name} is not what was written")
            advance(size)
    return Check(f"checksums of {path}", differences, f"{len(files)} files")


def _architectures(one: Architecture, other: Architecture) -> Check:
    theirs = asdict(other)
    differences = [f"{key}: {value} | {theirs[key]}" for key, value in asdict(one).items() if theirs[key] != value]
    return Check("architecture", differences, f"{one.model_type}, {one.parameter_count():,} parameters")


def _tensors(one: Source, other: Source) -> tuple[Check, Check, Check]:
    """Names and shapes, dtypes, bits."""
    ours, theirs = _by_name(one), _by_name(other)
    names = [f"{name} is missing in the {place}" for place, missing in _missing(ours, theirs) for name in missing]
    both = [name for name in ours if name in theirs]
    shapes = [f"{n}: {ours[n][1]} | {theirs[n][1]}" for n in both if ours[n][1] != theirs[n][1]]
    dtypes: dict[str, list[str]] = {}
    bits: list[tuple[float, str]] = []
    rounded = 0
    with progress.byte_bar("tensors", huggingface.nbytes(one, None)) as advance:
        for entry in entries(one.architecture):
            pair = [name for name in entry.hf if name in theirs and ours[name][1] == theirs[name][1]]
            if not pair:
                continue
            read = {name: tensor for name, tensor in zip(entry.hf, one.read(entry), strict=True) if name in pair}
            for name, tensor in _read_names(other, theirs, pair).items():
                mine = read[name]
                advance(mine.nbytes)
                if mine.dtype != tensor.dtype:
                    dtypes.setdefault(f"{_plain(mine.dtype)} | {_plain(tensor.dtype)}", []).append(name)
                    narrow = min(mine.dtype, tensor.dtype, key=lambda dtype: (dtype.itemsize, dtype != tensor.dtype))
                    mine, tensor = mine.to(narrow), tensor.to(narrow)
                    rounded += 1
                if (difference := _difference(mine, tensor)) is not None:
                    bits.append((difference[0], f"{name}: {difference[1]}"))
    of_dtypes = [f"{pair}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for pair, names in dtypes.items()]
    compared = f"{huggingface.nbytes(one, None) / 1e6:,.1f} MB compared" + (
        f", {rounded} tensors rounded to the narrower" if rounded else ""
    )
    found = sorted({_plain(one.dtype(entry)) for entry in entries(one.architecture)})
    return (
        Check("names and shapes", names + shapes, f"{len(ours)} tensors"),
        Check("dtypes", of_dtypes, ", ".join(found)),
        Check("bits", [text for _, text in sorted(bits, key=lambda bit: -bit[0])], compared),
    )


Tensors = dict[str, tuple[Entry, tuple[int, ...]]]


def _by_name(source: Source) -> Tensors:
    """Hugging Face name -> (entry, shape)."""
    a = source.architecture
    return {name: (entry, shape) for entry in entries(a) for name, shape in zip(entry.hf, expected_shapes(entry, a), strict=True)}


def _missing(ours: Tensors, theirs: Tensors) -> list[tuple[str, list[str]]]:
    return [("first", [name for name in theirs if name not in ours]), ("second", [name for name in ours if name not in theirs])]


def _read_names(source: Source, tensors: Tensors, names: list[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for entry in dict.fromkeys(tensors[name][0] for name in names):
        found |= {name: tensor for name, tensor in zip(entry.hf, source.read(entry), strict=True) if name in names}
    return found


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, str] | None:
    """How two tensors of one shape and dtype differ: by how much at most, and in words. NaN is equal to NaN of the same bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    if torch.equal(one.view(integers), other.view(integers)):
        return None
    unequal = one.view(integers) != other.view(integers)
    first = [int(place) for place in unequal.nonzero()[0]]
    largest = (one.double() - other.double()).abs().nan_to_num(math.inf, math.inf).max().item()
    return largest, f"{int(unequal.sum()):,} of {one.numel():,} numbers, by at most {largest:.3g}, the first at {first}"


def _companions(one: Path, other: Path) -> Check:
    """Tokenizer, templates and generation settings, byte by byte."""
    ours, theirs = ({path.name: path.read_bytes() for pattern in _COMPARED for path in folder.glob(pattern)} for folder in (one, other))
    differences = [f"{name} is missing in the second" for name in ours if name not in theirs]
    differences += [f"{name} is missing in the first" for name in theirs if name not in ours]
    differences += [f"{name} has other content" for name in ours if name in theirs and ours[name] != theirs[name]]
    return Check("tokenizer, templates", sorted(differences), f"{len(ours)} files")


def _logits(one: Source, other: Source) -> Check:
    name = "logits (float32)"
    if not all(source.megatron_loads for source in (one, other) if isinstance(source, Megatron)):
        return Check(name, [], "Megatron's own loader does not read this layout: megatron-to-hf makes one that can be run", compared=False)
    sequences = _sequences(one)
    first, second = (torch.cat(_logits_of(source, sequences)) for source in (one, other))
    difference = (first - second).abs().max().item()  # NaN if there is one
    allowed = TOLERANCE * max(1.0, first.abs().max().item())
    agree = int((first.argmax(-1) == second.argmax(-1)).sum())
    found = f"largest difference {difference:.2g} (allowed {allowed:.2g}), the same first choice on {agree} of {len(first)} tokens"
    return Check(name, [] if difference <= allowed else [found], found)


def _logits_of(source: Source, sequences: list[list[int]]) -> list[torch.Tensor]:
    if isinstance(source, Megatron):
        return logits.of_megatron(source.companions, checkpoint_folder(source.path), sequences)
    return logits.of_huggingface(source.path, sequences)


def _sequences(source: Source) -> list[list[int]]:
    """Token ids of the prompts; where there is no tokenizer, ids drawn with a fixed seed."""
    from trd_megatron.builtin_models import VOCABULARY_FILES

    if any((source.companions / name).is_file() for name in VOCABULARY_FILES):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(source.companions, local_files_only=True, trust_remote_code=False)
        return [tokenizer.encode(prompt) for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    size = source.architecture.vocab_size
    return [torch.randint(size, (length,), generator=generator).tolist() for length in (9, 40, 25)]
