"""A server that speaks SGLang's /generate by script: the answer is a function of prompt and seed, faults are injected by seed.

Raw asyncio, so that it can do what a well-behaved HTTP library cannot. It runs in a thread of the test's process.
"""

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

FAULTS = ("hang", "half", "junk", "500", "refuse", "close", "other_id")
VOCAB_SIZE = 1000


def response(prompt: Sequence[int], seed: int, max_new_tokens: int) -> tuple[list[int], list[float]]:
    """What the scripted server draws: ids and logprobs (multiples of 1/8, exact in float32)."""
    source = random.Random(f"{sum(prompt)} {len(prompt)} {list(prompt[:8])} {seed}")
    count = source.randint(1, max_new_tokens)
    return [source.randrange(VOCAB_SIZE) for _ in range(count)], [-source.randrange(80) / 8 for _ in range(count)]


class ScriptedServer:
    """faults: kind -> how many are left to inject, drawn at random with `seed` at rate `fault_rate`.

    refuse(request): status and message to answer, None to go on. kills(request): whether the server dies of it: all connections
    are cut and the port is closed until `start()`. change(request, answer): what is sent instead of the answer. drawn: how often
    each (prompt, seed) was answered in full. now: requests it is at. holds: requests that it takes at once, it refuses more.
    refuse_probe(): as `refuse`, of the small requests that only ask whether it works.
    """

    def __init__(self, *, label: str = "default", delay_s: float = 0.0, api_key: str | None = None, seed: int = 0) -> None:
        self.label, self.model_path, self.delay_s, self.api_key = label, "someone/model", delay_s, api_key
        self.context, self.total_tokens = 4096, 1 << 20
        self.original_logprobs = True
        self.takes_updates = True
        self.healthy = True
        self.frozen = False  # accepts connections and says nothing
        self.stuck = False  # generates nothing, and says it is healthy
        self.faults: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.fault_rate = 0.5
        self.refuse: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda request: None
        self.kills: Callable[[dict[str, Any]], bool] = lambda request: False
        self.change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda request, answer: answer  # what is sent instead
        self.refuse_probe: Callable[[], tuple[int, str] | None] = lambda: None
        self.holds = 1 << 30
        self.probe_logprobs = [-1.5, -2.0, -3.0]
        self.probes = self.starts = 0
        self.drawn: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.seen: list[dict[str, Any]] = []
        self.deaths = 0
        self.most_at_once = self.now = 0
        self._random = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "ScriptedServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def stop(self) -> None:
        """Dies: no port, no connections."""
        asyncio.run_coroutine_threadsafe(self._die(), self._loop).result()

    async def _listen(self) -> None:
        if self._server is None:
            self.starts += 1
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True, limit=1 << 24)

    async def _die(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                while self.frozen:
                    await asyncio.sleep(0.02)
                if self.api_key and path != "/health" and headers.get("authorization") != f"Bearer {self.api_key}":
                    _send(writer, 401, {"error": "Unauthorized"})
                elif path == "/generate":
                    await self._generate(json.loads(body), writer)
                else:
                    self._control(method, path, json.loads(body) if body else {}, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _control(self, method: str, path: str, order: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            _send(writer, 200 if self.healthy else 503, None)
        elif path == "/server_info":
            limits = {"max_req_input_len": self.context - 6, "max_total_num_tokens": self.total_tokens}
            _send(writer, 200, {"version": "0.5.23", "enable_deterministic_inference": False, "random_seed": self.starts, **limits})
        elif path == "/model_info":
            _send(writer, 200, {"model_path": self.model_path, "weight_version": self.label})
        elif method == "POST" and path == "/update_weight_version":
            self.orders.append((path, order))
            self.label = order["new_version"]
            _send(writer, 200, {"success": True})
        elif method == "POST" and path == "/update_weights_from_disk":
            self.orders.append((path, order))
            if self.takes_updates:
                self.label, self.model_path = order["weight_version"], order["model_path"]
            _send(writer, 200 if self.takes_updates else 400, {"success": self.takes_updates, "message": "no such folder"})
        else:
            _send(writer, 404, {"detail": "Not Found"})

    async def _generate(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        while self.stuck:
            await asyncio.sleep(0.02)
        if request.get("top_logprobs_num"):
            self.probes += 1
            refused = self.refuse_probe() or ((503, "The request queue is full.") if self.now >= self.holds else None)
            scale = 1.0 if self.original_logprobs else 1 / request["sampling_params"]["temperature"]
            top = [[logprob * scale, 7 + i, None] for i, logprob in enumerate(self.probe_logprobs)]
            status, answer = (refused[0], {"error": refused[1]}) if refused else (200, {"meta_info": {"output_top_logprobs": [top]}})
            _send(writer, status, answer)
            return
        self.seen.append(request)
        if self.now >= self.holds:
            _send(writer, 503, {"error": {"message": "The request queue is full."}})
            return
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            await self._answer(request, writer)
        finally:
            self.now -= 1

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if self.kills(request):
            self.deaths += 1
            await self._die()
            return
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if (refused := self.refuse(request)) is not None:
            _send(writer, refused[0], {"error": {"message": refused[1]}})
            return
        answer = make_answer(request, self.label)
        fault = self._next_fault()
        if fault is None:
            answer = self.change(request, answer)
            self.drawn[tuple(request["input_ids"]), request["sampling_params"]["sampling_seed"]] += 1
            _send(writer, 200, answer)
            return
        content = json.dumps(answer).encode()
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "half":
            _send(writer, 200, content[: len(content) // 2], chunked=self._random.random() < 0.5)
        elif fault == "junk":
            _send(
                writer,
                200,
                self._random.choice([b"<html>", b"", b"[" * 3000, b"[]", b'{"meta_info": 1}', b"\xff\xfe", b"null", b"1" * 5000]),
            )
        elif fault == "500":
            _send(writer, 500, {"error": {"message": "scripted"}})
        elif fault == "close":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content[: len(content) // 2])
            await writer.drain()
            writer.close()
            raise ConnectionResetError
        elif fault == "other_id":
            answer["meta_info"]["id"] = "another"
            _send(writer, 200, answer)
        elif fault == "refuse":  # the port is closed for a moment, this connection is reset
            if self._server is not None:
                self._server.close()
                self._server = None
                self._loop.call_later(0.02, lambda: self._loop.create_task(self._listen()))
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            raise ConnectionResetError

    def _next_fault(self) -> str | None:
        left = [kind for kind, count in self.faults.items() if count > 0]
        if not left or self._random.random() > self.fault_rate:
            return None
        kind = self._random.choice(left)
        self.faults[kind] -= 1
        self.injected[kind] += 1
        return kind


class ScriptedRouter(ScriptedServer):
    """An sglang-router: passes requests on to its workers in turn, to the next one if one is gone.

    workers: (worker, whether the router takes it for healthy). workers_status: what /workers answers.
    """

    def __init__(self, workers: Sequence[ScriptedServer]) -> None:
        super().__init__()
        self.workers = [(worker, True) for worker in workers]
        self.workers_status = 200
        self._turn = 0

    def _control(self, method: str, path: str, order: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/workers":
            rows = [{"id": str(i), "url": worker.url, "is_healthy": healthy} for i, (worker, healthy) in enumerate(self.workers)]
            _send(writer, self.workers_status, {"workers": rows, "total": len(rows)})
        else:  # what it answers for its workers says nothing about each of them
            _send(writer, 200 if path == "/health" else 500, {"error": "not asked of a router"})

    async def _generate(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        body = json.dumps(request).encode()
        self._turn = (self._turn + 1) % len(self.workers)
        for worker, healthy in self.workers[self._turn :] + self.workers[: self._turn]:
            if not healthy:
                continue
            try:
                reader, link = await asyncio.open_connection("127.0.0.1", worker.port, limit=1 << 24)
                link.write(b"POST /generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                head = await reader.readuntil(b"\r\n\r\n")
                answer = await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
            except (OSError, asyncio.IncompleteReadError):
                continue
            link.close()
            _send(writer, int(head.split(b" ")[1]), answer)
            return
        _send(writer, 503, {"error": {"message": "no worker"}})


def make_answer(request: dict[str, Any], label: str) -> dict[str, Any]:
    """A well-formed answer to a request."""
    params = request["sampling_params"]
    ids, logprobs = response(request["input_ids"], params["sampling_seed"], params["max_new_tokens"])
    return {
        "text": "",
        "output_ids": ids,
        "meta_info": {
            "id": request["rid"],
            "finish_reason": {"type": "length" if len(ids) == params["max_new_tokens"] else "stop"},
            "prompt_tokens": len(request["input_ids"]),
            "completion_tokens": len(ids),
            "weight_version": label,
            "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)],
        },
    }


def _send(writer: asyncio.StreamWriter, status: int, content: Any, chunked: bool = False) -> None:
    body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
    start = b"HTTP/1.1 %d X\r\n" % status
    if chunked:
        writer.write(start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    else:
        writer.write(start + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
