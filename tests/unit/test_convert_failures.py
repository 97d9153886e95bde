"""What goes wrong in conversions ends in one clear line, and leaves neither an output nor a temporary folder."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import Metadata

from tests.unit.test_cli import trd
from trd_megatron import cli
from trd_megatron.builtin_models import resolve_model
from trd_megatron.convert import operations, peft, torch_dist
from trd_megatron.convert.huggingface import INDEX, SINGLE
from trd_megatron.convert.megatron import TRACKER
from trd_megatron.convert.output import MANIFEST, new_folder
from trd_megatron.convert.safe_metadata import read_metadata
from trd_megatron.errors import UserError

QKV = "decoder.layers.self_attention.linear_qkv.weight"
NORM = "model.layers.1.self_attn.q_norm.weight"
Damage = Callable[[Path], object]
Refused = Callable[..., str]


# Good checkpoints, made once and copied


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf (one file), sharded (an index), bin (a pickle), megatron (with a tracker), adapter (PEFT), step_1 (the learner's adapter)."""
    folder = tmp_path_factory.mktemp("originals")
    hf = folder / "hf"
    shutil.copytree(resolve_model("builtin:tiny-qwen3"), hf)
    operations.hf_to_megatron(str(hf), folder / "megatron", tensor_model_parallel_size=2)
    operations.megatron_to_hf(folder / "megatron", folder / "sharded", max_shard_bytes=50_000)
    shutil.copytree(hf, folder / "bin")
    torch.save(load_file(folder / "bin" / SINGLE), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / SINGLE).unlink()
    module = "model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(4, 48), f"{module}.lora_B.weight": torch.randn(64, 4)}
    (folder / "adapter").mkdir()
    write_json(folder / "adapter" / peft.CONFIG, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(hf)})
    save_file({f"base_model.model.{name}": factor for name, factor in factors.items()}, folder / "adapter" / peft.WEIGHTS)
    parts = [
        torch_dist.Part(name, (), tuple(factor.shape), factor.dtype, (((0, 0), tuple(factor.shape)),), lambda factor=factor: [factor])
        for name, factor in factors.items()
    ]
    (folder / "step_1").mkdir()
    torch_dist.write(folder / "step_1", parts, [], {}, file_bytes=10**9, advance=lambda count: None, written=lambda path: None)
    write_json(folder / "step_1" / peft.STATE, {"step": 1, "lora": {"rank": 4, "alpha": 8.0, "base": str(hf)}})
    return folder


