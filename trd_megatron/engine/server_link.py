"""HTTP to one SGLang server or router: one exception per way in which it can go wrong, every answer bounded in size and time."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from trd_megatron.engine.answers import BadAnswerError, error_message, one_line
from trd_megatron.engine.base import API_KEY
from trd_megatron.errors import UserError

_KEEPALIVE_S = 2.0  # uvicorn closes an idle connection after 5 s; a request on one that is being closed would be lost


class UnreachableError(Exception):
    """No connection: refused, or none within the connect timeout. The request was not sent."""


class BrokenError(Exception):
    """The connection broke before the answer was whole."""


class SlowError(Exception):
    """No answer in time."""


class StatusError(Exception):
    """The server said no. reason: one line."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status_reason(status, body))
        self.status = status


LINK_ERRORS = (UnreachableError, BrokenError, SlowError, BadAnswerError)


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """The connections of all servers. Bounded by the requests in flight, not here. Nothing of the environment's proxies is used."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_headers_sent)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trace_configs=[trace],
    )


async def _headers_sent(session: aiohttp.ClientSession, context: Any, params: aiohttp.TraceRequestHeadersSentParams) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx()


class ServerLink:
    """One base URL."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, connect_timeout_s: float, read_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._session, self._connect_timeout_s, self._read_timeout_s = session, connect_timeout_s, read_timeout_s

    def beside(self, url: str) -> "ServerLink":
        """A link to another URL, over the same session."""
        return ServerLink(self._session, url, connect_timeout_s=self._connect_timeout_s, read_timeout_s=self._read_timeout_s)

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        limit: int,
        timeout_s: float,
        on_sent: Callable[[], None] | None = None,
    ) -> tuple[int, bytes]:
        """(status, body) of an answer of at most `limit` bytes.

        timeout_s counts from now, connecting included. Once the body began, its pieces must follow each other within the
        read timeout. on_sent: called once there is a connection and the request goes over it. Raises one of LINK_ERRORS.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_timeout_s)
        try:
            async with self._session.request(
                method, self.url + path, data=body, timeout=timeout, allow_redirects=False, trace_request_ctx=on_sent
            ) as response:
                return response.status, await self._body(response, limit)
        except aiohttp.ConnectionTimeoutError:
            raise UnreachableError(f"no connection within {self._connect_timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError(f"no connection: {one_line(error.strerror or str(error))}") from None
        except TimeoutError:
            raise SlowError(f"no answer within {timeout_s:g} s") from None
        except aiohttp.ClientResponseError as error:
            raise BadAnswerError(f"not HTTP: {one_line(error.message)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise BrokenError(f"the connection broke: {one_line(str(error)) or type(error).__name__}") from None

    async def _body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        if response.content.is_eof() and response.content.total_bytes <= limit:  # all of it came with the head: nothing to wait for
            return await response.content.read()
        loop = asyncio.get_running_loop()
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(None) as gap:
                while True:
                    gap.reschedule(loop.time() + self._read_timeout_s)
                    piece = await response.content.readany()
                    if not piece:
                        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
                    pieces.append(piece)
                    size += len(piece)
                    if size > limit:
                        response.close()  # what is left of it is not read
                        raise BadAnswerError(f"an answer of more than {limit} bytes")
        except TimeoutError:
            if gap.expired():
                raise SlowError(f"the answer stopped for {self._read_timeout_s:g} s") from None
            raise

    async def control(self, method: str, path: str, order: dict[str, Any] | None = None, *, timeout_s: float) -> tuple[int, bytes]:
        """(status, body) of what is no sample. Raises as `call` does, and UserError where the API key is refused."""
        body = None if order is None else json.dumps(order).encode()
        status, answer = await self.call(method, path, body, limit=1 << 20, timeout_s=timeout_s)
        if status in (401, 403):
            raise UserError(f"{self.url} refuses the API key ({status}): set {API_KEY} to the one it was started with")
        return status, answer


def status_reason(status: int, body: bytes) -> str:
    """One line about an answer that is an error."""
    return f"HTTP {status}: {error_message(body)}"
