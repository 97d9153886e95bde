"""Generation by SGLang servers over HTTP: an event loop in a thread of its own keeps them busy while the caller grades."""

import asyncio
import json
import queue
import resource
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trd_megatron.engine.admission import Admission
from trd_megatron.engine.base import Generation, Request, SamplingParams, Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.dispatch import Job
from trd_megatron.engine.fleet import Fleet
from trd_megatron.engine.journal import Journal
from trd_megatron.engine.shards import Result, Shards, prompt_array
from trd_megatron.errors import UserError

_SYNC_EVERY_S = 1.0
_CHECK_EVERY_S = 1.0
_TELL_EVERY_S = 0.1
_SPARE_FILES = 256  # of the process, beside the connections

_Event = tuple["asyncio.Task[None] | None", str, Any]  # the job it belongs to, kind, value


class SGLangEngine:
    """Engine (see engine/base.py) whose samples are drawn by SGLang servers or an sglang-router.

    Waits until every server was looked at and one is ready; the others join when they are. may_update: servers with other
    weights get the right ones from disk (the student's); else they are an error. role: whose servers they are, for messages
    (student or teacher by may_update, if it is not said). journal: the file that finished samples go
    to as they finish and are read back from; delete it when they are stored. say: told, in the caller's thread, what the
    user should know. check: raises, in the caller's thread, once waiting for servers has no point any more. One generate() at a time.

    Raises UserError if a server, the model folder or the journal is not what it must be, EngineFailedError if no server is
    healthy for give_up_after_s.
    """

    name = "sglang"

    def __init__(
        self,
        urls: Sequence[str],
        weights: Weights,
        options: ClientOptions,
        *,
        journal: Path,
        may_update: bool,
        say: Callable[[str], None],
        api_key: str | None = None,
        check: Callable[[], None] | None = None,
        role: str | None = None,
    ) -> None:
        _allow_files(options.max_outstanding * len(urls))
        self._weights, self._say, self._check = weights, say, check
        self._vocab_size = vocab_size(weights.path)
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._closed = False
        self._failure: BaseException | None = None
        self._journal = Journal(journal, say=self._put_message)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True)
        self._thread.start()
        self._job: asyncio.Task[None] | None = None
        role = role or ("student" if may_update else "teacher")
        admission = Admission(weights, options, may_update=may_update, role=role, say=self._put_message)
        self._fleet = Fleet(urls, admission, options, api_key, say=self._put_message, fail=self._put_error)
        try:
            for _ in self._until("opened", self._start(self._open())):
                pass
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: SGLang's version, whether seeds count, the servers. null for a server that never was healthy."""
        known = [server.facts for server in self._fleet.servers if server.facts is not None]
        return {
            "sglang": " ".join(sorted({facts.version for facts in known})),
            "deterministic": bool(known) and all(facts.deterministic for facts in known),
            "servers": [server.url for server in self._fleet.servers],
        }

    def generate(
        self,
        shards: Iterable[list[Request]],
        sampling: SamplingParams,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See Engine. Samples that the journal has are not drawn again, and on_tokens does not hear of them.

        Shards are pulled in the client's thread. Raises UserError, EngineFailedError and OSError (the journal's disk), and
        what pulling a shard raises.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._failure is not None:
            raise self._failure
        if isinstance(shards, Sequence):  # what is wrong in the last shard is better known before the first is drawn
            for shard in shards:
                for request in shard:
                    prompt_array(request, self._vocab_size)
        job = self._job = self._start(self._run(iter(shards), sampling, self._job))
        try:
            for kind, value in self._until("done", job):
                if kind == "tokens":
                    on_tokens(value)
                else:
                    index, results = value
                    yield index, [self._generation(result) for result in results]
        finally:
            if not self._closed:  # not waited for: the next job does
                self._loop.call_soon_threadsafe(job.cancel)

    def close(self) -> None:
        """Drops what is in flight and closes the connections and the journal. Calling it twice is fine."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._journal.close()
        self._put_message("closed")  # wakes a generate() that waits

    def _until(self, last: str, job: "asyncio.Task[None]") -> Iterator[tuple[str, Any]]:
        """Events of `job`, until the one called `last`; tells the user what is to be told, raises what went wrong."""
        while True:
            try:
                source, kind, value = self._events.get(timeout=_CHECK_EVERY_S)
            except queue.Empty:
                if self._check is not None:
                    self._check()
                continue
            if self._closed:
                raise RuntimeError("the engine is closed")
            if kind == "say":
                self._say(value)
            elif kind == "error":
                raise value
            elif source is not job:
                pass  # of a generate() that was left early
            elif kind == last:
                return
            else:
                yield kind, value

    def _generation(self, result: Result) -> Generation:
        if isinstance(result, str):
            return Generation([], [], "abort", self._weights.version, result)
        ids, logprobs, finish = self._journal.read(result)
        return Generation(ids, logprobs, finish, self._weights.version)

    # In the loop's thread

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """(caller's thread) Runs it in the loop."""

        async def start() -> asyncio.Task[None]:
            return self._fleet.spawn(work)

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def _put(self, kind: str, value: Any) -> None:
        self._events.put((asyncio.current_task(), kind, value))

    def _put_message(self, text: str) -> None:
        self._events.put((None, "say", text))

    def _put_error(self, error: BaseException) -> None:
        self._failure = self._failure or error
        if self._job is not None:
            self._job.cancel()
        self._events.put((None, "error", error))

    async def _open(self) -> None:
        self._fleet.spawn(self._sync())
        await self._fleet.open()
        self._put("opened", None)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            await asyncio.to_thread(self._journal.sync)

    async def _run(self, shards: Iterator[list[Request]], sampling: SamplingParams, before: "asyncio.Task[None] | None") -> None:
        if before is not None:
            await asyncio.wait({before})  # it was cancelled if it did not end
        this = asyncio.current_task()
        tokens = 0

        def tell_tokens() -> None:
            nonlocal tokens
            self._events.put((this, "tokens", tokens))
            tokens = 0

        def new_tokens(count: int) -> None:
            """Gathers them: waking the caller for each sample would cost as much as the sample's own work."""
            nonlocal tokens
            if not tokens:
                self._fleet.call_later(_TELL_EVERY_S, tell_tokens)
            tokens += count

        opened = Shards(
            shards,
            sampling,
            journal=self._journal,
            weights=self._weights,
            vocab_size=self._vocab_size,
            tell=lambda index, results: self._events.put((this, "shard", (index, results))),
            say=self._put_message,
        )
        job = Job(opened, sampling, fleet=self._fleet, weights=self._weights, vocab_size=self._vocab_size, new_tokens=new_tokens)
        await job.run()
        if tokens:
            tell_tokens()
        self._put("done", None)

    async def _shut(self) -> None:
        await self._fleet.close()
        await self._loop.shutdown_default_executor()


def vocab_size(model: Path) -> int:
    """The size of a model's vocabulary, from its config.json. Raises UserError if it does not say."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{model}/config.json cannot be read ({str(error).splitlines()[0]}): it must be a model folder") from None
    if type(size) is not int or size < 1:
        raise UserError(f"{model}/config.json gives no vocab_size: it must be a model folder")
    return size


def _allow_files(connections: int) -> None:
    """Raises this process's limit of open files, if it is too low for so many connections. Raises UserError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(f"engine.max_outstanding needs {needed} open files, {hard} are allowed (ulimit -Hn): lower it")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