@pytest.fixture
def work(originals: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(originals, tmp_path / "work"))


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Calls a conversion with an output folder, expects a line with all of `words`, and that nothing is left."""

    def call(convert: Callable[[Path], object], *words: str) -> str:
        before = listing(tmp_path)
        with pytest.raises(UserError) as error:
            convert(tmp_path / "made" / "on the way" / "output")
        assert listing(tmp_path) == before
        line = str(error.value)
        assert "\n" not in line
        assert all(word in line for word in words), line
        return line

    return call


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, count: int = 10) -> None:
    os.truncate(path, path.stat().st_size - count)


def flip(path: Path, inside: bytes) -> None:
    """Changes a byte of the only place where `inside` lies."""
    content = bytearray(path.read_bytes())
    assert content.count(inside) == 1
    content[content.index(inside) + len(inside) // 2] ^= 1
    path.write_bytes(content)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


# Hugging Face folders


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {name.replace("__", "."): file for name, file in places.items()}
    write_json(folder / INDEX, index)


def move_to_foreign_file(folder: Path) -> None:
    edit_index(folder, **{NORM: shard_of(folder, "model.embed_tokens.weight").name})


SHARDED: dict[str, tuple[Damage, list[str]]] = {
    "truncated": (lambda f: cut(shard_of(f, NORM)), ["model-00", "copy it again"]),
    "empty": (lambda f: shard_of(f, NORM).write_bytes(b""), ["model-00", "copy it again"]),
    "garbage": (lambda f: shard_of(f, NORM).write_bytes(b"\xff" * 400), ["model-00", "copy it again"]),
    "missing file": (lambda f: shard_of(f, NORM).unlink(), [INDEX, "model-00", "missing", "copy the folder again"]),
    "outside": (lambda f: edit_index(f, **{NORM: "../hf/model.safetensors"}), [INDEX, "outside", "copy it again"]),
    "wrong file": (move_to_foreign_file, [INDEX, NORM, "does not hold it", "copy the folder again"]),
    "index cut": (lambda f: cut(f / INDEX), [INDEX, "copy it again"]),
    "index no JSON": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), [INDEX, "copy it again"]),
    "index a list": (lambda f: write_json(f / INDEX, []), [INDEX, "copy it again"]),
    "index of numbers": (lambda f: write_json(f / INDEX, {"weight_map": {"a": 1}}), [INDEX, "copy it again"]),
    "index empty": (lambda f: write_json(f / INDEX, {"weight_map": {}}), ["has no tensor model.embed_tokens.weight"]),
    "twice": (
        lambda f: edit_tensors(shard_of(f, "model.norm.weight"), lambda t: t.update({NORM: torch.zeros(16)})),
        [NORM, "lies in", "delete"],
    ),
    "two sets": (lambda f: shutil.copy(shard_of(f, NORM), f / SINGLE), [SINGLE, "index", "delete"]),
}


def without(name: str) -> Damage:
    return lambda folder: edit_tensors(folder / SINGLE, lambda tensors: tensors.pop(name))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda folder: edit_tensors(folder / SINGLE, lambda tensors: tensors.update({name: change(tensors[name])}))


def configured(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "readme.txt").write_text("moved")


WHOLE: dict[str, tuple[Damage, list[str]]] = {
    "tensor missing": (without(NORM), [NORM, "has no tensor", "config.json"]),
    "tensor transposed": (changed("model.layers.0.mlp.up_proj.weight", lambda t: t.T.contiguous()), ["up_proj", "(48, 96)", "(96, 48)"]),
    "vocabulary cut": (changed("model.embed_tokens.weight", lambda t: t[:-1].clone()), ["embed_tokens", "(258, 48)", "(259, 48)"]),
    "tensor too many": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)})),
        ["model.layers.2.mlp.up_proj.weight", "no place"],
    ),
    "another output layer": (
        lambda f: edit_tensors(f / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        ["lm_head.weight", "no place"],
    ),
    "fewer layers": (configured(num_hidden_layers=1, layer_types=["full_attention"]), ["model.layers.1.", "no place"]),
    "more layers": (configured(num_hidden_layers=3, layer_types=["full_attention"] * 3), ["model.layers.2.", "has no tensor"]),
    "float8": (changed(NORM, lambda t: t.to(torch.float8_e4m3fn)), [NORM, "F8_E4M3", "quantised"]),
    "integers": (changed(NORM, lambda t: t.to(torch.int8)), [NORM, "I8", "quantised"]),
    "quantization_config": (configured(quantization_config={"quant_method": "fp8"}), ["quantised", "bfloat16"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config cut": (lambda f: cut(f / "config.json"), ["config.json", "not a valid JSON"]),
    "config empty": (lambda f: (f / "config.json").write_text(""), ["config.json"]),
    "config a list": (lambda f: write_json(f / "config.json", [1]), ["config.json", "model_type"]),
    "config a number": (lambda f: write_json(f / "config.json", 5), ["config.json cannot be used"]),
    "config of text": (configured(hidden_size="abc"), ["config.json cannot be used", "hidden_size", "abc"]),
    "no heads": (configured(num_attention_heads=0), ["config.json", "num_attention_heads is 0"]),
    "heads not in groups": (configured(num_key_value_heads=3), ["config.json", "num_key_value_heads=3"]),
    "rope scaling hollow": (configured(rope_parameters={"rope_type": "yarn"}), ["config.json cannot be used", "factor"]),
    "config gpt2": (lambda f: write_json(f / "config.json", {"model_type": "gpt2"}), ["'gpt2' is not supported", "llama, qwen2, qwen3"]),
    "config llama": (configured(model_type="llama", architectures=["LlamaForCausalLM"]), ["k_norm.weight", "no place", "llama"]),
    "config qwen2": (configured(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), ["q_proj.bias", "has no tensor"]),
    "untied": (configured(tie_word_embeddings=False), ["lm_head.weight", "has no tensor"]),
    "no weights": (no_weights, ["no *.safetensors", "save_pretrained"]),
    "no folder": (shutil.rmtree, ["hf"]),
}


@pytest.mark.parametrize(("kind", "case"), [*(("sharded", case) for case in SHARDED), *(("hf", case) for case in WHOLE)])
def test_damaged_hugging_face_folder(kind: str, case: str, work: Path, refused: Refused) -> None:
    damage, words = (SHARDED if kind == "sharded" else WHOLE)[case]
    damage(work / kind)
    refused(lambda output: operations.hf_to_megatron(str(work / kind), output, dtype=torch.float32), *words)
    refused(lambda output: operations.merge_lora(str(work / kind), work / "adapter", output), *words)


def test_what_looks_odd_but_is_sound_converts(work: Path, tmp_path: Path) -> None:
    hf = work / "hf"
    edit_tensors(hf / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # tied, written out
    edit_tensors(hf / SINGLE, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    save_file({"other": torch.zeros(1)}, hf / "adapter_model.safetensors")  # transformers does not look at it either
    (tmp_path / "output").mkdir()  # an empty folder gives way
    operations.hf_to_megatron(str(hf), tmp_path / "output")
    operations.megatron_to_hf(tmp_path / "output", tmp_path / "back")
    again = load_file(tmp_path / "back" / SINGLE)
    assert all(torch.equal(tensor, load_file(hf / SINGLE)[name]) for name, tensor in again.items())


def test_mixed_dtypes(work: Path, tmp_path: Path, refused: Refused) -> None:
    hf = work / "hf"
    changed("model.layers.0.self_attn.q_proj.weight", lambda t: t.bfloat16())(hf)
    refused(lambda output: operations.hf_to_megatron(str(hf), output), "q_proj.weight", "different dtypes", "--dtype")
    changed("model.layers.0.self_attn.q_proj.weight", lambda t: t.float())(hf)
    changed(NORM, lambda t: t.bfloat16())(hf)
    refused(lambda output: operations.hf_to_megatron(str(hf), output), NORM, "bfloat16", "in other layers torch.float32", "--dtype")
    operations.hf_to_megatron(str(hf), tmp_path / "output", dtype=torch.float32)
    assert {str(one.properties.dtype) for one in torch_dist.TorchDist(tmp_path / "output" / "release").tensors.values()} == {
        "torch.float32"
    }


def test_pickled_weights(work: Path, tmp_path: Path, refused: Refused) -> None:
    folder, file, run = work / "bin", work / "bin" / "pytorch_model.bin", tmp_path / "ran"

    def convert(output: Path) -> None:
        operations.hf_to_megatron(str(folder), output, allow_pickle=True)

    refused(lambda output: operations.hf_to_megatron(str(folder), output), "pytorch_model.bin", "--allow-pickle")
    refused(lambda output: operations.merge_lora(str(folder), work / "adapter", output), "pytorch_model.bin", "--allow-pickle")
    convert(tmp_path / "output")
    operations.megatron_to_hf(tmp_path / "output", tmp_path / "back")
    assert load_file(tmp_path / "back" / SINGLE).keys() == load_file(work / "hf" / SINGLE).keys()
    whole = file.read_bytes()
    for content in (whole[:-1000], whole[:100], b"", b"garbage", pickle.dumps([1])):
        file.write_bytes(content)
        refused(convert, "pytorch_model.bin")
    for value in ([torch.zeros(1)], {"a": 1}, {"a": torch.zeros(2, 2).to_sparse()}):
        torch.save(value, file)
        refused(convert, "pytorch_model.bin", "no weights by name")
    torch.save({"model.norm.weight": Malicious(run)}, file)
    line = refused(convert, "pytorch_model.bin", "may run code")
    assert "weights_only" not in line  # PyTorch's advice to switch the check off
    assert not run.exists()


# Megatron checkpoints


def edit_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def storage(metadata: Metadata, key: str = QKV) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def relocated(**values: Any) -> Damage:
    """A tensor's place in the files is changed."""

    def change(metadata: Metadata) -> None:
        for name, value in values.items():
            object.__setattr__(storage(metadata), name, value)

    return lambda folder: edit_metadata(folder / "release", change)


