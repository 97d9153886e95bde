"""One generate() call: which request goes to which server, and what becomes of it when that fails."""

import asyncio
import hashlib
import heapq
import itertools
import json
import random
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from trd_megatron.engine.answers import Draw, WrongWeightsError, read_answer, size_limit
from trd_megatron.engine.base import Request, SamplingParams, Weights
from trd_megatron.engine.fleet import Fleet, Server
from trd_megatron.engine.journal import Journal
from trd_megatron.engine.server_link import LINK_ERRORS, BrokenError, StatusError, UnreachableError
from trd_megatron.errors import UserError

_BACKOFF_S, _LONGEST_BACKOFF_S = 0.2, 10.0
_SUSPECT_AFTER = 2  # server losses that a request was in flight at
_TELLING = 32  # so many aborts and nothing else: something is wrong with all of them
_LOOK_AGAIN_S = 0.25  # how often requests are looked at that no server with room may have

Result = int | str  # the place in the journal, or the reason of an abort


@dataclass(eq=False)
class Shard:
    """An open shard. results: in request order, None where it is not finished."""

    index: int
    results: list[Result | None]
    missing: int


@dataclass(eq=False)
class Item:
    """A request that is not finished."""

    prompt: "array[int]"
    seed: int
    key: bytes
    shard: Shard
    place: int
    failures: int = 0
    losses: int = 0  # servers lost while it was in flight
    postponed: int = 0  # times that a server had no time for it; not the request's fault
    failed_on: set[Server] = field(default_factory=set)
    rejected_by: set[Server] = field(default_factory=set)  # HTTP 400: the same server would say it again
    reason: str = ""

    @property
    def is_suspect(self) -> bool:
        return self.losses >= _SUSPECT_AFTER


