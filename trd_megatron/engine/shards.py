"""The shards of one generate() call: opened as they are needed, told to the caller when all of their samples are there."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trd_megatron.engine.answers import Draw
from trd_megatron.engine.base import Request, SamplingParams, Weights
from trd_megatron.engine.journal import Journal
from trd_megatron.errors import UserError

if TYPE_CHECKING:
    from trd_megatron.engine.fleet import Server

TELLING = 32  # so many given up in a row, and nothing answered meanwhile: something is wrong with all of them

Result = int | str  # the place in the journal, or the reason of an abort


@dataclass(eq=False, slots=True)
class Shard:
    """An open shard. results: in request order, None where it is not finished."""

    index: int
    results: list[Result | None]
    missing: int


@dataclass(eq=False, slots=True)
class Item:
    """A request that is not finished.

    tries: attempts that came to nothing, for whatever reason. failures: those that count against it, at the servers `failed_on`.
    rejected_by: answered HTTP 400, which they would say again. failed_first: how many of the call's requests had been answered when
    this one failed for the first time.
    """

    prompt: "array[int]"
    seed: int
    key: bytes
    shard: Shard
    place: int
    tries: int = 0
    failures: int = 0
    failed_on: "set[Server]" = field(default_factory=set)
    rejected_by: "set[Server]" = field(default_factory=set)
    failed_first: int | None = None
    reason: str = ""


class Shards:
    """tell(index, results): hears of each shard once. say: told of requests that are given up.

    A shard with requests that were given up waits until another request is answered: if none is, the fault is not theirs, and
    nothing of them is recorded.
    """

    def __init__(
        self,
        source: Iterator[list[Request]],
        sampling: SamplingParams,
        *,
        journal: Journal,
        weights: Weights,
        vocab_size: int,
        tell: Callable[[int, list[Result]], None],
        say: Callable[[str], None],
    ) -> None:
        self._source, self._journal, self._vocab_size = enumerate(source), journal, vocab_size
        self._tell, self._say = tell, say
        params: dict[str, float | bool] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        params["max_new_tokens"] = sampling.max_new_tokens
        if sampling.ignore_eos:
            params["ignore_eos"] = True
        self.sampling_json = json.dumps(params)[1:-1]  # without the braces
        self._key_start = hashlib.sha256(json.dumps([weights.label, params]).encode() + b"\0")
        self.longest_prompt = 0
        self.answered = 0  # requests
        self._unfinished = 0
        self._exhausted = False
        self._worked = len(journal) > 0  # something was answered, now or before the run was cut off
        self._given_up = 0
        self._row: list[str] = []  # reasons of those given up since the last answer
        self._held: list[Shard] = []

    def open(self, wanted: int) -> list[Item]:
        """Opens shards until so many requests are unfinished, so that memory does not grow with the number of shards.

        Returns those of their requests that the journal does not have. Raises what pulling a shard raises.
        """
        items = []
        while not self._exhausted and self._unfinished < wanted:
            pulled = next(self._source, None)
            if pulled is None:
                self._exhausted = True
                break
            index, requests = pulled
            shard = Shard(index, [None] * len(requests), len(requests))
            for place, request in enumerate(requests):
                prompt = prompt_array(request, self._vocab_size)
                self.longest_prompt = max(self.longest_prompt, len(prompt))
                key = self._key(prompt, request.seed)
                found = self._journal.find(key)
                if found is None:
                    self._unfinished += 1
                    items.append(Item(prompt, request.seed, key, shard, place))
                else:
                    self._set(shard, place, found)
            if not requests:
                self._close(shard)
        return items

    def finish(self) -> bool:
        """Whether all is done; then the last shards are told of. Raises UserError if every request was given up."""
        if not self._exhausted or self._unfinished:
            return False
        if self._row and not self._worked:
            raise self._all_failed()
        self._release()
        return True

    def success(self, item: Item, draw: Draw) -> None:
        """Raises OSError if the journal cannot be written."""
        place = self._journal.append(item.key, draw.ids, draw.logprobs, draw.finish)
        self.answered += 1
        self._worked = True
        if self._row:
            self._row.clear()
            self._release()
        self._unfinished -= 1
        self._set(item.shard, item.place, place)

    def give_up(self, item: Item) -> None:
        """Raises UserError if nothing but that happens any more."""
        self._given_up += 1
        if item.failed_first == self.answered:  # nothing was answered in all the time that it failed
            self._row.append(item.reason)
            if len(self._row) >= TELLING:
                raise self._all_failed()
        if str(self._given_up).strip("0") == "1":  # 1, 10, 100 ...
            count = "a request is" if self._given_up == 1 else f"{self._given_up} requests are"
            self._say(f"{count} given up and will count as aborted, the last because of {item.reason}")
        self._unfinished -= 1
        self._set(item.shard, item.place, item.reason)

    def _all_failed(self) -> UserError:
        return UserError(
            f"the last {len(self._row)} requests all failed and none was answered, so something is wrong with all of them: {self._row[0]}"
        )

    def _key(self, prompt: "array[int]", seed: int) -> bytes:
        key = self._key_start.copy()
        key.update(b"%d\0" % seed)
        key.update(prompt)
        return key.digest()

    def _set(self, shard: Shard, place: int, result: Result) -> None:
        shard.results[place] = result
        shard.missing -= 1
        if shard.missing == 0:
            self._close(shard)

    def _close(self, shard: Shard) -> None:
        if self._row and any(isinstance(result, str) for result in shard.results):
            self._held.append(shard)
        else:
            self._told(shard)

    def _release(self) -> None:
        for shard in self._held:
            self._told(shard)
        self._held.clear()

    def _told(self, shard: Shard) -> None:
        self._tell(shard.index, [result for result in shard.results if result is not None])


def prompt_array(request: Request, vocab_size: int) -> "array[int]":
    """The prompt's ids as array("i"). Raises ValueError if it is empty, UserError if an id is beyond the vocabulary."""
    ids = request.prompt_ids
    if not len(ids):
        raise ValueError("a prompt is empty")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:  # an SGLang server dies of it
        raise UserError(
            f"a prompt holds the id {high if low >= 0 else low}, the model's vocabulary has {vocab_size} (config.json): "
            "its tokenizer belongs to another model"
        )
    return array("i", ids)
