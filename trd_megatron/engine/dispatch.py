"""One generate() call: which request goes to which server, and what becomes of it when that fails."""

import asyncio
import heapq
import itertools
import json
import random
import uuid
from collections.abc import Callable
from functools import partial

from trd_megatron.engine.answers import Draw, WrongWeightsError, read_answer, size_limit
from trd_megatron.engine.base import SamplingParams, Weights
from trd_megatron.engine.fleet import REFUSALS, Fleet, Server
from trd_megatron.engine.server_link import LINK_ERRORS, BrokenError, StatusError, UnreachableError
from trd_megatron.engine.shards import Item, Shards
from trd_megatron.engine.suspicion import Suspicion
from trd_megatron.errors import UserError

_BACKOFF_S, _LONGEST_BACKOFF_S = 0.2, 10.0
_LOOK_AGAIN_S = 0.25  # how often requests are looked at that no server with room may have
_REJECTED = (400, 413, 422)  # the same server would say it again


class Job:
    """Draws all shards of one call. Lives in the fleet's event loop; run() returns when all is done.

    A failure counts against a request if the server serves another one right after it (Fleet.prove); else it is the server's.
    So does the loss of a server at which it was the only suspect (Suspicion). A request is given up after options.attempts such
    failures, when all servers that are there or were not long ago had their say. new_tokens(count) tells the caller.
    """

    def __init__(
        self,
        shards: Shards,
        sampling: SamplingParams,
        *,
        fleet: Fleet,
        weights: Weights,
        vocab_size: int,
        new_tokens: Callable[[int], None],
    ) -> None:
        self._shards, self._sampling, self._fleet = shards, sampling, fleet
        self._weights, self._vocab_size = weights, vocab_size
        self._tell_tokens = new_tokens
        self._options = fleet.options
        self._ready: list[tuple[int, int, Item]] = []  # heap, longest prompt first
        self._choosy: list[Item] = []  # wait for a particular server, or for few others to be there
        self._timers: dict[Item, asyncio.TimerHandle] = {}
        self._suspicion = Suspicion(self._options.max_outstanding)
        self._longest_checked = 0
        self._order = itertools.count()
        self._rids = (f"trd-{uuid.uuid4().hex[:12]}-{number}" for number in itertools.count())
        self._done = asyncio.Event()

    async def run(self) -> None:
        self._fleet.job = self
        try:
            self._refill()
            self._pump()
            while not self._done.is_set():
                try:
                    await asyncio.wait_for(self._done.wait(), _LOOK_AGAIN_S)
                except TimeoutError:
                    self._pump()
        finally:
            self._fleet.job = None
            for timer in self._timers.values():
                timer.cancel()
            tasks = [task for server in self._fleet.servers for task in server.in_flight.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in self._fleet.servers:
                server.forget_work()

    # Queue

    def _refill(self) -> None:
        """Opens as many shards as keep the servers busy."""
        for item in self._shards.open(2 * self._options.max_outstanding * len(self._fleet.servers)):
            self._push(item)
        if self._shards.longest_prompt > self._longest_checked:
            self._longest_checked = self._shards.longest_prompt
            for server in self._fleet.healthy():
                self._check_budget(server)
        if self._shards.finish():
            self._done.set()

    def _check_budget(self, server: Server) -> None:
        assert server.facts is not None
        needed = self._longest_checked + self._sampling.max_new_tokens + 2  # the server itself stops 2 tokens early
        if needed > server.facts.context:
            raise UserError(
                f"{server.url} has room for {server.facts.context} tokens, the longest prompt ({self._longest_checked}) and "
                f"{self._sampling.max_new_tokens} new tokens need {needed}: {self._fleet.context_hint}"
            )

    def _push(self, item: Item) -> None:
        self._timers.pop(item, None)
        if item in self._suspicion:
            self._choosy.append(item)
        else:
            heapq.heappush(self._ready, (-len(item.prompt), next(self._order), item))

    def _later(self, item: Item) -> None:
        """Back into the queue after a wait that doubles with its tries."""
        delay = min(_BACKOFF_S * 2.0 ** min(item.tries - 1, 10), _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.5)
        self._timers[item] = self._fleet.call_later(delay, self._push_and_pump, item)

    def _push_and_pump(self, item: Item) -> None:
        self._push(item)
        self._pump()

    def _pump(self) -> None:
        """Gives work to every server with room."""
        room = [server for server in self._fleet.servers if server.has_room]
        if self._choosy and room:
            waiting, self._choosy = self._choosy, []
            for item in waiting:
                if not room or not self._place(item, room):
                    self._choosy.append(item)
                room = [server for server in room if server.has_room]
        while self._ready and room:
            item = heapq.heappop(self._ready)[2]
            if not self._place(item, room):
                self._choosy.append(item)
            room = [server for server in room if server.has_room]

    def _place(self, item: Item, room: list[Server]) -> bool:
        """Sends it to one of the servers with `room`, or gives it up; False if it has to wait."""
        fit = room
        if item.failed_on or item.rejected_by:
            spent = item.failures >= self._options.attempts
            expected = self._fleet.expected()
            if (item.failed_on | item.rejected_by).issuperset(expected) and (spent or item.rejected_by.issuperset(expected)):
                self._give_up(item)
                return True
            fit = [s for s in room if s not in item.failed_on and s not in item.rejected_by]
            others_are_left = any(s.healthy and s not in item.failed_on and s not in item.rejected_by for s in self._fleet.servers)
            if not spent and not others_are_left:
                fit = [s for s in room if s not in item.rejected_by]
        fit = [server for server in fit if self._suspicion.admits(item, server)]
        if not fit:
            return False
        server = min(fit, key=lambda server: server.tokens)
        self._suspicion.begins(item, server)
        server.tokens += len(item.prompt) + self._sampling.max_new_tokens
        server.unsent.add(item)
        server.in_flight[item] = self._fleet.spawn(self._attempt(item, server))
        return True

    def _give_up(self, item: Item) -> None:
        if item in self._suspicion:
            self._suspicion.convict()
        self._shards.give_up(item)
        self._refill()

    def _detach(self, item: Item, server: Server) -> None:
        del server.in_flight[item]
        server.unsent.discard(item)
        server.tokens -= len(item.prompt) + self._sampling.max_new_tokens
        self._suspicion.ends(item, server)

    # Servers

    def take_back(self, server: Server, lost: bool) -> None:
        """The server is out: its requests go back into the queue. lost: it died or hangs, perhaps by one of them."""
        tasks = dict(server.in_flight)
        blamed = self._suspicion.lost(server, tasks.keys() - server.unsent) if lost else None
        if blamed is not None:
            self._note(blamed, f"{server.url} was lost while it ran: {server.reason}")
            self._count(blamed, server)
        for item, task in tasks.items():
            self._detach(item, server)
            task.cancel()
            self._push(item)
        self._fleet.call_later(0, self._pump_if_alive)

    def server_is_back(self, server: Server) -> None:
        """Also: has other facts."""
        self._check_budget(server)
        self._pump()

    def _pump_if_alive(self) -> None:
        if self._fleet.job is self:
            self._pump()

    # One attempt

    def _body(self, item: Item, rid: str) -> bytes:
        ids = json.dumps(item.prompt.tolist(), separators=(",", ":"))
        return (
            f'{{"rid":"{rid}","input_ids":{ids},"sampling_params":{{{self._shards.sampling_json},"sampling_seed":{item.seed}}},'
            '"return_logprob":true}'
        ).encode()

    async def _ask(self, item: Item, server: Server) -> Draw:
        """Raises one of LINK_ERRORS, or StatusError."""
        rid = next(self._rids)
        max_new_tokens = self._sampling.max_new_tokens
        body = self._body(item, rid)
        limit, timeout_s = size_limit(max_new_tokens), self._options.request_timeout_s
        status, answer = await server.link.call(
            "POST", "/generate", body, limit=limit, timeout_s=timeout_s, on_sent=partial(server.unsent.discard, item)
        )
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
        try:
            draw = await self._ask(item, server)
        except (StatusError, *LINK_ERRORS) as error:
            if self._has(server, item):
                await self._failed(item, server, error)
        else:
            if not self._has(server, item):
                return
            self._detach(item, server)
            self._suspicion.acquit(item)
            server.answered()
            self._shards.success(item, draw)
            self._tell_tokens(len(draw.ids))
            self._refill()
        self._pump_if_alive()

    def _has(self, server: Server, item: Item) -> bool:
        """(in an attempt) False if the server was taken out meanwhile: the request is back in the queue."""
        return server.in_flight.get(item) is asyncio.current_task()

    async def _failed(self, item: Item, server: Server, error: Exception) -> None:
        """While the server is asked about, the request counts as in flight there: it may be what the server suffers from."""
        self._note(item, f"{server.url}: {error}")
        status = error.status if isinstance(error, StatusError) else None
        if status in _REJECTED:
            self._detach(item, server)
            item.rejected_by.add(server)
            self._push(item)
        elif isinstance(error, WrongWeightsError):
            self._detach(item, server)
            self._push(item)
            self._fleet.wrong_weights(server, str(error))
        elif isinstance(error, UnreachableError):  # the server never had it
            self._detach(item, server)
            self._later(item)
            await self._fleet.confirm(server)
        else:
            if isinstance(error, BrokenError):
                await self._fleet.connection_broke(server, item)
            counts = await self._fleet.prove(server, item)
            if not self._has(server, item):
                return
            self._detach(item, server)
            if status in REFUSALS:
                server.is_full()
            if counts:
                self._count(item, server)
            self._later(item)

    def _note(self, item: Item, reason: str) -> None:
        item.reason = reason
        item.tries += 1
        if item.failed_first is None:
            item.failed_first = self._shards.answered

    def _count(self, item: Item, server: Server) -> None:
        item.failures += 1
        item.failed_on.add(server)
