"""Conversion against Megatron-Core itself: it loads what we write and we read what it saves, at every parallel layout, bit by bit."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.dist import checkpoint_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner import merged_logits
from trd_megatron.convert import operations
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import entries, expected_shapes, shard
from trd_megatron.convert.megatron import checkpoint_folder

IDS = [[5, 200, 17, 3, 258, 40, 41], [7, 7, 9]]
# 1, 2, 3 and 4 ranks divide heads, key/value heads and MLP; all sizes differ, and 259 rows of the vocabulary need padding.
SIZES: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 24, "num_key_value_heads": 12, "head_dim": 6, "intermediate_size": 132}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {name: SIZES | ({"moe_intermediate_size": 36} if "moe" in name else {}) for name in tiny.ARCHITECTURES}
    return {name: tiny.make(name, folder / name, **sizes[name]) for name in tiny.ARCHITECTURES}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_bit_equal(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_there_and_back_is_bit_equal(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    for tp in (1, 2, 3, 4):
        operations.hf_to_megatron(str(models[name]), tmp_path / f"m{tp}", tensor_model_parallel_size=tp)
        operations.megatron_to_hf(tmp_path / f"m{tp}", tmp_path / f"hf{tp}", max_shard_bytes=60_000)
        assert len(list((tmp_path / f"hf{tp}").glob("*.safetensors"))) > 1
        assert_bit_equal(models[name], tmp_path / f"hf{tp}")
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / f"hf{tp}" / file).read_bytes() == (models[name] / file).read_bytes()


# (model, tensor, pipeline and expert parallel size) of what Megatron saves, by ranks. Tied embeddings lie on both pipeline stages.
SAVED: dict[int, list[tuple[str, int, int, int]]] = {
    1: [("llama", 1, 1, 1), ("qwen3-moe", 1, 1, 1)],
    2: [("llama3-rope", 2, 1, 1), ("qwen2", 2, 1, 1), ("qwen3", 2, 1, 1)],
    3: [("llama3-rope", 3, 1, 1), ("qwen3-moe", 3, 1, 1)],
    4: [("llama3-rope", 2, 2, 1), ("qwen2", 4, 1, 1), ("qwen3-moe", 2, 1, 2), ("qwen3-moe", 1, 2, 2)],
}


@pytest.mark.parametrize("ranks", SAVED)
def test_megatron_loads_what_we_write_and_we_read_what_it_saves(ranks: int, models: dict[str, Path], tmp_path: Path) -> None:
    """Megatron-Core loads every model, laid out for another tensor parallel size, with transformers' logits; what it saves converts
    back. With 4 ranks also pipeline and expert parallel."""
    for name, folder in models.items():
        operations.hf_to_megatron(str(folder), tmp_path / name, tensor_model_parallel_size=ranks % 4 + 1)
    layouts = [(name, ranks, 1, 1) for name in models] + [one for one in SAVED[ranks] if one[1] != ranks]
    loads = [(models[name], checkpoint_folder(tmp_path / name), *sizes, IDS if sizes[0] == ranks else None) for name, *sizes in layouts]
    saves = [(models[one[0]], tmp_path / f"saved-{number}", *one[1:]) for number, one in enumerate(SAVED[ranks])]
    results = run_ranks(ranks, cases.load_and_save, loads, saves, timeout_s=240)
    for number, (name, tp, _, _) in enumerate(layouts):
        seen: set[str] = set()
        for rank, loaded in enumerate(results):
            assert_shards(models[name], loaded[number][0], rank % tp, tp)
            seen.update(loaded[number][0])
        assert seen >= {entry.megatron for entry in entries(Architecture.from_hf(models[name]))}
        if tp == ranks:
            for ours, theirs in zip(results[0][number][1], merged_logits(models[name], IDS), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for folder, saved, *_ in saves:
        operations.megatron_to_hf(saved, saved.with_name(f"{saved.name}-back"), base_path=str(folder))
        assert_bit_equal(folder, saved.with_name(f"{saved.name}-back"))


def assert_shards(folder: Path, parameters: dict[str, torch.Tensor], tp_rank: int, tp: int) -> None:
    """Parameters of one rank, by their names in a whole model, against the name table's cut of the folder's tensors."""
    architecture, whole = Architecture.from_hf(folder), tensors(folder)
    table = {entry.megatron: entry for entry in entries(architecture)}
    for name, parameter in parameters.items():
        entry = table[name if name in table else "embedding.word_embeddings.weight"]  # a tied copy on the last stage
        expected = shard(entry, [whole[one] for one in entry.hf], architecture, tp_rank, tp)
        rows = len(expected)
        if entry.kind == "vocab":  # padding may hold anything
            rows = min(rows, max(0, architecture.vocab_size - tp_rank * rows))
        assert torch.equal(parameter[:rows], expected[:rows]), name


class Unknown:
    """What no checkpoint needs."""


def test_names_are_megatrons_and_what_does_not_fit_is_refused_in_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    folder = models["qwen3"]
    operations.hf_to_megatron(str(folder), tmp_path / "m")
    out = checkpoint_folder(tmp_path / "m")
    wider = tiny.make("qwen3", tmp_path / "wider", **SIZES | {"head_dim": 16})
    untagged, short, evil = (Path(shutil.copytree(out, tmp_path / name)) for name in ("untagged", "short", "evil"))
    (untagged / "metadata.json").unlink()
    next(short.glob("*.distcp")).unlink()
    torch.save({"args": Unknown()}, evil / "common.pt")
    loads = [(wider, out), (models["qwen3-moe"], out), (folder, untagged), (folder, short), (folder, evil)]
    operations.hf_to_megatron(str(models["qwen3-moe"]), tmp_path / "moe")
    whole = [(folder, out), (models["qwen3-moe"], checkpoint_folder(tmp_path / "moe"))]
    [(found, not_found, messages)] = run_ranks(1, cases.keys_and_refusals, list(models.values()), whole, loads)
    assert not_found == [set(), set()]
    expected = [
        r"release: decoder\.layers\.self_attention\.linear_proj\.weight has shape \[2, 48, 144\], the model's config\.json says \[2, 48, 384\]",
        r"release has no tensor decoder\.layers\.\S+: it is of another model",
        r"untagged cannot be read: .* is not a distributed checkpoint",
        r"short cannot be read: ",
        r"common\.pt cannot be read: it names tests\.dist\.test_convert\.Unknown, which is not loaded from a checkpoint",
    ]
    for message, words in zip(messages, expected, strict=True):
        assert re.search(words, message) and "\n" not in message, message
    for one, shapes in zip(models.values(), found, strict=True):
        architecture = Architecture.from_hf(one)
        table = list(entries(architecture))
        assert {entry.key for entry in table} == shapes.keys()
        for entry in table:  # stacked over layers (and experts)
            assert len(shapes[entry.key]) == len(entry.index) + len(expected_shapes(entry, architecture)[0])
            assert all(at < size for at, size in zip(entry.index, shapes[entry.key], strict=False))
