"""The SGLang client alone: SGLangEngine against a server that draws nothing and answers at once.

Server and client are processes of their own, so that the client's CPU time and memory are its own.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from trd_megatron import processes
from trd_megatron.engine.base import Request, SamplingParams, Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.sglang import SGLangEngine

_VOCAB_SIZE = 150_000  # ids as long as a real model's
_SHARD = 256
_COMMAND = "from trd_megatron import processes; processes.die_with_parent(); from trd_megatron.bench import client; client.{}"


class NullServer(asyncio.Protocol):
    """One connection. Answers with `answer`, the request's id and number of prompt tokens filled in."""

    label = "default"

    def __init__(self, answer: bytes) -> None:
        self._answer, self._buffer = answer, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = self._buffer.find(b"\r\n\r\n") + 4
        if start < 4:
            return
        length = re.search(rb"(?i)content-length: *(\d+)", self._buffer[:start])
        end = start + (int(length[1]) if length else 0)
        if len(self._buffer) < end:
            return
        path, body = self._buffer.split(b" ", 2)[1], bytes(self._buffer[start:end])
        del self._buffer[:end]
        status, content = self._reply(bytes(path), body)
        self._transport.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(content)) + content
        )

    def _reply(self, path: bytes, body: bytes) -> tuple[int, bytes]:
        if path == b"/generate" and b"top_logprobs_num" not in body:
            prompt = body[body.index(b"[") : body.index(b"]")]
            rid = body[8 : body.index(b'"', 8)]  # {"rid":"...
            return 200, self._answer.replace(b"RID", rid, 1).replace(b"-77", b"%d" % (prompt.count(b",") + 1), 1)
        if path == b"/generate":
            return 200, b'{"meta_info":{"output_top_logprobs":[[[-1.0,1,null],[-2.0,2,null],[-3.0,3,null]]]}}'
        if path == b"/update_weight_version":
            NullServer.label = json.loads(body)["new_version"]
        elif path == b"/server_info":
            return 200, b'{"version":"null server","max_req_input_len":1000000,"max_total_num_tokens":1000000}'
        elif path == b"/model_info":
            return 200, json.dumps({"weight_version": NullServer.label}).encode()
        elif path != b"/health":
            return 404, b"{}"
        return 200, b"{}"


def serve(response_tokens: int, label: str) -> None:
    """(its own process) Serves on a free port, which is printed."""
    source = random.Random(0)
    ids = [source.randrange(_VOCAB_SIZE) for _ in range(response_tokens)]
    meta = {
        "id": "RID",
        "finish_reason": {"type": "length", "length": response_tokens},
        "prompt_tokens": -77,
        "weight_version": label,
        "output_token_logprobs": [[-20 * source.random(), token, None] for token in ids],
        "completion_tokens": response_tokens,
        "cached_tokens": 0,
    }
    # Text as long as English of a real tokenizer.
    answer = json.dumps({"text": "word" * response_tokens, "output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()

    NullServer.label = label

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: NullServer(answer), "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


def measure(url: str, folder: str, prompts: int, prompt_tokens: int, response_tokens: int, max_outstanding: int) -> None:
    """(its own process) Draws them all and prints the figures as JSON."""
    (Path(folder) / "config.json").write_text(json.dumps({"vocab_size": _VOCAB_SIZE}))
    source = random.Random(1)
    base = [source.randrange(_VOCAB_SIZE) for _ in range(prompt_tokens)]

    def shards() -> Iterator[list[Request]]:
        for start in range(0, prompts, _SHARD):
            yield [Request(array("i", [number, *base[1:]]), number) for number in range(start, min(start + _SHARD, prompts))]

    options = ClientOptions(max_outstanding=max_outstanding)
    weights = Weights(Path(folder), 0, "null")
    with closing(SGLangEngine([url], weights, options, journal=Path(folder) / "journal", may_update=True, say=print)) as engine:
        sampling = SamplingParams(0.6, 0.95, 20, response_tokens)
        cpu, start, samples, tokens = time.process_time(), time.perf_counter(), 0, 0
        for _, generations in engine.generate(shards(), sampling):
            samples += len(generations)
            tokens += sum(len(generation.token_ids) for generation in generations)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if (samples, tokens) != (prompts, prompts * response_tokens):
        raise RuntimeError(f"{samples} samples and {tokens} tokens came back, not {prompts} and {prompts * response_tokens}")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    figures = {"cpu_ms_per_request": 1000 * cpu / prompts, "requests_per_second": prompts / seconds}
    print(json.dumps(figures | {"peak_rss_mb": int(peak.split()[1]) / 1024}))


def _child(call: str) -> "subprocess.Popen[str]":
    """A process of this module that ends with this one."""
    environment = dict(os.environ) | {processes.PARENT: str(os.getpid())}
    return subprocess.Popen([sys.executable, "-c", _COMMAND.format(call)], stdout=subprocess.PIPE, text=True, env=environment)


def benchmark(
    *, prompts: int = 10_000, prompt_tokens: int = 1_000, response_tokens: int = 64, max_outstanding: int = 256, quiet: bool = False
) -> dict[str, float]:
    """cpu_ms_per_request, requests_per_second, peak_rss_mb (the whole process of the client) and what was asked for."""
    label = Weights(Path(), 0, "null").label
    with tempfile.TemporaryDirectory(prefix="trd-bench-client-") as folder:
        server = _child(f"serve({response_tokens}, {label!r})")
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            client = _child(f"measure({url!r}, {folder!r}, {prompts}, {prompt_tokens}, {response_tokens}, {max_outstanding})")
            try:
                output = client.communicate()[0]
            finally:
                client.kill()
            if client.returncode:
                raise RuntimeError(f"the client of the benchmark failed with exit code {client.returncode}")
        finally:
            server.kill()
            server.communicate()
    result: dict[str, float] = {"prompts": prompts, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens}
    result["max_outstanding"] = max_outstanding
    result |= json.loads(output.splitlines()[-1])
    if not quiet:
        print(f"{prompts} prompts of {prompt_tokens} tokens, responses of {response_tokens}, {max_outstanding} in flight, null server")
        print(f"CPU per request  {result['cpu_ms_per_request']:8.3f} ms")
        print(f"requests/s       {result['requests_per_second']:8.0f}")
        print(f"peak memory      {result['peak_rss_mb']:8.0f} MB", flush=True)
    return result