def forget_storage(metadata: Metadata) -> None:
    metadata.storage_data.pop(next(index for index in metadata.storage_data if index.fqn == QKV))


def retyped(dtype: torch.dtype) -> Damage:
    return lambda folder: edit_metadata(
        folder / "release", lambda metadata: setattr(metadata.state_dict_metadata[QKV].properties, "dtype", dtype)
    )


def renamed(old: str, new: str) -> Damage:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)

    return lambda folder: edit_metadata(folder / "release", change)


def raw_row(folder: Path) -> bytes:
    """A row of a tensor's numbers as it lies in the file."""
    return torch_dist.TorchDist(folder / "release").read(QKV, (1,))[5].numpy().tobytes()


def evil_tensor(folder: Path) -> None:
    torch.save(Malicious(folder / "ran"), folder / "release" / "evil.distcp")
    relocated(relative_path="evil.distcp", offset=0, length=(folder / "release" / "evil.distcp").stat().st_size)(folder)


def other_tensor(folder: Path) -> None:
    torch.save(torch.zeros(3), folder / "release" / "other.distcp")
    relocated(relative_path="other.distcp", offset=0, length=(folder / "release" / "other.distcp").stat().st_size)(folder)


def metadata_bytes(content: bytes) -> Damage:
    return lambda folder: (folder / "release" / ".metadata").write_bytes(content)


def tracker(content: bytes) -> Damage:
    return lambda folder: (folder / TRACKER).write_bytes(content)


