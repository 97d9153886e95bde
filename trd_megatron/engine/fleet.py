"""The servers: which are healthy, how much each has to do, when one is out and when it is back."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trd_megatron.engine.admission import Admission, NotReadyError, ServerFacts
from trd_megatron.engine.base import EngineFailedError
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.server_link import LINK_ERRORS, ServerLink, SlowError, StatusError, UnreachableError, open_session
from trd_megatron.errors import UserError

if TYPE_CHECKING:
    from trd_megatron.engine.dispatch import Job
    from trd_megatron.engine.shards import Item

_T = TypeVar("_T")
_SAY_EVERY_S = 30.0
_TOGETHER_S = 0.1  # connections that break within it break together
REFUSALS = (408, 429, 503)  # "not now": its queue is full, or a router has no worker just now


class Server:
    """One URL and what is known of it. tokens: prompt and max_new_tokens of what is in flight. most: requests it may have at once."""

    def __init__(self, link: ServerLink, most: int) -> None:
        self.link, self.url, self.most = link, link.url, most
        self.facts: ServerFacts | None = None  # None: never healthy
        self.healthy = False
        self.reason = "not looked at yet"  # why it is out
        self.out_since = 0.0
        self.in_flight: dict[Item, asyncio.Task[None]] = {}
        self.unsent: set[Item] = set()  # in flight, but there is no connection yet
        self.tokens = 0
        self.limit = most  # what it had room for when it refused more; grows again
        self.last_answer = 0.0
        self.wrong_weights_in_row = 0
        self.checking: asyncio.Task[bool] | None = None
        self.proving: asyncio.Task[bool] | None = None
        self.failing: set[Item] = set()  # in flight, but failed: until the proof is over it is not known whose fault that is
        self.doubting: asyncio.Task[bool] | None = None
        self.doubted = False  # a connection broke: until it is known whether the server is the same as before, no new work
        self.broken: set[Item] = set()

    @property
    def has_room(self) -> bool:
        return self.healthy and not self.doubted and len(self.in_flight) < self.limit

    def answered(self) -> None:
        self.last_answer = asyncio.get_running_loop().time()
        self.wrong_weights_in_row = 0

    def is_full(self) -> None:
        """It refused a request though it has others."""
        self.limit = max(1, min(self.limit, len(self.in_flight)))

    def forget_work(self) -> None:
        self.in_flight.clear()
        self.unsent.clear()
        self.failing.clear()
        self.tokens = 0
        self.doubted, self.broken = False, set()


class Fleet:
    """Watches the servers from open() to close(). Lives in one event loop.

    job: who is told of servers that are lost and back. fail: told of an error that ends the run. say: told of what the user
    should know.
    """

    def __init__(
        self,
        urls: Sequence[str],
        admission: Admission,
        options: ClientOptions,
        api_key: str | None,
        say: Callable[[str], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._urls, self._admission, self.options, self._api_key = list(urls), admission, options, api_key
        self.say, self.fail, self.context_hint = say, fail, admission.context_hint
        self.servers: list[Server] = []
        self.job: Job | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = True

    async def open(self) -> None:
        """Returns when every server has been looked at and at least one is ready."""
        self._session = open_session(self._api_key)
        options = self.options
        for url in self._urls:
            link = ServerLink(self._session, url, connect_timeout_s=options.connect_timeout_s, read_timeout_s=options.read_timeout_s)
            self.servers.append(Server(link, options.max_outstanding))
        looked_at = [asyncio.Event() for _ in self.servers]
        self._admitted = asyncio.Event()
        for server, event in zip(self.servers, looked_at, strict=True):
            self.spawn(self._watch(server, event))
        self.spawn(self._patience())
        await self._admitted.wait()
        for event in looked_at:
            await event.wait()
        self._opening = False

    async def close(self) -> None:
        """Drops whatever is in flight."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.servers:
            await self._session.close()

    def spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """A task whose error ends the run."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def call_later(self, delay_s: float, work: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """A call whose error ends the run: asyncio itself would only log it."""

        def call() -> None:
            try:
                work(*args)
            except Exception as error:
                self.fail(error)

        return asyncio.get_running_loop().call_later(delay_s, call)

    def healthy(self) -> list[Server]:
        return [server for server in self.servers if server.healthy]

    def expected(self) -> list[Server]:
        """The healthy servers and those that went out not long ago: a request is not given up before they had their say."""
        limit = asyncio.get_running_loop().time() - self.options.give_up_after_s
        return [s for s in self.servers if s.healthy or (s.facts is not None and s.out_since > limit)]

    def take_out(self, server: Server, reason: str, *, lost: bool) -> None:
        """Gives it no work until it is admitted again; what is in flight goes back to the job. lost: it died or hangs."""
        if not server.healthy:
            return
        server.healthy, server.reason = False, reason
        server.out_since = asyncio.get_running_loop().time()
        server.doubted, server.broken = False, set()
        self.say(f"{server.url} is out: {reason}")
        if self.job is not None:
            self.job.take_back(server, lost)

    async def confirm(self, server: Server) -> bool:
        """Whether the server is healthy, by asking it; takes it out if not. Several callers share one look."""
        if server.checking is None:
            server.checking = self.spawn(self._check(server))
        return await _result(server.checking)

    async def _check(self, server: Server) -> bool:
        loop, options = asyncio.get_running_loop(), self.options
        start = loop.time()
        assert server.facts is not None
        try:
            for attempt in range(2):
                try:
                    timeout_s = max(options.health_timeout_s - options.health_interval_s, options.health_timeout_s / 2)
                    facts = await self._admission.look_again(server.link, server.facts, timeout_s)
                    if facts != server.facts:
                        server.facts = facts
                        if self.job is not None:
                            self.job.server_is_back(server)
                    return True
                except NotReadyError as error:  # one bad answer that comes at once can be a hiccup
                    if attempt or loop.time() - start > options.health_interval_s:
                        self.take_out(server, str(error), lost=True)
                        break
                    await asyncio.sleep(min(1.0, options.health_interval_s))
                except SlowError as error:
                    if server.last_answer > start:  # it works, only not on this
                        return True
                    self.take_out(server, f"health check: {error}", lost=True)
                    break
                except LINK_ERRORS as error:
                    if attempt or isinstance(error, UnreachableError):
                        self.take_out(server, str(error), lost=True)
                        break
            return False
        finally:
            server.checking = None

    async def prove(self, server: Server, item: "Item") -> bool:
        """Whether the server, at which `item` failed, serves a small request of ours. Then the failure was the item's.

        Takes the server out if it does not, unless it only has no time for more than it has. Several callers share one proof.
        """
        server.failing.add(item)
        if server.proving is None:
            server.proving = self.spawn(self._prove(server))
        return await _result(server.proving)

    async def _prove(self, server: Server) -> bool:
        loop, options = asyncio.get_running_loop(), self.options
        try:
            for attempt in range(2):
                if not (server.healthy and await self.confirm(server)):
                    return False
                try:
                    await self._admission.probe(server.link)
                    return True
                except SlowError as error:
                    if loop.time() - server.last_answer > options.request_timeout_s:  # longer than any request may take
                        self.take_out(server, f"it answers nothing any more: {error}", lost=True)
                    return False
                except (StatusError, *LINK_ERRORS) as error:
                    refuses = isinstance(error, StatusError) and error.status in REFUSALS
                    if refuses and server.in_flight.keys() - server.failing:
                        return False
                    if attempt:
                        self.take_out(server, f"a small request failed too: {error}", lost=not refuses)
                        return False
                    await asyncio.sleep(min(1.0, options.health_interval_s))
            return False
        finally:
            server.proving = None
            server.failing.clear()

    async def connection_broke(self, server: Server, item: "Item") -> None:
        """Finds out whether the server died with the connection of `item`, and takes it out then.

        One that restarted at once is told by all its connections having broken together.
        """
        server.broken.add(item)
        if server.doubting is None:
            server.doubting = self.spawn(self._doubt(server))
        await _result(server.doubting)

    async def _doubt(self, server: Server) -> bool:
        """Whether it is the same server as before."""
        server.doubted, broken = True, server.broken
        running = server.in_flight.keys() - server.unsent - server.failing
        try:
            await asyncio.sleep(min(_TOGETHER_S, self.options.health_interval_s))
            if not await self.confirm(server):
                return False
            if len(broken) > 1 and not (running & server.in_flight.keys()) - broken:
                self.take_out(server, "all its connections broke at once", lost=True)
            return server.healthy
        finally:
            server.doubting, server.doubted, server.broken = None, False, set()

    async def _watch(self, server: Server, looked_at: asyncio.Event) -> None:
        options = self.options
        while True:
            if server.healthy:
                await self.confirm(server)
                server.limit = min(server.most, server.limit + server.limit // 2 + 1)
            else:
                try:
                    facts = await self._admission.admit(server.link, known=server.facts is not None)
                except NotReadyError as error:
                    if not looked_at.is_set():
                        self.say(f"waiting for {server.url}: {error}")
                    server.reason = str(error)
                else:
                    self._admit(server, facts)
                looked_at.set()
            await asyncio.sleep(options.health_interval_s if server.healthy else min(options.health_interval_s, 2.0))

    def _admit(self, server: Server, facts: ServerFacts) -> None:
        if server.facts is not None:
            self.say(f"{server.url} is back")
        server.facts, server.healthy, server.limit = facts, True, server.most
        server.last_answer = asyncio.get_running_loop().time()  # to a probe
        self._admitted.set()
        if self.job is not None:
            self.job.server_is_back(server)

    async def _patience(self) -> None:
        """Ends the run when no server was healthy for too long."""
        loop = asyncio.get_running_loop()
        since, said = None, 0.0
        while True:
            await asyncio.sleep(min(1.0, self.options.give_up_after_s / 10))
            if not (self._opening or self.job is not None) or self.healthy():
                since = None
                continue
            now = loop.time()
            if since is None:
                since, said = now, now
            reasons = "; ".join(f"{s.url}: {s.reason}" for s in self.servers)
            if now - since > self.options.give_up_after_s:
                raise EngineFailedError(
                    f"no healthy server of the {self._admission.role} for {self.options.give_up_after_s:g} s ({reasons}). "
                    "What was finished is kept: see to the servers and run again"
                )
            if now - said >= _SAY_EVERY_S:
                said = now
                self.say(f"no healthy server of the {self._admission.role} for {now - since:.0f} s ({reasons})")

    def wrong_weights(self, server: Server, reason: str) -> None:
        """An answer came from other weights: the server is out until they are right."""
        server.wrong_weights_in_row += 1
        if server.wrong_weights_in_row > 2:
            raise UserError(f"{server.url} answers with wrong weights ({reason}) though it says it has the right ones: restart it")
        self.take_out(server, reason, lost=False)


async def _result(task: "asyncio.Task[bool]") -> bool:
    """Of a task that others wait for too: cancelling the caller leaves it alone. False if it failed, which ends the run anyway."""
    await asyncio.wait({task})
    return not task.cancelled() and task.exception() is None and task.result()
