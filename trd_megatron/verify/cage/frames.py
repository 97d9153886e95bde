"""Messages between the grader and the cage: a JSON object and raw bytes, each with its length before it."""

import json
import os
import struct
from collections.abc import Callable
from typing import Any

_HEAD = struct.Struct(">II")


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """The bytes of one message."""
    text = json.dumps(header).encode("ascii")
    return _HEAD.pack(len(text), len(body)) + text + body


def unpack(read: Callable[[int], bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None where the other side is gone. `read(n)` gives 1 to n bytes, or none at the end."""
    head = _exactly(read, _HEAD.size)
    if head is None:
        return None
    header_size, body_size = _HEAD.unpack(head)
    content = _exactly(read, header_size + body_size)
    return None if content is None else (json.loads(content[:header_size]), content[header_size:])


def _exactly(read: Callable[[int], bytes], size: int) -> bytes | None:
    parts = []
    while size:
        part = read(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(link: int, header: dict[str, Any], body: bytes = b"") -> None:
    """Writes one message to a file descriptor."""
    write(link, pack(header, body))


def write(descriptor: int, content: bytes) -> None:
    """Writes all of it."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(link: int) -> tuple[dict[str, Any], bytes] | None:
    """Waits for one message on a file descriptor."""
    return unpack(lambda size: os.read(link, size))