DISTCP = "__0_0.distcp"
MEGATRON: dict[str, tuple[Damage, list[str]]] = {
    "file cut": (lambda f: cut(f / "release" / DISTCP), [DISTCP, "truncated", "copy the checkpoint again"]),
    "file missing": (lambda f: (f / "release" / DISTCP).unlink(), [DISTCP, "missing", "copy the checkpoint again"]),
    "numbers flipped": (lambda f: flip(f / "release" / DISTCP, raw_row(f)), [QKV, "CRC", "copy the checkpoint again"]),
    "file zeroed": (
        lambda f: (f / "release" / DISTCP).write_bytes(bytes((f / "release" / DISTCP).stat().st_size)),
        ["cannot be read", "copy the checkpoint again"],
    ),
    "malicious tensor": (evil_tensor, [QKV, "other than a tensor"]),
    "another tensor": (other_tensor, [QKV, "cannot be read"]),
    "metadata missing": (lambda f: (f / "release" / ".metadata").unlink(), ["no distributed checkpoint"]),
    "metadata garbage": (metadata_bytes(b"garbage"), [".metadata", "cannot be read"]),
    "metadata empty": (metadata_bytes(b""), [".metadata", "cannot be read"]),
    "metadata another object": (metadata_bytes(pickle.dumps({"a": 1})), [".metadata", "no checkpoint metadata"]),
    "metadata malicious": (lambda f: metadata_bytes(pickle.dumps(Malicious(f / "ran")))(f), [".metadata", "mkdir"]),
    "metadata hollow": (metadata_bytes(pickle.dumps(Metadata({}))), [".metadata", "damaged"]),
    "metadata of nonsense": (metadata_bytes(pickle.dumps(Metadata({"a": 5}, storage_data={}))), [".metadata", "damaged"]),  # type: ignore[dict-item]
    "chunk outside": (
        lambda f: edit_metadata(f / "release", lambda m: setattr(m.state_dict_metadata[QKV].chunks[0], "offsets", torch.Size([0, 100, 0]))),
        [".metadata", "damaged"],
    ),
    "chunk forgotten": (
        lambda f: edit_metadata(f / "release", lambda m: m.state_dict_metadata[QKV].chunks.pop()),
        [QKV, "parts of", "missing"],
    ),
    "place forgotten": (lambda f: edit_metadata(f / "release", forget_storage), [QKV, "cannot be read"]),
    "leaves the folder": (relocated(relative_path="../../hf/model.safetensors"), ["outside", "../../hf"]),
    "leaves the folder by root": (relocated(relative_path="/etc/passwd"), ["outside", "/etc/passwd"]),
    "names its parent": (relocated(relative_path=".."), ["is missing"]),
    "integers": (retyped(torch.int8), [QKV, "int8", "quantised"]),
    "tensor missing": (renamed(QKV, "optimizer.x"), ["has no tensor", QKV, "config.json"]),
    "tensor too many": (renamed("decoder.layers.self_attention.q_layernorm.weight", "decoder.x"), ["has no tensor", "q_layernorm"]),
    "tracker of a missing step": (tracker(b"7"), [TRACKER, "iter_0000007", "release"]),
    "tracker of rubbish": (tracker(b"latest"), [TRACKER, "'latest'", "release"]),
    "tracker of bytes": (tracker(b"\xff\xfe\x00"), [TRACKER, "release"]),
    "tracker empty": (tracker(b""), [TRACKER, "''", "release"]),
    "tracker of another digit": (tracker("²".encode()), [TRACKER, "release"]),
    "no tracker": (lambda f: (f / TRACKER).unlink(), ["no Megatron distributed checkpoint", TRACKER]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "release" / "tokenizer"), ["tokenizer/config.json", "--base-path"]),
    "config cut": (lambda f: cut(f / "release" / "tokenizer" / "config.json"), ["config.json", "not a valid JSON"]),
    "no folder": (shutil.rmtree, ["megatron"]),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_damaged_megatron_checkpoint(case: str, work: Path, refused: Refused) -> None:
    damage, words = MEGATRON[case]
    damage(work / "megatron")
    refused(lambda output: operations.megatron_to_hf(work / "megatron", output), *words)
    assert not (work / "megatron" / "ran").exists()


BASES: dict[str, tuple[Damage, list[str]]] = {
    "other sizes": (configured(hidden_size=64), ["embedding.word_embeddings.weight", "(260, 48)", "(260, 64)", "--base-path"]),
    "larger vocabulary": (configured(vocab_size=300), ["embedding.word_embeddings.weight", "(300, 48)", "--base-path"]),
    "fewer layers": (configured(num_hidden_layers=1, layer_types=["full_attention"]), ["(2, 48)", "(1, 48)", "--base-path"]),
    "more layers": (configured(num_hidden_layers=3, layer_types=["full_attention"] * 3), ["(2, 48)", "(3, 48)", "--base-path"]),
    "no norms on q and k": (configured(model_type="llama"), ["k_layernorm.weight", "no place", "llama", "--base-path"]),
    "biases": (configured(model_type="qwen2"), ["linear_qkv.bias", "has no tensor"]),
    "untied": (configured(tie_word_embeddings=False), ["output_layer.weight", "has no tensor"]),
    "no model": (shutil.rmtree, ["hf"]),
}


@pytest.mark.parametrize("case", BASES)
def test_wrong_base_path(case: str, work: Path, refused: Refused) -> None:
    damage, words = BASES[case]
    damage(work / "hf")
    refused(lambda output: operations.megatron_to_hf(work / "megatron", output, base_path=str(work / "hf")), *words)


def test_every_flipped_byte_of_the_numbers_is_noticed(work: Path) -> None:
    """Also where the checkpoint lies in one of the files of another writer: without the checksum PyTorch reads on."""
    path = work / "megatron" / "release" / DISTCP
    row, whole = raw_row(work / "megatron"), path.read_bytes()
    start = whole.index(row)
    for position in range(start, start + len(row), 31):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x80]) + whole[position + 1 :])
        with pytest.raises(UserError, match="CRC"):
            torch_dist.TorchDist(path.parent).read(QKV, (1,))
    path.write_bytes(whole)
    assert torch_dist.TorchDist(path.parent).read(QKV, (1,))[5].numpy().tobytes() == row


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    part = torch_dist.Part("a", (), (3, 4), torch.float32, (((0, 0), (3, 4)),), lambda: [tensor])
    torch.serialization.set_crc32_options(False)
    try:
        torch_dist.write(tmp_path, [part], [], {}, file_bytes=100, advance=lambda count: None, written=lambda path: None)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(torch_dist.TorchDist(tmp_path).read("a"), tensor)


