"""Megatron-Core's own checkpoints: the names of the name table, and weights that come back from any layout."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import tiny
from tests.dist import checkpoint_cases as cases
from tests.dist.ranks import run_ranks
from tests.dist.test_learner import merged_logits
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import entries, expected_shapes, shard

IDS = [[5, 200, 17, 3, 258, 40, 41], [7, 7, 9]]


def test_megatron_saves_under_the_names_of_the_name_table(tmp_path: Path) -> None:
    folders = [tiny.make(name, tmp_path / name) for name in tiny.ARCHITECTURES]
    [found] = run_ranks(1, cases.keys, folders)
    for folder, shapes in zip(folders, found, strict=True):
        architecture = Architecture.from_hf(folder)
        table = list(entries(architecture))
        assert {entry.key for entry in table} == shapes.keys()
        for entry in table:  # stacked over layers (and experts)
            assert len(shapes[entry.key]) == len(entry.index) + len(expected_shapes(entry, architecture)[0])
            assert all(at < size for at, size in zip(entry.index, shapes[entry.key], strict=False))


def test_what_pipeline_stages_save_one_rank_loads(tmp_path: Path) -> None:
    """Tensor parallel 2 (vocabularies are padded to 260) or expert parallel 2, x pipeline parallel 2; tied embeddings lie on both stages."""
    layouts = {"llama3-rope": (2, 2, 1), "qwen3": (2, 2, 1), "qwen3-moe": (1, 2, 2)}
    folders = [tiny.make(name, tmp_path / name) for name in layouts]
    outs = [folder / "megatron" for folder in folders]
    run_ranks(4, cases.save_each, [(folder, out, *place) for folder, out, place in zip(folders, outs, layouts.values(), strict=True)])
    loads = [(folder, out, 1, 1, 1, IDS) for folder, out in zip(folders, outs, strict=True)]
    [loaded] = run_ranks(1, cases.load_each, loads)
    for folder, (parameters, logits) in zip(folders, loaded, strict=True):
        architecture, tensors = Architecture.from_hf(folder), load_file(folder / "model.safetensors")
        table = {entry.megatron: entry for entry in entries(architecture)}
        assert table.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, shard(table[name], [tensors[one] for one in table[name].hf], architecture, 0, 1)), name
        for ours, theirs in zip(logits, merged_logits(folder, IDS), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, out = tiny.make("qwen3", tmp_path / "qwen3"), tmp_path / "out"
    run_ranks(1, cases.save_megatron, folder, out)
    wider, other = tiny.make("qwen3", tmp_path / "wider", head_dim=16), tiny.make("qwen3-moe", tmp_path / "moe")
    untagged, short, evil = (Path(shutil.copytree(out, tmp_path / name)) for name in ("untagged", "short", "evil"))
    (untagged / "metadata.json").unlink()
    next(short.glob("*.distcp")).unlink()
    torch.save({"args": Unknown()}, evil / "common.pt")
    loads = [(wider, out), (other, out), (folder, untagged), (folder, short), (folder, evil)]
    [messages] = run_ranks(1, cases.refusals, loads)
    for message, words in zip(
        messages,
        [
            r"out: decoder\.layers\.self_attention\.linear_proj\.weight has shape \[2, 40, 48\], the model's config\.json says \[2, 40, 64\]",
            r"out has no tensor decoder\.layers\.\S+: it is of another model",
            r"untagged cannot be read: .* is not a distributed checkpoint",
            r"short cannot be read: ",
            r"common\.pt cannot be read: it names tests\.dist\.test_megatron_checkpoints\.Unknown, which is not loaded from a checkpoint",
        ],
        strict=True,
    ):
        assert re.search(words, message), message
        assert "\n" not in message


class Unknown:
    """What no checkpoint needs."""
