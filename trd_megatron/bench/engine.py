"""LocalEngine against plain `model.generate`: same model, prompts, sampling parameters and number of new tokens, one process.

Both load the model by themselves, ignore the end-of-turn token (so that both draw the same number of tokens) and take turns,
so that what else the machine does hits both. The figure is the median over the repeats.
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trd_megatron.builtin_models import resolve_model
from trd_megatron.engine.base import Request, SamplingParams
from trd_megatron.engine.local import LocalEngine, load_model

TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 20


def random_prompts(count: int, lengths: list[int], samples: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of random ids, each `samples` times in a row; their lengths go round `lengths`."""
    source = random.Random(seed)
    prompts = [[source.randrange(vocab_size // 2, vocab_size) for _ in range(lengths[i % len(lengths)])] for i in range(count)]
    return [prompt for prompt in prompts for _ in range(samples)]


def benchmark(
    model_path: str | Path,
    batch_size: int = 32,
    prompts: list[list[int]] | None = None,
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
) -> dict[str, float]:
    """Response tokens per second of both sides (float32, CPU): local, plain, ratio (local / plain), tokens of one repeat.

    `prompts` are token ids, in the order in which plain generate takes them in batches of batch_size; without any, batch_size
    random ones of 64 tokens.
    """
    engine = LocalEngine(model_path, batch_size=batch_size)
    engine.eos_token_ids = frozenset()
    plain = load_model(model_path, torch.float32).eval()
    plain.generation_config.eos_token_id = None
    if prompts is None:
        prompts = random_prompts(batch_size, [64], 1, plain.config.vocab_size)
    shard = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]

    def run_local(new_tokens: int) -> int:
        sampling = SamplingParams(TEMPERATURE, TOP_P, TOP_K, new_tokens)
        return sum(len(g.token_ids) for _, generations in engine.generate([shard], sampling) for g in generations)

    def run_plain(new_tokens: int) -> int:
        return sum(_plain_batch(plain, prompts[i : i + batch_size], new_tokens) for i in range(0, len(prompts), batch_size))

    seconds: dict[str, list[float]] = {"local": [], "plain": []}
    sides: list[tuple[str, Callable[[int], int]]] = [("local", run_local), ("plain", run_plain)]
    for repeat in range(-1, repeats):  # repeat -1 warms up
        for name, run in sides if repeat % 2 else sides[::-1]:
            start = time.perf_counter()
            tokens = run(max_new_tokens if repeat >= 0 else 2)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
                if tokens != len(prompts) * max_new_tokens:
                    raise RuntimeError(f"{name} drew {tokens} tokens, not {len(prompts) * max_new_tokens}")
    total = len(prompts) * max_new_tokens
    rates = {name: total / statistics.median(values) for name, values in seconds.items()}
    result = {**rates, "ratio": rates["local"] / rates["plain"], "tokens": float(total)}
    print(f"local engine   {result['local']:8.1f} tokens/s")
    print(f"model.generate {result['plain']:8.1f} tokens/s")
    print(f"ratio          {result['ratio']:8.2f}", flush=True)
    return result


@torch.inference_mode()
def _plain_batch(model: Any, prompts: list[list[int]], new_tokens: int) -> int:
    """Tokens that model.generate draws for one left-padded batch."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=TOP_K,
        pad_token_id=0,
    )
    return output[:, length:].numel()


def run(
    model: str, batch_size: int, prompts: int, lengths: list[int], samples: int, max_new_tokens: int, repeats: int, threads: int | None
) -> None:
    """`trd bench engine`. model: folder, hub id or builtin:NAME. prompts: distinct ones. threads: None for torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    path = resolve_model(model)
    vocab_size = load_model(path, torch.float32).config.vocab_size
    ids = random_prompts(prompts, lengths, samples, vocab_size)
    benchmark(path, batch_size, ids, max_new_tokens=max_new_tokens, repeats=repeats)
