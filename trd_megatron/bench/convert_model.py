"""The model that `trd bench convert` converts: a Llama of a given size in bfloat16, random, made tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from trd_megatron.convert import huggingface, peft
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import Entry, entries, expected_shapes
from trd_megatron.errors import UserError

HIDDEN = (4096, 2048, 1024, 512, 256, 128, 64)  # 4096: the layers of Llama-3.1-8B; the others are those, scaled down
LAYERS = 4  # at least
BLOCK = 16_777_259  # numbers in the block of random ones that tensors repeat; prime, so that no two tensors begin alike
RANK = 16  # of the adapter


@dataclass(frozen=True)
class Shape:
    """layers: the fewest that make a model of `size` bytes with such layers."""

    hidden: int
    layers: int

    @property
    def vocab(self) -> int:
        return 128_256 * self.hidden // 4096

    @property
    def nbytes(self) -> int:
        """Of all weights in bfloat16: both embeddings, q and o, k and v, gate, up and down, norms."""
        layer = self.hidden * (self.hidden * 2 + self.hidden // 4 * 2 + self.hidden * 7 // 2 * 3 + 2)
        return 2 * (2 * self.vocab * self.hidden + self.layers * layer + self.hidden)


def shape(size: int) -> Shape:
    """Of a model of at least `size` bytes. Raises UserError if that is less than the smallest has."""
    for hidden in HIDDEN:
        smallest = Shape(hidden, LAYERS).nbytes
        if smallest <= size:
            layer = Shape(hidden, LAYERS + 1).nbytes - smallest
            return Shape(hidden, LAYERS - (smallest - size) // layer)
    raise UserError(f"--size: the smallest model has {smallest / 1e6:.1f} MB")


class Random:
    """A Source of random weights: slices of one block, each from another place."""

    def __init__(self, model: Shape, folder: Path) -> None:
        """folder: gets config.json."""
        heads = max(4, model.hidden // 128)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": model.hidden,
            "intermediate_size": model.hidden * 7 // 2,
            "num_hidden_layers": model.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "vocab_size": model.vocab,
            "tie_word_embeddings": False,
        }
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        self.path = self.companions = folder
        self.architecture = Architecture.from_hf(folder)
        generator = torch.Generator().manual_seed(0)
        self._block = torch.empty(min(BLOCK, model.nbytes // 8)).normal_(0, 0.02, generator=generator).bfloat16()
        self._at = 0

    def dtype(self, entry: Entry) -> torch.dtype:
        return torch.bfloat16

    def read(self, entry: Entry) -> list[torch.Tensor]:
        return [self._next(wanted) for wanted in expected_shapes(entry, self.architecture)]

    def _next(self, wanted: tuple[int, ...]) -> torch.Tensor:
        numbers, length = torch.Size(wanted).numel(), len(self._block)
        start = self._at
        self._at = (start + numbers) % length
        return self._block.repeat(-(-(start + numbers) // length))[start : start + numbers].view(wanted)


def write_model(model: Shape, folder: Path) -> int:
    """Writes it in Hugging Face layout, in at least four files; returns the bytes of its weights."""
    source = Random(model, folder.with_name(f"{folder.name}-config"))
    huggingface.write(source, folder, dtype=None, max_shard_bytes=min(huggingface.SHARD_BYTES, model.nbytes // 4))
    return huggingface.nbytes(source, None)


def write_adapter(model: Path, folder: Path) -> None:
    """Writes a random adapter on all seven projections of every layer of the model in the folder `model`."""
    architecture = Architecture.from_hf(model)
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, torch.Tensor] = {}
    for entry in entries(architecture):
        for name, wanted in zip(entry.hf, expected_shapes(entry, architecture), strict=True):
            if name.endswith("_proj.weight"):
                module = name.removesuffix(".weight")
                factors[f"{module}.lora_A.weight"] = torch.empty(RANK, wanted[1]).normal_(0, 0.02, generator=generator)
                factors[f"{module}.lora_B.weight"] = torch.empty(wanted[0], RANK).normal_(0, 0.02, generator=generator)
    peft.write(factors, RANK, 2 * RANK, str(model), folder)
