"""verify, inspect, dtypes and adapters of `trd convert`; round trips against Megatron are in tests/dist/test_convert.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft as peft_library
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests import tiny
from tests.checkpoints import read_tensors
from trd_megatron.convert import inspect, operations, peft, torch_dist, verify
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.commands import app
from trd_megatron.convert.mapping import entries
from trd_megatron.convert.megatron import checkpoint_folder
from trd_megatron.convert.run_config import bridge_model, megatron_lm_flags
from trd_megatron.errors import UserError

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def differing(report: verify.Report) -> dict[str, list[str]]:
    return {check.name: check.differences for check in report.checks if check.differences}


def edit(folder: Path, name: str, index: tuple[int, ...], by: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] += by
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.make("qwen3", tmp_path / "base")


def test_verify_calls_a_conversion_the_same_logits_included(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m", tensor_model_parallel_size=2)
    report = verify.compare(str(base), str(tmp_path / "m"))
    assert report.same, differing(report)
    assert [check.name for check in report.checks][-1] == "logits (float32)"


def test_verify_names_the_number_that_differs(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m")
    edit(base, "model.layers.1.mlp.up_proj.weight", (3, 5), 0.25)
    found = differing(verify.compare(str(base), str(tmp_path / "m")))
    assert list(found) == ["bits", "logits (float32)"]
    assert found["bits"] == ["model.layers.1.mlp.up_proj.weight: 1 of 2,880 numbers, by at most 0.25, the first at [3, 5]"]


def test_verify_sees_a_flipped_sign_of_zero_and_equal_nans(base: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    for value, copy in ((0.0, "a"), (-0.0, "b"), (float("nan"), "c"), (float("nan"), "d")):
        shutil.copytree(base, tmp_path / copy)
        tensors = load_file(base / "model.safetensors")
        tensors[name][0] = value
        save_file(tensors, tmp_path / copy / "model.safetensors", metadata={"format": "pt"})
    pair = [str(tmp_path / one) for one in "ab"]
    assert list(differing(verify.compare(*pair, logits=False))) == ["bits"]
    assert verify.compare(str(tmp_path / "c"), str(tmp_path / "d"), logits=False).same


def test_verify_names_changed_files_other_dtypes_templates_and_architectures(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m")
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "half", dtype=torch.bfloat16)
    (tmp_path / "m/release/tokenizer/tokenizer_config.json").write_text("{}")
    found = differing(verify.compare(str(tmp_path / "half"), str(tmp_path / "m"), logits=False))
    assert found.pop(f"checksums of {tmp_path / 'm'}") == ["release/tokenizer/tokenizer_config.json is not what was written"]
    assert found.pop("tokenizer, templates") == ["tokenizer_config.json has other content"]
    assert found.pop("dtypes") == ["bfloat16 | float32: model.embed_tokens.weight and 24 more"]
    assert not found  # each number is the other's, rounded
    edit(base, "model.layers.1.mlp.up_proj.weight", (3, 5), 0.25)
    edit(base, "model.norm.weight", (0,), 2.0)
    found = differing(verify.compare(str(tmp_path / "half"), str(base), logits=False))
    assert [bits.split(":")[0] for bits in found["bits"]] == ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]  # the worst first
    other = tiny.make("llama", tmp_path / "other", num_hidden_layers=3, vocab_size=261)
    found = differing(verify.compare(str(base), str(other)))
    assert {"model_type: qwen3 | llama", "num_layers: 2 | 3", "qk_norm: True | False"} <= set(found["architecture"])
    assert "model.layers.0.self_attn.q_norm.weight is missing in the second" in found["names and shapes"]
    assert "model.norm.weight is missing in the second" not in found["names and shapes"]
    assert "lm_head.weight: (259, 40) | (261, 40)" in found["names and shapes"]
    assert "logits (float32)" not in found


def test_verify_exits_with_1_where_something_differs(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    arguments = ["verify", str(base), str(tmp_path / "copy"), "--no-logits"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    edit(tmp_path / "copy", "model.norm.weight", (0,), 1.0)
    assert CliRunner().invoke(app, arguments).exit_code == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_cast_and_recorded(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m", dtype=dtype)
    checkpoint = checkpoint_folder(tmp_path / "m")
    assert {t.dtype for t in read_tensors(checkpoint).values()} == {dtype}
    assert yaml.safe_load((checkpoint / "run_config.yaml").read_text())["model"]["params_dtype"]["_target_"] == str(dtype)
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "back")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_output_layer_that_was_written_out_is_dropped(tmp_path: Path) -> None:
    base = tiny.make("qwen2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    operations.hf_to_megatron(str(base), tmp_path / "m")
    assert "output_layer.weight" not in read_tensors(checkpoint_folder(tmp_path / "m"))


def test_files_of_weights_are_split_and_indexed(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m")
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "back", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "back" / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def lora(base: Path, folder: Path, **settings: object) -> peft_library.PeftModel:
    """A PEFT adapter with random factors, saved by PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    config = peft_library.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)  # type: ignore[arg-type]
    adapted = peft_library.get_peft_model(model, config)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_merging_gives_the_logits_of_peft(settings: dict[str, object], base: Path, tmp_path: Path) -> None:
    adapted = lora(base, tmp_path / "adapter", **settings)
    operations.merge_lora(str(base), tmp_path / "adapter", tmp_path / "merged", max_shard_bytes=60_000)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 200, 17, 3, 258]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
        assert (merged(ids).logits - AutoModelForCausalLM.from_pretrained(base)(ids).logits).abs().max() > 1e-2


