"""Plain built-in values as JSON, and back: what crosses the wall between a program and its grader, and what tests are written in.

JSON's own values stand for themselves. What JSON cannot hold is an object with one key that begins with a dollar sign:

    {"$tuple": [...]}  {"$set": [...]}  {"$frozenset": [...]}  {"$bytes": "hex"}  {"$range": [start, stop, step]}
    {"$int": "0x..."} (beyond 64 bits)  {"$float": "inf" | "-inf" | "nan"}  {"$complex": [re, im]}
    {"$dict": [[key, value], ...]} (a dict with keys that are no strings or begin with a dollar sign)

An object of any other shape is a dict of its own. Nothing is evaluated and no class is looked up, so text from a hostile program
can be decoded. Imports only the standard library: the programs in the cage load this file by its path.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100  # of nested containers
MAX_ITEMS = 2_000_000  # values in one encoded value, containers included
MAX_MEMBERS = 20_000  # of all sets and dicts in one value together: numbers can be chosen so that building them takes quadratic time
MAX_COLLISIONS = 64  # members of a set, or keys of a dict, with one hash: numbers can be chosen so that a set takes for ever to build


class NotPlain(ValueError):
    """A value that has no plain form, or a text that is not the form of one; the message is one short line."""


def encode(value: Any) -> Any:
    """The JSON value (for json.dumps) that stands for a built-in value.

    Subclasses count as their built-in base; numpy's scalars and arrays as numbers and lists; a bytearray as bytes. Raises NotPlain
    for everything else, for more than MAX_DEPTH levels (so for a list that holds itself) and for more than MAX_ITEMS values.
    """
    return _Encoder().encode(value, 0)


class _Encoder:
    def __init__(self) -> None:
        self.items = 0

    def encode(self, value: Any, depth: int) -> Any:
        self.items += 1
        if self.items > MAX_ITEMS:
            raise NotPlain(f"a value with more than {MAX_ITEMS:,} parts")
        if depth > MAX_DEPTH:
            raise NotPlain(f"a value nested more than {MAX_DEPTH} deep")
        if value is None or value is True or value is False:
            return value
        if isinstance(value, int):
            number = int(value)
            return number if -(1 << 63) <= number < 1 << 63 else {"$int": hex(number)}
        if isinstance(value, float):
            real = float(value)
            return real if math.isfinite(real) else {"$float": str(real)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, complex):
            return {"$complex": [self.encode(value.real, depth + 1), self.encode(value.imag, depth + 1)]}
        if isinstance(value, bytes | bytearray):
            return {"$bytes": value.hex()}
        if isinstance(value, range):
            return {"$range": [self.encode(part, depth + 1) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, dict):
            return self._dict(value, depth)
        for kind, tag in ((list, ""), (tuple, "$tuple"), (set, "$set"), (frozenset, "$frozenset")):
            if isinstance(value, kind):
                parts = [self.encode(part, depth + 1) for part in value]
                return {tag: parts} if tag else parts
        if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
            return self.encode(value.tolist(), depth + 1)
        raise NotPlain(f"a value of type {type(value).__name__[:100]}, not a plain built-in value")

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(part, depth + 1) for key, part in value.items()}
        return {"$dict": [[self.encode(key, depth + 1), self.encode(part, depth + 1)] for key, part in value.items()]}


def decode(value: Any) -> Any:
    """The built-in value that a JSON value (from json.loads) stands for.

    The result holds exact built-in types alone. Raises NotPlain for a malformed tag, an unhashable key or member, and more than
    MAX_DEPTH levels, or more than MAX_MEMBERS members of sets and dicts (those with text keys do not count).
    """
    members, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            members += sum(len(part[tag]) for tag in ("$set", "$frozenset", "$dict") if isinstance(part.get(tag), list))
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    if members > MAX_MEMBERS:
        raise NotPlain(f"a value with more than {MAX_MEMBERS:,} members of sets and dicts")
    return _decode(value, 0)


def _decode(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise NotPlain(f"a value nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_decode(part, depth + 1) for part in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(tag, body)] = value.items()
        if tag in _TAGS:
            try:
                return _TAGS[tag](body, depth + 1)
            except (TypeError, ValueError, OverflowError, AttributeError) as error:  # of the wrong shape, or not hashable
                if isinstance(error, NotPlain):
                    raise
                raise NotPlain(f"a malformed {tag} in an encoded value") from None
    return {key: _decode(part, depth + 1) for key, part in value.items()}


def _parts(body: Any, depth: int) -> list[Any]:
    if not isinstance(body, list):
        raise ValueError("not a list")
    return [_decode(part, depth) for part in body]


def _int(body: Any, depth: int) -> int:
    if not isinstance(body, str):
        raise ValueError("not text")
    return int(body, 16)  # linear in its length, unlike decimal digits


def _float(body: Any, depth: int) -> float:
    return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[body] if body in ("inf", "-inf", "nan") else _refuse()


def plain_set(parts: Iterable[Any]) -> set[Any]:
    """set(parts), where they do not have their hashes in common. Raises NotPlain, TypeError."""
    parts = list(parts)
    if len(parts) > MAX_MEMBERS:
        raise NotPlain(f"a set or dict of more than {MAX_MEMBERS:,} members")
    counts = Counter(map(hash, parts))
    if counts and max(counts.values()) > MAX_COLLISIONS:
        different: dict[int, list[Any]] = {}
        for part in parts:
            same = different.setdefault(hash(part), [])
            if part not in same:
                same.append(part)
            if len(same) > MAX_COLLISIONS:
                raise NotPlain(f"a set or dict with more than {MAX_COLLISIONS} members of one hash")
    return set(parts)


def _refuse() -> Any:
    raise ValueError


def _complex(body: Any, depth: int) -> complex:
    real, imaginary = _parts(body, depth)
    return complex(real, imaginary)


def _range(body: Any, depth: int) -> range:
    return range(*_parts(body, depth)) if len(body) == 3 else _refuse()


def _dict(body: Any, depth: int) -> dict[Any, Any]:
    if not isinstance(body, list):
        raise ValueError("not a list")
    pairs = [(_decode(key, depth), _decode(part, depth)) for key, part in body]
    plain_set(key for key, _ in pairs)
    return dict(pairs)


_TAGS: dict[str, Any] = {
    "$tuple": lambda body, depth: tuple(_parts(body, depth)),
    "$set": lambda body, depth: plain_set(_parts(body, depth)),
    "$frozenset": lambda body, depth: frozenset(plain_set(_parts(body, depth))),
    "$bytes": lambda body, depth: bytes.fromhex(body),
    "$range": _range,
    "$int": _int,
    "$float": _float,
    "$complex": _complex,
    "$dict": _dict,
}