# Adapters


def adapter_config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / peft.CONFIG, **changes)


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: edit_tensors(folder / peft.WEIGHTS, change)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ADAPTERS: dict[str, tuple[Damage, list[str]]] = {
    "DoRA": (adapter_config(use_dora=True), [peft.CONFIG, "use_dora", "plain LoRA"]),
    "DoRA's tensors": (adapter_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})), ["lora_magnitude_vector"]),
    "bias": (adapter_config(bias="all"), [peft.CONFIG, "bias='all'"]),
    "another kind": (adapter_config(peft_type="IA3"), [peft.CONFIG, "IA3", "LORA"]),
    "trained embeddings": (adapter_config(modules_to_save=["embed_tokens"]), [peft.CONFIG, "modules_to_save"]),
    "trained tokens": (adapter_config(trainable_token_indices=[1]), [peft.CONFIG, "trainable_token_indices"]),
    "copied layers": (adapter_config(layer_replication=[[0, 2], [1, 2]]), [peft.CONFIG, "layer_replication"]),
    "a changed base": (adapter_config(init_lora_weights="pissa_niter_4"), [peft.CONFIG, "pissa_niter_4", "base model"]),
    "ranks by layer": (adapter_config(rank_pattern={"q_proj": 2}), [peft.CONFIG, "rank_pattern"]),
    "no rank": (lambda f: write_json(f / peft.CONFIG, {"peft_type": "LORA"}), [peft.CONFIG, "r is None"]),
    "rank 0": (adapter_config(r=0), [peft.CONFIG, "r is 0"]),
    "another rank": (adapter_config(r=8), ["lora_A.weight", "(4, 48)", "rank 8"]),
    "alpha of text": (adapter_config(lora_alpha="16"), [peft.CONFIG, "lora_alpha", "'16'"]),
    "config cut": (lambda f: cut(f / peft.CONFIG), [peft.CONFIG, "copy it again"]),
    "config a list": (lambda f: write_json(f / peft.CONFIG, [1]), [peft.CONFIG, "JSON object"]),
    "weights cut": (lambda f: cut(f / peft.WEIGHTS), [peft.WEIGHTS, "copy it again"]),
    "weights missing": (lambda f: (f / peft.WEIGHTS).unlink(), [peft.WEIGHTS, "save_pretrained"]),
    "no B": (adapter_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), ["q_proj.lora_B.weight", "copy the adapter again"]),
    "unknown tensor": (adapter_tensors(lambda t: t.update({"x": torch.zeros(1)})), [peft.WEIGHTS, "x is no LoRA factor"]),
    "unknown module": (
        adapter_tensors(lambda t: [t.update({name.replace("layers.0", "layers.9"): t.pop(name)}) for name in list(t)]),
        ["model.layers.9.self_attn.q_proj.weight", "does not exist"],
    ),
    "A of a vector": (adapter_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4)})), ["lora_A.weight", "(4,)"]),
    "A too wide": (
        adapter_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 50)})),
        ["q_proj.weight", "(64, 48)", "(4, 50)"],
    ),
    "integers": (adapter_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 48, dtype=torch.int8)})), ["lora_A", "int8"]),
    "no adapter": (lambda f: [path.unlink() for path in f.iterdir()], ["holds no adapter", peft.CONFIG, peft.STATE]),
    "no folder": (shutil.rmtree, ["adapter", "holds no adapter"]),
    "steps in it": (
        lambda f: [(f / peft.CONFIG).unlink(), (f / "step_2").mkdir(), (f / "step_4").mkdir()],
        ["give one of its step_2, step_4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_damaged_adapter(case: str, work: Path, refused: Refused) -> None:
    damage, words = ADAPTERS[case]
    damage(work / "adapter")
    refused(lambda output: operations.merge_lora(str(work / "hf"), work / "adapter", output), *words)


def lora_state(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / peft.STATE, lora={"rank": 4, "alpha": 8.0, "base": "none/such"} | changes)


STEPS: dict[str, tuple[Damage, list[str]]] = {
    "no state": (lambda f: (f / peft.STATE).unlink(), [peft.STATE, "train/checkpoints/step_N"]),
    "state cut": (lambda f: cut(f / peft.STATE), [peft.STATE, "copy it again"]),
    "all trained": (lambda f: edit_json(f / peft.STATE, lora=None), ["holds no adapter", "every parameter"]),
    "lora of text": (lambda f: edit_json(f / peft.STATE, lora="yes"), [peft.STATE, "'yes'"]),
    "rank missing": (lora_state(rank=None), [peft.STATE, "rank is None"]),
    "another rank": (lora_state(rank=2), ["lora_A.weight", "rank 2"]),
    "no base": (lora_state(base="/none/such"), ["/none/such"]),
    "no metadata": (lambda f: (f / ".metadata").unlink(), [".metadata"]),
    "file cut": (lambda f: cut(f / DISTCP), [DISTCP, "truncated"]),
    "no folder": (shutil.rmtree, ["step_1", peft.STATE]),
}


@pytest.mark.parametrize("case", STEPS)
def test_damaged_checkpoint_of_the_learner(case: str, work: Path, refused: Refused) -> None:
    damage, words = STEPS[case]
    damage(work / "step_1")
    refused(lambda output: operations.export_peft(work / "step_1", output), *words)


def test_the_wrong_kind_of_checkpoint(work: Path, refused: Refused) -> None:
    edit_json(work / "hf" / "config.json", torch_dtype="float32")
    refused(lambda output: operations.export_peft(work / "hf", output), "no checkpoint of the learner", "train/checkpoints/step_N")
    refused(lambda output: operations.export_peft(work, output), "step_1")
    refused(lambda output: operations.megatron_to_hf(work / "hf", output), "Hugging Face layout", "hf-to-megatron")
    refused(lambda output: operations.megatron_to_hf(work / "nowhere", output), "there is no folder", "nowhere")
    refused(lambda output: operations.megatron_to_hf(work, output), "no Megatron distributed checkpoint")
    refused(lambda output: operations.megatron_to_hf(work / "step_1", output), "adapter", "merge-lora")
    refused(lambda output: operations.megatron_to_hf(work / "step_1", output, base_path=str(work / "hf")), "adapter", "merge-lora")
    refused(lambda output: operations.hf_to_megatron(str(work / "megatron" / "release"), output), "megatron-to-hf")
    refused(lambda output: operations.hf_to_megatron(str(work / "adapter"), output), "config.json")


# The output


def test_an_existing_output_is_kept(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for name in ("file", "folder", "link", "dangling"):
        with pytest.raises(UserError, match=f"{name} exists: give another path, or delete it"):
            operations.hf_to_megatron(str(originals / "hf"), tmp_path / name)
    with pytest.raises(UserError, match=r"file.* cannot be made .*file.*: give another path"):
        operations.hf_to_megatron(str(originals / "hf"), tmp_path / "file" / "below")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty is a mount point, .*: give a folder in it"), new_folder(tmp_path / "empty", 0, {}):
        pass
    assert listing(tmp_path) == before
    assert (tmp_path / "folder" / "file").read_text() == "mine"


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_output_that_may_not_be_written(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "closed").mkdir()
        folder.chmod(0o555)
        (folder / "closed").chmod(0o000)
        for target in (folder / "output", folder / "new" / "output", folder / "closed" / "output"):
            with as_nobody(), pytest.raises(UserError, match=r"\(.*: Permission denied\): give another path"), new_folder(target, 0, {}):
                pass
        assert listing(folder) == {folder / "closed"}
        folder.chmod(0o755)


def test_a_full_disk_is_noticed_before(originals: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64_000_000))
    needed = r"needs 0.07 GB", "has 0.06 GB free", "make room"
    hf, megatron, adapter, step = (str(originals / "hf"), *(originals / name for name in ("megatron", "adapter", "step_1")))
    refused(lambda output: operations.hf_to_megatron(hf, output), *needed)
    refused(lambda output: operations.megatron_to_hf(megatron, output), *needed)
    refused(lambda output: operations.merge_lora(hf, adapter, output), *needed)
    refused(lambda output: operations.export_peft(step, output), *needed)


def test_a_source_that_cannot_be_copied_is_named(work: Path, refused: Refused) -> None:
    (work / "hf" / "extra.json").symlink_to("nowhere")
    refused(lambda output: operations.hf_to_megatron(str(work / "hf"), output), "could not be written", "extra.json", "No such file")


def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "output"

    def write(by: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with new_folder(target, 0, {"by": by}) as output:
            (output.folder / "a").write_text(by)
            meanwhile()

    with pytest.raises(UserError, match="output was made by another process meanwhile"):
        write("second", lambda: write("first"))
    assert listing(tmp_path) == {target, target / "a", target / MANIFEST}
    assert (target / "a").read_text() == "first"
    assert json.loads((target / MANIFEST).read_text())["made_by"] == {"by": "first"}


def test_a_second_interrupt_does_not_stop_the_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    remove, handlers = shutil.rmtree, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def impatient(folder: Path, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", impatient)

    def write() -> None:
        with new_folder(tmp_path / "output", 0, {}) as output:
            (output.folder / "a").write_text("x")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not listing(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_checksums_and_modes(work: Path, tmp_path: Path) -> None:
    for path in (work / "hf").iterdir():
        path.chmod(0o600)
    (work / "hf" / "additional_chat_templates").mkdir()
    (work / "hf" / "additional_chat_templates" / "tools.jinja").write_text("x")
    operations.hf_to_megatron(str(work / "hf"), tmp_path / "megatron")
    operations.megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=50_000)
    operations.merge_lora(str(work / "hf"), work / "adapter", tmp_path / "merged")
    operations.export_peft(work / "step_1", tmp_path / "adapter", base_path=str(work / "hf"))
    for name in ("megatron", "hf", "merged", "adapter"):
        folder = tmp_path / name
        check_manifest(folder)
        for path in [folder, *listing(folder)]:
            wanted = 0o755 if path.is_dir() else 0o644
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert (tmp_path / "hf" / "additional_chat_templates" / "tools.jinja").read_text() == "x"


def check_manifest(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    for name, facts in files.items():
        content = (folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {folder / name for name in files} | {folder / MANIFEST} == {path for path in listing(folder) if path.is_file()}


# Processes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hf: a Llama of 270 MB, all zeros, that takes no room on the disk; megatron: the same, converted; adapter."""
    folder = tmp_path_factory.mktemp("large")
    hidden, ffn, layers, rows = 1024, 4096, 3, 16_000
    hf = folder / "hf"
    shutil.copytree(resolve_model("builtin:tiny-qwen3"), hf)
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": rows,
        "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    write_json(hf / "config.json", config)
    shapes = {"model.embed_tokens.weight": [rows, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        here = f"model.layers.{layer}."
        shapes |= {f"{here}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{here}mlp.{name}_proj.weight": [ffn, hidden] for name in ("gate", "up")} | {
            f"{here}mlp.down_proj.weight": [hidden, ffn]
        }
        shapes |= {f"{here}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    (hf / SINGLE).write_bytes(struct.pack("<Q", len(packed)) + packed)
    os.truncate(hf / SINGLE, 8 + len(packed) + end)
    operations.hf_to_megatron(str(hf), folder / "megatron")
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    (folder / "adapter").mkdir()
    write_json(folder / "adapter" / peft.CONFIG, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    factors = {f"{Q}.lora_A.weight": torch.zeros(4, hidden), f"{Q}.lora_B.weight": torch.zeros(hidden, 4)}
    save_file(factors, folder / "adapter" / peft.WEIGHTS)
    yield folder
    shutil.rmtree(folder)


DIRECTIONS = ("hf-to-megatron", "megatron-to-hf", "merge-lora")


def arguments(direction: str, large: Path, output: Path) -> list[str]:
    shards = ["--max-shard-size", "40MB"]
    return {
        "hf-to-megatron": ["--hf-path", f"{large / 'hf'}", "--megatron-path", str(output)],
        "megatron-to-hf": ["--megatron-path", f"{large / 'megatron'}", "--hf-path", str(output), *shards],
        "merge-lora": ["--base-path", f"{large / 'hf'}", "--adapter-path", f"{large / 'adapter'}", "--output-path", str(output), *shards],
    }[direction]


class Process:
    """`trd convert` in a process of its own: a fork, which has imported everything already."""

    def __init__(self, log: Path, *argv: str, file_size: int | None = None) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            self._child(argv, file_size)

    def _child(self, argv: tuple[str, ...], file_size: int | None) -> NoReturn:
        code = 99
        torch.set_num_threads(1)  # a fork has none of the threads that PyTorch thinks it has
        try:
            with self.log.open("w") as sys.stderr:
                if file_size is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
                sys.argv = ["trd", "convert", *argv]
                try:
                    cli.main()
                except SystemExit as stop:
                    code = int(stop.code or 0)
        finally:
            os._exit(code)

    def wait(self) -> tuple[int, str]:
        """(exit code, standard error)"""
        try:
            for _ in range(6000):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status), self.log.read_text()
                time.sleep(0.01)
        except BaseException:
            os.kill(self.pid, signal.SIGKILL)
            raise
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"it did not end: {self.log.read_text()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_interrupted_in_the_middle(direction: str, number: int, large: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    process = Process(tmp_path / "log", direction, *arguments(direction, large, parent / "output"))
    for _ in range(60_000):
        if any(path.suffix in (".distcp", ".safetensors") for path in parent.glob(".output.*.tmp/**/*")):
            break
        time.sleep(0.001)
    os.kill(process.pid, number)
    code, err = process.wait()
    assert (code, err.splitlines()[-1]) == (130, "interrupted; nothing was written"), err
    assert not listing(parent)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_disk_that_fills_up_in_the_middle(direction: str, large: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    code, err = Process(tmp_path / "log", direction, *arguments(direction, large, parent / "new" / "output"), file_size=30_000_000).wait()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1), err
    assert "Traceback" not in err
    assert "could not be written" in lines[0]
    assert "File too large" in lines[0]
    assert not parent.exists()


def test_two_processes_to_one_output(large: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    argv = ("megatron-to-hf", *arguments("megatron-to-hf", large, parent / "output"))
    both = [Process(tmp_path / f"log{number}", *argv) for number in range(2)]
    (code, _), (other, err) = sorted(process.wait() for process in both)
    assert (code, other) == (0, 2), err
    assert "output exists" in err or "output was made by another process" in err
    assert list(parent.iterdir()) == [parent / "output"]
    check_manifest(parent / "output")


# The command line


HOSTILE = "[red]x[/red]\x1b[31m\x07\n\u202e"
SHOWN = r"[red]x[/red]\x1b[31m\x07\n\u202e"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--dtype", "int8"], ["--dtype int8", "float32"]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--dtype", HOSTILE], [SHOWN]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--tensor-model-parallel-size", "3"], ["size 3", "1, 2"]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--tensor-model-parallel-size", "0"], ["or equal to 1"]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--backend", "theirs"], ["--backend"]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{out}", "--backend", "bridge"], ["megatron-bridge"]),
        (["hf-to-megatron", "--hf-path", HOSTILE, "--megatron-path", "{out}"], [SHOWN, "no model folder"]),
        (["hf-to-megatron", "--hf-path", "\udcff", "--megatron-path", "{out}"], [r"\udcff"]),
        (["hf-to-megatron", "--hf-path", "{hf}", "--megatron-path", "{step}"], ["step_1 exists"]),
        (["megatron-to-hf", "--megatron-path", "{megatron}", "--hf-path", "{out}", "--base-path", "{adapter}"], ["config.json"]),
        *(
            (["megatron-to-hf", "--megatron-path", "{megatron}", "--hf-path", "{out}", "--max-shard-size", size], ["such as 500MB"])
            for size in ("0", "-1", "1e9", "2TB", "", "nan", "9" * 400, "٣GB")
        ),
        (["merge-lora", "--base-path", "{hf}", "--adapter-path", "{hf}", "--output-path", "{out}"], ["holds no adapter"]),
        (["export-peft", "--megatron-path", "{megatron}", "--output-path", "{out}"], ["no checkpoint of the learner"]),
        (["inspect", "{out}"], ["no model folder"]),
        (["verify", "{adapter}", "{hf}"], ["is an adapter", "merge-lora"]),
        (["inspect", "{bin}"], ["pytorch_model.bin", "--allow-pickle"]),
    ],
)  # fmt: skip
def test_wrong_arguments(
    argv: list[str], words: list[str], originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: originals / name for name in ("hf", "megatron", "adapter", "bin")}
    filled = [one.format(**paths, step=originals / "step_1", out=tmp_path / "out") if "{" in one else one for one in argv]
    code, _, err = trd("convert", *filled, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert err.rstrip("\n").isprintable()
    assert not listing(tmp_path)


def test_hostile_names_are_text(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hf, out = work / "hf", str(tmp_path / "out")
    edit_tensors(hf / SINGLE, lambda tensors: tensors.update({HOSTILE: torch.zeros(1)}))
    write_json(hf / MANIFEST, {"made_by": {"source": HOSTILE}, "versions": {"torch": "\x1b]0;title\x07"}})
    code, shown, _ = trd("convert", "inspect", str(hf), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert SHOWN in shown
    assert f"source {SHOWN}" in shown
    assert r"\x1b]0;title\x07" in shown
    assert all(line.isprintable() for line in shown.split("\n"))
    code, _, err = trd("convert", "hf-to-megatron", "--hf-path", str(hf), "--megatron-path", out, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{SHOWN} has no place" in err
    edit_json(work / "megatron" / "release" / "tokenizer" / "config.json", model_type=HOSTILE)
    argv = ("megatron-to-hf", "--megatron-path", f"{work / 'megatron'}", "--hf-path", out)
    code, _, err = trd("convert", *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err.rstrip("\n").isprintable()
    renamed(QKV, HOSTILE)(work / "megatron")
    code, shown, _ = trd("convert", "inspect", f"{work / 'megatron'}", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, SHOWN in shown) == (0, True)
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_hostile_output_name_is_made_and_shown(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "[/red] \x1b[1m"
    argv = ("convert", "megatron-to-hf", "--megatron-path", str(originals / "megatron"), "--hf-path", str(path))
    code, shown, _ = trd(*argv, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, shown) == (0, f"wrote {tmp_path}/[/red] \\x1b[1m\n")
    check_manifest(path)


INSPECTED: dict[str, tuple[str, Damage, str]] = {
    "manifest cut": ("sharded", lambda f: cut(f / MANIFEST, 50), MANIFEST),
    "manifest a list": ("sharded", lambda f: write_json(f / MANIFEST, []), MANIFEST),
    "manifest hollow": ("megatron", lambda f: write_json(f / MANIFEST, {"made_by": 1}), MANIFEST),
    "run_config garbage": ("megatron", lambda f: (f / "release" / "run_config.yaml").write_text("a: [\n\x00"), "run_config.yaml"),
    "metadata malicious": ("megatron", lambda f: metadata_bytes(pickle.dumps(Malicious(f / "ran")))(f), ".metadata"),
    "shard cut": ("sharded", lambda f: cut(shard_of(f, NORM)), "model-00"),
    "adapter cut": ("adapter", lambda f: cut(f / peft.WEIGHTS), peft.WEIGHTS),
}


@pytest.mark.parametrize("case", INSPECTED)
def test_inspect_of_what_is_damaged(case: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage, word = INSPECTED[case]
    damage(work / name)
    code, _, err = trd("convert", "inspect", str(work / name), monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert word in err
    assert not (work / name / "ran").exists()