def test_merging_rounds_once_to_the_dtype_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m", dtype=torch.bfloat16)
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "half")
    lora(base, tmp_path / "adapter")
    operations.merge_lora(str(tmp_path / "half"), tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    adapter, name = peft.read(tmp_path / "adapter"), MODULES[1]
    a, b = adapter.pair(name)
    expected = load_file(tmp_path / "half/model.safetensors")[f"{name}.weight"].float() + 7 / 3 * (b @ a)
    torch.testing.assert_close(load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def shown(path: Path, every: bool = False) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in inspect.describe(path, every=every):
        console.print(part, highlight=False)
    return console.export_text()


def test_inspect_shows_either_format_and_adapters(tmp_path: Path) -> None:
    base = tiny.make("qwen3-moe", tmp_path / "base")
    operations.hf_to_megatron(str(base), tmp_path / "m")
    text = shown(base)
    assert "model.layers.*.mlp.experts.*.gate_proj.weight" in text and "6 of 20, 2 per token" in text
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in shown(base, every=True)
    text = shown(tmp_path / "m")
    assert "[2, 6, 40, 40]" in text and "--moe-router-topk 2" in text and "hf-to-megatron" in text
    dense = tiny.make("qwen3", tmp_path / "dense")
    lora(dense, tmp_path / "adapter")
    assert "model.layers.*.self_attn.q_proj.lora_A.weight" in shown(tmp_path / "adapter")


FLAGS = {
    "llama": "--rotary-base 10000 --norm-epsilon 1e-06 --group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights "
    "--padded-vocab-size 260 --kv-channels 12",
    "llama3-rope": "--use-rope-scaling --rope-scaling-factor 4",
    "qwen2": "--add-qkv-bias",
    "qwen3": "--qk-layernorm",
    "qwen3-yarn": "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 32 --yarn-beta-fast 32 "
    "--yarn-beta-slow 1 --yarn-correction-range-round-to-int --no-rope-fusion",
    "qwen3-moe": "--num-experts 6 --moe-router-topk 2 --moe-ffn-hidden-size 20 --moe-aux-loss-coeff 0.001",
    "qwen3-moe-unnormalized": "--moe-router-pre-softmax",
}
HAVE = {
    "--add-qkv-bias": {"qwen2"},
    "--use-rope-scaling": {"llama3-rope"},
    "--qk-layernorm": {"qwen3", "qwen3-yarn", "qwen3-moe", "qwen3-moe-unnormalized"},
    "--rotary-scaling-factor": {"qwen3-yarn"},
    "--num-experts": {"qwen3-moe", "qwen3-moe-unnormalized"},
    "--moe-router-pre-softmax": {"qwen3-moe-unnormalized"},
    "--untie-embeddings-and-output-weights": {"llama", "qwen3", "qwen3-moe", "qwen3-moe-unnormalized"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_megatron_lm_flags_say_the_whole_architecture(name: str, tmp_path: Path) -> None:
    flags = " ".join(megatron_lm_flags(Architecture.from_hf(tiny.make(name, tmp_path / name)), 2)) + " "
    for flag in re.findall(r"--\S+(?: [^-]\S*)?", FLAGS[name]):
        assert f"{flag} " in flags, flags
    for flag, names in HAVE.items():
        assert (f"{flag} " in flags) == (name in names), flag


def test_bridge_model_carries_rope_and_experts(tmp_path: Path) -> None:
    yarn = bridge_model(Architecture.from_hf(tiny.make("qwen3-yarn", tmp_path / "yarn")), torch.bfloat16, 2)
    assert (yarn["position_embedding_type"], yarn["yarn_rotary_scaling_factor"]) == ("yarn", 4.0)
    assert yarn["yarn_original_max_position_embeddings"] == 32
    moe = bridge_model(Architecture.from_hf(tiny.make("qwen3-moe-unnormalized", tmp_path / "moe")), torch.float32, 1)
    assert (moe["num_moe_experts"], moe["moe_router_topk"], moe["moe_router_pre_softmax"]) == (6, 2, True)
    assert moe["moe_aux_loss_coeff"] == 0.001
    llama = bridge_model(Architecture.from_hf(tiny.make("llama3-rope", tmp_path / "llama")), torch.float32, 1)
    assert (llama["rope_scaling"], llama["rope_scaling_factor"], llama["share_embeddings_and_output_weights"]) == (True, 4.0, True)


def write_parts(folder: Path, parts: list[torch_dist.Part]) -> None:
    folder.mkdir()
    torch_dist.write(folder, parts, [], {}, file_bytes=10**9, advance=lambda count: None, written=lambda path: None)


def part(key: str, index: tuple[int, ...], size: tuple[int, ...], offset: tuple[int, ...], tensor: torch.Tensor) -> torch_dist.Part:
    return torch_dist.Part(key, index, size, tensor.dtype, ((offset, tuple(tensor.shape)),), lambda: [tensor])


def test_layers_under_names_of_their_own_are_read(tmp_path: Path) -> None:
    """As Megatron saves layers that are not alike, and a local layer with experts its norm."""
    base = tiny.make("qwen3-moe", tmp_path / "base")
    operations.hf_to_megatron(str(base), tmp_path / "m")
    stacked = torch_dist.TorchDist(checkpoint_folder(tmp_path / "m"))
    parts, seen = [], set()
    for entry in entries(Architecture.from_hf(base)):
        key, index = entry.key, entry.index
        tensor = stacked.read(key, index)
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if index:
            key, index = key.replace("decoder.layers.", f"decoder.layers.{index[0]}."), index[1:]
        size = (6,) * len(index) + tuple(tensor.shape)
        parts.append(part(key, index, size, (0,) * tensor.ndim, tensor))
        seen.add(key)
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in seen
    write_parts(tmp_path / "apart", parts)
    operations.megatron_to_hf(tmp_path / "apart", tmp_path / "back", base_path=str(base))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    report = verify.compare(str(base), str(tmp_path / "apart"), base_path=str(base))
    assert report.same and not report.checks[-1].compared


def test_chunks_are_put_together_and_must_cover_a_tensor_once(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(2, 4, 6)
    corners = [(0, 0), (0, 4), (2, 0), (2, 4)]
    parts = [part("a", (i,), (2, 4, 6), (r, c), whole[i, r : r + 2, c : c + 4]) for i in range(2) for r, c in corners]
    write_parts(tmp_path / "whole", parts)
    checkpoint = torch_dist.TorchDist(tmp_path / "whole")
    assert torch.equal(checkpoint.read("a"), whole)
    assert torch.equal(checkpoint.read("a", (1,)), whole[1])
    assert torch.equal(checkpoint.read("a", (1,), (1, 3)), whole[1, 1:3])
    write_parts(tmp_path / "twice", [parts[0], part("a", (0,), (2, 4, 6), (1, 0), whole[0, 1:3, :4]), *parts[3:]])
    for index in ((), (0,)):
        with pytest.raises(UserError, match="parts of a are missing, or there twice"):
            torch_dist.TorchDist(tmp_path / "twice").read("a", index)


def test_config_says_the_dtype_that_was_written(base: Path, tmp_path: Path) -> None:
    operations.hf_to_megatron(str(base), tmp_path / "m")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "back", base_path=str(base))
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float32"


def test_logits_that_are_no_numbers_differ(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import itertools

    calls = itertools.count()

    def logits(source: object, sequences: list[list[int]]) -> list[torch.Tensor]:
        found = [torch.ones(len(ids), 3) for ids in sequences]
        if next(calls):
            found[1][0, 0] = float("nan")
        return found

    monkeypatch.setattr(verify, "_logits_of", logits)
    assert "logits (float32)" in differing(verify.compare(str(base), str(base)))


def test_code_of_a_model_folder_is_not_offered_to_run(tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}))
    (tmp_path / "evil/configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "trd_megatron.cli", "convert", "hf-to-megatron", "--hf-path", "evil", "--megatron-path", "m"]
    environment = {**os.environ, "PYTHONPATH": str(Path(verify.__file__).parents[2])}
    result = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "ran").exists()


def test_backend_bridge_takes_no_options_of_ours(base: Path, tmp_path: Path) -> None:
    arguments = ["hf-to-megatron", "--hf-path", str(base), "--megatron-path", str(tmp_path / "m"), "--backend", "bridge"]
    for more, message in ((["--dtype", "float32"], "takes no --dtype"), ([], "needs Megatron-Bridge")):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "m").exists()


def test_a_folder_that_was_an_adapters_does_not_stay_one(base: Path, tmp_path: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    operations.hf_to_megatron(str(base), tmp_path / "m")
    operations.megatron_to_hf(tmp_path / "m", tmp_path / "back")
    assert not (tmp_path / "back/adapter_config.json").exists()
