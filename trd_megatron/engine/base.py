"""What a generation engine is to the stages that use it: shards of token ids in, token ids out."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from trd_megatron.engine.launch_sglang import KEY as API_KEY
from trd_megatron.errors import UserError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Weights:
    """What an engine is to serve: a model folder and which it is.

    version: the round whose training made the student, 0 before any; always 0 for a teacher. fingerprint: of the folder's
    content. label: what a server calls these weights in its answers.
    """

    path: Path
    version: int
    fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.version}-{self.fingerprint[:12]}"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. top_k is applied before top_p; temperature 0 is greedy. ignore_eos: to max_new_tokens, for benchmarks."""

    temperature: float
    top_p: float
    top_k: int  # -1: the whole vocabulary
    max_new_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One sample to draw. Its draw depends on `seed`, not on its neighbours in the batch (up to rounding)."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Generation:
    """One drawn response.

    token_ids includes the end-of-turn token when it was produced (finish_reason "stop"). logprobs are those of token_ids
    at temperature 1 over the full vocabulary, before top-k and top-p; same length as token_ids. weight_version: that of the
    Weights it was drawn from. abort_reason: one line, where finish_reason is "abort"; token_ids is empty then.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: FinishReason
    weight_version: int = 0
    abort_reason: str | None = None


def api_key() -> str | None:
    """The key of SGLang servers, from the environment. Raises UserError for one that a log would show in another spelling, so that it
    could not be taken out there."""
    key = os.environ.get(API_KEY) or None
    if key is not None and not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", key):
        raise UserError(f"{API_KEY} may hold letters, digits and . _ ~ + / = - only: choose another key")
    return key


class EngineFailedError(RuntimeError):
    """No server is left to draw from, or one could not be started. What was finished is kept."""


class Engine(Protocol):
    """Draws responses for shards of requests. A shard is the unit in which results are stored."""

    name: str

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest should say of it, besides the configuration."""
        ...

    def generate(
        self,
        shards: Iterable[list[Request]],
        sampling: SamplingParams,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yields (index of the shard, its generations in request order), each shard once, in any order.

        The same shard gives the same ids whatever other shards are around. `on_tokens` hears of newly drawn tokens.
        """
        ...

    def close(self) -> None:
        """Frees the memory or the connections. Calling it twice is fine."""
        ...
