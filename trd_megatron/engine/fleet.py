"""The servers: which are healthy, how much each has to do, when one is out and when it is back."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from trd_megatron.engine.admission import Admission, NotReadyError, ServerFacts
from trd_megatron.engine.base import EngineFailedError
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.server_link import LINK_ERRORS, ServerLink, SlowError, UnreachableError, open_session
from trd_megatron.errors import UserError

if TYPE_CHECKING:
    from trd_megatron.engine.dispatch import Item, Job

_SAY_EVERY_S = 30.0
_AILING = 8  # after so many failures in a row a server gets one request at a time, until one succeeds


class Server:
    """One URL and what is known of it. tokens: prompt and max_new_tokens of what is in flight."""

    def __init__(self, link: ServerLink) -> None:
        self.link, self.url = link, link.url
        self.facts: ServerFacts | None = None  # None: never healthy
        self.healthy = False
        self.reason = "not looked at yet"  # why it is out
        self.out_since = 0.0
        self.in_flight: dict[Item, asyncio.Task[None]] = {}
        self.tokens = 0
        self.suspect: Item | None = None
        self.last_answer = 0.0
        self.failures_in_row = 0
        self.refuses_work = False  # the last it said was "not now" (503, 429, no connection) though it is healthy
        self.wrong_weights_in_row = 0
        self.checking: asyncio.Task[bool] | None = None
        self.doubted: frozenset[Item] | None = None  # in flight when a connection broke; until the check is over, no new ones
        self.broken: set[Item] = set()

    def has_room(self, max_outstanding: int) -> bool:
        limit = 1 if self.failures_in_row >= _AILING else max_outstanding
        return self.healthy and self.doubted is None and len(self.in_flight) < limit

    @property
    def usable(self) -> bool:
        """Healthy, and something may come of it."""
        return self.healthy and not (self.refuses_work and len(self.in_flight) <= 1)


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
        self.say, self.fail, self.role = say, fail, admission.role
        self.servers: list[Server] = []
        self.job: Job | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = True

    async def open(self) -> None:
        """Returns when every server has been looked at and at least one is ready."""
        self._session = open_session(self._api_key)
        options = self.options
        self.servers = [
            Server(ServerLink(self._session, url, connect_timeout_s=options.connect_timeout_s, read_timeout_s=options.read_timeout_s))
            for url in self._urls
        ]
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

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task whose error ends the run."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

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
        server.doubted, server.broken = None, set()
        self.say(f"{server.url} is out: {reason}")
        if self.job is not None:
            self.job.take_back(server, lost)

    async def confirm(self, server: Server) -> bool:
        """Whether the server is healthy, by asking it; takes it out if not. Several callers share one look."""
        if server.checking is None:
            server.checking = asyncio.get_running_loop().create_task(self._check(server))
            self._tasks.add(server.checking)  # type: ignore[arg-type]
            server.checking.add_done_callback(self._ended)
        checking = server.checking
        await asyncio.wait({checking})  # cancelling the caller leaves the look alone
        return not checking.cancelled() and checking.exception() is None and checking.result()

    async def _check(self, server: Server) -> bool:
        loop, options = asyncio.get_running_loop(), self.options
        start = loop.time()
        assert server.facts is not None
        try:
            for attempt in range(2):
                try:
                    timeout_s = max(options.health_timeout_s - options.health_interval_s, options.health_timeout_s / 2)
                    await self._admission.healthy(server.link, server.facts.is_router, timeout_s)
                    return True
                except NotReadyError as error:  # one bad answer that comes at once can be a hiccup
                    if attempt or loop.time() - start > options.health_interval_s:
                        self.take_out(server, str(error), lost=True)
                        break
                    await asyncio.sleep(min(1.0, options.health_interval_s))
                except SlowError as error:
                    if server.last_answer > start:  # it works, only not on this
                        return True
                    self.take_out(server, f"/health: {error}", lost=True)
                    break
                except LINK_ERRORS as error:
                    if attempt or isinstance(error, UnreachableError):
                        self.take_out(server, str(error), lost=True)
                        break
            return False
        finally:
            server.checking = server.doubted = None

    async def connection_broke(self, server: Server, item: "Item") -> None:
        """Finds out whether the server died with the connection of `item`, and takes it out then.

        One that restarted at once is told by all its connections having broken together.
        """
        if server.doubted is None:
            server.doubted, server.broken = frozenset(server.in_flight), set()
        doubted = server.doubted
        server.broken.add(item)
        alive = await self.confirm(server)
        if alive and server.healthy and len(doubted) > 1 and doubted <= server.broken:
            self.take_out(server, "all its connections broke at once", lost=True)

    async def _watch(self, server: Server, looked_at: asyncio.Event) -> None:
        options = self.options
        while True:
            if server.healthy:
                await self.confirm(server)
            else:
                try:
                    facts = await self._admission.admit(server.link)
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
        server.facts, server.healthy, server.failures_in_row, server.refuses_work = facts, True, 0, False
        self._admitted.set()
        if self.job is not None:
            self.job.server_is_back(server)

    async def _patience(self) -> None:
        """Ends the run when nothing was usable for too long."""
        loop = asyncio.get_running_loop()
        since, said = None, 0.0
        while True:
            await asyncio.sleep(min(1.0, self.options.give_up_after_s / 10))
            if not (self._opening or self.job is not None) or any(server.usable for server in self.servers):
                since = None
                continue
            now = loop.time()
            if since is None:
                since, said = now, now
            reasons = "; ".join(f"{s.url}: {'it refuses all requests' if s.healthy else s.reason}" for s in self.servers)
            if now - since > self.options.give_up_after_s:
                raise EngineFailedError(
                    f"no healthy server of the {self.role} for {self.options.give_up_after_s:g} s ({reasons}). "
                    "What was finished is kept: see to the servers and run again"
                )
            if now - said >= _SAY_EVERY_S:
                said = now
                self.say(f"no healthy server of the {self.role} for {now - since:.0f} s ({reasons})")

    def wrong_weights(self, server: Server, reason: str) -> None:
        """An answer came from other weights: the server is out until they are right."""
        server.wrong_weights_in_row += 1
        if server.wrong_weights_in_row > 2:
            raise UserError(f"{server.url} answers with wrong weights ({reason}) though it says it has the right ones: restart it")
        self.take_out(server, reason, lost=False)
