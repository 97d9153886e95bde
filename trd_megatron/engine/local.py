"""The embedded engine: batched generation with transformers in this process, on CPU or one GPU.

A lean decoding loop over the Hugging Face model. What it saves against `model.generate`: keys and values are written in
place, top-k comes before top-p so that the vocabulary is not sorted, a prompt drawn n times is prefilled once, rows that have
ended leave the batch, and on CPU the weights are packed for oneDNN.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from trd_megatron.engine.base import FinishReason, Generation, Request, SamplingParams
from trd_megatron.engine.cpu_linear import pack_linears
from trd_megatron.engine.kv_cache import InPlaceCache
from trd_megatron.errors import UserError

PREFILL_TOKENS = 16_384  # tokens of one prefill forward, so that activations and the mask stay small with long prompts
FIRST_CAPACITY = 256  # response tokens the cache has room for before it grows


def draw(logits: Tensor, sampling: SamplingParams, uniforms: Tensor) -> Tensor:
    """Draws one id a row by inverting the cumulative distribution at `uniforms`.

    logits [B, V] float32 at temperature 1; uniforms [B] float64 in [0, 1); returns ids [B]. Exactly top_k tokens survive
    top-k (ties broken as torch.topk does); top-p then keeps the smallest set whose share of what survived reaches top_p.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits / sampling.temperature
    vocab_size = logits.shape[-1]
    if sampling.top_k == -1 and sampling.top_p == 1:
        return _invert(scaled.softmax(-1, dtype=torch.float64).cumsum(-1), uniforms)
    if sampling.top_k != -1:
        values, ids = scaled.topk(min(sampling.top_k, vocab_size))
        normaliser = values.logsumexp(-1, keepdim=True)
    else:  # The nucleus lies within the k largest as soon as they hold top_p of the whole mass, so k grows until they do.
        normaliser = scaled.logsumexp(-1, keepdim=True)
        k = min(256, vocab_size)
        values, ids = scaled.topk(k)
        while k < vocab_size and (values - normaliser).double().exp().sum(-1).min() < sampling.top_p:
            k = min(8 * k, vocab_size)
            values, ids = scaled.topk(k)
    probabilities = (values - normaliser).double().exp()  # [B, k], descending
    cumulative = probabilities.cumsum(-1)
    kept = (cumulative - probabilities < sampling.top_p).sum(-1, keepdim=True)  # [B, 1], at least 1
    place = _invert(cumulative, uniforms * cumulative.gather(-1, kept - 1).squeeze(-1))
    return ids.gather(-1, torch.minimum(place.unsqueeze(-1), kept - 1)).squeeze(-1)


def _invert(cumulative: Tensor, points: Tensor) -> Tensor:
    """The first column of cumulative [B, N] that exceeds points [B]; tokens of probability 0 are never met."""
    place = torch.searchsorted(cumulative, points.unsqueeze(-1), right=True).squeeze(-1)
    return place.clamp(max=cumulative.shape[-1] - 1)


