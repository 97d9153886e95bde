"""`trd bench engine`: tokens per second of SGLang servers, the embedded engine and plain `model.generate` on the same work.

All sides get the same prompts and sampling, ignore the end of turn (so that all draw the same number of tokens) and take turns, so
that what else the machine does hits all. Each round has prompts of its own: SGLang keeps those that it has seen.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trd_megatron.bench import client, engine_report, record
from trd_megatron.bench.engine_report import Row
from trd_megatron.bench.engine_sides import SIDES, TEMPERATURE, TOP_K, TOP_P, Prompts, Settings, Side
from trd_megatron.builtin_models import resolve_model
from trd_megatron.engine.base import EngineFailedError
from trd_megatron.errors import UserError
from trd_megatron.progress import bar
from trd_megatron.run_dir import write_json

ROUNDS_OF_WORK = 4  # a round has so many times more responses than are drawn at once, if there are enough prompts


def check(settings: Settings) -> None:
    """Raises UserError for settings that cannot be measured."""
    for side in settings.sides:
        if side not in SIDES:
            raise UserError(f"--sides {side}: it is one of {', '.join(SIDES)}")
    if settings.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {settings.dtype}: it must be float32 or bfloat16")
    if settings.urls and "sglang" not in settings.sides:
        raise UserError("--url names SGLang servers, but sglang is not among --sides")
    record.check_device(settings.device)


def random_prompts(settings: Settings, vocab_size: int, seed: str) -> Prompts:
    """Prompts of random ids, each `samples` times in a row; their lengths go round `lengths`."""
    source, lengths = random.Random(seed), settings.lengths
    prompts = [[source.randrange(vocab_size // 2, vocab_size) for _ in range(lengths[i % len(lengths)])] for i in range(settings.prompts)]
    return [prompt for prompt in prompts for _ in range(settings.samples)]


def benchmark(settings: Settings, out: Path, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Measures and writes out/bench_engine.json and out/bench_engine.png anew after each concurrency.

    A side that cannot be had or fails has rows that say so. Raises UserError for settings that cannot be measured.
    """
    check(settings)
    record.prepare(out, settings.device)
    torch.set_num_threads(settings.threads)
    model = resolve_model(settings.model)
    vocab_size = int(AutoConfig.from_pretrained(model, local_files_only=True).get_text_config().vocab_size)
    rows: list[Row] = []
    sides: dict[str, Side] = {}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="trd-bench-") as name:
        try:
            for side in settings.sides:
                say(f"{side} loads the model")
                try:
                    sides[side] = SIDES[side](settings, model, Path(name), say)
                except (UserError, EngineFailedError) as error:
                    errors[side] = str(error)
            for concurrency in settings.concurrency:
                rows += _measure(settings, concurrency, vocab_size, sides, errors)
                write_json(out / "bench_engine.json", _record(settings, rows))
                engine_report.plot(rows, settings.title, out / "bench_engine.png")
        finally:
            for opened in sides.values():
                opened.close()
    return rows


def _measure(settings: Settings, concurrency: int, vocab_size: int, sides: dict[str, Side], errors: dict[str, str]) -> list[Row]:
    """The rows of one concurrency. A side that fails goes from `sides` to `errors`."""
    responses = min(settings.prompts * settings.samples, ROUNDS_OF_WORK * concurrency)
    rows = {side: Row(side, concurrency, responses, responses * settings.max_new_tokens) for side in settings.sides}
    with bar(f"{concurrency} at once", total=len(rows) * (settings.repeats + 1), unit="rounds") as progress:
        for repeat in range(settings.repeats + 1):  # the first is a warm-up, and not timed
            prompts = random_prompts(settings, vocab_size, f"{concurrency}/{repeat}")[:responses]
            for side in settings.sides if repeat % 2 else settings.sides[::-1]:
                if side in sides:
                    progress.note(side)
                    _round(sides, errors, rows[side], prompts, settings.max_new_tokens, timed=repeat > 0)
                progress.advance()
    for side, error in errors.items():
        rows[side].status, rows[side].error, rows[side].seconds = "failed", error, []
    return list(rows.values())


def _round(sides: dict[str, Side], errors: dict[str, str], row: Row, prompts: Prompts, new_tokens: int, timed: bool) -> None:
    side, expected = sides[row.side], len(prompts) * new_tokens
    try:
        side.prepare(row.concurrency)
        start = time.perf_counter()
        drawn = side.draw(prompts, new_tokens)
        seconds = time.perf_counter() - start
        if drawn != expected:
            raise EngineFailedError(f"it drew {drawn} tokens, not {expected}")
    except (UserError, EngineFailedError) as error:
        errors[row.side] = str(error)
        sides.pop(row.side).close()
        return
    if timed:
        row.seconds.append(seconds)


def client_alone(out: Path) -> dict[str, float]:
    """Figures of bench/client.py, also in out/bench_client.json."""
    record.prepare(out, "cpu")
    figures = client.benchmark(quiet=True)
    write_json(out / "bench_client.json", {"versions": record.versions(["aiohttp"]), "machine": record.machine("cpu"), "results": figures})
    return figures


def _record(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    return {
        "settings": asdict(settings) | {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K},
        "versions": record.versions(["torch", "transformers", "aiohttp"]),
        "machine": record.machine(settings.device),
        "results": [row.json() for row in rows],
    }