class Job:
    """Draws all shards of one call. Lives in the fleet's event loop; run() returns when all is done.

    finished_shard(index, results) and new_tokens(count) tell the caller.
    """

    def __init__(
        self,
        shards: Iterator[list[Request]],
        sampling: SamplingParams,
        *,
        fleet: Fleet,
        journal: Journal,
        weights: Weights,
        vocab_size: int,
        finished_shard: Callable[[int, list[Result]], None],
        new_tokens: Callable[[int], None],
    ) -> None:
        self._source, self._sampling, self._fleet, self._journal = enumerate(shards), sampling, fleet, journal
        self._weights, self._vocab_size = weights, vocab_size
        self._tell_shard, self._tell_tokens = finished_shard, new_tokens
        self._options = fleet.options
        self._ready: list[tuple[int, int, Item]] = []  # heap, longest prompt first
        self._suspects: list[Item] = []
        self._stuck: list[Item] = []  # wait for a particular server
        self._look_again: asyncio.TimerHandle | None = None
        self._timers: dict[Item, asyncio.TimerHandle] = {}
        self._order = itertools.count()
        self._rids = (f"trd-{uuid.uuid4().hex[:12]}-{number}" for number in itertools.count())
        self._unfinished = 0
        self._exhausted = False
        self._longest_prompt = 0
        self._aborts: list[str] = []
        self._succeeded = False
        self._held: list[Shard] = []  # finished while all requests were aborts
        self._done = asyncio.Event()
        params: dict[str, float | bool] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        params["max_new_tokens"] = sampling.max_new_tokens
        if sampling.ignore_eos:
            params["ignore_eos"] = True
        self._sampling_json = json.dumps(params)[1:-1]
        self._key_start = hashlib.sha256(json.dumps([weights.label, params]).encode() + b"\0")

    async def run(self) -> None:
        self._fleet.job = self
        try:
            self._open_shards()
            self._pump()
            await self._done.wait()
        finally:
            self._fleet.job = None
            for timer in [*self._timers.values(), self._look_again]:
                if timer is not None:
                    timer.cancel()
            tasks = [task for server in self._fleet.servers for task in server.in_flight.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in self._fleet.servers:
                server.in_flight.clear()
                server.tokens, server.suspect = 0, None

    # Shards

    def _open_shards(self) -> None:
        """Opens as many as keep the servers busy, so that memory does not grow with the number of shards."""
        longest = self._longest_prompt
        wanted = 2 * self._options.max_outstanding * len(self._fleet.servers)
        while not self._exhausted and self._unfinished < wanted:
            pulled = next(self._source, None)
            if pulled is None:
                self._exhausted = True
                break
            index, requests = pulled
            shard = Shard(index, [None] * len(requests), len(requests))
            for place, request in enumerate(requests):
                prompt = prompt_array(request, self._vocab_size)
                longest = max(longest, len(prompt))
                key = self._key(prompt, request.seed)
                found = self._journal.find(key)
                if found is None:
                    self._unfinished += 1
                    self._push(Item(prompt, request.seed, key, shard, place))
                else:
                    self._succeeded = True
                    self._set(shard, place, found)
            if not requests:
                self._close_shard(shard)
        if longest > self._longest_prompt:
            self._longest_prompt = longest
            for server in self._fleet.healthy():
                self._check_budget(server)
        if self._exhausted and not self._unfinished:
            self._finish()

    def _key(self, prompt: "array[int]", seed: int) -> bytes:
        key = self._key_start.copy()
        key.update(b"%d\0" % seed)
        key.update(prompt)
        return key.digest()

    def _check_budget(self, server: Server) -> None:
        assert server.facts is not None
        needed = self._longest_prompt + self._sampling.max_new_tokens + 2  # the server itself stops 2 tokens early
        if needed > server.facts.context:
            raise UserError(
                f"{server.url} has room for {server.facts.context} tokens, the longest prompt ({self._longest_prompt}) and "
                f"{self._sampling.max_new_tokens} new tokens need {needed}: raise engine.{self._fleet.role}.context_length "
                "(and the memory for it), or lower max_prompt_tokens and max_response_tokens"
            )

    def _set(self, shard: Shard, place: int, result: Result) -> None:
        shard.results[place] = result
        shard.missing -= 1
        if shard.missing == 0:
            self._close_shard(shard)

    def _close_shard(self, shard: Shard) -> None:
        self._held.append(shard)
        if self._succeeded or not self._aborts:
            self._release()

    def _release(self) -> None:
        for shard in self._held:
            self._tell_shard(shard.index, [result for result in shard.results if result is not None])
        self._held.clear()

    def _finish(self) -> None:
        self._release()
        self._done.set()

    # Results

    def _complete(self, item: Item, result: Result) -> None:
        self._unfinished -= 1
        self._set(item.shard, item.place, result)
        self._open_shards()

    def _success(self, item: Item, draw: Draw) -> None:
        place = self._journal.append(item.key, draw.ids, draw.logprobs, draw.finish)
        if not self._succeeded:
            self._succeeded = True
            self._release()
        self._tell_tokens(len(draw.ids))
        self._complete(item, place)

    def _abort(self, item: Item) -> None:
        self._aborts.append(item.reason)
        if not self._succeeded and len(self._aborts) >= _TELLING:
            raise UserError(f"the first {_TELLING} requests all failed, so something is wrong with all of them: {self._aborts[0]}")
        self._complete(item, item.reason)

    # Queue

    def _push(self, item: Item) -> None:
        self._timers.pop(item, None)
        if item.is_suspect:
            self._suspects.append(item)
        else:
            heapq.heappush(self._ready, (-len(item.prompt), next(self._order), item))

    def _later(self, item: Item, times: int) -> None:
        """Back into the queue after a wait that doubles with `times`."""
        delay = min(_BACKOFF_S * 2.0 ** min(times - 1, 10), _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.5)
        self._timers[item] = asyncio.get_running_loop().call_later(delay, self._push_and_pump, item)

    def _push_and_pump(self, item: Item) -> None:
        self._push(item)
        self._pump()

    def _pump(self) -> None:
        """Gives work to every server with room."""
        if self._suspects:
            waiting, self._suspects = self._suspects, []
            for item in waiting:
                if not self._place(item):
                    self._suspects.append(item)
        room = any(server.has_room(self._options.max_outstanding) for server in self._fleet.servers)
        while self._ready and room:
            item = heapq.heappop(self._ready)[2]
            if not self._place(item):
                self._stuck.append(item)
            room = any(server.has_room(self._options.max_outstanding) for server in self._fleet.servers)
        if (self._stuck or self._suspects) and self._look_again is None:
            self._look_again = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._unstick)

    def _unstick(self) -> None:
        self._look_again = None
        stuck, self._stuck = self._stuck, []
        for item in stuck:
            self._push(item)
        self._pump()

    def _place(self, item: Item) -> bool:
        """Sends it, or gives it up; False if it has to wait."""
        out_of_attempts = item.failures >= self._options.attempts
        expected = self._fleet.expected()
        tried = item.failed_on | item.rejected_by
        rejected_by_all = item.rejected_by.issuperset(self._fleet.healthy()) and bool(item.rejected_by)
        if self._fleet.healthy() and ((out_of_attempts and tried.issuperset(expected)) or rejected_by_all):
            self._abort(item)
            return True
        fit = [
            server
            for server in self._fleet.servers
            if server.has_room(self._options.max_outstanding)
            and server not in item.rejected_by
            and not (out_of_attempts and server in item.failed_on)
            and not (item.is_suspect and server.suspect is not None)
        ]
        if not fit:
            return False
        server = min(fit, key=lambda server: (server in item.failed_on, server.tokens))
        if item.is_suspect:
            server.suspect = item
        server.tokens += len(item.prompt) + self._sampling.max_new_tokens
        server.in_flight[item] = self._fleet.spawn(self._attempt(item, server))
        return True

    def _detach(self, item: Item, server: Server) -> None:
        del server.in_flight[item]
        server.tokens -= len(item.prompt) + self._sampling.max_new_tokens
        if server.suspect is item:
            server.suspect = None

    # Servers

    def take_back(self, server: Server, lost: bool) -> None:
        """The server is out: its requests go back into the queue. lost: it died or hangs, perhaps by one of them."""
        for item, task in list(server.in_flight.items()):
            self._detach(item, server)
            task.cancel()
            if lost:
                if item.is_suspect:  # it was asked for alone among suspects, so this one counts
                    item.failures = max(item.failures, item.losses) + 1
                    item.failed_on.add(server)
                    item.reason = f"{server.url} was lost while it ran: {server.reason}"
                item.losses += 1
            self._push(item)
        asyncio.get_running_loop().call_soon(self._pump_if_alive)

    def server_is_back(self, server: Server) -> None:
        self._check_budget(server)
        if self._look_again is not None:
            self._look_again.cancel()
        self._unstick()

    def _pump_if_alive(self) -> None:
        if self._fleet.job is self:
            self._pump()

    # One attempt

    def _body(self, item: Item, rid: str) -> bytes:
        ids = json.dumps(item.prompt.tolist(), separators=(",", ":"))
        return (
            f'{{"rid":"{rid}","input_ids":{ids},"sampling_params":{{{self._sampling_json},"sampling_seed":{item.seed}}},'
            '"return_logprob":true}'
        ).encode()

    async def _ask(self, item: Item, server: Server) -> Draw:
        """Raises one of LINK_ERRORS, or StatusError."""
        rid = next(self._rids)
        max_new_tokens = self._sampling.max_new_tokens
        body = self._body(item, rid)
        limit, timeout_s = size_limit(max_new_tokens), self._options.request_timeout_s
        status, answer = await server.link.call("POST", "/generate", body, limit=limit, timeout_s=timeout_s)
        if status != 200:
            raise StatusError(status, answer)
        return read_answer(
            answer,
            rid=rid,
            prompt_tokens=len(item.prompt),
            max_new_tokens=max_new_tokens,
            vocab_size=self._vocab_size,
            label=self._weights.label,
        )

    async def _attempt(self, item: Item, server: Server) -> None:
        """Sends the request once. Cancelled when the server is taken out."""
        draw: Draw | None = None
        error: Exception | None = None
        try:
            draw = await self._ask(item, server)
        except UnreachableError as caught:
            error = caught
            await self._fleet.confirm(server)
        except BrokenError as caught:
            error = caught
            await self._fleet.connection_broke(server, item)
        except (StatusError, *LINK_ERRORS) as caught:
            error = caught
        if server.in_flight.get(item) is not asyncio.current_task():
            return  # the server was taken out, the request is back in the queue
        self._detach(item, server)
        if draw is not None:
            server.failures_in_row, server.refuses_work, server.wrong_weights_in_row = 0, False, 0
            server.last_answer = asyncio.get_running_loop().time()
            self._success(item, draw)
        else:
            self._failed(item, server, error)
        self._pump()

    def _failed(self, item: Item, server: Server, error: Exception | None) -> None:
        item.reason = f"{server.url}: {error}"
        status = error.status if isinstance(error, StatusError) else None
        if status in (400, 413, 422):
            item.rejected_by.add(server)
            self._push(item)
            return
        server.failures_in_row += 1
        if isinstance(error, UnreachableError) or status in (429, 503):
            # Its queue is full, or a router has no worker just now: not the request's fault.
            server.refuses_work = True
            item.postponed += 1
            self._later(item, item.postponed)
            return
        item.failures += 1
        item.failed_on.add(server)
        self._later(item, item.failures)
        if isinstance(error, WrongWeightsError):
            self._fleet.wrong_weights(server, str(error))


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
