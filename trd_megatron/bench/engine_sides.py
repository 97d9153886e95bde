"""The sides of `trd bench engine`: each draws a fixed number of tokens for every prompt, through the interface that runs use."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from trd_megatron.config import EngineConfig, ServersConfig
from trd_megatron.engine.admission import BENCHMARK
from trd_megatron.engine.base import Engine, EngineFailedError, Request, SamplingParams, api_key
from trd_megatron.engine.engines import weights_of
from trd_megatron.engine.local import LocalEngine, load_model
from trd_megatron.engine.server import LaunchedServers
from trd_megatron.engine.sglang import ClientOptions, SGLangEngine

TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 20
Prompts = list[list[int]]


@dataclass(frozen=True)
class Settings:
    """prompts: distinct ones of a round, at most; samples: of each. urls: servers that already run (none: one is launched)."""

    model: str
    sides: list[str] = field(default_factory=lambda: list(SIDES))
    concurrency: list[int] = field(default_factory=lambda: [32])
    prompts: int = 32
    lengths: list[int] = field(default_factory=lambda: [64])
    samples: int = 1
    max_new_tokens: int = 64
    repeats: int = 3
    threads: int = field(default_factory=torch.get_num_threads)
    device: str = "cpu"
    dtype: str = "float32"
    urls: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        where = "GPU" if self.device == "cuda" else f"CPU, {self.threads} threads"
        return f"{self.model}, {self.dtype}, {where}: {self.max_new_tokens} new tokens after {'/'.join(map(str, self.lengths))}"


class Side(Protocol):
    """One way to generate, with its model loaded."""

    def prepare(self, concurrency: int) -> None:
        """What a round needs before its time starts. concurrency: responses that are drawn at once."""
        ...

    def draw(self, prompts: Prompts, new_tokens: int) -> int:
        """Tokens that were drawn after all `prompts`, which are token ids."""
        ...

    def close(self) -> None: ...


def _drawn(engine: Engine, prompts: Prompts, new_tokens: int) -> int:
    """Tokens. Raises EngineFailedError if a request failed."""
    sampling = SamplingParams(TEMPERATURE, TOP_P, TOP_K, new_tokens, ignore_eos=True)
    shard = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    generations = [generation for _, generations in engine.generate([shard], sampling) for generation in generations]
    aborted = [generation.abort_reason for generation in generations if generation.finish_reason == "abort"]
    if aborted:
        raise EngineFailedError(f"{len(aborted)} of {len(generations)} requests failed: {aborted[0]}")
    return sum(len(generation.token_ids) for generation in generations)


class Local:
    """LocalEngine in this process."""

    def __init__(self, settings: Settings, model: Path, folder: Path, say: Callable[[str], None]) -> None:
        self._engine = LocalEngine(model, device=settings.device, dtype=settings.dtype)  # type: ignore[arg-type]

    def prepare(self, concurrency: int) -> None:
        self._engine.batch_size = concurrency

    def draw(self, prompts: Prompts, new_tokens: int) -> int:
        return _drawn(self._engine, prompts, new_tokens)

    def close(self) -> None:
        self._engine.close()


class Plain:
    """transformers' model.generate in this process, on left-padded batches in the order of the prompts."""

    def __init__(self, settings: Settings, model: Path, folder: Path, say: Callable[[str], None]) -> None:
        self._device = torch.device(settings.device)
        self._model: Any = load_model(model, getattr(torch, settings.dtype)).to(self._device).eval()
        self._model.generation_config.eos_token_id = None
        self._batch_size = 1

    def prepare(self, concurrency: int) -> None:
        self._batch_size = concurrency

    def draw(self, prompts: Prompts, new_tokens: int) -> int:
        size = self._batch_size
        return sum(self._batch(prompts[start : start + size], new_tokens) for start in range(0, len(prompts), size))

    @torch.inference_mode()
    def _batch(self, prompts: Prompts, new_tokens: int) -> int:
        length = max(len(prompt) for prompt in prompts)
        input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=self._device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device)
        output = self._model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=TOP_K,
            pad_token_id=0,
        )
        return int(output[:, length:].numel())

    def close(self) -> None:
        self._model = None


class Sglang:
    """SGLangEngine, and the servers that it asks: launched for this, or running already."""

    def __init__(self, settings: Settings, model: Path, folder: Path, say: Callable[[str], None]) -> None:
        """Raises UserError if there is no SGLang to launch, EngineFailedError if it does not start."""
        servers = ServersConfig(urls=settings.urls)
        launch = not settings.urls
        config = EngineConfig(kind="sglang", device=settings.device, dtype=settings.dtype, launch=launch, student=servers)
        self._weights, self._options, self._say = weights_of(model, 0), ClientOptions.from_config(config), say
        self._folder = folder
        self._launched = LaunchedServers("student", self._weights, config, folder, say, api_key=api_key()) if launch else None
        if self._launched is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))  # a server on the CPU takes its threads from there
            self._launched.start()
        self._urls: Sequence[str] = settings.urls if self._launched is None else self._launched.urls
        self._engine: SGLangEngine | None = None
        self._engine_options: ClientOptions | None = None

    def prepare(self, concurrency: int) -> None:
        options = replace(self._options, max_outstanding=-(-concurrency // len(self._urls)))
        if self._engine is not None and self._engine_options == options:
            return
        self._close_engine()
        self._engine_options = options
        self._engine = SGLangEngine(
            self._urls,
            self._weights,
            options,
            journal=self._folder / f"journal-{concurrency}",
            may_update=False,
            say=self._say,
            api_key=api_key(),
            check=None if self._launched is None else self._launched.check,
            role=BENCHMARK,
        )

    def draw(self, prompts: Prompts, new_tokens: int) -> int:
        assert self._engine is not None
        return _drawn(self._engine, prompts, new_tokens)

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def close(self) -> None:
        self._close_engine()
        if self._launched is not None:
            self._launched.stop()


SIDES: dict[str, Callable[[Settings, Path, Path, Callable[[str], None]], Side]] = {"sglang": Sglang, "local": Local, "plain": Plain}