class LocalEngine:
    """Engine (see engine/base.py) that runs a Hugging Face causal language model in this process.

    The rows of a batch come from one shard, so a shard's ids depend on its requests, the sampling parameters and
    batch_size, and on nothing that ran before. weight_version is noted on every generation.

    Raises UserError if the folder does not hold a complete model that this engine can run or the device is missing.
    """

    name = "local"

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 32,
        weight_version: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device=cuda, but torch sees no GPU here; set engine.device=cpu")
        self.facts: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.batch_size = batch_size
        self.weight_version = weight_version
        self.device = torch.device(device)
        self._model: Any = load_model(model_path, getattr(torch, dtype)).to(self.device).eval()
        config = self._model.config.get_text_config()
        self._layers: int = config.num_hidden_layers
        self._vocab_size: int = self._model.get_input_embeddings().num_embeddings
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_token_ids: frozenset[int] = eos_token_ids(self._model)
        if device == "cpu":
            pack_linears(self._model)

    def generate(
        self,
        shards: Iterable[list[Request]],
        sampling: SamplingParams,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See Engine.generate; shards come back in order.

        Raises ValueError for an empty prompt or impossible sampling parameters, UserError for a prompt that does not fit
        the model (token ids beyond its vocabulary, more positions than it has).
        """
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.max_new_tokens < 1:
            raise ValueError(f"needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {sampling}")
        if sampling.top_k != -1 and sampling.top_k < 1:
            raise ValueError(f"top_k must be -1 or at least 1, got {sampling.top_k}")
        if self._model is None:
            raise RuntimeError("this engine is closed")
        return ((index, self._generate_shard(shard, sampling, on_tokens)) for index, shard in enumerate(shards))

    def close(self) -> None:
        """Frees the model. Calling it twice is fine."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _generate_shard(self, shard: list[Request], sampling: SamplingParams, on_tokens: Callable[[int], None]) -> list[Generation]:
        for request in shard:
            self._check_prompt(request.prompt_ids, sampling.max_new_tokens)
        # Longest first: a batch that does not fit in memory fails at the start. Equal prompts become neighbours.
        order = sorted(range(len(shard)), key=lambda i: (-len(shard[i].prompt_ids), shard[i].prompt_ids))
        results: dict[int, Generation] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            results.update(zip(rows, self._decode([shard[i] for i in rows], sampling, on_tokens), strict=True))
        return [results[i] for i in range(len(shard))]

    def _check_prompt(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        if not prompt_ids:
            raise ValueError("a prompt has no tokens")
        if max(prompt_ids) >= self._vocab_size or min(prompt_ids) < 0:
            raise UserError(
                f"a prompt has token id {max(prompt_ids)}, but the model has {self._vocab_size} embeddings: "
                "use the tokenizer of the same model folder"
            )
        if self._context is not None and len(prompt_ids) + max_new_tokens > self._context:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones exceed the model's "
                f"{self._context} positions: lower the stage's max_response_tokens, or use a model with a longer context"
            )

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request], sampling: SamplingParams, on_tokens: Callable[[int], None]) -> list[Generation]:
        """One batch from prefill to the end of its last row."""
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        reasons: list[FinishReason] = ["length"] * len(requests)
        ends = frozenset() if sampling.ignore_eos else self.eos_token_ids
        logits, cache, mask = self._prefill([request.prompt_ids for request in requests], sampling.max_new_tokens)
        uniforms = self._uniforms(requests, sampling)
        positions = torch.tensor([[len(request.prompt_ids)] for request in requests], device=self.device)
        prompt_length = cache.get_seq_length()
        active = list(range(len(requests)))  # active[slot]: which request the slot of the batch belongs to
        rows = torch.arange(len(requests), device=self.device)  # the same as a tensor
        padded = not bool(mask.all())
        for step in range(sampling.max_new_tokens):
            normaliser = logits.logsumexp(-1)
            if not bool(normaliser.isfinite().all()):
                raise RuntimeError(f"the model gave non-finite logits at response token {step}")
            drawn = draw(logits, sampling, uniforms[step, rows])
            scores = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - normaliser
            for row, token, score in zip(active, drawn.tolist(), scores.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(score)
                if token in ends:
                    reasons[row] = "stop"
            on_tokens(len(active))
            if step + 1 == sampling.max_new_tokens:
                break
            keep = [slot for slot, row in enumerate(active) if reasons[row] != "stop"]
            if not keep:
                break
            if len(keep) < len(active):
                keep = cache.compact(keep)
                active = [active[slot] for slot in keep]
                drawn, positions, mask, rows = (tensor[keep] for tensor in (drawn, positions, mask, rows))
                padded = not bool(mask.all())
            output = self._model(
                input_ids=drawn.unsqueeze(-1),
                attention_mask=mask[:, : prompt_length + step + 1] if padded else None,
                position_ids=positions + step,
                past_key_values=cache,
            )
            logits = output.logits[:, -1].float()
        return [Generation(*parts, self.weight_version) for parts in zip(ids, logprobs, reasons, strict=True)]

    def _prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, InPlaceCache, Tensor]:
        """Runs every distinct prompt once. Returns logits [B, V] float32 of the first response token, the cache with a row
        for each prompt, and mask [B, L + max_new_tokens], false on the padding left of a shorter prompt."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        length = max(len(prompt) for prompt in distinct)
        input_ids = torch.zeros(len(distinct), length, dtype=torch.long)
        mask = torch.ones(len(distinct), length + max_new_tokens, dtype=torch.bool)
        for row, prompt in enumerate(distinct):
            input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, : length - len(prompt)] = False
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        position_ids = (mask[:, :length].long().cumsum(-1) - 1).clamp(min=0)
        cache = InPlaceCache(self._layers, length + max_new_tokens, length + FIRST_CAPACITY)
        columns = max(1, PREFILL_TOKENS // len(distinct))
        for start in range(0, length, columns):
            end = min(start + columns, length)
            output = self._model(
                input_ids=input_ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                logits_to_keep=1,
            )
        logits = output.logits[:, -1].float()
        index = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=self.device)
        if len(distinct) < len(prompts):
            cache.repeat_rows(index)
        return logits[index], cache, mask[index]

    def _uniforms(self, requests: Sequence[Request], sampling: SamplingParams) -> Tensor:
        """One random number for each step and row [max_new_tokens, B], from a generator of the row's own."""
        streams = [np.random.Generator(np.random.PCG64(request.seed % 2**64)) for request in requests]
        numbers = np.stack([stream.random(sampling.max_new_tokens) for stream in streams], axis=1)
        return torch.from_numpy(numbers).to(self.device)


def load_model(model_path: str | Path, dtype: torch.dtype) -> Any:
    """A transformers causal language model from safetensors, every weight present; UserError otherwise."""
    path = Path(model_path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a Hugging Face model folder (no config.json)")
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the model in {path} cannot be loaded: {reason[:300]}") from error
    missing = sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]})
    if missing:
        raise UserError(f"the model in {path} lacks {len(missing)} weights or has them in another shape, such as {missing[0]}")
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise UserError(f"engine=local cannot run model type {model.config.model_type} (special attention cache): use engine=sglang")
    return model


def eos_token_ids(model: Any) -> frozenset[int]:
    """Every id at which the model's generation config or config says that a turn ends."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
